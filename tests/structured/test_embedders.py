"""Embedding models lose tokens: texts whose tokens all stay keep their embeddings."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from tiny import saved, tensors_of
from tokenizers_of_kinds import documents, save_tokenizer
from zoo import EMBEDDERS

import secateur
from secateur.errors import ArchitectureError, CheckpointError, RecipeError, VerificationError
from secateur.models.hub import FILES, IGNORED
from secateur.structured.embedders import least_similarity

HALF = documents()[:4]
"""The text that tokens are counted in."""

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 1200,
}  # fmt: skip
SAVED = "sentence_transformers.models."
SPECIAL = {"BertTokenizer": ("[PAD]", "[MASK]"), "Qwen2Tokenizer": ("<|endoftext|>", "<mask>")}
"""Tokens for padding and for masked words, which these classes add where they are missing."""

PROMPTS = {"query": "Instruct: find texts that answer the quick brown fox. Query: ", "document": ""}

PIPELINES = [form for form in EMBEDDERS if EMBEDDERS[form][-1]]
HEADS = [form for form in EMBEDDERS if "head" in form]


def embedder(folder: Path, form: str, **settings: Any) -> Path:
    """A tiny embedding model as one of its family is stored."""
    name, kind, own, tokenizer_class, modules = EMBEDDERS[form]
    tokenizer = save_tokenizer(folder, kind)
    pad, mask = SPECIAL.get(tokenizer_class, ("<pad>", "<mask>"))
    tokenizer.add_special_tokens({"pad_token": pad, "mask_token": mask})
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    content = {**json.loads(file.read_text()), "tokenizer_class": tokenizer_class}
    file.write_text(json.dumps(content))
    model_class = getattr(t, name)
    ids = {f"{x}_token_id": i for x, i in (("pad", 0), ("bos", 1), ("eos", 2), ("cls", 1))}
    ids |= {"sep_token_id": 2, "vocab_size": len(tokenizer) + 3}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**SIZES, **ids, **own, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    saved(model, folder)
    if form == "Qwen3-Embedding":  # stored without the head and without the decoder's name
        inner = {n.removeprefix("model."): x for n, x in tensors_of(folder).items()}
        inner.pop("lm_head.weight", None)
        save_file(inner, folder / "model.safetensors", metadata={"format": "pt"})
    pipeline(folder, modules)
    return folder


def pipeline(folder: Path, modules: tuple[str, ...]) -> None:
    """Write the further modules as sentence-transformers does."""
    if not modules:
        return
    listed = [{"idx": 0, "name": "0", "path": "", "type": f"{SAVED}Transformer"}]
    contents: dict[str, dict[str, Any]] = {
        "Pooling": {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        "Dense": {"in_features": 32, "out_features": 32, "bias": False,
                  "activation_function": "torch.nn.modules.linear.Identity"},
        "Normalize": {},
    }  # fmt: skip
    for place, kind in enumerate(modules, start=1):
        path = f"{place}_{kind}"
        listed.append({"idx": place, "name": str(place), "path": path, "type": SAVED + kind})
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(contents[kind]))
        if kind == "Dense":
            save_file({"linear.weight": torch.randn(32, 32)}, folder / path / "model.safetensors")
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": PROMPTS}))


def trim(source: Path, output: Path, **options: Any) -> Any:
    """Trim the vocabulary by the first texts."""
    text = output.parent / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": x}) for x in HALF), encoding="utf-8")
    return secateur.structure(source, output=output, **{"vocabulary": text, **options})


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Any]]:
    """A tiny embedding model, the same trimmed by the first texts, and the result."""

    @functools.cache
    def made(form: str) -> tuple[Path, Path, Any]:
        place = tmp_path_factory.mktemp("embedder")
        source = embedder(place / "m", form)
        return source, place / "out", trim(source, place / "out")

    return made


def new_ids(source: Path, output: Path) -> tuple[Any, Any, dict[int, int]]:
    """Both tokenizers, and the new ids of the tokens that stay by their old ones."""
    old, new = (t.AutoTokenizer.from_pretrained(folder) for folder in (source, output))
    return old, new, {old.convert_tokens_to_ids(x): n for x, n in new.get_vocab().items()}


@pytest.mark.parametrize("form", EMBEDDERS)
def test_texts_keep_their_hidden_states(form: str, trimmed) -> None:
    source, output, made = trimmed(form)
    old, new, number = new_ids(source, output)
    before, after = (t.AutoModel.from_pretrained(x).eval() for x in (source, output))
    rows = after.get_input_embeddings().num_embeddings
    assert rows == len(new) == after.config.vocab_size < 0.97 * before.config.vocab_size
    for text in HALF:
        ids = old(text, return_tensors="pt").input_ids
        assert [number[x] for x in ids[0].tolist()] == new(text).input_ids
        with torch.no_grad():
            states = [
                model(tokenizer(text, return_tensors="pt").input_ids).last_hidden_state
                for model, tokenizer in ((before, old), (after, new))
            ]
        torch.testing.assert_close(*states, rtol=0, atol=1e-5)
    step = made.structure.steps[0]
    assert step["similarity"] == pytest.approx(1, abs=1e-9)
    parameters = sum(x.numel() for x in tensors_of(output).values())
    assert made.structure.after.parameters == parameters
    assert made.structure.before.decoder == made.structure.after.decoder > 0


@pytest.mark.parametrize("form", EMBEDDERS)
def test_all_but_tables_is_the_source(form: str, trimmed) -> None:
    source, output, _ = trimmed(form)
    before, after = tensors_of(source), tensors_of(output)
    *_, number = new_ids(source, output)
    kept = sorted(number, key=number.__getitem__)
    rows = t.AutoConfig.from_pretrained(source).vocab_size
    assert before.keys() == after.keys()
    tables = [name for name, tensor in before.items() if tensor.shape[:1] == (rows,)]
    assert len(tables) == 1 + (form in HEADS)  # the head is tied, its bias is not
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor[kept] if name in tables else tensor), name
    for file in (*source.glob("*_*/*"), *source.glob("*modules.json"), *source.glob("sent*")):
        assert (output / file.relative_to(source)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("form", HEADS)
def test_a_head_for_words_loses_the_same_rows(form: str, trimmed) -> None:
    source, output, _ = trimmed(form)
    old, new, number = new_ids(source, output)
    models = [t.AutoModelForMaskedLM.from_pretrained(x).eval() for x in (source, output)]
    kept = sorted(number, key=number.__getitem__)
    with torch.no_grad():
        before, after = (
            model(tokenizer(HALF[0], return_tensors="pt").input_ids).logits
            for model, tokenizer in zip(models, (old, new), strict=True)
        )
    torch.testing.assert_close(before[..., kept], after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", PIPELINES)
def test_sentence_transformers_loads_the_folder(form: str, trimmed) -> None:
    name = "sentence_transformers"
    library = pytest.importorskip(name, reason="pip install sentence-transformers")
    source, output, _ = trimmed(form)
    before, after = (
        library.SentenceTransformer(str(x), device="cpu").encode(HALF, convert_to_tensor=True)
        for x in (source, output)
    )
    assert before.shape == (len(HALF), 32)
    assert float(torch.cosine_similarity(before, after).min()) >= 1 - 1e-5


@pytest.mark.parametrize("form", PIPELINES)
def test_tokens_of_prompts_stay(form: str, trimmed) -> None:
    source, output, _ = trimmed(form)
    old, new, number = new_ids(source, output)
    ids = old(PROMPTS["query"]).input_ids
    assert [number.get(x) for x in ids] == new(PROMPTS["query"]).input_ids
    assert {*ids} - {x for text in HALF for x in old(text).input_ids}


def test_modules_of_embedding_models_are_fetched() -> None:
    names = ["1_Pooling/config.json", "2_Dense/model.safetensors", "modules.json"]
    others = ["onnx/config.json", "openvino/x.json", "original/1_a/x.json", "2_Dense/x.bin"]
    found = filter_repo_objects([*names, *others], allow_patterns=FILES, ignore_patterns=IGNORED)
    assert [*found] == names


def test_models_of_few_positions_are_compared(tmp_path: Path) -> None:
    source = embedder(tmp_path / "m", "XLM-R with a head", max_position_embeddings=30)
    made = trim(source, tmp_path / "out")
    assert made.structure.steps[0]["similarity"] == pytest.approx(1, abs=1e-9)


def test_an_embedding_that_changed_is_refused(trimmed, tmp_path: Path) -> None:
    source, output, _ = trimmed("mBERT")
    old, _, number = new_ids(source, output)
    ids = old(HALF)["input_ids"]
    assert least_similarity(source, output, ids, number) == pytest.approx(1, abs=1e-9)
    changed = {old: new for new, old in enumerate(sorted(number, reverse=True))}
    with pytest.raises(VerificationError, match="cosine"):
        least_similarity(source, output, ids, changed)


def test_positions_are_counted_from_the_same_id(tmp_path: Path) -> None:
    """In RoBERTa from the id of padding on. So no id before it leaves."""
    source = embedder(tmp_path / "m", "XLM-R", pad_token_id=40)
    made = trim(source, tmp_path / "out")
    assert made.structure.steps[0]["similarity"] == pytest.approx(1, abs=1e-9)
    assert t.AutoConfig.from_pretrained(tmp_path / "out").pad_token_id == 40


@pytest.mark.parametrize(
    "options", [{"keep_layers": 1}, {"ffn": 0.5}, {"distill_epochs": 1}, {"must_keep": "loops:0.1"}]
)
@pytest.mark.parametrize("form", ["Qwen3-Embedding", "BERT with a head"])
def test_nothing_else_is_cut(form: str, options: dict[str, Any], trimmed, tmp_path: Path) -> None:
    source, *_ = trimmed(form)
    with pytest.raises(RecipeError, match=next(iter(options)).replace("_", ".")):
        trim(source, tmp_path / "out", **options)


@pytest.mark.parametrize("form", EMBEDDERS)
def test_embedding_models_are_not_pruned(form: str, trimmed, tmp_path: Path) -> None:
    source, *_ = trimmed(form)
    with pytest.raises(ArchitectureError, match="only tokens"):
        secateur.prune(source, output=tmp_path / "out", sparsity=0.5, method="magnitude")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ([{"path": "", "type": "Transformer"}, {"path": "1", "type": "SpladePooling"}], None),
        ([{"path": "1", "type": "Transformer"}], None),
        ([{"path": "", "type": "Transformer"}, {"path": "../x", "type": "Dense"}], "folder"),
        ([{"path": ""}], "modules"),
        ({"a": 1}, "modules"),
    ],
)
def test_other_modules_are_refused(change: Any, error: str | None, tmp_path: Path) -> None:
    source = embedder(tmp_path / "m", "mBERT")
    (source / "modules.json").write_text(json.dumps(change))
    with pytest.raises(CheckpointError if error else ArchitectureError, match=error or "module"):
        trim(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"prompts": [1]}'])
def test_damaged_prompts_are_refused(content: str, tmp_path: Path) -> None:
    source = embedder(tmp_path / "m", "mBERT")
    (source / "config_sentence_transformers.json").write_text(content)
    with pytest.raises(CheckpointError, match="prompts"):
        trim(source, tmp_path / "out")


def test_a_model_in_a_folder_within_is_named(tmp_path: Path) -> None:
    embedder(tmp_path / "m" / "0_Transformer", "BERT with a head")
    (tmp_path / "m" / "modules.json").write_text("[]")
    with pytest.raises(CheckpointError, match="0_Transformer"):
        trim(tmp_path / "m", tmp_path / "out")


def test_a_plan_shows_the_model(trimmed) -> None:
    source, *_ = trimmed("mBERT")
    plan = secateur.structure(source, vocabulary_size=400, dry_run=True)
    assert plan.steps == ("vocabulary",)
    assert plan.before.parameters == sum(
        x.numel() for x in load_file(source / "model.safetensors").values()
    )
