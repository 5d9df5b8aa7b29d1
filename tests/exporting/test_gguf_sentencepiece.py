"""SentencePiece tokenizers in GGUF: llama.cpp gives the tokens of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from gguf_models import PROMPTS, assert_alike, save, sentencepiece_model
from llama_cpp_py_sync import Llama
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from trained import source_text

import secateur
from secateur.errors import ExportError
from secateur.exporting.gguf.tokenizer import SPACE, piece_scores, space_rules
from secateur.models.skeleton import quiet_transformers

TEXTS = (
    *PROMPTS,
    "x" + " " * 17 + "y\t\tz\r\n",
    "漢字 🙂 e\u0301",
    source_text(held_out=True)[:3000],
)
"""Also runs of spaces, characters without a piece, and code that the tokenizer has not seen."""


def llama_style(folder: Path) -> Any:
    """transformers' own class for Llama, from `tokenizer.model`."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True})
    )
    with quiet_transformers():
        return transformers.AutoTokenizer.from_pretrained(folder)


def as_stored(bare: Any, normalizer: Any, prefix: bool) -> Any:
    """The same pieces as older files store them: with a normaliser instead of Metaspace."""
    model = json.loads(bare.backend_tokenizer.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    inner = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    inner.normalizer = normalizer
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return llama_style(tmp_path_factory.mktemp("spm") / "t")


@pytest.fixture(scope="module")
def prefixed(llama: Any) -> Any:
    rules = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    return as_stored(llama, normalizers.Sequence(rules), prefix=True)


@pytest.fixture(scope="module")
def gemma(llama: Any) -> Any:
    """Without a prefix; runs of spaces and line ends are tokens of their own."""
    made = as_stored(llama, normalizers.Replace(" ", SPACE), prefix=False)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.add_tokens([AddedToken(word, normalized=False) for word in ("\n\n", "<table>")])
    made.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    return made


def tokens(file: Path, given: tuple[str, ...]) -> list[list[int]]:
    with Llama(str(file), n_ctx=64) as engine:
        return [list(engine.tokenize(x, add_special=True, parse_special=True)) for x in given]


@pytest.mark.parametrize("style", ["llama", "prefixed", "gemma"])
def test_llama_cpp_gives_the_same_tokens_and_texts(style, request, tmp_path: Path) -> None:
    tokenizer = request.getfixturevalue(style)
    source = save(tmp_path / "model", tokenizer, "gemma2" if style == "gemma" else "llama")
    found = secateur.export(source, output=tmp_path / "out", type="f32")
    file = tmp_path / "out" / found.files[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    alike = tuple(p for p in PROMPTS if style != "llama" or not p.startswith(" "))
    assert_alike(file, model, tokenizer, alike)
    given = tuple(x for x in TEXTS if style != "llama" or not x.startswith(" "))
    assert tokens(file, given) == [tokenizer(text)["input_ids"] for text in given]


def test_a_file_of_sentencepiece_itself_is_an_oracle(llama: Any, tmp_path: Path) -> None:
    """The tokens of SentencePiece's own library, for texts that begin with a space too."""
    source = save(tmp_path / "model", llama, "llama")
    found = secateur.export(source, output=tmp_path / "out", type="f32")
    oracle = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    theirs = tokens(tmp_path / "out" / found.files[0], TEXTS)
    assert [ids[1:] for ids in theirs] == [oracle.encode(text) for text in TEXTS]
    assert "space" in found.exported.notes[0]


def test_added_tokens_are_found_first(gemma: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "model", gemma, "gemma2")
    found = secateur.export(source, output=tmp_path / "out", type="f32")
    text = "a\n\n\n<table>x<end_of_turn>\n"
    assert tokens(tmp_path / "out" / found.files[0], (text,)) == [gemma(text)["input_ids"]]


KNOWN = {
    "type": "BPE",
    "byte_fallback": True,
    "vocab": {f"<0x{b:02X}>": b for b in range(256)} | {"a": 256, "b": 257, "ab": 258},
    "merges": [["a", "b"]],
}
FIRST = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ignore_merges": True}, "sets ignore_merges"),
        ({"vocab": {"a": 0}}, "the byte 0 has no token"),
        ({"merges": []}, "'a' and 'b' are never merged to 'ab'"),
        (
            {
                "vocab": {**KNOWN["vocab"], "aba": 259, "ba": 260},
                "merges": [["ab", "a"], ["a", "b"], ["b", "a"], ["a", "ba"]],
            },
            "'aba' do not stand together",
        ),
    ],
)
def test_merges_that_scores_cannot_express_are_refused(changes: dict[str, Any], said: str) -> None:
    assert piece_scores({"model": KNOWN}, set(), "t") == {"ab": 0.0}
    with pytest.raises(ExportError, match=said):
        piece_scores({"model": {**KNOWN, **changes}}, set(), "t")


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": {**FIRST, "split": True}},
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
    ],
)
def test_other_treatment_of_spaces_is_refused(changes: dict[str, Any]) -> None:
    known = {"normalizer": None, "pre_tokenizer": FIRST}
    prefixed, _ = space_rules(known, "t")
    assert prefixed
    with pytest.raises(ExportError, match="treats spaces by"):
        space_rules({**known, **changes}, "t")
