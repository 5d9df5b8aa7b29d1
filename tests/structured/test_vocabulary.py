"""Vocabulary trimming: the same pieces, the same logits, and every text can still be encoded."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from same_logits import assert_same_logits
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny
from tokenizers_of_kinds import documents, random_texts, save_tokenizer
from transformers import AutoTokenizer
from weight_files import digest

import secateur
from secateur.errors import ArchitectureError, CheckpointError, RecipeError, SecateurError
from secateur.structured.token_pieces import pieces_of
from secateur.structured.vocabulary import Vocabulary

BYTES = ("byte-level", "llama 3", "characters", "unigram")
KINDS = (*BYTES, "unigram of letters", "clip", "bert", "words")
HALF = documents()[:4]
"""The text that tokens are counted in."""


def model_with(folder: Path, kind: str, family: str = "llama", **sizes: Any) -> Path:
    """A tiny model with a real tokenizer."""
    tokenizer = save_tokenizer(folder, kind)
    rows = len(tokenizer) + 3  # some that no token uses, as in Qwen
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
           for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<unk>"))}  # fmt: skip
    save_tiny(folder, family, tokenizer=False, vocab_size=rows, **ids, **sizes)
    return folder


def text_of(place: Path, texts: list[str]) -> Path:
    """A JSONL file of texts."""
    file = place / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in texts), encoding="utf-8")
    return file


def loaded(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer, by plain transformers."""
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


def trim(source: Path, output: Path, **options: Any) -> Any:
    """Trim the vocabulary by the first texts."""
    text = text_of(output.parent, HALF)
    return secateur.structure(source, output=output, vocabulary=text, **options)


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Any]]:
    """A model with a kind of tokenizer, the same trimmed by the first texts, and the result."""

    @functools.cache
    def made(kind: str) -> tuple[Path, Path, Any]:
        place = tmp_path_factory.mktemp("trimmed")
        source = model_with(place / "m", kind, tie_word_embeddings=kind != "unigram")
        return source, place / "out", trim(source, place / "out")

    return made


@pytest.mark.parametrize("kind", KINDS)
def test_texts_become_the_same_pieces_with_the_same_logits(kind: str, trimmed) -> None:
    source, output, made = trimmed(kind)
    model, tokenizer = loaded(source)
    small, cut = loaded(output)
    step = made.manifest.structure.steps[0]
    rows = small.get_input_embeddings().num_embeddings
    assert (step["tokens_before"], step["tokens_after"]) == (model.config.vocab_size, rows)
    assert rows < 0.97 * model.config.vocab_size
    assert rows == small.config.vocab_size == len(cut)
    for text in HALF:
        assert tokenizer.tokenize(text) == cut.tokenize(text)
    old = [tokenizer.convert_tokens_to_ids(cut.convert_ids_to_tokens(n)) for n in range(rows)]
    assert old == sorted(set(old))
    before, after = (t(HALF[0], return_tensors="pt").input_ids[:, :60] for t in (tokenizer, cut))
    assert_same_logits(model(before).logits[..., old], small(after).logits)
    for name in ("bos", "eos", "unk"):
        assert getattr(cut, f"{name}_token") == getattr(tokenizer, f"{name}_token")
    for config in (small.config, small.generation_config):
        assert config.bos_token_id == cut.bos_token_id
        assert config.eos_token_id == cut.eos_token_id
    assert small.config.pad_token_id == cut.convert_tokens_to_ids("<unk>")


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_can_still_be_encoded(kind: str, count: int, trimmed) -> None:
    source, output, _ = trimmed(kind)
    tokenizer, cut = (AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    texts = [*documents(), *random_texts(count)]
    options: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    uncut, ids = (x(texts, add_special_tokens=False)["input_ids"] for x in (tokenizer, cut))
    assert max(max(row, default=0) for row in ids) < len(cut)
    if kind != "words":  # those that leave become unknown
        assert cut.batch_decode(ids, **options) == tokenizer.batch_decode(uncut, **options)
    if kind in ("byte-level", "llama 3"):
        assert cut.batch_decode(ids, **options) == texts
    # Unknown words stay unknown, and words whose tokens all stay keep them.
    words = [word for text in texts for word in text.split()]
    uncut, ids = (x(words, add_special_tokens=False)["input_ids"] for x in (tokenizer, cut))
    new = {tokenizer.convert_tokens_to_ids(token): n for token, n in cut.get_vocab().items()}
    whole = [(a, b) for a, b in zip(uncut, ids, strict=True) if new.keys() >= {*a}]
    assert all([new[token] for token in before] == after for before, after in whole)
    unknown = sum(tokenizer.unk_token_id in before for before, _ in whole)
    assert unknown > 50 or kind in (*BYTES, "clip")
    assert len(whole) > 0.5 * len(words)


def test_a_size_keeps_the_most_frequent_tokens(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", "byte-level")
    made = trim(source, tmp_path / "out", vocabulary_size=420)
    _, tokenizer = loaded(source)
    small, cut = loaded(tmp_path / "out")
    assert small.config.vocab_size == 420 == len(cut)
    counts = Counter(token for text in HALF for token in tokenizer.tokenize(text))
    whole, stayed = set(cut.get_vocab()), 0
    for token, _ in counts.most_common():
        if token not in whole:
            break
        stayed += 1
    assert stayed > 60
    covered = sum(n for token, n in counts.items() if token in whole) / sum(counts.values())
    assert made.manifest.structure.steps[0]["covered"] == pytest.approx(covered)
    same = [t for t in HALF if set(tokenizer.tokenize(t)) <= whole]
    notes = json.loads((tmp_path / "out" / "secateur" / "steps.json").read_text())
    assert notes[0]["same_documents"] == len(same)
    assert cut.decode(cut("parser add_argument").input_ids) == "parser add_argument"
    assert made.manifest.structure.latency["milliseconds_after"] > 0


def test_copies_of_the_tables_lose_the_same_rows(tmp_path: Path) -> None:
    """Layers that predict several tokens have an embedding and a head of their own."""
    source = model_with(tmp_path / "m", "byte-level", num_nextn_predict_layers=1)
    file = source / "model.safetensors"
    tensors = load_file(file)
    rows, columns = tensors["model.embed_tokens.weight"].shape
    copies = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")
    others = {"model.layers.3.eh_proj.weight": rows, "model.layers.3.head.weight": rows + 1}
    for name, size in (dict.fromkeys(copies, rows) | others).items():
        tensors[name] = torch.randn(size, columns)
    save_file(tensors, file, metadata={"format": "pt"})
    trim(source, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    tokenizer, cut = (AutoTokenizer.from_pretrained(x) for x in (source, tmp_path / "out"))
    kept = tokenizer.convert_tokens_to_ids(cut.convert_ids_to_tokens(range(len(cut))))
    assert len(kept) < rows
    for name in ("model.embed_tokens.weight", *copies):
        assert torch.equal(after[name], tensors[name][kept]), name
    assert all(torch.equal(after[name], tensors[name]) for name in others)


def test_too_small_a_size_is_refused(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", "byte-level")
    with pytest.raises(RecipeError, match="259 tokens") as caught:
        trim(source, tmp_path / "out", vocabulary_size=200)
    assert "at least 259" in str(caught.value)
    with pytest.raises(RecipeError, match="keeps 5000"):
        trim(source, tmp_path / "out2", vocabulary_size=5000)


def test_a_size_may_be_a_share_or_bytes_and_a_multiple(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", "byte-level", tie_word_embeddings=False)
    text = text_of(tmp_path, HALF)
    vocabulary = Vocabulary.counted(source, str(text))
    shares, rows = vocabulary.shares, vocabulary.rows
    assert sum(shares.values()) == pytest.approx(1)
    for share in (0.5, 0.1, 0.01):
        kept = vocabulary.kept(share)
        lost = sum(x for token, x in shares.items() if token not in kept)
        fewer = [token for token in kept if token in shares and token not in vocabulary.always]
        rarest = min(fewer, key=lambda token: shares[token], default=None)
        assert lost <= share < (1 if rarest is None else lost + 2 * shares[rarest] + 1e-9) + share
    each = vocabulary.saved_bytes(range(1, rows))
    assert each == 2 * 4 * 32  # a row of the embedding and one of the head
    whole = (source / "model.safetensors").stat().st_size
    fits = vocabulary.kept(f"{whole - 200 * each}B")
    assert rows - 202 <= len(fits) <= rows - 200
    for size in (None, 400, 0.2, f"{whole - 200 * each}B"):
        some = vocabulary.kept(size, 64)
        assert len(some) % 64 == 0
        assert not isinstance(size, int) or len(some) == 384
    assert {*vocabulary.kept()} <= {*vocabulary.kept(None, 64)}


def test_files_have_no_more_bytes_than_asked(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", "byte-level")
    limit = (source / "model.safetensors").stat().st_size - 20_000
    trim(source, tmp_path / "out", vocabulary_size=f"{limit}B")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert limit - 2 * 4 * 32 - 128 < size <= limit
    for size in ("1kB", "1GiB"):
        with pytest.raises(RecipeError, match="without any token"):
            trim(source, tmp_path / "never", vocabulary_size=size)


def test_weights_say_how_much_each_text_counts(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", "byte-level")
    names = []
    for name, text in (("one", "parser " * 400), ("two", "wrapped lines " * 5)):
        names.append(tmp_path / f"{name}.txt")
        names[-1].write_text(text, encoding="utf-8")
    made = secateur.structure(
        source, output=tmp_path / "out", vocabulary=f"{names[0]}=1,{names[1]}=3", multiple=64
    )
    step = made.manifest.structure.steps[0]
    assert [text["weight"] for text in step["texts"]] == [1, 3]
    assert [text["covered"] for text in step["texts"]] == [1, 1] == [step["covered"]] * 2
    assert step["tokens_after"] % 64 == 0  # which 48 neurons, that stay, are not
    vocabulary = Vocabulary.counted(source, f"{names[0]}=1,{names[1]}=3")
    tokenizer = AutoTokenizer.from_pretrained(source)
    one, two = (Counter(tokenizer(x.read_text()).input_ids) for x in names)
    for token, share in vocabulary.shares.items():
        expected = one[token] / one.total() / 4 + 3 * two[token] / two.total() / 4
        assert share == pytest.approx(expected)


@pytest.mark.parametrize("size", [0, -3, 1.0, 0.0, "12345", "0B", "2 furlongs", True])
def test_sizes_that_mean_nothing_are_refused(size: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="vocabulary_size"):
        secateur.structure("x", output=tmp_path / "out", vocabulary="t", vocabulary_size=size)


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", "byte-level")
    (tmp_path / "none.jsonl").write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(SecateurError, match=r"none\.jsonl"):
        secateur.structure(source, output=tmp_path / "out", vocabulary=str(tmp_path / "none.jsonl"))
    assert not (tmp_path / "out").exists()


def merged(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """BPE from the paper: apply the first merge of the list that is possible, again and again."""
    parts = list(word)
    while True:
        for pair in merges:
            places = [n for n in range(len(parts) - 1) if (parts[n], parts[n + 1]) == pair]
            if places:
                parts[places[0] : places[0] + 2] = ["".join(pair)]
                break
        else:
            return parts


def test_merges_stay_closed_and_in_order(trimmed) -> None:
    source, output, _ = trimmed("byte-level")
    before, after = (
        json.loads((folder / "tokenizer.json").read_text())["model"] for folder in (source, output)
    )
    old, new = ([tuple(pair) for pair in model["merges"]] for model in (before, after))
    assert new == [pair for pair in old if {*pair, "".join(pair)} <= after["vocab"].keys()]
    assert len(new) < len(old)
    pieces = pieces_of(json.loads((source / "tokenizer.json").read_text()), "here")
    for token in after["vocab"]:
        if merged(token, old) == [token]:
            assert merged(token, new) == [token]
            assert pieces.parts_of(token) <= after["vocab"].keys()


def test_added_tokens_stay_if_something_mentions_them(trimmed) -> None:
    _, output, _ = trimmed("llama 3")
    cut = AutoTokenizer.from_pretrained(output)
    assert "<tool>" in cut.get_vocab()
    assert "<unused0>" not in cut.get_vocab()
    assert cut("x").input_ids[0] == cut.bos_token_id
    assert [*cut.get_added_vocab().values()] == [*range(len(cut) - 4, len(cut))]


def test_other_cuts_see_the_smaller_model(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", "byte-level")
    options: dict[str, Any] = {
        "keep_layers": 2, "ffn": 32, "windows": 3, "sequence_length": 24, "effort": "fast",
        "calibration": text_of(tmp_path, HALF), "distill_epochs": 1,
    }  # fmt: skip
    made = trim(source, tmp_path / "out", **options)
    small, cut = loaded(tmp_path / "out")
    record = made.manifest.structure
    assert [step["step"] for step in record.steps] == ["vocabulary", "depth", "width"]
    assert record.after.parameters == sum(p.numel() for p in small.parameters())
    assert record.before.embeddings > record.after.embeddings
    assert small.config.vocab_size == len(cut)
    assert small(cut("x", return_tensors="pt").input_ids).logits.isfinite().all()


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    source = model_with(tmp_path / "m", "byte-level")
    options: dict[str, Any] = {
        "keep_layers": 2, "windows": 3, "sequence_length": 24, "effort": "fast",
        "calibration": text_of(tmp_path, HALF),
    }  # fmt: skip
    trim(source, tmp_path / "whole", **options)
    stages = {"counting tokens": 1, "cutting": 1, "checking tokens": 1, "copying": 0}
    for label, steps in stages.items():
        output = tmp_path / label
        with pytest.raises(StoppedError):
            trim(source, output, progress=StopAt(label, steps), **options)
        assert not output.exists()
        trim(source, output, resume=True, **options)
        assert digest(output) == digest(tmp_path / "whole")
        for name in ("tokenizer.json", "config.json"):
            assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_cannot_be_trimmed_is_refused(tmp_path: Path) -> None:
    words = save_tiny(tmp_path / "words", "llama")
    file = words / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["unk_token"] = "none"
    file.write_text(json.dumps(content))
    with pytest.raises(ArchitectureError, match="WordLevel"):
        trim(words, tmp_path / "out")
    (words / "tokenizer.json").unlink()
    with pytest.raises(ArchitectureError, match=r"no.*|has none"):
        trim(words, tmp_path / "out")
    source = model_with(tmp_path / "m", "byte-level")
    with pytest.raises(RecipeError, match="windows"):
        secateur.structure(source, output=tmp_path / "out", vocabulary="x.safetensors")
    with pytest.raises(RecipeError, match="windows"):
        trim(source, tmp_path / "out", keep_layers=2, calibration="x.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "model",
    [
        None,
        {"type": "BPE", "vocab": {"a": 0}},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]},
        {"type": "Unigram", "vocab": {"a": 1}, "unk_id": 0},
        {"type": "BPE", "vocab": [1], "merges": []},
    ],
)
def test_damaged_tokenizers_are_refused(model: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        pieces_of({"model": model}, "here").always()


def test_affixes_are_refused_by_name() -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": [], "continuing_subword_prefix": "@"}
    with pytest.raises(ArchitectureError, match="continuing_subword_prefix"):
        pieces_of({"model": model}, "here")
