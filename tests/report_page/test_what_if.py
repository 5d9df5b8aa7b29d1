"""The formulas in JavaScript give the numbers of the formulas in Python."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from secateur.advisor.advice import AdviceQuestion, Requirements
from secateur.advisor.capacity import Capacity, Load, TokenTimes
from secateur.advisor.facts import Facts, read_facts
from secateur.models.shape import LayerCache, LayerKind, ModelShape
from secateur.report_page import report
from secateur.report_page.report import what_if_data

NODE = shutil.which("node") or shutil.which("nodejs")
pytestmark = pytest.mark.skipif(
    NODE is None, reason="no JavaScript engine here (Debian: apt-get install nodejs)"
)

HARNESS = """
const cases = JSON.parse(require("fs").readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(cases.map((data) => {
  const { need, hardware, facts } = data.question, other = facts.hardware[data.other];
  const price = (other ?? hardware).usd_per_hour;
  const device = advisor.deviceOf(data, data.other ?? data.hardware);
  const answer = advisor.adviseOn(data, device, need, price);
  return {
    ...answer,
    commands: answer.chosen ? advisor.commands(answer.chosen.option, data.name) : [],
    apis: advisor.apisOf(data, answer.chosen, need.load, price),
  };
})));
"""


def in_javascript(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of the page's script."""
    script = (report.TEMPLATES / "advisor.js").read_text(encoding="utf-8") + HARNESS
    assert NODE is not None
    found = subprocess.run(
        [NODE, "-e", script], input=json.dumps(cases), capture_output=True, text=True, check=True
    )
    answers: list[dict[str, Any]] = json.loads(found.stdout)
    return answers


def drawn_shape(draw: random.Random, facts: Facts) -> ModelShape:
    """A well-known model, perhaps tied and with other sizes."""
    name = draw.choice([*facts.shapes])
    sizes = replace(
        facts.shapes[name],
        layers=draw.randrange(2, 130),
        ffn=draw.randrange(64, 30000),
        vocabulary=draw.randrange(100, 300000),
        tied=draw.random() < 0.5,
    )
    shape = sizes.shape("drawn & <b>")
    return replace(shape, kinds=drawn_kinds(draw, shape.layers))


def drawn_kinds(draw: random.Random, layers: int) -> tuple[LayerKind, ...]:
    """Layers of any kinds: full, with a window, latent, recurrent, sharing another's cache."""
    window, width = draw.choice([None, draw.randrange(8, 5000)]), draw.randrange(64, 20000)
    kept, state = draw.randrange(8, 9000), draw.randrange(8, 10**6)
    known = (
        LayerCache(kept, kept, window, 0, width, width),
        LayerCache(kept, kept, None, 0, width, 3 * width, latent=True),
        LayerCache(state_bytes=state),
        LayerCache(kept, kept, window, state, width, width),
        LayerCache(0, kept, window, 0, width, width),
    )
    kinds = draw.sample(known, draw.randrange(1, 4))
    return tuple(LayerKind(layers // len(kinds), cache) for cache in kinds)


def drawn(draw: random.Random) -> tuple[str, AdviceQuestion]:
    """A question about some model on some hardware, with any load and bounds."""
    facts = read_facts()
    name = draw.choice([*facts.hardware])
    hardware, shape = facts.hardware[name], drawn_shape(draw, facts)
    times = None
    if hardware.bandwidth_gb_s is None:
        times = {
            f"{zeros} {values}": TokenTimes(*(10 ** draw.uniform(-6, -1) for _ in range(3)))
            for zeros in ("dense", "50%")
            for values in ("bf16", "int8", "int4")
        }
    load = Load(
        10 ** draw.uniform(0, 9),
        draw.randrange(1, 30000),
        draw.randrange(1, 4000),
        draw.uniform(1, 5),
        draw.uniform(0.05, 1),
        draw.choice([None, 10 ** draw.uniform(0, 4)]),
        draw.choice([None, 10 ** draw.uniform(1, 4)]),
    )
    loss, hours = draw.choice([None, draw.uniform(0, 0.5)]), draw.choice([None, 10.0, 500.0])
    size = round((hardware.memory_gib or draw.uniform(0.5, 64)) * 2**30)
    return name, AdviceQuestion(
        shape, hardware, size, facts, Requirements(load, loss, hours), times
    )


def same(found: Any, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=1e-12, abs_tol=1e-15)


def test_many_random_questions_have_the_same_answers() -> None:
    draw = random.Random(25)
    asked = [drawn(draw) for _ in range(120)]
    found = in_javascript([what_if_data(one, "org/model", name) for name, one in asked])
    answers = [question.answer() for _, question in asked]
    kinds = set()
    for wanted, theirs in zip(answers, found, strict=True):
        assert theirs["verdict"] == wanted.verdict
        assert len(theirs["rows"]) == len(wanted.considered)
        for row, mine in zip(theirs["rows"], wanted.considered, strict=True):
            assert row["option"]["name"] == mine.option.name
            assert bool(row["refused"]) == bool(mine.refused)
            assert row["safe"] == mine.safe
            assert all(map(same, row["option"]["kept"], mine.kept))
            for name in ("gpu_hours", "usd"):
                assert ends(row["making"][name], getattr(mine.making, name))
            kinds.add(type(mine.capacity).__name__)
            if isinstance(mine.capacity, Capacity):
                assert mine.cost is not None
                capacity = row["found"]
                assert capacity["memory"]["total"] == mine.capacity.memory.total
                for name in ("shared_by", "batch", "replicas"):
                    assert capacity[name] == getattr(mine.capacity, name)
                for name in ("step", "p99", "alone", "first_token", "busy", "devices"):
                    assert ends(capacity[name], getattr(mine.capacity, name)), name
                for name in ("month", "year", "million_tokens"):
                    assert ends(row["cost"][name], getattr(mine.cost, name)), name
        if wanted.paid_back_months is None:
            assert theirs["paid_back_months"] is None
        else:
            assert same(theirs["paid_back_months"], wanted.paid_back_months)
        assert len(theirs["apis"]) == len(wanted.apis)
        for api, mine_api in zip(theirs["apis"], wanted.apis, strict=True):
            assert same(api["month"], mine_api.month)
            assert (api["requests_per_day"] is None) == (mine_api.requests_per_day is None)
        chosen = wanted.chosen
        assert theirs["commands"] == (
            [] if chosen is None else [*chosen.option.commands("org/model")]
        )
    assert kinds == {"Capacity", "TooMuch"}
    assert any("does not fill a device" in wanted.verdict for wanted in answers)


def ends(found: list[float], wanted: Any) -> bool:
    """Whether low, typical and high agree."""
    return all(map(same, found, (wanted.low, wanted.typical, wanted.high)))


def test_a_question_survives_its_json() -> None:
    draw = random.Random(3)
    for _ in range(20):
        _, question = drawn(draw)
        assert AdviceQuestion.from_json(json.loads(json.dumps(question.to_json()))) == question
        other = question.with_need(requests_per_day=7.0, quality_loss=0.25)
        assert other.need.load.requests_per_day == 7.0
        assert other.need == replace(
            question.need, quality_loss=0.25, load=replace(question.need.load, requests_per_day=7.0)
        )


def test_other_hardware_gives_what_a_new_advice_gives() -> None:
    facts = read_facts()
    model = facts.shapes["llama-2-7b"].shape("llama-2-7b")
    need = Requirements(Load(1e6, 400, 100), 0.03)

    def on(name: str) -> AdviceQuestion:
        device = facts.hardware[name]
        return AdviceQuestion(model, device, round((device.memory_gib or 0) * 2**30), facts, need)

    others = ("h200", "raspberry-pi-5")
    data = what_if_data(on("a100-80gb"), "m", "a100-80gb")
    found = in_javascript([{**data, "other": name} for name in others])
    for name, answer in zip(others, found, strict=True):
        wanted = on(name).answer()
        assert answer["verdict"] == wanted.verdict
        assert [row["option"]["name"] for row in answer["rows"]] == [
            row.option.name for row in wanted.considered
        ]


def test_the_script_has_no_numbers_of_its_own() -> None:
    """Constants come from Python: a change there reaches the page."""
    draw = random.Random(1)
    name, question = drawn(draw)
    while question.answer().chosen is None or question.hardware.kind == "cpu":
        name, question = drawn(draw)
    data = what_if_data(question, "m", name)
    before = in_javascript([data])[0]
    data["constants"]["month_hours"] *= 2
    after = in_javascript([data])[0]
    first = next(row for row in before["rows"] if row["cost"])
    again = next(row for row in after["rows"] if row["option"] == first["option"])
    assert same(again["cost"]["month"][1], 2 * first["cost"]["month"][1])
