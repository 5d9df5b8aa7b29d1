"""Three scenarios of the common guides, computed by hand from data sheets."""

from __future__ import annotations

import math

import pytest

from guide_scenarios import BATCH, CHATBOT, EDGE
from secateur.advisor.advice import Advice, Considered
from secateur.advisor.capacity import Capacity

GIB = 2**30


def option(advice: Advice, name: str) -> tuple[Considered, Capacity]:
    row = next(one for one in advice.considered if one.option.name == name)
    assert isinstance(row.capacity, Capacity)
    return row, row.capacity


def test_a_chatbot_on_gpus_is_quantized() -> None:
    """Llama-3.1-8B on A100s: 32 layers of 218,103,808 weights, a head of 128256 · 4096."""
    advice = CHATBOT.answer()
    assert advice.verdict == "Only quantize: int8."
    row, found = option(advice, "int8")
    linears, head, norms = 32 * 218_103_808, 128_256 * 4096, 65 * 4096
    weights = linears + 2 * head + 2 * norms
    assert found.memory.weights == weights
    cache = 128 * 500 * 2 * 32 * 8 * 128 * 2
    working = 512 * 6 * 4096 * 2 + 128 * 128_256 * 4
    assert found.batch == 128  # of 512 that fit: 64 would need a second device at slow times
    total = (weights + cache + working) * 1.03 + 0.9 * GIB
    assert found.memory.total == pytest.approx(total)
    # a step reads weights and cache, at 70 % of 2039 GB/s; 4 µs for each layer
    step = (linears + head + cache) / (2039e9 * 0.7) + 32 * 4e-6
    assert found.step.typical == pytest.approx(step)
    # a prompt of 400 tokens is arithmetic: 624 TOPS of int8, half of it reached
    prompt = (2 * (400 * linears + head) + 2 * 400**2 * 32 * 4096) / (624e12 * 0.5)
    assert found.first_token.typical == pytest.approx(
        max(prompt, (linears + head) / (2039e9 * 0.7) + 32 * 4e-6)
    )
    busy = found.first_token.typical + 100 * step / 128
    assert found.replicas == math.ceil(1e6 / 86400 * 2 * busy / 0.7) == 1
    assert row.cost is not None
    assert row.cost.month.typical == pytest.approx(1.5 * 730)
    assert found.p99.typical * 1e3 < 50


def test_a_device_at_the_edge_is_quantized_to_be_quick_enough() -> None:
    """Llama-3.2-3B on a Raspberry Pi: int8 is too slow by the data sheet, int4 is not."""
    advice = EDGE.answer()
    assert advice.verdict.startswith("Only quantize: int4.")
    _, found = option(advice, "int4")
    linears = 28 * (2 * 3072 * 128 * (24 + 8) + 3 * 3072 * 8192)
    head = 128_256 * 3072
    read = linears * 4.125 / 8 + head + 128 * 2 * 28 * 8 * 128 * 2
    step = read / (17.1e9 * 0.7) + 28 * 3e-6
    assert found.alone.typical == pytest.approx(step)
    assert step * 1e3 < 250
    eight = next(one for one in advice.considered if one.option.name == "int8")
    assert "270 ms between two tokens (99 of 100), 250 allowed" in eight.refused
    whole = next(one for one in advice.considered if one.option.name == "as it is")
    assert "538 ms between two tokens" in whole.refused


def test_a_batch_of_documents_needs_fewer_gpus_in_eight_bits() -> None:
    """Llama-3.1-70B on H100s: half of the devices, because half of the bytes."""
    advice = BATCH.answer()
    assert advice.verdict.startswith("Only quantize: fp8.")
    row, eight = option(advice, "fp8")
    base, whole = option(advice, "as it is")
    assert (eight.devices.typical, whole.devices.typical) == (4, 8)
    assert row.cost is not None
    assert base.cost is not None
    assert row.cost.month.typical == pytest.approx(4 * 2.95 * 730)
    assert base.cost.month.typical == pytest.approx(8 * 2.95 * 730)
    for found in (eight, whole):
        demand = 1e6 / 86400 * found.busy.typical / 0.95
        assert found.replicas == math.ceil(demand)
