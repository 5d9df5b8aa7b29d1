"""Attention written out is torch's, for every kind of mask, with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from secateur.engine.plan import AttentionOfPlan
from secateur.models import attention
from secateur.models.attention import LONGEST, WrittenOut, writes_out

ROWS = 12


def drawn(columns: int = ROWS, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of 6 heads, keys and values, 3 windows."""
    draw = torch.Generator().manual_seed(0)
    shapes = (3, 6, ROWS, 8), (3, groups, columns, 8), (3, groups, columns, 10)
    q, k, v = (torch.randn(shape, generator=draw).requires_grad_() for shape in shapes)
    return q, k, v


def local(rows: int, columns: int) -> Tensor:
    """Each token sees itself and the three before it."""
    apart = torch.arange(rows)[:, None] - torch.arange(columns)[None]
    return (apart >= 0) & (apart < 4)


def windows_of_their_own() -> Tensor:
    """The first window has five tokens of padding before it."""
    mask = torch.ones(3, 1, ROWS, ROWS, dtype=torch.bool).tril()
    mask[0, :, 5:, :5] = False
    return mask


ASKED: dict[str, tuple[dict[str, Any], int, int]] = {
    "causal": ({"is_causal": True, "enable_gqa": True}, ROWS, 2),
    "a head for each": ({"is_causal": True}, ROWS, 6),
    "everything, scaled": ({"scale": 0.3, "enable_gqa": True}, 7, 2),
    "a window": ({"attn_mask": local(ROWS, ROWS), "enable_gqa": True}, ROWS, 2),
    "by window": ({"attn_mask": windows_of_their_own(), "enable_gqa": True}, ROWS, 2),
    "added": ({"attn_mask": torch.linspace(-2, 2, ROWS * ROWS).view(ROWS, ROWS)}, ROWS, 6),
    "added by head": ({"attn_mask": torch.linspace(-2, 2, 6 * ROWS * ROWS).view(6, ROWS, ROWS)},
                      ROWS, 6),
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
def test_written_out_is_what_torch_gives(asked: str) -> None:
    options, columns, groups = ASKED[asked]
    q, k, v = drawn(columns, groups)
    exact = scaled_dot_product_attention(q, k, v, **options)
    with WrittenOut():
        rough = scaled_dot_product_attention(q, k, v, **options)
    assert rough.dtype == torch.bfloat16
    assert rough.shape == exact.shape
    assert (rough.float() - exact).norm() < 0.01 * exact.norm()
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad(exact, (q, k, v), upstream)
    given = torch.autograd.grad(rough, (q, k, v), upstream.bfloat16())
    for one, other in zip(given, wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_dropout_is_left_to_torch() -> None:
    q, k, v = drawn(groups=6)
    torch.manual_seed(0)
    exact = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    with WrittenOut():
        assert torch.equal(scaled_dot_product_attention(q, k, v, dropout_p=0.5), exact)


def test_a_plan_knows_the_shape_alone() -> None:
    q, k, v = (x.to("meta") for x in drawn())
    with AttentionOfPlan():
        assert scaled_dot_product_attention(q, k, v, enable_gqa=True).shape == (3, 6, ROWS, 10)


def test_it_is_for_short_windows_on_processors_with_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(attention, "fast_dtype", lambda device: torch.bfloat16)
    assert writes_out(cpu, LONGEST)
    assert not writes_out(cpu, LONGEST + 1)
    assert not writes_out(torch.device("cuda"), 16)
    monkeypatch.setattr(attention, "fast_dtype", lambda device: None)
    assert not writes_out(cpu, 16)
