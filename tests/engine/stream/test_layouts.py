"""Models whose layers are of several kinds: each kind has its own groups of linears."""

from __future__ import annotations

import dataclasses
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from architectures import tiny_architecture
from safetensors.torch import load_file, save_file
from slow import slow_but
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import tiny_model, tiny_windows

import secateur
from oracles.hybrids import wanda
from secateur.engine.prune.layer import OpenLayer
from secateur.engine.prune.tasks import UNSEEN
from secateur.engine.stream.calls import layouts
from secateur.errors import ArchitectureError, VerificationError
from secateur.models.architecture import describe
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import quiet_transformers
from secateur.models.targets import CheckpointTarget, ModelTarget

HYBRIDS = {
    "qwen3_5_text": "model.layers",
    "lfm2": "model.layers",
    "recurrent_gemma": "model.layers",
    "mamba": "backbone.layers",
    "mamba2": "backbone.layers",
    "falcon_h1": "model.layers",
    "bamba": "model.layers",
    "granitemoehybrid dense": "model.layers",
    "nemotron_h dense": "model.layers",
    "gemma4_text": "model.layers",
    "gemma4_text small": "model.layers",
    "gemma4_text shared": "model.layers",
    "gemma3n_text": "model.layers",
    "gemma3n_text shared": "model.layers",
}
"""Where their layers are."""

IN_TUPLES = {"bloom": "transformer.h", "falcon": "transformer.h"}
"""Models that expect tuples of their layers."""

FEW = ("lfm2", "mamba2", "falcon_h1", "bloom", "gemma4_text small", "gemma3n_text shared")
"""One with each sort of layers; the others are slow tests."""


def matrices_of(model: nn.Module, path: str) -> list[list[str]]:
    """The names of all linears of each layer, found without the library."""
    return [
        [
            f"{path}.{i}.{n}"
            for n, m in layer.named_modules()
            if isinstance(m, (nn.Linear, Conv1D)) and "altup" not in n
        ]
        for i, layer in enumerate(model.get_submodule(path))
    ]


@pytest.mark.parametrize(
    ("name", "pattern"),
    slow_but(
        [(name, "unstructured") for name in FEW] + [("lfm2", "2:4")],
        product(HYBRIDS | IN_TUPLES, ["unstructured", "2:4"]),
    ),
)
def test_every_kind_is_pruned_as_by_plain_forwards(name: str, pattern: str) -> None:
    windows = tiny_windows(4, 12)
    ours, plain = tiny_architecture(name), tiny_architecture(name)
    report = secateur.prune(
        ours, method="wanda", sparsity=0.5, pattern=pattern, calibration=windows,
        micro_batch_tokens=24,
    )  # fmt: skip
    layers = matrices_of(plain, (HYBRIDS | IN_TUPLES)[name])
    ran = wanda(plain, layers, windows, pattern)
    expected = dict(plain.named_parameters())
    for parameter, value in ours.named_parameters():
        assert torch.equal(value, expected[parameter]), parameter
    assert {r.name for layer in report.layers for r in layer.linears} == ran
    for matrix in ran:
        weight = ours.get_submodule(matrix).weight
        assert (weight == 0).sum() * 2 == weight.numel(), matrix
    left = {one.names: one.reason for one in report.left}
    unseen = {n for names in layers for n in names} - ran
    assert bool(unseen) == (UNSEEN in left.values())
    assert unseen <= {f"backbone.layers.{i}.mixer.dt_proj" for i in range(3)}


@pytest.mark.parametrize("name", slow_but([x for x in FEW if x in HYBRIDS], HYBRIDS))
def test_layouts_of_a_checkpoint_are_those_of_the_loaded_model(name: str, tmp_path: Path) -> None:
    """A checkpoint's layers run on the meta device, a loaded model's with their weights."""
    model = tiny_architecture(name)
    with quiet_transformers():
        model.save_pretrained(tmp_path)
    stored = CheckpointTarget(CheckpointReader(tmp_path), None, torch.device("cpu"))
    buffers = {n: b.clone() for n, b in stored.model.named_buffers()}
    assert layouts(stored, 16) == layouts(ModelTarget(model), 16)
    assert all(p.is_meta for p in stored.layers.parameters())
    for n, buffer in stored.model.named_buffers():
        assert torch.equal(buffer, buffers[n]), n


def test_declared_groups_that_miss_a_linear_are_not_used() -> None:
    """A declared family may get a linear that its file does not know."""
    model = tiny_model("llama")
    target = ModelTarget(model)
    assert layouts(target, 8)[0].groups == describe(model).groups
    target.architecture = dataclasses.replace(
        target.architecture, groups=target.architecture.groups[:-1]
    )
    assert [set(g) for g in layouts(target, 8)[0].groups] == [
        set(g) for g in describe(model).groups
    ]


def test_linears_with_parts_of_one_tensor_are_no_group() -> None:
    """Two halves of a tensor have one memory and one shape, and are two inputs."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(32, 64, bias=False)
            self.one, self.two = (nn.Linear(32, 32, bias=False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            left, right = self.wide(x).chunk(2, dim=-1)
            return x + self.one(left) + self.two(right)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.halves = Halves()

        def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
            return self.halves(x)

    model = tiny_model("generic")
    for i in range(3):
        model.model.layers[i] = Block()
    found = layouts(ModelTarget(model), 8)
    assert found[0].groups == (("halves.wide",), ("halves.one",), ("halves.two",))


def test_the_first_layer_of_a_kind_is_verified_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grouped, begun = OpenLayer.pruned_groups, []

    def forgets(opened: OpenLayer) -> list:
        begun.append(opened.index)
        return [g for g in grouped(opened) if not g[0].name.endswith("self_attn.out_proj")]

    monkeypatch.setattr(OpenLayer, "pruned_groups", forgets)
    with pytest.raises(VerificationError) as caught:
        secateur.prune(
            tiny_architecture("lfm2"), method="wanda", sparsity=0.5, calibration=tiny_windows()
        )
    assert begun == [0, 1]
    assert caught.value.where == "model.layers.1.self_attn.out_proj.weight"
    assert "512 of 1024" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("name", "message"), [
    ("bert", "BertLMHeadModel is an encoder, not a causal decoder"),
    ("roberta", "is an encoder"),
    ("whisper", "WhisperForCausalLM is part of an encoder-decoder"),
    ("bart", "is part of an encoder-decoder"),
    ("zamba2", "12 parameters of decoder layers are shared with other layers"),
])  # fmt: skip
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_is_not_known_is_refused_by_name(name: str, message: str, method: str) -> None:
    model = tiny_architecture(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ArchitectureError, match=message):
        secateur.prune(model, method=method, sparsity=0.5, calibration=tiny_windows())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_layer_that_does_not_run_by_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """For example because it reads keys of an earlier layer behind the model's back."""
    model = tiny_architecture("recurrent_gemma")

    def forward(*args: object, **kwargs: object) -> None:
        raise KeyError("keys of layer 0")

    monkeypatch.setattr(model.model.layers[2], "forward", forward)
    with pytest.raises(ArchitectureError, match="KeyError") as e:
        secateur.prune(model, method="wanda", sparsity=0.5, calibration=tiny_windows())
    assert e.value.where == "model.layers.2"


def test_stored_buffers_are_read(tmp_path: Path) -> None:
    """A checkpoint may hold more than parameters: here the scale of each layer."""
    model = tiny_architecture("gemma4_text")
    for i, layer in enumerate(model.model.layers):
        layer.layer_scalar.fill_(0.5 + i)
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source")
    save_file({"input_ids": tiny_windows(4, 12)}, tmp_path / "windows.safetensors")
    options = {"method": "wanda", "sparsity": 0.5, "micro_batch_tokens": 24}
    secateur.prune(
        tmp_path / "source", output=tmp_path / "out",
        calibration=tmp_path / "windows.safetensors", **options,
    )  # fmt: skip
    secateur.prune(model, calibration=tiny_windows(4, 12), **options)
    made = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in made:
            assert torch.equal(made[name], value), name
    assert made["model.layers.1.layer_scalar"] == 1.5
    secateur.compress(tmp_path / "out", output=tmp_path / "small", values="keep")
    packed = secateur.load(tmp_path / "small")
    assert packed.model.layers[1].layer_scalar == 1.5
    report = secateur.structure(
        tmp_path / "source", output=tmp_path / "cut", keep_layers=2,
        calibration=tmp_path / "windows.safetensors",
    )  # fmt: skip
    steps = json.loads((tmp_path / "cut" / "secateur" / "steps.json").read_text())
    kept = steps[0]["cut"]["layers"]
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    assert report.manifest.structure.removed > 0
    assert [cut[f"model.layers.{i}.layer_scalar"] for i in range(2)] == [0.5 + i for i in kept]
