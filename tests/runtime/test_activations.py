"""Activations that meet integers are rounded as the folder says, whatever multiplies them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from torch.nn.functional import cross_entropy

import secateur
from oracles.kernels import rounded_to_bytes
from oracles.packed_reader import read_matrices
from runtime.kernel_examples import TIERS, using
from runtime.packed_examples import Forgery
from runtime.packed_models import packed_model, pruned_folder
from secateur.errors import CheckpointError
from secateur.evaluation.perplexity import judged_part
from secateur.models.skeleton import quiet_transformers
from secateur.quantization.activations import GROUP, round_activations
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import quantize_rows
from secateur.runtime.decode import Decoder
from secateur.runtime.kernels import library as lib
from secateur.runtime.kernels.dispatch import by_blocks
from secateur.runtime.kernels.linear import IntegerLinear, PackedLinear, activations_of
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.packed import PackedCheckpoint

WIDE = {"intermediate_size": 600, "num_hidden_layers": 2, "head_dim": 16}
"""Inputs of three groups, the last one shorter."""

STORED: dict[str, dict[str, Any]] = {
    "int8": {"values": "int8", "embeddings": "int8", "tie_word_embeddings": True},
    "int4": {"values": "int4", "embeddings": "int4", "tie_word_embeddings": False},
    "int3": {
        "values": "int3",
        "embeddings": "int4",
        "format": "bitmask",
        "tie_word_embeddings": True,
    },
    "float": {"values": "bfloat16"},
}
TIED = "tie_word_embeddings"
BEST = lib.kernel_info().tier


def sensitive_model(folder: Path, **options: Any) -> Path:
    """A packed model with a large channel and sure predictions: rounding activations shows.

    It computes in float32, so that losses can be compared.
    """
    sizes = {name: value for name, value in options.items() if name in (*WIDE, TIED)}
    dense = pruned_folder(folder / "dense", **sizes)
    tensors = load_file(dense / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor[3] *= 3
        if name == "lm_head.weight" or (options.get(TIED) and "embed" in name):
            tensor *= 6
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    how = {name: value for name, value in options.items() if name not in sizes}
    secateur.compress(dense, output=folder / "packed", **how)
    config = json.loads((folder / "packed" / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    return folder / "packed"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    words = [f"def f{n}(a, b): return {n} * a + b" for n in range(40)]
    (tmp_path / "text.txt").write_text("\n".join(words))
    return tmp_path / "text.txt"


@torch.no_grad()
def slow_loss(folder: Path, text: Path, length: int) -> float:
    """The loss by formats and rule of docs/format.md: plain linears, float64 rounding."""
    stored = read_matrices(folder / "secateur.safetensors")
    values = {n: x["values"] for n, x in Forgery(next(folder.glob("*.safetensors"))).description[
        "layouts"].items()}  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with quiet_transformers():
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain = secateur.runtime.packed.PackedCheckpoint(folder)
    for name, parameter in model.named_parameters():
        owner = name.removesuffix(".weight")
        found = torch.tensor(stored[owner]) if owner in stored else plain.read(name).float()
        parameter.copy_(found)
    tied = {"lm_head": "model.embed_tokens"} if config.tie_word_embeddings else {}
    for name, module in model.named_modules():
        own = values.get(tied.get(name, name), "")
        if isinstance(module, torch.nn.Linear) and "int" in own:
            shares = "spread" if own == "int8" else "consecutive"
            module.register_forward_pre_hook(
                lambda _, x, shares=shares: (
                    rounded_to_bytes(x[0].flatten(0, -2), shares).view(x[0].shape).float(),
                )
            )
    ids = tiny_tokenizer()(text.read_text(), return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // length * length].view(-1, length)[:4]
    logits = model(input_ids=windows).logits
    return float(cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


@pytest.mark.parametrize("stored", STORED)
def test_the_judged_loss_is_that_of_a_slow_computation(
    tmp_path: Path, text: Path, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels, and on a machine without."""
    folder = sensitive_model(tmp_path, **WIDE, **STORED[stored])
    expected = slow_loss(folder, text, 32)
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(lib, "library", lambda: None)
            assert lib.kernel_info().tier == "none"
        found = secateur.evaluate(folder, text=text, sequence_length=32, windows=4)
        assert found.mean_loss == pytest.approx(expected, abs=3e-5)
        rounded = stored != "float"
        assert found.protocol["activations"] == ("int8 g64" if rounded else "none")
        assert found.protocol_id.endswith("-float32-int8g64" if rounded else "-float32")
    plain = secateur.load(folder, expand=True)
    assert activations_of(plain) == "none"
    loose = secateur.evaluate(
        plain, tokenizer=tiny_tokenizer(), text=text, sequence_length=32, windows=4
    )
    assert (abs(loose.mean_loss - expected) > 6e-5) is rounded  # the test can tell
    assert judged_part(loose.protocol_id) == judged_part(found.protocol_id)


@pytest.mark.skipif(BEST == "none", reason="no kernels here")
@pytest.mark.parametrize("stored", ["int8", "int4"])
def test_prompts_tokens_and_the_one_call_decoder_agree(tmp_path: Path, stored: str) -> None:
    folder = packed_model(tmp_path, **WIDE, **STORED[stored])
    ids = torch.arange(3, 43) % 90
    models = [secateur.load(folder, dtype=torch.float32, kernels=k) for k in (True, False)]
    with torch.inference_mode():
        prompts = [model(input_ids=ids[None]).logits[0, -1] for model in models]
    decoder = Decoder(models[0], 64)
    decoder.prefill(ids[:1])
    for token in ids[1:].tolist():
        last = decoder.step(token)
    for found in (prompts[1], last):  # another order of sums can round an activation another way
        assert float((found - prompts[0]).norm() / prompts[0].norm()) < 0.02


@pytest.mark.skipif(BEST == "none", reason="no kernels here")
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize(("rows", "columns", "group"), [(33, 130, 32), (48, 577, 64), (7, 64, 128)])
def test_prompts_are_the_same_bits_without_kernels(
    tier: str, values: str, rows: int, columns: int, group: int
) -> None:
    """On every tier. So a deep model, which makes one bit into many, has the same perplexity."""
    torch.manual_seed(rows)
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(70, columns) * torch.rand(columns).exp2() ** 8).to(dtype)
        if values == "int8":
            codes, scales = quantize_rows(torch.randn(rows, columns))
            matrix, plain = KernelMatrix(codes, scale=scales), IntegerLinear(codes, scales)
        else:
            grid = GroupGrid(4, group)
            codes, found = grid.quantize(torch.randn(rows, columns))
            matrix = KernelMatrix.of_codes(codes, found, group)
            plain = IntegerLinear(codes, found.values, group)
        with using(tier):
            assert torch.equal(by_blocks(matrix, x), plain(x))


def test_without_kernels_integers_stay_integers(tmp_path: Path) -> None:
    folder = packed_model(tmp_path, **WIDE, **STORED["int8"])
    model = secateur.load(folder, kernels=False)
    kinds = {type(module) for module in model.modules()}
    assert IntegerLinear in kinds
    assert PackedLinear not in kinds
    up = model.model.layers[0].mlp.up_proj
    model.float()
    assert (up.codes.dtype, up.scales.dtype) == (torch.int8, torch.float32)
    assert model.to("meta").model.layers[0].mlp.up_proj.codes.device.type == "meta"
    with pytest.raises(CheckpointError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    reason = secateur.runtime.decode.why_not(secateur.load(folder, kernels=False))
    assert (lib.kernel_info().reason or "kernels=False") in str(reason)


@pytest.mark.parametrize("shares", ["consecutive", "spread"])
@pytest.mark.parametrize("columns", [1, 65, 2 * GROUP + 9, 13 * GROUP, 24 * GROUP - 5])
def test_rounding_is_that_of_the_oracle(shares: Any, columns: int) -> None:
    x = torch.randn(5, columns)
    x[1, :GROUP] = 0
    x[2] *= 1e-30
    assert torch.equal(round_activations(x, shares), rounded_to_bytes(x, shares).float())
    assert round_activations(x.view(5, 1, -1), shares).shape == (5, 1, columns)
    assert round_activations(torch.tensor([[float("nan"), 1.0]]), shares).isnan().all()


def test_the_folder_says_how_activations_are_rounded(tmp_path: Path) -> None:
    folder = packed_model(tmp_path, **STORED["int8"])
    config = json.loads((folder / "config.json").read_text())
    rounding = {"values": "int8", "group": 64}
    assert config["quantization_config"]["activations"] == rounding
    assert PackedCheckpoint(folder).activations == rounding
    assert Forgery(folder / "secateur.safetensors").description["activations"] == rounding


@pytest.mark.parametrize("stated", [{"values": "int8", "group": 256}, "int8", None])
def test_another_rounding_is_refused(tmp_path: Path, stated: Any) -> None:
    folder = packed_model(tmp_path, **STORED["int8"])
    forgery = Forgery(folder / "secateur.safetensors")
    forgery.description["activations"] = stated
    forgery.write()
    with pytest.raises(CheckpointError, match="activations") as refused:
        PackedCheckpoint(folder)
    assert refused.value.where == str(folder / "secateur.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activations"] = stated
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="activations") as refused:
        PackedCheckpoint(folder)
    assert refused.value.where == str(folder if stated is None else folder / "config.json")
    del config["quantization_config"]["activations"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="activations"):
        PackedCheckpoint(folder)
