"""Write docs/guide-tables.md: the tables of the common guides, computed by `secateur.advisor`.

    python tools/guide_tables.py          # write the page
    python tools/guide_tables.py --check  # fail if it is out of date

Every number of the page is computed here from `secateur/advisor/facts.yaml` and the formulas of
`docs/advise.md`, except those that the page names as said by guides or as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from guide_scenarios import FACTS, asked, billions, ranged, scenarios, shape
from secateur.advisor.advice import MONTH_DAYS, AdviceQuestion, learning_hours, making_of
from secateur.advisor.capacity import GIB, Capacity, Load, Roofline, weight_bytes
from secateur.advisor.facts import Estimate
from secateur.advisor.options import STRUCTURES, VALUES, ZEROS, CompressionWay
from written_files import table, write_or_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/guide-tables.md")

GPU = "a100-80gb"
DEVICE = FACTS.hardware[GPU]


SEVEN = shape("llama-2-7b")


def option(structure: str = "whole", zeros: str = "dense", values: str = "bf16") -> CompressionWay:
    """A way to store a model."""
    return CompressionWay(STRUCTURES[structure], ZEROS[zeros], VALUES[values])


def main() -> None:
    """Write the page, or check it."""
    write_or_check(ROOT, {PAGE: page()}, "guide_tables.py")


def page() -> str:
    """The text of the page."""
    parts: Sequence[Callable[[], Iterable[str]]] = (
        head, training, sizes, speeds, gpus, hosted, against, when, scenarios,
    )  # fmt: skip
    return "\n".join(line for part in parts for line in part())


def head() -> Iterable[str]:
    """What the page is."""
    yield "# The tables of the common guides, computed"
    yield ""
    yield (
        "This page redoes the tables that guides to pruning show: training cost, sizes, speed, "
        "self-hosting against an API, prune against quantize, and when to prune. `python "
        "tools/guide_tables.py` writes it with the formulas of [advise](advise.md), and `make "
        "check` fails when page and formulas differ."
    )
    yield ""
    yield (
        f"Prices and losses: `src/secateur/advisor/facts.yaml` of {FACTS.date}, with sources. A "
        "range is *low to high*; all times on GPUs are estimates. Change any number yourself: "
        "`secateur advise MODEL --html page.html` has a slider for each."
    )
    yield ""


def training() -> Iterable[str]:
    """Making the model."""
    price, per = FACTS.price(DEVICE), SEVEN.per_token
    half = SEVEN.scaled(linears=0.5)
    rows = []
    for method, seconds in FACTS.pruning_seconds_of_7b.items():
        said = "1 to 2 h" if method == "sparsegpt" else "not said"
        hours = Estimate.exact(seconds / 3600)
        usd = ranged(hours.times(price), ".2f")
        rows.append((f"prune it once, {method}", said, f"{seconds:,.0f} s / 3600, published",
                     f"{hours.typical:.2f}", usd))  # fmt: skip
    peak = f"{DEVICE.tflops['bf16']:g} TFLOPS · {FACTS.training_compute[1]:g}"
    for name, said, formula, operations, tokens in (
        ("train it from nothing, 1,000 B tokens", "20 h, $20",
         f"6 · {billions(per)} · 1e12", 6 * per, 1e12),
        ("train after pruning, 0.1 B tokens", "not said",
         f"6 · {billions(per)} · 1e8", 6 * per, 1e8),
        ("distil half of it, 90 B tokens", "not said",
         f"(6 · {billions(half.per_token)} + 2 · {billions(per)}) · 9e10",
         6 * half.per_token + 2 * per, 9e10),
    ):  # fmt: skip
        hours = learning_hours(operations, tokens, DEVICE, FACTS)
        rows.append((name, said, f"{formula} / ({peak}) / 3600", ranged(hours),
                     ranged(hours.times(price))))  # fmt: skip
    yield "## Training cost"
    yield ""
    yield (
        f"Llama-2-7B ({billions(SEVEN.parameters)}) on one {DEVICE.name} at "
        f"{ranged(price, '.2f')} USD an hour."
    )
    yield ""
    yield from table(("what", "guides say", "arithmetic", "GPU hours", "USD"), rows)
    yield (
        "LLaMA-7B took 82,432 A100 hours (its paper), so training from nothing costs thousands "
        "of times what guides say, and pruning once costs less than they say. Training brings "
        "back most of the loss only with billions of tokens; this, and not pruning, is the price "
        "of a small model."
    )
    yield ""


def sizes() -> Iterable[str]:
    """Bits of a weight."""
    rows = []
    for said, zeros, values in (
        ("not said", "50%", "bf16"), ("4x", "dense", "int8"), ("not said", "dense", "int4"),
        ("6x to 12x", "50%", "int8"), ("not said", "50%", "int4"), ("not said", "2:4", "bf16"),
    ):  # fmt: skip
        one = option(zeros=zeros, values=values)
        value, scales = one.values, one.values.bits - one.values.value_bits
        sum_of = f"{value.value_bits} · {1 - one.zeros.sparsity:g} + {one.zeros.index_bits:g}"
        sum_of += f" + {scales:g}" if scales else ""
        bytes_now, before = weight_bytes(SEVEN, one), weight_bytes(SEVEN, option())
        rows.append((one.name, said, f"{sum_of} = {one.bits:g}", f"{16 / one.bits:.2f}x",
                     f"{bytes_now / GIB:.2f} GiB", f"{before / bytes_now:.2f}x"))  # fmt: skip
    yield "## Size and memory"
    yield ""
    yield (
        "Bits of a weight = bits of a value · (1 − sparsity) + 1 bit that says where the zeros "
        "are + scales. The last two columns count all weights of Llama-2-7B: embedding and head "
        "have 8 or 16 bits and no zeros. Dense in bfloat16 it has "
        f"{weight_bytes(SEVEN, option()) / GIB:.2f} GiB."
    )
    yield ""
    columns = ("way", "guides say", "bits of a weight", "of 16 bits", "weights", "smaller by")
    yield from table(columns, rows)
    yield "A pruned model in an ordinary safetensors file is 1.00x: its zeros are stored as zeros."
    yield ""


def speeds() -> Iterable[str]:
    """Decoding on a GPU."""
    speed = Roofline(DEVICE, FACTS.efficiency["cuda"])
    base, many = speed.step(SEVEN, option(), 1, 512), speed.step(SEVEN, option(), 64, 512)
    dense = (ranged(base * 1e3, ".1f"), "1.00x", ranged(many * 1e3, ".1f"), "1.00x")
    rows = [("as it is", "1x", *dense), ("50% zeros, stored dense", "2x to 4x", *dense)]
    for said, one in (
        ("2.04x (A100), 2.5x (H100)", option(zeros="2:4")), ("4x to 6x", option(values="int8")),
        ("not said", option(values="int4")), ("not said", option("layers-25%")),
        ("not said", option("width-25%")),
    ):  # fmt: skip
        cut = one.shape(SEVEN)
        alone, batch = speed.step(cut, one, 1, 512), speed.step(cut, one, 64, 512)
        gain, more = base.typical / alone.typical, many.typical / batch.typical
        rows.append((one.name, said, ranged(alone * 1e3, ".1f"), f"{gain:.2f}x",
                     ranged(batch * 1e3, ".1f"), f"{more:.2f}x"))  # fmt: skip
    read, cache = (SEVEN.linears + SEVEN.head) * 2 / 1e9, SEVEN.cache_bytes(512) / 1e9
    e, layer = FACTS.efficiency["cuda"].bandwidth[1], FACTS.efficiency["cuda"].layer_microseconds[1]
    bandwidth = DEVICE.bandwidth_gb_s or 0.0
    yield "## Inference savings"
    yield ""
    yield f"Milliseconds of a token of Llama-2-7B on one {DEVICE.name}, 512 tokens of context."
    yield ""
    columns = ("way", "guides say", "1 sequence", "gain", "64 sequences", "gain")
    yield from table(columns, rows)
    yield (
        "The first number by hand: a token reads all weights of the linears and the head, "
        f"{read:.2f} GB, and keys and values of 512 tokens, {cache:.2f} GB, at "
        f"{bandwidth:g} GB/s · {e:g}; and {SEVEN.layers} layers have an overhead of "
        f"{layer:g} µs each: {read + cache:.2f} / {bandwidth * e / 1e3:.2f} + "
        f"{SEVEN.layers * layer / 1e3:.2f} = {base.typical * 1e3:.1f} ms. No kernel of a common "
        "engine skips single zeros on a GPU, so they change nothing. 2:4 zeros are bounded by 2x "
        "in hardware; published for whole models are 1.0 (TensorRT-LLM issues 1731 and 1802) to "
        "1.24 (Wanda paper). With many sequences keys and values dominate, and every gain shrinks."
    )
    yield ""


def gpus() -> Iterable[str]:
    """Whether pruning halves the GPUs."""
    question = asked("llama-2-7b", GPU, Load(1e7, 400, 100), None)
    rows = {row.option.name: row for row in question.answer().considered}
    cells = [("50% zeros, stored dense", *serving(rows["as it is"].capacity), "half of the GPUs")]
    for name, said in (("as it is", ""), ("2:4 zeros", "not said"), ("int8", "not said"),
                       ("int4", "not said"), ("width-50%-distilled", "not said")):  # fmt: skip
        cells.append((name, *serving(rows[name].capacity), said))
    yield "### GPUs of a service"
    yield ""
    yield (
        "Llama-2-7B for 10 million requests a day of 400 + 100 tokens; the busiest moment has "
        "twice the average, and 70 % of a GPU's time is planned."
    )
    yield ""
    columns = ("way", "sequences at once", "GPU seconds of a request", "GPUs", "guides say")
    yield from table(columns, cells)
    yield (
        "GPUs = requests per second · 2 · GPU seconds / 0.7. Smaller weights leave memory for "
        "more sequences, and that is what saves GPUs."
    )
    yield ""


def serving(found: object) -> tuple[str, str, str]:
    """Batch, seconds of a request and devices of an option."""
    assert isinstance(found, Capacity)
    return str(found.batch), ranged(found.busy, ".4f"), ranged(found.devices)


def hosted() -> Iterable[str]:
    """Self-hosting against an API."""
    load = Load(1e6, 250, 250)
    tokens = load.requests_per_day * load.context * MONTH_DAYS
    rows = []
    for name, api in FACTS.apis.items():
        said = {"gpt-4o": "$7,500", "gpt-4o-mini": "$1,125"}.get(name, "not said")
        least, most = tokens * api.input / 1e6, tokens * api.output / 1e6
        half = (least + most) / 2
        formula = f"{tokens / 1e9:.2f} B · (250 · {api.input:g} + 250 · {api.output:g}) / 500 / 1e6"
        rows.append((name, said, formula, f"{half:,.0f}", f"{least:,.0f} to {most:,.0f}"))
    yield "## Self-hosting against an API"
    yield ""
    yield (
        f"A million requests a day of 500 tokens are 1e6 · 500 · {MONTH_DAYS:.2f} = "
        f"{tokens / 1e9:.2f} billion tokens a month."
    )
    yield ""
    columns = (
        "hosted model", "guides say", "arithmetic, half of the tokens are answers", "USD a month",
        "all prompts to all answers",
    )  # fmt: skip
    yield from table(columns, rows)
    own = []
    for name in ("llama-3.1-8b", "llama-3.1-70b"):
        advice = asked(name, GPU, load, None).answer()
        row = next(one for one in advice.considered if one.option.changed == 0)
        question = asked(name, GPU, load, 0.03)
        chosen = question.answer().chosen
        assert row.cost is not None
        assert chosen is not None
        assert chosen.cost is not None
        when = {
            api.name: "never" if api.requests_per_day is None else f"{api.requests_per_day:,.0f}"
            for api in question.answer().apis
        }
        own.append((
            name, ranged(row.cost.month), chosen.option.name, ranged(chosen.cost.month),
            when["gpt-4o"], when["gpt-4o-mini"],
        ))  # fmt: skip
    yield (
        f"The same load on {DEVICE.name} GPUs of one's own, with at most 3 % of the accuracy lost:"
    )
    yield ""
    of_own = (
        "model", "as it is, USD a month", "advised", "USD a month",
        "requests a day from which it is cheaper than gpt-4o", "than gpt-4o-mini",
    )  # fmt: skip
    yield from table(of_own, own)
    year = DEVICE.usd_per_hour[1] * 8760
    yield (
        f"An A100 at 50,000 USD a year, which some guides count with, is {50000 / 8760:.2f} USD "
        f"an hour, twice what the same guides say (2 to 3 USD). At {DEVICE.usd_per_hour[1]:g} USD "
        f"it is {year:,.0f} USD a year. Models differ in quality: this compares prices, not "
        "answers. Staff is not counted."
    )
    yield ""


def against() -> Iterable[str]:
    """Prune against quantize."""
    speed = Roofline(DEVICE, FACTS.efficiency["cuda"])
    base = speed.step(SEVEN, option(), 1, 512)
    rows = []
    for one in (option(), option(values="int8"), option(values="int4"), option(zeros="2:4"),
                option("width-25%"), option("layers-25%"), option("width-50%-distilled"),
                option("width-25%", values="int4"),
                option("width-50%-distilled", values="int4")):  # fmt: skip
        low, high = one.kept(FACTS)
        cut = one.shape(SEVEN)
        gain = base.typical / speed.step(cut, one, 1, 512).typical
        kept = f"{100 * low:.3g} %" if low == high else f"{100 * low:.3g} to {100 * high:.3g} %"
        making = making_of(SEVEN, one, FACTS)
        size = weight_bytes(cut, one) / GIB
        rows.append((one.name, kept, f"{size:.2f} GiB", f"{gain:.2f}x",
                     ranged(making.gpu_hours, ",.1f")))  # fmt: skip
    here = [CompressionWay(STRUCTURES["whole"], ZEROS["50%"], VALUES[v]) for v in ("int8", "int4")]
    yield "## Prune against quantize"
    yield ""
    yield (
        f"Llama-2-7B on one {DEVICE.name}, one sequence. Accuracy is published for models of 7 to "
        "8 B."
    )
    yield ""
    columns = ("way", "accuracy kept", "weights", "faster", "GPU hours to make")
    yield from table(columns, rows)
    yield "Where the accuracies come from:"
    yield ""
    for name in ("int8", "int4", "2:4", "50%", "width-25%", "layers-25%", "width-50%-distilled"):
        yield f"- **{name}**: {FACTS.compressions[name].source}"
    yield ""
    yield (
        "So on a GPU: quantize first. It costs minutes and a per cent, and gains more than 2:4 "
        "zeros or a quarter less width, which lose more. Prune further only if quantizing is not "
        "enough, and then pay for distillation."
    )
    yield ""
    yield "On a CPU with kernels that skip zeros, both together are smaller than either:"
    yield ""
    yield from table(
        ("way", "bits of a weight", "weights of Llama-2-7B", "accuracy kept"),
        [(one.name, f"{one.bits:g}", f"{weight_bytes(SEVEN, one) / GIB:.2f} GiB",
          "{:.3g} to {:.3g} %".format(*(100 * k for k in one.kept(FACTS)))) for one in here],
    )  # fmt: skip
    yield (
        "But 50 % zeros lose far more accuracy than the step from int8 to int4. [fit](fit.md) "
        "measures both on your model."
    )
    yield ""


def when() -> Iterable[str]:
    """When to prune."""
    cases: list[tuple[str, Callable[[float | None], AdviceQuestion]]] = [
        ("Llama-2-7B, A100, 1,000 requests a day",
         lambda loss: asked("llama-2-7b", GPU, Load(1e3, 400, 100), loss)),
        ("Llama-2-7B, A100, 10 million a day",
         lambda loss: asked("llama-2-7b", GPU, Load(1e7, 400, 100), loss)),
        ("Llama-3.1-70B, H100, 1 million a day",
         lambda loss: asked("llama-3.1-70b", "h100-80gb", Load(1e6, 400, 100), loss)),
        ("Qwen3-30B-A3B, RTX 4090, 100,000 a day",
         lambda loss: asked("qwen3-30b-a3b", "rtx-4090", Load(1e5, 400, 100), loss)),
        ("Llama-3.1-8B, laptop, 100 a day",
         lambda loss: asked("llama-3.1-8b", "laptop-cpu", Load(100, 200, 200), loss)),
        ("Llama-3.2-3B, laptop, 100 a day",
         lambda loss: asked("llama-3.2-3b", "laptop-cpu", Load(100, 200, 200), loss)),
    ]  # fmt: skip
    bounds = (0.0, 0.01, 0.03, 0.1, None)
    rows = []
    for name, question in cases:
        cells = []
        for loss in bounds:
            chosen = question(loss).answer().chosen
            cells.append(chosen.option.name if chosen else "nothing is sure")
        rows.append((name, *cells))
    yield "## When to prune"
    yield ""
    yield (
        "What `secateur advise` takes, by the accuracy that may be lost. Nothing is changed "
        "where it saves less than 5 % of the cost."
    )
    yield ""
    names = ["none" if b == 0 else "any" if b is None else f"{b:.0%}" for b in bounds]
    yield from table(("load", *names), rows)
    yield (
        "So: if the model does not fit or needs several GPUs, and quantizing breaks no bound, "
        "quantize. Prune where the bound on accuracy is loose, or where training pays for "
        "itself, at a load that needs many GPUs."
    )
    yield ""


if __name__ == "__main__":
    main()
