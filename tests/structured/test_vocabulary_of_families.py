"""Tables of tokens of every kind lose the rows of the same tokens, and logits stay.

Tables are those of `zoo.TRIMMED`, copies in layers that predict further tokens, and integers,
float8 and 4-bit numbers whose rows stand alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from at_rest import describe_as, raw, stored_tensors, to_float4, to_float8
from further import FORMS, save_further
from safetensors.torch import save_file
from same_logits import assert_same_logits
from tiny import saved
from tokenizers import Tokenizer
from tokenizers_of_kinds import documents, save_tokenizer
from torch import Tensor, nn
from transformers.models.gemma3n import modeling_gemma3n
from zoo import TRIMMED, class_of, config_of, with_routes

import secateur
from secateur.errors import ArchitectureError
from secateur.models.architecture import text_config
from secateur.models.opening import open_weights
from secateur.structured.vocabulary import _completed

TEXTS = documents()[:3]
LATE = 8
"""Ids of pictures or sounds behind the tokens of the tokenizer."""


def save_family(folder: Path, family: str, late: int = 3, **changes: Any) -> Path:
    """A tiny model with a real tokenizer and ids of pictures in its configuration."""
    tokenizer = save_tokenizer(folder, "byte-level")
    config, words = config_of(family), len(tokenizer)
    text = text_config(config)
    text.vocab_size = words + late
    for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<unk>")):
        for part in (config, text):
            setattr(part, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    if hasattr(text, "vocab_size_per_layer_input"):
        text.vocab_size_per_layer_input = words  # ids behind it read the first row
    for name in ("image", "boi", "eoi"):
        for key in (f"{name}_token_id", f"{name}_token_index"):
            if key in config.to_dict():
                setattr(config, key, words if late else words - 1)
    if family == "gemma3n vision":
        for part, start in ((config.vision_config, words), (config.audio_config, words + LATE)):
            part.vocab_offset, part.vocab_size = start, LATE
        config.image_token_id, config.audio_token_id = words + 1, words + LATE + 1
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return saved(with_routes(class_of(config).from_config(config)), folder)


def loaded(folder: Path) -> Any:
    """The model, by plain transformers."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return class_of(config).from_pretrained(folder).eval()


def trimmed(source: Path, output: Path, **options: Any) -> Any:
    """Trim by the first texts."""
    text = output.parent / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": x}) for x in TEXTS), encoding="utf-8")
    return secateur.structure(source, output=output, vocabulary=text, **options)


def kept_of(source: Path, output: Path) -> list[int]:
    """The old ids of the tokens that stay, then those of pictures and sounds."""
    old, new = (
        Tokenizer.from_file(str(x / "tokenizer.json")).get_vocab() for x in (source, output)
    )
    config = transformers.AutoConfig.from_pretrained(output)
    late = text_config(config).vocab_size - len(new)
    found = [old[token] for token in sorted(new, key=lambda token: new[token])]
    assert found == sorted(found)
    return [*found, *range(len(old), len(old) + late)]


class _Tower(nn.Module):
    """Stands for a tower that needs timm."""


SLOW = ("gemma2", "granite", "opt", "mistral3", "llama4", "gemma3n_text", "gemma4_text small")
"""Families that have no kind of table of their own."""


@pytest.mark.parametrize(
    "family", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in TRIMMED]
)
def test_texts_keep_their_tokens_and_these_their_logits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "gemma3n vision":
        original = modeling_gemma3n.AutoModel.from_config
        monkeypatch.setattr(
            modeling_gemma3n.AutoModel,
            "from_config",
            lambda config: original(config) if "text" in config.model_type else _Tower(),
        )
    late = 2 * LATE if family == "gemma3n vision" else 3
    source = save_family(tmp_path / "m", family, late)
    made = trimmed(source, tmp_path / "out")
    old, new = (transformers.AutoTokenizer.from_pretrained(x) for x in (source, tmp_path / "out"))
    for text in TEXTS:
        assert old.tokenize(text) == new.tokenize(text)
    kept = kept_of(source, tmp_path / "out")
    small = loaded(tmp_path / "out")
    assert small.get_input_embeddings().num_embeddings == len(kept) < 650
    ids = old(TEXTS[0], return_tensors="pt").input_ids[:, :40]
    if family == "gemma3n vision":  # ids of pictures and sounds: from embeddings of their own
        assert kept[-2 * LATE :] == [*range(len(old), len(old) + 2 * LATE)]
        ids = torch.cat([ids, torch.tensor([kept[-2 * LATE :]])], dim=1)
    whole = loaded(source)
    with torch.no_grad():
        before = whole(ids).logits[..., kept]
        after = small(torch.searchsorted(torch.tensor(kept), ids)).logits
    assert_same_logits(after, before)
    found = made.manifest.structure.steps[0]["among_kept"]
    assert found["apart"] < 1e-5
    assert found["trimmed"] == pytest.approx(found["uncut_among_kept"], abs=1e-5)
    rows = (len(old), whole.get_input_embeddings().num_embeddings)
    stored, written = stored_tensors(source), stored_tensors(tmp_path / "out")
    others = [name for name, tensor in stored.items() if len(tensor) not in rows]
    assert others
    assert all(torch.equal(raw(stored[name]), raw(written[name])) for name in others)


def test_a_model_that_reads_no_text_alone_is_trimmed_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers 5.24 runs Llama 4 only with a picture."""
    source = save_family(tmp_path / "m", "llama4 vision")
    made = trimmed(source, tmp_path / "out")
    kept, tables = kept_of(source, tmp_path / "out"), 0
    assert made.manifest.structure.steps[0]["among_kept"] == {}
    assert "not compared" in caplog.text
    written = stored_tensors(tmp_path / "out")
    for name, tensor in stored_tensors(source).items():
        table = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        assert torch.equal(tensor[kept] if table else tensor, written[name]), name
        tables += table
    assert tables == 2
    assert loaded(tmp_path / "out").config.image_token_index == kept.index(source_words(source))


def source_words(folder: Path) -> int:
    """The number of tokens of a tokenizer: the first id behind them is that of pictures."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()


def of_integers(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """A table in integers with a scale for each row, of 4 bits packed eight in a word."""
    scale = weight.float().abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = (weight.float() / scale).round().to(torch.int32)
    shape = {"weight_shape": torch.tensor(weight.shape), "weight_scale": scale.bfloat16()}
    if bits == 8:
        return {"weight": codes.to(torch.int8), "weight_scale": scale.bfloat16()}
    words = ((codes + 8).unflatten(1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
    return {"weight_packed": words.to(torch.int32), **shape}


def of_float8(weight: Tensor, rows: int) -> dict[str, Tensor]:
    """A table in float8 with a scale for so many rows."""
    codes, scales = to_float8(weight, (rows, weight.shape[1]))
    return {"weight": codes, "weight_scale": scales.bfloat16()}


def of_float4(weight: Tensor) -> dict[str, Tensor]:
    """A table in NVFP4."""
    pairs, scales, whole = to_float4(weight, 16)
    parts = {"weight_packed": pairs, "weight_scale": scales}
    return {**parts, "weight_global_scale": 1 / whole.reshape(1)}


FEWER_BITS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], int]] = {
    "int8": (lambda weight: of_integers(weight, 8), 8),
    "int4": (lambda weight: of_integers(weight, 4), 4),
    "float8 by rows": (lambda weight: of_float8(weight, 1), 8),
    "float8 as a whole": (lambda weight: of_float8(weight, len(weight)), 8),
    "float4": (of_float4, 4),
}
"""How compressed-tensors stores embedding and head, and its bits."""


def save_in_bits(folder: Path, form: Callable[[Tensor], dict[str, Tensor]], bits: int) -> Path:
    """A tiny model whose embedding and head are stored in fewer bits."""
    save_family(folder, "llama", tie_word_embeddings=False, dtype=torch.bfloat16)
    tensors = {name: x.bfloat16() for name, x in stored_tensors(folder).items()}
    for owner in ("model.embed_tokens", "lm_head"):
        weight = tensors.pop(f"{owner}.weight")
        tensors |= {f"{owner}.{role}": part for role, part in form(weight).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    group = {"targets": ["Linear", "Embedding"], "weights": {"num_bits": bits}}
    describe_as(folder, {"quant_method": "compressed-tensors", "config_groups": {"a": group}})
    return folder


@pytest.mark.parametrize("name", FEWER_BITS)
def test_tables_in_fewer_bits_keep_the_bytes_of_rows(name: str, tmp_path: Path) -> None:
    source = save_in_bits(tmp_path / "m", *FEWER_BITS[name])
    made = trimmed(source, tmp_path / "out")
    kept = kept_of(source, tmp_path / "out")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    rows = before["lm_head.weight_packed" if "4" in name else "lm_head.weight"].shape[0]
    for part, tensor in before.items():
        if part.endswith("weight_shape"):
            assert after[part].tolist() == [len(kept), tensor[1]]
        else:
            own = tensor[kept] if tensor.shape[:1] == (rows,) else tensor
            assert torch.equal(raw(own), raw(after[part])), part
    old, new = open_weights(source), open_weights(tmp_path / "out")
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(old.read(table)[kept], new.read(table))
    assert made.manifest.structure.steps[0]["among_kept"]["apart"] < 0.03


def test_a_table_whose_rows_share_scales_is_refused(tmp_path: Path) -> None:
    source = save_in_bits(tmp_path / "m", lambda weight: of_float8(weight, 19), 8)
    with pytest.raises(ArchitectureError, match="weight_scale") as caught:
        trimmed(source, tmp_path / "out")
    assert "lm_head.weight" in str(caught.value) or "embed_tokens" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_5_moe"])
def test_tables_of_further_layers_lose_the_same_rows(name: str, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "m", "byte-level")
    ids = {f"{x}_token_id": n for n, x in enumerate(("pad", "bos", "eos"))}
    words = len(tokenizer)
    source = save_further(
        tmp_path / "m", name, tokenizer=False, vocab_size=words, tokens=words, **ids
    )
    trimmed(source, tmp_path / "out")
    kept = kept_of(source, tmp_path / "out")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    tables = 0
    for part, tensor in before.items():
        own = tensor[kept] if len(tensor) == words else tensor
        tables += len(tensor) == words
        assert torch.equal(own, after[part]), part
    assert tables == (2 if FORMS[name].apart else 4)


def test_tokens_that_a_processor_may_write_stay(tmp_path: Path) -> None:
    """Nothing names `<row_1_col_1>`, which processors of pictures write; no one uses the other."""
    for family in ("llava", "llama"):
        source = save_family(tmp_path / family, family, late=8)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        tokenizer.add_tokens(["<row_1_col_1>", "<unused7>"])
        tokenizer.save_pretrained(source)
        trimmed(source, tmp_path / f"{family}-out")
        found = Tokenizer.from_file(str(tmp_path / f"{family}-out" / "tokenizer.json"))
        assert (found.token_to_id("<row_1_col_1>") is not None) == (family == "llava")
        assert found.token_to_id("<unused7>") is None


def test_what_a_configuration_leaves_to_its_class_is_written() -> None:
    written = {"model_type": "x", "text_config": {"hidden_size": 4}}
    text = {"hidden_size": 4, "vocab_size": 9, "pad_token_id": 1}
    whole = {**written, "text_config": text, "image_token_id": 7, "other": 3}
    after = {**whole, "text_config": {**text, "vocab_size": 5}, "image_token_id": 4}
    assert _completed(written, whole, after) == {
        "model_type": "x", "image_token_id": 4, "text_config": {"hidden_size": 4, "vocab_size": 5},
    }  # fmt: skip
