"""Several processes make the model that one makes, and end together."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from slow import slow_but
from tiny import save_tiny, tensors_of
from together import (
    Started,
    as_command,
    carried_out,
    fail_in_a_layer,
    run_together,
    together,
    train_in_python,
    train_until_killed,
)
from trained import source_text

from secateur.recipes.prune import presets
from secateur.sparsity.allocation import allocations

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
OPTIONS: dict[str, Any] = {
    "sparsity": 0.5,
    "memory": {"micro_batch_tokens": 32},
}

WANDA = {"method": "wanda"}

CASES: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "allocation": "owl"},
    "sparsegpt": {"method": "sparsegpt", "memory": {"micro_batch_tokens": 64}},
    "asymmetric": {"method": "sparsegpt", "asymmetric": True},
    "experts": {"method": "wanda", "model": "experts", "sequential": "layer"},
}

MORE: dict[str, dict[str, Any]] = {
    "all-groups": {"method": "sparsegpt", "sequential": "layer"},
    "tuned": {"method": "wanda", "reconstruction": {"passes": 1}},
    "gradients": {"method": "taylor"},
    "per-layer embeddings": {"method": "wanda", "model": "gemma3n"},
    "gradients of gemma3n": {"method": "taylor", "model": "gemma3n"},
    "on-disk": {"method": "wanda", "memory": {"micro_batch_tokens": 32, "activations": "disk"}},
}

ROUNDED = ("tuned", "gradients", "gradients of gemma3n")
"""Cases in which the sums of two processes round in another way than those of one."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a text."""
    place = tmp_path_factory.mktemp("together")
    save_tiny(place / "dense", **SIZES)
    save_tiny(place / "experts", "mixtral")
    save_tiny(place / "gemma3n", "gemma3n_text shared")
    (place / "text.txt").write_text(source_text()[:20_000])
    return place


def recipe(place: Path, output: Path, case: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with absolute paths."""
    text = {"source": str(place / "text.txt"), "windows": 11, "sequence_length": 32}
    values = {"model": "dense", **OPTIONS, "calibration": text, **case}
    return {**values, "model": str(place / values["model"]), "output": str(output)}


Alone = Callable[..., Path]


@pytest.fixture(scope="module")
def alone(place: Path) -> Alone:
    """What one process makes of a case."""
    found: dict[str, Path] = {}

    def made(case: Mapping[str, Any]) -> Path:
        key = json.dumps(case)
        if key not in found:
            found[key] = place / f"one-{len(found)}"
            carried_out("prune", recipe(place, found[key], case))
        return found[key]

    return made


def moved_zeros(one: Path, other: Path) -> int:
    """The number of weights that are zero in only one of two models."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    return sum(int(((ours[n] == 0) != (theirs[n] == 0)).sum()) for n in ours)


def moved_weights(one: Path, other: Path) -> int:
    """The number of weights that differ in two models."""
    ours, theirs = tensors_of(one), tensors_of(other)
    return sum(int((ours[n] != theirs[n]).sum()) for n in ours)


def apart(one: Path, other: Path) -> float:
    """The largest difference of a weight in two models."""
    ours, theirs = tensors_of(one), tensors_of(other)
    return max(float((ours[n] - theirs[n]).abs().max()) for n in ours)


def recorded(folder: Path) -> list[str]:
    """The linears in the ledger of a run."""
    lines = (folder / "secateur" / "layers.jsonl").read_text().splitlines()
    return [record["name"] for line in lines for record in json.loads(line)["linears"]]


@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_two_processes_make_the_model_of_one(
    place: Path, alone: Alone, tmp_path: Path, cases: Mapping[str, Mapping[str, Any]]
) -> None:
    recipes = [recipe(place, tmp_path / "two" / name, case) for name, case in cases.items()]
    run_together(2, together, tmp_path, "prune", recipes, {})
    for name, case in cases.items():
        one, two = alone(case), tmp_path / "two" / name
        assert moved_zeros(one, two) == 0, name
        # Gradients are summed in float32, and tuning computes a step with one window only once.
        assert apart(one, two) <= (1e-4 if name in ROUNDED else 0), name
        source = place / case.get("model", "dense")
        assert moved_zeros(two, source) > 10_000, name
        assert recorded(one) == recorded(two), name
    assert not list((tmp_path / "two").glob("*.partial"))


DISTILLED: Mapping[str, int] = {"thorough": 128, "best": 256}
"""Tokens that a tiny model reads in the efforts that distill."""

Cell = tuple[str, str, str]
"""An effort, an allocation and a model."""

FEW: list[Cell] = [
    ("balanced", "divergence", "dense"),
    ("balanced", "divergence", "experts"),
    ("thorough", "owl", "dense"),
    ("fast", "global", "experts"),
]
EVERY = {
    effort: [(effort, how, model) for how in allocations.names() for model in ("dense", "experts")]
    for effort in presets
}


@pytest.mark.parametrize(
    "cells",
    slow_but([FEW], [FEW, *EVERY.values()]),
    ids=["few", *EVERY],
)
def test_an_effort_makes_the_same_bytes_with_two_processes(
    place: Path, alone: Alone, tmp_path: Path, cells: list[Cell]
) -> None:
    cases = list[dict[str, Any]]()
    for effort, allocation, model in cells:
        assert bool(presets[effort].get("distillation")) == (effort in DISTILLED)
        learned = {"distillation": {"tokens": DISTILLED[effort]}} if effort in DISTILLED else {}
        text = {"source": str(place / "text.txt"), "windows": 4, "sequence_length": 32}
        case = {"effort": effort, "allocation": allocation, "model": model, "calibration": text}
        cases.append({**case, **learned})
    recipes = [recipe(place, tmp_path / f"two-{n}", case) for n, case in enumerate(cases)]
    run_together(2, together, tmp_path, "prune", recipes, {}, seconds=500)
    for n, case in enumerate(cases):
        one, two = alone(case), tmp_path / f"two-{n}"
        same = (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        assert same, case
        assert moved_zeros(two, place / case["model"]) > 10_000, case


@pytest.mark.slow
def test_three_processes_with_two_micro_batches_make_the_model_of_one(
    place: Path, alone: Alone, tmp_path: Path
) -> None:
    every = {name: dict(case) for name, case in (CASES | MORE).items()}
    for case in every.values():
        activations = case.get("memory", {}).get("activations", "memory")
        case["memory"] = {"micro_batch_tokens": 256, "activations": activations}
    recipes = [recipe(place, tmp_path / "three" / name, case) for name, case in every.items()]
    run_together(3, together, tmp_path, "prune", recipes, {})
    for name, case in every.items():
        one, three = alone(case), tmp_path / "three" / name
        # Tuning sums the gradients of eight windows, which are divided among processes.
        assert moved_zeros(one, three) <= (100 if name == "tuned" else 0), name
        if name != "tuned":
            assert apart(one, three) <= (1e-4 if name == "gradients" else 0), name
        assert moved_zeros(three, place / case.get("model", "dense")) > 10_000, name


def experts_recipe(place: Path, output: Path, **more: Any) -> dict[str, Any]:
    """A cut of experts."""
    own = recipe(place, output, {"model": "experts"})
    kept = ("model", "output", "calibration", "memory")
    return {**{name: own[name] for name in kept}, "experts": 2, **more}


def test_processes_share_the_survey_of_experts(place: Path, tmp_path: Path) -> None:
    for by in (criteria := ("reap", "frequency")):
        carried_out("structure", experts_recipe(place, tmp_path / "one" / by, experts_by=by))
    recipes = [experts_recipe(place, tmp_path / "three" / by, experts_by=by) for by in criteria]
    run_together(3, together, tmp_path, "structure", recipes, {})
    for by in criteria:
        one, three = (tensors_of(tmp_path / count / by) for count in ("one", "three"))
        assert one.keys() == three.keys()
        assert all(one[tensor].equal(three[tensor]) for tensor in one), by
    assert not list((tmp_path / "three").glob("*.partial"))


def errors(printed: str) -> list[str]:
    """The errors that a process has printed; usually only the first one prints any."""
    return [line for line in printed.splitlines() if line.startswith("error:")]


@pytest.mark.parametrize("victim", slow_but([1], [0, 1]))
def test_an_error_of_one_process_ends_all_with_its_reason(
    place: Path, alone: Alone, tmp_path: Path, victim: int
) -> None:
    values = recipe(place, tmp_path / "model", WANDA)
    started = Started(2, fail_in_a_layer, tmp_path, values, victim, 1, False)
    assert started.join(60) == [1, 1]
    assert "the weights are NaN" in started.output(0)
    assert ("process 1 " in started.output(0)) == (victim == 1)
    assert all("the weights are NaN" in line for line in errors(started.output(1)))
    carried_out("prune", values, resume=True)
    assert apart(tmp_path / "model", alone(WANDA)) == 0


@pytest.mark.parametrize("effort", slow_but([None], [None, *presets]))
def test_a_killed_process_ends_the_others_and_two_finish_what_three_began(
    place: Path, alone: Alone, tmp_path: Path, effort: str | None
) -> None:
    learned = {"distillation": {"tokens": DISTILLED[effort]}} if effort in DISTILLED else {}
    case = {"effort": effort, **learned} if effort else WANDA
    values = recipe(place, tmp_path / "model", case)
    started = Started(3, fail_in_a_layer, tmp_path, values, 2, 2, True)
    started.all[2].join(120)  # it kills itself
    assert started.join(30) == [1, 1, -signal.SIGKILL]
    assert "process 2 " in started.output(0)
    stored = sorted(x.name for x in (tmp_path / "model.partial" / "work").glob("inputs-*"))
    assert stored == [f"inputs-0002.{rows}.bin" for rows in ("0-4", "4-8", "8-11")]
    run_together(2, together, tmp_path, "prune", [values], {"resume": True})
    assert apart(tmp_path / "model", alone(case)) == 0


@pytest.mark.parametrize(
    ("verb", "more", "said"),
    [
        ("prune", {"method": "wanda", "compress": "int8"}, "--compress"),
        ("prune", {"method": "wanda", "calibration": {"windows": 1}}, "1 calibration windows"),
        ("structure", {"experts": 2, "keep_layers": 1}, "--keep-layers"),
        ("structure", {"experts": 2, "distillation": {"epochs": 1}}, "--distill-epochs"),
        ("compress", {}, "secateur compress"),
        ("fit", {"max_size": "1MiB"}, "secateur fit"),
        ("prune", {"method": "wanda"}, "--dry-run"),
    ],
)
def test_what_several_cannot_do_is_refused_before_any_work(
    place: Path, tmp_path: Path, verb: str, more: dict[str, Any], said: str
) -> None:
    values = recipe(place, tmp_path / "x", {})
    if "calibration" in more:
        more = {**more, "calibration": values["calibration"] | more["calibration"]}
    else:  # known before the model is looked for
        values["model"] = "./nowhere"
    if verb != "prune":
        values = {name: values[name] for name in ("model", "output")}
    work = partial(as_command, dry_run=True) if said == "--dry-run" else as_command
    started = Started(2, work, tmp_path, verb, {**values, **more})
    assert started.join(60) == [2, 2]
    assert said in started.output(0)
    assert not list(tmp_path.glob("x*"))


def training(place: Path, output: Path, **more: Any) -> dict[str, Any]:
    """A recipe of a training."""
    return {
        "model": str(place / "dense"), "output": str(output), "steps": 2, "batch": 2,
        "text": [str(place / "text.txt")], "windows": 8, "sequence_length": 16, "teacher":
        str(place / "dense"), "top_k": 4, "validation_windows": 2, "device": "cpu", **more,
    }  # fmt: skip


@pytest.mark.parametrize("train", [train_in_python, partial(as_command, "train")])
def test_a_training_waits_for_what_the_first_process_writes(
    place: Path, tmp_path: Path, train: Callable[..., None]
) -> None:
    run_together(2, train, tmp_path, training(place, tmp_path / "trained"))
    assert moved_weights(tmp_path / "trained", place / "dense") > 1000


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_training_ends_in_all_and_goes_on_with_the_same_bits(
    place: Path, tmp_path: Path, victim: int
) -> None:
    whole, cut = (
        training(place, tmp_path / name, steps=6, windows=16, teacher=None, top_k=None)
        | {"save_minutes": 0}
        for name in ("whole", "cut")
    )
    run_together(2, partial(as_command, "train"), tmp_path, whole)
    started = Started(2, train_until_killed, tmp_path, cut, victim, 4)
    started.all[victim].join(120)  # it kills itself
    codes = started.join(40)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert (tmp_path / "cut.partial").is_dir()
    run_together(2, partial(as_command, "train", resume=True), tmp_path, cut)
    assert moved_weights(tmp_path / "whole", tmp_path / "cut") == 0
