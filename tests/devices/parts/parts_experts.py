"""Experts on a GPU: what a layer asks of it does not grow with their number."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from pretended import Traffic, counted
from torch import Tensor, nn
from zoo import tiny_model

from secateur.calibration.statistics import GroupStatistics, InputSource
from secateur.machine import exact_in_tf32
from secateur.models.architecture import Linear
from secateur.models.experts import OpenExperts, opened_experts

AMPERE = mock.patch("torch.cuda.get_device_capability", return_value=(8, 0))
NAMES = dict.fromkeys(("gram", "column_norm"), InputSource())


def routed(experts: int, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """The two experts of each token, most often the first ones, and their weights."""
    draws = torch.rand(tokens, experts) + torch.linspace(1, 0, experts)
    chosen = draws.topk(2)
    return chosen.indices, chosen.values


@torch.no_grad()
def forward(experts: OpenExperts, *given: Tensor) -> tuple[Tensor, Traffic]:
    with counted() as traffic:
        out = experts(*(x.to("cuda") for x in given))
    return out.cpu(), traffic


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_product_for_all_experts_in_bfloat16(dtype: torch.dtype) -> None:
    found = []
    for count in (4, 8):
        model = tiny_model("qwen3_moe", num_experts=count).to(dtype)
        x, given = torch.randn(40, 32).to(dtype), routed(count)
        with opened_experts(model):
            experts = next(m for m in model.modules() if isinstance(m, OpenExperts))
            with torch.no_grad():
                expected = experts(x, *given)
            with AMPERE:
                out, traffic = forward(experts.to("cuda"), x, *given)
        torch.testing.assert_close(out, expected)
        found.append(traffic)
    fewer, more = found
    assert fewer.waits == more.waits == 1  # for the number of tokens of each expert
    assert (more.launches == fewer.launches) == (dtype == torch.bfloat16)


def test_statistics_of_a_batch_are_those_of_its_groups() -> None:
    found = []
    for counts in ([3, 0, 40, 1], [3, 0, 40, 1] * 2):
        groups = [[Linear(f"{i}", nn.Linear(6, 4))] for i in range(len(counts))]
        batch = GroupStatistics(NAMES, groups, torch.device("cuda"), batch=True)
        x = torch.randn(sum(counts), 6)
        with counted() as traffic:
            batch.update(x.to("cuda"), counts=counts)
        found.append(traffic)
        values = batch.value()
        assert batch.tokens == counts
        for i, rows in enumerate(x.split(counts)):
            torch.testing.assert_close(values["gram"][i].cpu(), rows.T @ rows)
            torch.testing.assert_close(values["column_norm"][i].cpu(), rows.norm(dim=0))
    fewer, more = found
    assert fewer.waits == more.waits == 0
    assert more.launches == fewer.launches


@pytest.mark.parametrize(
    ("dtypes", "short"),
    [
        ((torch.bfloat16,), True),
        ((torch.float16, torch.bfloat16), True),
        ((torch.float32,), False),
        ((torch.bfloat16, torch.float32), False),
    ],
)
def test_tf32_only_for_numbers_that_it_holds(dtypes: tuple[torch.dtype, ...], short: bool) -> None:
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    factors = [torch.ones(2, 2, dtype=dtype, device="cuda") for dtype in dtypes]
    with exact_in_tf32(*factors):
        assert (products.fp32_precision == "tf32") == short
    with exact_in_tf32(*(x.cpu() for x in factors)):
        assert products.fp32_precision == before
    assert products.fp32_precision == before
