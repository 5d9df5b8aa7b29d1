"""The formulas of the advice, against cases that are computed by hand."""

from __future__ import annotations

import pytest

from secateur.advisor.advice import (
    AdviceQuestion,
    Measured,
    Roofline,
    Served,
    making_of,
    served,
    weight_bytes,
    weights_read,
)
from secateur.advisor.facts import Estimate, Facts, read_facts
from secateur.advisor.options import STRUCTURES, VALUES, ZEROS, CompressionWay, options_for
from secateur.models.shape import ModelShape, PlainDecoder, memory_with


def option(structure: str = "whole", zeros: str = "dense", values: str = "bf16") -> CompressionWay:
    return CompressionWay(STRUCTURES[structure], ZEROS[zeros], VALUES[values])


@pytest.fixture(scope="module")
def facts() -> Facts:
    return read_facts()


@pytest.fixture(scope="module")
def llama(facts: Facts) -> ModelShape:
    return facts.shapes["llama-2-7b"].shape("llama-2-7b")


def test_known_shapes_have_the_published_parameters(facts: Facts) -> None:
    published = {
        "llama-2-7b": 6_738_415_616,
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "llama-3.1-405b": 405_853_388_800,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.2-3b": 3_212_749_824,
        "mistral-7b": 7_241_732_096,
        "qwen3-8b": 8_190_726_144,
    }  # Qwen3's norms of queries and keys, 9,216 weights, are not in a known shape
    for name, parameters in published.items():
        found = facts.shapes[name].shape(name).parameters
        assert abs(found - parameters) <= 9_216, name
    mixture = facts.shapes["qwen3-30b-a3b"].shape("q")
    assert mixture.parameters == pytest.approx(30.5e9, rel=0.01)
    assert mixture.active + mixture.outer == pytest.approx(3.3e9, rel=0.03)


def test_weights_of_a_small_shape_by_hand() -> None:
    tiny = PlainDecoder(
        layers=2, hidden=8, ffn=16, heads=2, kv_heads=1, head=4, vocabulary=10
    ).shape("tiny")
    # q 8x8, k and v 4x8, o 8x8; gate, up, down 16x8
    assert tiny.linears == 2 * (64 + 32 + 32 + 64 + 3 * 128)
    assert tiny.parameters == tiny.linears + 2 * 80 + 5 * 8
    bits = {"bf16": 16, "int8": 8, "int4": 4.125}
    for values, each in bits.items():
        outer = 160 * (2 if values == "bf16" else 1)
        assert (
            weight_bytes(tiny, option(values=values)) == round(tiny.linears * each / 8) + outer + 80
        )
    assert tiny.cache_bytes(1) == 2 * 2 * 4 * 2  # keys and values, 2 layers, 4 channels, bf16
    sparse = option(zeros="50%", values="int4")
    assert sparse.bits == 4 * 0.5 + 1 + 0.125
    assert option(zeros="50%", values="int8").bits == 5


def test_memory_by_hand(llama: ModelShape) -> None:
    weights = weight_bytes(llama, option())
    found = memory_with(weights, llama, "cpu", 1, 4096)
    assert found.weights == 2 * llama.parameters
    assert found.cache == 4096 * 2 * 32 * 4096 * 2  # half a mebibyte for each token
    assert found.working == 512 * 6 * 4096 * 2 + 32000 * 4
    assert found.overhead == 185 * 2**20
    assert memory_with(weights, llama, "cuda", 1, 4096).overhead > 0.9 * 2**30


def test_roofline_by_hand(facts: Facts, llama: ModelShape) -> None:
    speed = Roofline(facts.hardware["a100-80gb"], facts.efficiency["cuda"])
    step = speed.step(llama, option(), 1, 0)
    read = (llama.linears + llama.head) * 2
    assert step.typical == pytest.approx(read / (2039e9 * 0.7) + 32 * 4e-6)
    assert step.low == pytest.approx(read / (2039e9 * 0.85) + 32 * 2e-6)
    assert step.high == pytest.approx(read / (2039e9 * 0.55) + 32 * 8e-6)
    # a large batch is bound by arithmetic: 2 operations for each weight and sequence
    many = speed.step(llama, option(), 512, 0)
    operations = 512 * 2 * (llama.linears + llama.head)
    assert many.typical == pytest.approx(operations / (312e12 * 0.5) + 32 * 4e-6)
    prompt = speed.prompt(llama, option(), 2048)
    # the head for the last token alone
    operations = 2 * (2048 * llama.linears + llama.head) + 2 * 2048**2 * 32 * 4096
    assert prompt.typical == pytest.approx(operations / (312e12 * 0.5))
    # 2:4 gains what was measured, not what the bytes say
    sparse = speed.step(llama, option(zeros="2:4"), 1, 0)
    head = llama.head * 2 / (2039e9 * 0.7)
    gained = llama.linears * 2 / (2039e9 * 0.7) / 1.15
    assert sparse.typical == pytest.approx(gained + head + 32 * 4e-6)


def test_a_batch_reads_the_experts_that_it_hits(facts: Facts) -> None:
    mixture = facts.shapes["qwen3-30b-a3b"].shape("q")
    dense = mixture.linears - mixture.expert_weights
    assert weights_read(mixture, 1) == pytest.approx(mixture.active)
    hit = 1 - (1 - 8 / 128) ** 16
    assert weights_read(mixture, 16) == pytest.approx(dense + hit * mixture.expert_weights)
    fewer = mixture.scaled(experts=0.5)
    assert fewer.active == mixture.active
    assert fewer.expert_weights == mixture.expert_weights // 2
    assert fewer.experts == 64


class Fixed(Measured):
    """10 ms for a step of any batch, 1 ms for a token of a prompt."""

    def step(self, model: ModelShape, way: CompressionWay, batch: int, context: int) -> Estimate:
        return Estimate(0.005, 0.01, 0.02)

    def prompt(self, model: ModelShape, way: CompressionWay, tokens: int) -> Estimate:
        return Estimate(0.0005 * tokens, 0.001 * tokens, 0.002 * tokens)


def asked(facts: Facts, model: ModelShape, room: int, **bounds: float) -> AdviceQuestion:
    """A question about an A100 with fixed times, 100 tokens in and 50 out."""
    device = facts.hardware["a100-80gb"]
    return AdviceQuestion(model, device, room, facts, Fixed(model, {}), 100, 50, **bounds)  # type: ignore[arg-type]


def test_batch_time_and_cost_by_hand(facts: Facts, llama: ModelShape) -> None:
    weights = weight_bytes(llama, option())
    room = memory_with(weights, llama, "cuda", 8, 150).total
    found = served(asked(facts, llama, room), option())
    assert isinstance(found, Served)
    assert found.batch == 8  # 16 do not fit
    assert found.memory.total == room
    assert found.busy.typical == pytest.approx(0.1 + 50 * 0.01 / 8)
    assert found.request.typical == pytest.approx(0.1 + 50 * 0.01)
    assert found.request.high == pytest.approx(0.2 + 50 * 0.02)
    assert found.usd is not None
    million = 1e6 / 150 / 3600
    assert found.usd.typical == pytest.approx(1.5 * found.busy.typical * million)
    assert found.usd.high == pytest.approx(3.0 * found.busy.high * million)
    alone = served(asked(facts, llama, room, batch=1), option())
    assert isinstance(alone, Served)
    assert (alone.batch, alone.busy) == (1, alone.request)


@pytest.mark.parametrize(
    ("room", "bounds", "said"),
    [(2**40, {"token_ms": 5.0}, "10 ms for a token, 5"), (2**28, {}, "needs 13.9 GiB, 0.2 GiB")],
)
def test_bounds_that_cannot_be_kept_are_explained(
    facts: Facts, llama: ModelShape, room: int, bounds: dict[str, float], said: str
) -> None:
    assert str(served(asked(facts, llama, room, **bounds), option())).startswith(said)


def test_the_making_of_a_model_by_hand(facts: Facts, llama: ModelShape) -> None:
    pruned, usd, _ = making_of(llama, option(zeros="2:4"), facts)
    assert pruned.typical == pytest.approx(3043 * llama.parameters / 7e9 / 3600)
    assert usd.typical == pytest.approx(1.5 * pruned.typical)
    once, *_ = making_of(llama, option(values="fp8"), facts)
    assert once.typical == pytest.approx(25 * llama.parameters / 7e9 / 3600)
    whole, _, formula = making_of(llama, option(), facts)
    assert (whole.high, formula) == (0, "nothing to make")
    taught, *_ = making_of(llama, option("width-50%-distilled"), facts)
    operations = (6 * llama.scaled(linears=0.5).per_token + 2 * llama.per_token) * 90e9
    hours = operations / (312e12 * 0.4) / 3600
    assert taught.typical == pytest.approx(hours + pruned.typical)
    assert taught.low < taught.typical < taught.high


def test_measured_times_of_a_cut_model(llama: ModelShape) -> None:
    """Layers take as much less time as they have fewer weights; what is outside does not."""
    speed = Measured(llama, {"dense int8": (0.002, 0.010, 0.004)})
    eight = option(values="int8")
    assert speed.step(llama, eight, 1, 100).typical == pytest.approx(0.012)
    assert speed.step(llama, eight, 3, 100).typical == pytest.approx(0.036)
    half = llama.scaled(linears=0.5)
    found = speed.step(half, eight, 1, 100)
    assert found == pytest.approx((0.85 * 0.007, 0.007, 1.15 * 0.007))
    assert speed.prompt(half, eight, 10).typical == pytest.approx(10 * 0.002)


def test_only_what_a_device_gains_from_is_offered(facts: Facts, llama: ModelShape) -> None:
    def names(device: str) -> set[str]:
        return {one.name for one in options_for(llama, facts.hardware[device])}

    assert "2:4 zeros" in names("a100-80gb")
    assert not any("50% zeros" in name for name in names("h100-80gb"))
    assert "fp8" in names("h100-80gb")
    assert "fp8" not in names("a100-80gb")
    here = names("this-machine")
    assert "50% zeros + int4" in here
    assert not any("2:4" in name or "fp8" in name or "experts" in name for name in here)
    assert "as it is" in here


@pytest.mark.parametrize(("name", "tokens_per_second"), [("m4-16gb", 20.87), ("m1-max-64gb", 46.2)])
def test_a_mac_decodes_as_quickly_as_its_owner_measured(
    facts: Facts, name: str, tokens_per_second: float
) -> None:
    """normiebench issues 3 and 40: Llama-3.1-8B in Q4_K_M by llama.cpp, 128 tokens."""
    device = facts.hardware[name]
    speed = Roofline(device, facts.efficiency[device.kind])
    eight = facts.shapes["llama-3.1-8b"].shape("l")
    step = speed.step(eight, option(values="q4_0"), 1, 128)
    assert step.low < 1 / tokens_per_second < step.high


def test_every_price_says_where_it_is_from(facts: Facts) -> None:
    for name, device in facts.hardware.items():
        assert ("price_source" in device.model_fields_set) == bool(device.usd_per_hour), name
    assert facts.hardware["m4-24gb"].memory_gib == 16
    assert facts.hardware["m4-24gb"].bandwidth_gb_s == 120
