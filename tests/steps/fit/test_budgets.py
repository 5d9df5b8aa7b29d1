"""Budgets of time and memory: counted like an oracle counts, refused where impossible, measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import save_tiny
from with_kernels import needs_kernels
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.search.knapsack import fits
from secateur.errors import ArchitectureError, RecipeError
from secateur.evaluation.speed import Speed
from secateur.evaluation.token_times import BASE, MatrixTimes
from secateur.recipes.compress import FitRecipe
from secateur.recipes.reading import build_recipe
from secateur.reporting.fit import FitCheck, FitResult
from secateur.runtime.formats import WeightFormat
from secateur.steps.fitting import problem as problem_module
from secateur.steps.fitting.bench import FitBench, check_running
from secateur.steps.fitting.problem import (
    EMBEDDINGS,
    FORMATS,
    MEMORY,
    SECONDS,
    SIZE,
    CostKind,
    Costs,
    PackedFolder,
    as_timed,
    check_feasible,
)

OPTIONS = {"effort": "fast"}
SHAPES = {"a": (1024, 1024), "b": (2048, 1024), "c": (1024, 2048)}


def imaginary_times(shapes: Mapping[str, tuple[int, int]]) -> MatrixTimes:
    """A nanosecond for a byte, and three times as long where there is a bitmask."""
    formats = {as_timed(kind) for kind in FORMATS} | {BASE}
    whole = sum(map(math.prod, shapes.values()))
    layers = {
        stored: 1e-9 * whole * stored.bits / 8 * (3 if stored.sparsity else 1) for stored in formats
    }
    shares = {(s, stored): math.prod(s) / whole for s in set(shapes.values()) for stored in formats}
    return MatrixTimes(layers, shares, 1e-5)


def costs_within(size: float, memory: float, speedup: float) -> Costs:
    """Three linears with all three kinds of cost."""
    times = imaginary_times(SHAPES)
    kinds = (
        CostKind(SIZE, 1000.0, size),
        CostKind(MEMORY, 2000.0, memory),
        CostKind(SECONDS, times.rest, times.base / speedup),
    )
    return Costs(kinds, SHAPES, {"embedding": (512, 64)}, times)


@pytest.mark.parametrize(
    ("size", "memory", "speedup"),
    [(math.inf, math.inf, 1.2), (3e6, math.inf, 1.0), (3e6, 4e6, 1.1), (2e6, math.inf, 1.0)],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_least_of_one_cost_within_the_others(
    size: float, memory: float, speedup: float, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = costs_within(size, memory, speedup)
    others = tuple(math.inf if n == place else most for n, most in enumerate(costs.aim))
    some = FORMATS[:4] + FORMATS[-4:]
    monkeypatch.setattr(PackedFolder, "formats", tuple(some))
    every = [[costs.of(name, kind) for kind in some] for name in costs.units]
    totals = [tuple(map(sum, zip(*each, strict=True))) for each in product(*every)]
    fitting = [total[place] for total in totals if fits(total, others)]
    found = costs.least(place)
    assert (found is None) == (not fitting)
    if found is not None:
        margin = 1 - problem_module.MARGINS[costs.kinds[place].name]
        linears = (found - costs.kinds[place].rest) * margin
        assert linears >= min(fitting) - 1e-12
        # the greedy answer may miss the best one by a step of one linear
        step = max(max(level[place] for level in one) - min(level[place] for level in one)
                   for one in every)  # fmt: skip
        assert linears <= min(fitting) + step


def test_seconds_and_memory_are_those_of_a_format() -> None:
    costs = costs_within(math.inf, math.inf, 1.0)
    int4, int3 = (WeightFormat(values, 0.0) for values in ("int4", "int3"))
    # int3 is smaller in the files, and int4 in memory and in the kernels
    assert costs.of("a", int3)[0] < costs.of("a", int4)[0]
    assert costs.of("a", int3)[1:] == costs.of("a", int4)[1:]
    assert costs.of("b", WeightFormat("int8", 0.0))[2] == pytest.approx(1e-9 * 2048 * 1024)


def test_embeddings_have_values_and_no_zeros() -> None:
    costs = costs_within(math.inf, math.inf, 1.0)
    size_of = {one.name: costs.of(EMBEDDINGS, one)[0] for one in FORMATS}
    assert size_of["int8"] == size_of["bfloat16"] == size_of["70% zeros, int8"]
    assert 0 < size_of["int8"] - (512 * 64 + 4 * 512) < 400  # of headers
    assert size_of["int4"] == size_of["30% zeros, int4"]
    assert 0 < size_of["int4"] - (512 * 64 // 2 + 512 + 512) < 500
    assert size_of["int3"] == size_of["int2"] < size_of["int4"]
    assert costs.of(EMBEDDINGS, FORMATS[0])[2] == 0


def recipe_of(**options: Any) -> FitRecipe:
    return build_recipe(FitRecipe, {"model": "m", "output": "o", **options})


@pytest.mark.parametrize(
    ("options", "limits", "said"),
    [
        (
            {"max_inference_memory": "1MiB"},
            (math.inf, 2.0**20, 0.01),
            "1MiB with 2048",
        ),
        ({"decode_speedup": 9.0}, (math.inf, math.inf, 9.0), "9.0 times"),
        (
            {"decode_speedup": 1.9, "max_size": "1.25MiB"},
            (1.25 * 2**20, math.inf, 1.9),
            "1.25MiB with this decode_speedup",
        ),
    ],
)
def test_an_impossible_bound_names_the_nearest_which_is_possible(
    options: dict[str, Any], limits: tuple[float, float, float], said: str
) -> None:
    costs = costs_within(*limits)
    with pytest.raises(RecipeError, match=said) as caught:
        check_feasible(recipe_of(**options), costs, 10**9)
    (option,) = [caught.value.where]
    possible = str(caught.value.remedy).split(";")[0].rsplit(" ", 1)[1]
    place = ["max_size", "max_inference_memory", "decode_speedup"].index(str(option))
    nearest = list(limits)
    nearest[place] = float(possible.removesuffix("MiB")) * (2**20 if place < 2 else 1)
    check_feasible(recipe_of(**{**options, option: possible if place < 2 else float(possible)}),
                   costs_within(*nearest), 10**9)  # fmt: skip


def test_a_size_that_asks_for_nothing_is_refused() -> None:
    costs = costs_within(8e6, math.inf, 0.01)
    only_size = Costs(costs.kinds[:1], SHAPES)
    with pytest.raises(RecipeError, match="as it is"):
        check_feasible(recipe_of(max_size="8MB"), only_size, 7_900_000)
    check_feasible(recipe_of(max_size="8MB"), only_size, 8_100_000)
    check_feasible(recipe_of(max_size="8MB", max_loss_increase=0.1), only_size, 7_900_000)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "llama.cpp", "decode_speedup": 2.0}, "decode_speedup"),
        ({"target": "llama.cpp", "max_inference_memory": "1GB"}, "max_inference_memory"),
        ({"target": "gpu", "max_size": "1GB"}, "target='gpu'"),
        ({"decode_speedup": 0.0}, "decode_speedup=0.0"),
        ({"max_inference_memory": "much"}, r"max_inference_memory='much': .*kB, MB, GB"),
        ({"minutes": 0.0, "max_size": "1GB"}, "minutes=0.0"),
        ({"max_inference_memory": "1GB", "context_length": 0}, "context_length"),
    ],
)
def test_nonsense_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        secateur.fit(tmp_path / "no model", output=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and windows."""
    place = tmp_path_factory.mktemp("budgets")
    save_tiny(place / "dense", num_hidden_layers=1, hidden_size=64, intermediate_size=128)
    save_windows(tiny_windows(12, 24), place / "windows.safetensors")
    return place


def fitted_at(
    monkeypatch: pytest.MonkeyPatch, place: Path, output: Path, then: float, **options: Any
) -> FitResult:
    """A fit for a speedup of 1.3 that first measures 1.2."""
    speedups: list[float] = [1.2, then, then]

    def race(bench: FitBench, made: Path) -> list[Speed]:
        assert (made / "config.json").exists()
        found = speedups.pop(0) if len(speedups) > 1 else speedups[0]
        return [Speed("packed", (1.0, 1.0), (1.0,), 10 * 2**20),
                Speed("dense int8", (found, found), (1.0,), 20 * 2**20)]  # fmt: skip

    monkeypatch.setattr(problem_module, "time_linears", lambda c, s, p: imaginary_times(s))
    monkeypatch.setattr(FitBench, "race", race)
    options |= {**OPTIONS, "calibration": place / "windows.safetensors", "decode_speedup": 1.3}
    found = secateur.fit(place / "dense", output=output, **options)
    check = next(one for one in found.checks if one.option == "decode_speedup")
    assert check.measured == pytest.approx(then)
    assert check.kept == (then > 1.3)
    first, *more = found.corrections
    assert first.measured == pytest.approx(1.2)
    assert first.predicted >= 1.3
    assert first.reached == pytest.approx(then)
    assert not more
    fastest = imaginary_speedup(place / "dense", dict.fromkeys(found.kind_of, "int4"))
    assert first.aimed == pytest.approx(min(1.3 * first.predicted / 1.2, 0.96 * fastest), rel=0.03)
    # 1.22 is not faster than 1.2 by more than timing errs, so the first winner stays: it lost less
    reached = imaginary_speedup(place / "dense", found.kind_of)
    assert (
        reached >= first.aimed * 0.999 if then > 1.3 else reached == pytest.approx(first.predicted)
    )
    again = json.loads((output / "secateur" / "fit.json").read_text())["corrections"]
    assert len(again) == len(found.corrections)
    return found


def imaginary_speedup(folder: Path, kinds: Mapping[str, str]) -> float:
    """Of a model over dense int8, by the imaginary table."""
    stored = load_file(folder / "model.safetensors")
    shapes: dict[str, Any] = {name: tuple(stored[f"{name}.weight"].shape) for name in kinds}
    times = imaginary_times(shapes)
    by_name = {kind.name: kind for kind in FORMATS}
    taken = sum(times.seconds(shapes[n], as_timed(by_name[kind])) for n, kind in kinds.items())
    return times.base / (times.rest + taken)


@needs_kernels
def test_a_winner_that_is_slower_than_predicted_tightens_the_search(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(fitted_at(monkeypatch, place, tmp_path / "fast", 1.31).checks) == 1


@needs_kernels
def test_a_speedup_is_searched_and_measured_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fitted_at(monkeypatch, place, tmp_path / "fast", 1.22, max_inference_memory="1GB")
    checks = {one.option: one for one in found.checks}
    assert set(checks) == {"decode_speedup", "max_inference_memory"}
    assert 10 * 2**20 < checks["max_inference_memory"].measured < 10**9
    times = imaginary_times(dict.fromkeys("a", (64, 64)))
    assert times.rest == pytest.approx(1e-5)
    seconds = next(one for one in found.costs if one.name == SECONDS)
    assert seconds.limit is not None
    assert seconds.rest < seconds.limit
    (fault,) = found.broken
    assert fault.startswith("--decode-speedup")
    assert fault.endswith(" 1.220")
    record = json.loads((tmp_path / "fast" / "secateur" / "fit.json").read_text())
    assert [one["option"] for one in record["checks"]] == list(checks)


@pytest.mark.parametrize(
    ("speedup", "kept"), [(1.3, True), (1.24, True), (1.23, False), (0.0, False)]
)
def test_a_speedup_may_be_off_by_the_error_of_measuring(speedup: float, kept: bool) -> None:
    ours = Speed("packed", (1.0,), (1.0,)) if speedup else Speed("packed", failure="no kernels")
    dense = Speed("dense int8", (speedup or 1.0,), (1.0,))
    recipe = recipe_of(decode_speedup=1.3)
    (check,) = check_running(recipe, Path(), lambda made: [ours, dense])
    assert check.kept == kept
    if not speedup:
        assert check.said.endswith("no kernels")


@pytest.mark.parametrize(
    ("family", "grown"),
    [
        ("llama", 3 * (2 * 2 * 8) * 2 * 1984),  # three layers, 2 KV heads of 8; 64 are there
        ("mistral", 3 * (2 * 2 * 8) * 2 * 9 * 64),  # windows of 8 have rings of ten tiles
        # one layer of three has no window
        ("gemma3", (2 * 2 * 8) * 2 * (1984 + 2 * 9 * 64)),
        ("deepseek_v3", 3 * (8 + 4) * 2 * 1984),  # a latent of 8 and a rotary key of 4
        ("mamba", 0),
    ],
)
def test_the_cache_beyond_the_measured_text_grows_by_kind_of_layer(
    family: str, grown: int, tmp_path: Path
) -> None:
    """On 91843e48 every layer grew, so bounds that hold were called broken."""
    save_tiny(tmp_path, family)
    ours = Speed("packed", (1.0,), (1.0,), 10 * 2**20)
    recipe = recipe_of(max_inference_memory="1GB", context_length=2048)
    (check,) = check_running(recipe, tmp_path, lambda made: [ours])
    assert check.measured == 10 * 2**20 + grown


@pytest.mark.parametrize(
    ("option", "wanted", "measured", "nearest"),
    [
        ("max_size", 2**20, 2**20 + 1, "1.1MiB"),
        ("max_inference_memory", 2**30, 2**31, "2048.0MiB"),
        ("max_loss_increase", 0.1, 0.12341, "0.1235"),
        ("decode_speedup", 1.5, 1.4229, "1.422"),
    ],
)
def test_the_nearest_bound_is_on_the_side_that_is_kept(
    option: str, wanted: float, measured: float, nearest: str
) -> None:
    check = FitCheck(option, wanted, measured, kept=False)
    assert check.said.endswith(f" {nearest}")
    assert check.said.startswith("--" + option.replace("_", "-"))


@needs_kernels
def test_a_speedup_of_a_model_that_our_loop_does_not_decode_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "gpt2")
    with pytest.raises(ArchitectureError, match="llama") as caught:
        secateur.fit(tmp_path / "dense", output=tmp_path / "no", decode_speedup=1.1)
    assert caught.value.where == "decode_speedup"
    assert not (tmp_path / "no.partial").exists()
