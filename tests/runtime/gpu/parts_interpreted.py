"""The GPU's kernels in Triton's interpreter; `test_interpreted.py` starts a process for them.

The interpreter computes with tensors of the CPU, so no GPU runs here. What is checked: numbers of
every kind of values, of odd shapes and of 1 to 16 tokens; and which way a model takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from torch import Tensor, nn

import secateur
from secateur.engine.stream.layerwise import LayerwiseReader
from secateur.errors import ShapeError
from secateur.evaluation.perplexity import perplexity
from secateur.models.skeleton import build_skeleton
from secateur.quantization.groups import GroupGrid
from secateur.runtime.kernels.dispatch import KernelChoice
from secateur.runtime.kernels.gpu import bitmask, integers, linear
from secateur.runtime.kernels.gpu.bitmask import GpuBitmask
from secateur.runtime.kernels.gpu.integers import GpuIntegers
from secateur.runtime.kernels.gpu.linear import GpuLinear
from secateur.runtime.kernels.linear import IntegerLinear, activations_of
from secateur.runtime.load import PackedTarget, install_on_gpu
from secateur.runtime.packed import PackedCheckpoint

SHAPES = [(5, 8), (17, 300)]
EXACT, ROUNDED = (torch.float32, 2e-6), (torch.bfloat16, 2**-8)
TRIED = [(1, *EXACT), (1, *ROUNDED), (3, *ROUNDED), (16, *EXACT)]
"""Tokens, their dtype, and the largest error of a product."""


def drawn(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Weights, and a mask with an empty row, a full one and others."""
    draw = torch.Generator().manual_seed(shape[0])
    mask = torch.rand(shape, generator=draw) < 0.5
    mask[0], mask[-1] = False, True
    return torch.randn(shape, generator=draw), mask


def example(kind: str, shape: tuple[int, int]) -> tuple[Any, Tensor]:
    """A matrix for the GPU, and the same one dense in float64."""
    weight, mask = drawn(shape)
    stored = weight.to(getattr(torch, kind))
    return GpuBitmask.of(mask, stored[mask], device="cpu"), stored.double() * mask


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_the_dense_matrix(kind: str, shape: tuple[int, int]) -> None:
    matrix, dense = example(kind, shape)
    assert torch.equal(matrix.dense(torch.float32).double(), dense.float().double())
    for tokens, dtype, error in TRIED:
        draw = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, shape[1], generator=draw).to(dtype)
        y = matrix.multiply(x)
        assert (y.dtype, y.shape) == (dtype, (tokens, shape[0]))
        expected = x.double() @ dense.t()
        size = x.double().abs() @ dense.abs().t()
        assert ((y.double() - expected).abs() <= error * size + 1e-12).all()
        assert not y[:, 0].any()  # the empty row


def integer_linear(group: int | None, shape: tuple[int, int]) -> IntegerLinear:
    """A linear of int8, or of 4 bits in groups, with zeros."""
    weight, mask = drawn(shape)
    if group is None:
        return IntegerLinear(
            (40 * weight * mask).clamp(-127, 127).to(torch.int8), torch.rand(shape[0]) / 99
        )
    codes, scales = GroupGrid(4, group).quantize(weight * mask)
    return IntegerLinear(codes, scales.values, group)


@pytest.mark.parametrize("group", [None, 32, 64, 128])
@pytest.mark.parametrize("shape", [(5, 8), (17, 300), (130, 640)], ids=str)
def test_integers_are_multiplied_as_on_a_cpu(group: int | None, shape: tuple[int, int]) -> None:
    """Rounded activations and products of integers are the same; only sums have another order."""
    on_cpu = integer_linear(group, shape)
    matrix = GpuIntegers.of(on_cpu, "cpu")
    kinds = torch.float32, torch.bfloat16, torch.float32, torch.float16
    for tokens, dtype in zip((1, 3, 17, 65), kinds, strict=True):
        draw = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, shape[1], generator=draw).to(dtype)
        x[0, : shape[1] // 2] *= 100
        x[-1, -5:] = 0
        y, expected = matrix.multiply(x), on_cpu(x)
        assert (y.dtype, y.shape) == (dtype, (tokens, shape[0]))
        size = on_cpu(x.abs()).abs().float() + expected.abs().float().mean()
        error = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert ((y - expected).float().abs() <= error * size).all()
        assert not y[:, 0].any()
        # by torch, which rounds activations and weights to the dtype
        rough = (matrix.expanded(x) - expected).float()
        assert float(rough.norm() / expected.float().norm()) < max(1e-6, torch.finfo(dtype).eps)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_no_number_stays_none() -> None:
    matrix = GpuIntegers.of(integer_linear(64, (5, 128)), "cpu")
    for value in (torch.nan, torch.inf):
        x = torch.ones(1, 128)
        x[0, 70] = value
        assert matrix.multiply(x)[0, 1:].isnan().all()


def test_integers_take_few_bits_and_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Counted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.kernel.__name__)
            return self.kernel[grid]

    for name in ("rounded", "integer_product"):
        monkeypatch.setattr(integers, name, Counted(getattr(integers, name)))
    for group, bits in ((None, 8), (64, 4.25)):
        matrix = GpuIntegers.of(integer_linear(group, (64, 1024)), "cpu")
        for tokens in (1, 40):
            matrix.multiply(torch.randn(tokens, 1024))
            assert launched == ["rounded", "integer_product"]
            launched.clear()
        beside = 4 * 1024 + (4 * 64 if group is None else 0)  # the order; scales of rows
        assert matrix.nbytes - beside == bits * 64 * 1024 / 8


@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_tiles_can_be_divided_among_programs(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitmask, "PROGRAMS", programs)
    matrix, dense = example("bfloat16", (20, 1100))  # five tiles
    x = torch.randn(2, 1100)
    expected = (x.double() @ dense.t()).float()
    torch.testing.assert_close(matrix.multiply(x), expected, rtol=1e-5, atol=1e-4)


def test_it_is_as_small_as_the_format_and_a_table() -> None:
    matrix, _ = example("bfloat16", (64, 2048))
    count = matrix.nonzeros
    assert matrix.nbytes == 64 * 2048 // 8 + 2 * (count + 1) + 64 * 8 * 8  # mask, values, starts


def test_parts_that_do_not_fit_are_refused() -> None:
    mask = torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ShapeError, match="16 weights"):
        GpuBitmask.of(mask, torch.ones(3), device="cpu")
    matrix = GpuBitmask.of(mask, torch.ones(16), device="cpu")
    for shape in ((0, 8), (17, 8), (1, 9)):
        with pytest.raises(ShapeError, match="1 to 16"):
            matrix.multiply(torch.ones(shape))


@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("gain", [2.0, 0.5])
def test_a_model_answers_as_its_dense_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str, gain: float
) -> None:
    save_tiny(tmp_path / "dense", num_hidden_layers=1)
    secateur.prune(tmp_path / "dense", output=tmp_path / "p", method="magnitude", sparsity=0.5)
    secateur.compress(tmp_path / "p", output=tmp_path / "small", values=values)
    monkeypatch.setattr(linear, "measured", lambda matrix, dtype, device: KernelChoice(4, gain))
    model = build_skeleton(tmp_path / "small", dtype=torch.float32)
    packed = PackedCheckpoint(tmp_path / "small")
    install_on_gpu(model, packed, torch.float32, torch.device("cpu"))
    linears = [name for name, x in model.named_modules() if isinstance(x, GpuLinear)]
    # integers stay integers, the tied head too
    assert len(linears) == (8 if values != "bfloat16" else 7 if gain > 1 else 0)
    assert not [n for n, p in model.named_parameters() if p.device.type == "meta"]
    plain = secateur.load(tmp_path / "small", dtype=torch.float32, kernels=False)
    kind = nn.Linear if values == "bfloat16" else IntegerLinear
    assert all(isinstance(plain.get_submodule(name), kind) for name in linears)
    assert activations_of(model) == activations_of(plain)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])  # more tokens than the kernel takes
    for tokens in (ids, ids[:, :2]):
        ours, theirs = model.eval()(tokens).logits, plain(tokens).logits
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    target = PackedTarget(packed, torch.device("cpu"))
    target.by_triton = True
    model = build_skeleton(tmp_path / "small", dtype=target.dtype)
    install_on_gpu(model, packed, target.dtype, torch.device("cpu"))
    found = perplexity(LayerwiseReader(target, 1e9), ids).losses
    assert found == perplexity(model.eval(), ids).losses
