"""Allocations on tiny models, against plain forwards of the whole model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from zoo import CONFIGS, matrices, tiny_model, tiny_windows, weight_of

import secateur
from oracles import allocation as oracle
from oracles.mixtures import inputs_of
from secateur.calibration.windows import save_windows
from secateur.engine.prune.tasks import Selection, Settings, tasks_of
from secateur.engine.search.allocation import LevelVariants, allocate, search_levels
from secateur.engine.search.candidate_evaluator import CandidateEvaluator, FitnessCache
from secateur.engine.search.depth import choose_depth
from secateur.engine.search.sensitivity import drawn, pruned_alone
from secateur.engine.search.survey import Survey, grains_of
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.experts import opened_experts
from secateur.models.targets import CheckpointTarget, ModelTarget
from secateur.progress import Silent
from secateur.recipes import methods_of
from secateur.sparsity.allocation import AllocationDefaults, allocations
from secateur.sparsity.allocation.divergence import ByDivergence
from secateur.sparsity.allocation.global_threshold import GlobalThreshold
from secateur.sparsity.allocation.layer_sensitivity import LayerSensitivity
from secateur.sparsity.allocation.owl import OWL
from secateur.sparsity.allocation.search import Search
from secateur.sparsity.methods import compose

NAMES = ["owl", "layer-sensitivity", "divergence", "global", "search"]
SMALL = Search(generations=3, offspring=4, stages=((2, 40), (1, 120)))


pytestmark = pytest.mark.usefixtures("exact_matmuls")


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's search is the small one."""
    short = {name: allocations[name] for name in allocations} | {"search": lambda: SMALL}
    monkeypatch.setattr(methods_of, "allocations", short)


def survey_of(
    model, work: Path, method="wanda", sparsity=0.5, overrides=None, scope=None
) -> Survey:
    target = model if isinstance(model, CheckpointTarget) else ModelTarget(model)
    calibration = CalibrationStream(target, tiny_windows(), 40, True, work)
    tasks = tasks_of(
        target,
        Selection(overrides=overrides or {}),
        compose(method, "unstructured", scope),
        sparsity,
        calibration.layouts,
    )
    return Survey(target, tasks, calibration, Settings(micro_batch_tokens=40, work=work), Silent())


def shares_of(survey: Survey, allocation, sparsity=0.5) -> dict[str, float]:
    return {n: x.sparsity for n, x in allocate(survey, allocation, sparsity).items()}


def zeros(model) -> int:
    return sum(int((weight_of(m) == 0).sum()) for m in matrices(model).values())


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"method": "wanda"}),
        ("llama", {"method": "sparsegpt"}),
        ("gpt2", {"method": "taylor"}),
        ("generic", {"method": "magnitude", "pattern": "4x4"}),
    ],
)
def test_every_allocation_prunes_exactly_what_uniform_does(family: str, options: dict) -> None:
    found = {}
    for name in ("uniform", *NAMES):
        model = tiny_model(family)
        report = secateur.prune(
            model, sparsity=0.6, allocation=name, calibration=tiny_windows(), **options
        )
        found[name] = zeros(model)
        asked = {r.asked for layer in report.layers for r in layer.linears}
        assert (len(asked) == 1) == (name == "uniform")
    assert set(found.values()) == {found["uniform"]}


@pytest.mark.parametrize("family", [*CONFIGS, "mixtral"])
def test_owl_on_a_model_equals_the_formula_on_plain_forwards(family: str, tmp_path: Path) -> None:
    with opened_experts(model := tiny_model(family)):
        check_owl(model, tmp_path)


def check_owl(model, work: Path) -> None:
    inputs, modules = inputs_of(model, [*matrices(model)], tiny_windows()), matrices(model)
    by_layer: dict[str, list] = {}
    for name, module in modules.items():
        layer = next(part for part in name.split(".") if part.isdigit())
        norm = inputs[name].double().square().mean(0).sqrt()  # over the tokens it sees
        by_layer.setdefault(layer, []).append((weight_of(module), norm))
    expected = oracle.owl(list(by_layer.values()), 0.5, 2.0, 0.08)
    # a few outliers, in models this small
    found = shares_of(survey_of(model, work), OWL(outlier_multiple=2.0))
    for name, share in found.items():
        layer = next(part for part in name.split(".") if part.isdigit())
        columns = weight_of(modules[name]).shape[1]
        # The scope is row: whole columns of at most 1/32.
        assert share == pytest.approx(expected[int(layer)], abs=2.01 / columns), name


def test_sensitivity_on_a_model_ranks_by_the_error_of_its_own_method(tmp_path: Path) -> None:
    model = tiny_model("llama")
    inputs, method = (
        inputs_of(model, [*matrices(model)], tiny_windows()),
        compose("wanda", "unstructured", "layer"),
    )
    errors = {}
    for name, module in matrices(model).items():
        weight = weight_of(module)
        mask = method.pattern.mask(weight.abs() * inputs[name].norm(dim=0), 0.5)
        errors[name] = oracle.relative_error(weight, weight * mask, inputs[name])
    expected = dict(zip(errors, oracle.sensitivity(list(errors.values()), 0.6, 0.1), strict=True))
    found = shares_of(
        survey_of(model, tmp_path, sparsity=0.6, scope="layer"), LayerSensitivity(), 0.6
    )
    weights = {name: weight_of(m).numel() for name, m in matrices(model).items()}
    total = sum(weights.values())
    excess = sum((expected[n] - 0.6) * weights[n] for n in weights) / total
    for name, share in found.items():
        # What all are moved by; those at an end of the range stay there.
        assert share == pytest.approx(expected[name] - excess, abs=abs(excess) + 0.01), name
        assert 0.5 - 1e-9 <= share <= 0.7 + 1e-9


def test_the_bounded_threshold_on_a_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    scores = {n: weight_of(m).abs() for n, m in sorted(matrices(model).items())}
    sizes = {n: s.numel() for n, s in scores.items()}
    for index, score in enumerate(scores.values()):
        score *= 1 + index  # layers whose scores are far apart
    with torch.no_grad():
        for name, module in matrices(model).items():
            weight_of(module).copy_(scores[name])
    found = shares_of(survey_of(model, tmp_path, "magnitude"), GlobalThreshold(reach=0.15))
    bounds = {n: (round(0.35 * s + 0.499), int(0.65 * s)) for n, s in sizes.items()}
    expected = oracle.bounded_threshold(scores, sum(sizes.values()) // 2, bounds)
    got = {n: found[n] * sizes[n] for n in scores}
    assert {n: round(x) for n, x in got.items()} == expected
    shares = [x / sizes[n] for n, x in expected.items()]
    assert min(shares) < 0.3515
    assert max(shares) > 0.6485


def tournament_of(survey: Survey, rungs, files: list[Path]) -> FitnessCache:
    outer = EmbeddingAndHead(survey.target, tiny_windows())
    fixed = {n for n, task in survey.tasks.items() if task.sparsity > 0 and n not in rungs}
    variants = LevelVariants(outer, list(rungs), fixed, files)
    evaluator = CandidateEvaluator(outer, Silent(), variants.opened)
    return FitnessCache(evaluator, variants.versions, variants.names, 1, None)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_candidate_is_worth_what_a_plain_forward_gives(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model)
    survey = survey_of(model, tmp_path, overrides={"*.layers.1.mlp.down_proj": 0.25}
                       if family == "llama" else None)  # fmt: skip
    grains = grains_of(survey.tasks, SMALL)
    files = survey.execute(SMALL, grains)
    rungs = SMALL.ladders(grains)
    measure = tournament_of(survey, rungs, files)
    uniform = (0,) * len(rungs)
    early = (1, *uniform[1:])  # shares nothing; the two below share all but the last layer
    late, later = (*uniform[:-1], -1), (*uniform[:-1], 1)
    candidates = [uniform, early, late, later, uniform]
    measured = measure(candidates, 120, 0)
    part = measure(candidates, 40, 2)
    for candidate, whole, some in zip(candidates, measured, part, strict=True):
        other = copy.deepcopy(before)
        shares = {n: r.sparsity(x) for (n, r), x in zip(rungs.items(), candidate, strict=True)}
        inputs = inputs_of(before, [*matrices(before)], tiny_windows())
        for name, module in matrices(other).items():
            weight = weight_of(module)
            score = weight.abs() * inputs[name].norm(dim=0)
            weight *= survey.tasks[name].method.pattern.mask(score, shares.get(name, 0.25))
        with torch.no_grad():
            logits = [m(input_ids=tiny_windows()).logits.flatten(0, 1) for m in (before, other)]
        assert whole == pytest.approx(oracle.divergence(*logits), rel=1e-3)
        picked = slice(4 * 20, 6 * 20)
        assert some == pytest.approx(oracle.divergence(*(x[picked] for x in logits)), rel=1e-3)
    assert len(set(measured)) == 4
    for name, parameter in model.named_parameters():  # looking leaves the model as it was
        assert torch.equal(parameter, before.get_parameter(name)), name


def test_a_search_gives_at_least_what_uniform_gives(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    survey = survey_of(tiny_model("llama"), tmp_path / "a", "sparsegpt")
    grains = grains_of(survey.tasks, SMALL)
    files = survey.execute(SMALL, grains)
    ideal, found = search_levels(survey, SMALL, grains, files)
    assert found["divergence"] < found["uniform_divergence"]
    rungs = SMALL.ladders(grains)
    best = tuple(
        next(x for x in range(r.lowest, r.highest + 1) if r.sparsity(x) == ideal[n])
        for n, r in rungs.items()
    )
    again = tournament_of(survey, rungs, files)([best, (0,) * len(rungs)], 120, 0)
    assert again == [*found.values()]
    tasks = survey.tasks
    pruned = sum(tasks[n].method.pattern.pruned(tasks[n].shape, s) for n, s in ideal.items())
    assert pruned == sum(g.uniform for g in grains.values())


def test_a_killed_search_measures_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = survey_of(tiny_model("llama"), tmp_path)
    grains = grains_of(survey.tasks, SMALL)
    files = survey.execute(SMALL, grains)
    measured: list[int] = []
    plain = CandidateEvaluator.fitness

    def counted(self: CandidateEvaluator, candidates, rows) -> list[float]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(len(candidates))
        return plain(self, candidates, rows)

    monkeypatch.setattr(CandidateEvaluator, "fitness", counted)
    with pytest.raises(KeyboardInterrupt):
        search_levels(survey, SMALL, grains, files)
    monkeypatch.setattr(CandidateEvaluator, "fitness", plain)
    before = (tmp_path / "search.jsonl").read_text()
    resumed = search_levels(survey, SMALL, grains, files)
    after = (tmp_path / "search.jsonl").read_text()
    assert after.startswith(before)
    (tmp_path / "search.jsonl").unlink()
    assert search_levels(survey, SMALL, grains, files) == resumed
    assert (tmp_path / "search.jsonl").read_text() == after


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_each_linear_alone_costs_what_the_formula_gives(family: str, tmp_path: Path) -> None:
    """Every token's (g · ΔW x)², with gradients of one plain backward for each window."""
    with opened_experts(model := tiny_model(family)):
        check_alone(model, tmp_path)


def check_alone(model, work: Path) -> None:
    windows, part = tiny_windows(), ByDivergence(judged_tokens=120)
    survey = survey_of(model, work, sparsity=0.8, scope="layer")
    grains, inputs = grains_of(survey.tasks, part), inputs_of(model, [*matrices(model)], windows)
    found = pruned_alone(survey, part, grains)
    modules = matrices(model)
    assert found.keys() == modules.keys()
    changes = {}
    for name, module in modules.items():
        weight = weight_of(module)
        mask = survey.tasks[name].method.pattern.mask(weight.abs() * inputs[name].norm(dim=0), 0.8)
        changes[name] = (weight * mask - weight).detach()
    sums = dict.fromkeys(modules, 0.0)
    for place, window in enumerate(windows):
        products: dict[str, torch.Tensor] = {}
        outputs: dict[str, torch.Tensor] = {}

        def after(module, args, output, products=products, outputs=outputs):
            name = next(n for n, m in modules.items() if m is module)
            output.retain_grad()
            outputs[name], products[name] = output, (args[0] @ changes[name].t()).detach()

        hooks = [module.register_forward_hook(after) for module in modules.values()]
        log_p = model(input_ids=window[None]).logits[0].log_softmax(-1)
        draw = torch.Generator().manual_seed(place)
        draws = torch.rand(len(log_p), generator=draw, dtype=torch.float64).tolist()
        labels = torch.tensor(
            [
                [next(i for i, up_to in enumerate(accumulate(row)) if up_to > number)]
                for row, number in zip(log_p.detach().exp().tolist(), draws, strict=True)
            ]
        )
        (-log_p.gather(1, labels).sum()).backward()
        for hook in hooks:
            hook.remove()
        for name, output in outputs.items():
            each = (output.grad * products[name]).flatten(0, -2).sum(-1)
            sums[name] += float(each.double().square().sum())
    units: dict[str, list[str]] = {}
    for name in modules:  # the experts of a layer are one unit
        parts = name.split(".")
        if "experts" in parts:
            parts[parts.index("experts") + 1] = "*"
        units.setdefault(".".join(parts), []).append(name)
    for unit in units.values():
        total = sum(weight_of(modules[name]).numel() for name in unit)
        expected = 0.5 * sum(sums[name] for name in unit) / windows.numel() / total
        for name in unit:
            assert float(found[name]) == pytest.approx(expected, rel=1e-3), name


def test_a_token_is_drawn_as_often_as_it_is_probable() -> None:
    p = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    draws = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    labels = drawn(p.expand(len(draws), -1), draws).flatten()
    assert torch.bincount(labels, minlength=6).tolist() == [0, 200, 0, 500, 300, 0]
    assert drawn(p[None], torch.zeros(1, 1, dtype=torch.float64)).tolist() == [[1]]


def test_the_second_order_is_the_divergence_where_tokens_do_not_mix(tmp_path: Path) -> None:
    """Behind the last attention. Before it, the products of different tokens are missing."""
    model, part = tiny_model("llama"), ByDivergence(judged_tokens=1000)
    many = torch.randint(0, 90, (50, 20), generator=torch.Generator().manual_seed(1))
    target = ModelTarget(model)
    stream = CalibrationStream(target, many, 400, True, tmp_path)
    method = compose("wanda", "unstructured", "layer")
    tasks = tasks_of(target, Selection(), method, 0.3, stream.layouts)
    settings = Settings(micro_batch_tokens=400, work=tmp_path)
    survey = Survey(target, tasks, stream, settings, Silent())
    found = pruned_alone(survey, part, grains_of(tasks, part))
    inputs = inputs_of(model, [*matrices(model)], many)
    last = f"layers.{len(target.layers) - 1}."
    behind = [name for name in found if last in name and ("mlp" in name or "o_proj" in name)]
    assert len(behind) == 4
    with torch.no_grad():
        dense = model(input_ids=many).logits.flatten(0, 1)
        for name in behind:
            weight = weight_of(matrices(model)[name])
            before = weight.clone()
            weight *= method.pattern.mask(weight.abs() * inputs[name].norm(dim=0), 0.3)
            logits = model(input_ids=many).logits.flatten(0, 1)
            weight.copy_(before)
            whole = float(found[name]) * weight.numel()
            assert whole == pytest.approx(oracle.divergence(dense, logits), rel=0.15), name


@dataclass(frozen=True)
class Judged(AllocationDefaults):
    """An allocation of somebody else's package, which the engine does not know by name."""

    judged_tokens: int = 60
    reach: float = 0.1
    uses: ClassVar[frozenset[str]] = frozenset({"score", "solver"})

    def observe(self, layer):
        return ByDivergence().observe(layer)

    def working_bytes(self, weights, itemsize):
        return 0

    def allocate(self, kept, grains, sparsity):
        worst = max(kept(), key=lambda item: float(item[1]))[0]
        return {name: sparsity - 0.1 * (name == worst) for name in grains}


def surveyed(work: Path, fast: bool) -> list[float]:
    """What allocations and a choice of depth measure of a tiny model."""
    model, found, target = tiny_model("llama"), [], ModelTarget(tiny_model("llama"))
    for part in (ByDivergence(judged_tokens=120), SMALL):
        folder = work / type(part).__name__
        folder.mkdir(parents=True)
        survey = survey_of(model, folder)
        survey = replace(survey, settings=replace(survey.settings, fast_matmuls=fast))
        grains = grains_of(survey.tasks, part)
        if part is SMALL:
            files = survey.execute(SMALL, grains)
            found += search_levels(survey, SMALL, grains, files)[1].values()
        else:
            found += map(float, pruned_alone(survey, part, grains).values())
    dropped = choose_depth(
        target, tiny_windows(), 1, None, Silent(), method="greedy", fast_matmuls=fast
    )
    return [*found, dropped.fitness]


def test_exact_matmuls_reach_the_surveys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = surveyed(tmp_path / "slow processor", fast=True)
    monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: True)
    assert surveyed(tmp_path / "exact", fast=False) == exact
    rough = surveyed(tmp_path / "fast", fast=True)
    assert rough == pytest.approx(exact, rel=0.2)
    assert all(a != b for a, b in zip(rough, exact, strict=True))


def test_any_allocation_may_have_each_linear_measured_alone(tmp_path: Path) -> None:
    survey = survey_of(tiny_model("llama"), tmp_path, sparsity=0.5)
    tasks = allocate(survey, Judged(), 0.5)
    sparsities = sorted(task.sparsity for task in tasks.values())
    assert sparsities[0] < 0.45
    assert sparsities[1] >= 0.5


@pytest.mark.parametrize("stops", [1, 8, 13, 20])
def test_a_killed_survey_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: int
) -> None:
    part, steps = ByDivergence(judged_tokens=120), []

    class Killed(Silent):
        def step(self, by: int = 1, note: str = "") -> None:
            steps.append(note)
            if len(steps) == stops:
                raise KeyboardInterrupt

    def measured(name: str, progress) -> dict:
        (tmp_path / name).mkdir(exist_ok=True)
        survey = replace(survey_of(tiny_model("llama"), tmp_path / name), progress=progress)
        return pruned_alone(survey, part, grains_of(survey.tasks, part))

    whole = measured("a", Silent())
    with pytest.raises(KeyboardInterrupt):
        measured("b", Killed())
    assert measured("b", Silent()) == whole


def test_checkpoint_and_loaded_model_find_the_same(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "source")
    found = []
    for index, target in enumerate(
        [model, CheckpointTarget(CheckpointReader(tmp_path / "source"), None, torch.device("cpu"))]
    ):
        (tmp_path / str(index)).mkdir()
        found.append(shares_of(survey_of(target, tmp_path / str(index)), SMALL))
        assert [f.name for f in (tmp_path / str(index)).glob("survey*")] == []
    assert found[0] == found[1]


@pytest.mark.usefixtures("short_search")
def test_linears_with_a_sparsity_of_their_own_keep_it(tmp_path: Path) -> None:
    for name in NAMES:
        model = tiny_model("llama")
        secateur.prune(
            model,
            method="wanda",
            sparsity=0.5,
            allocation=name,
            overrides={"*.q_proj": 0.25, "*.layers.1.mlp.*": 0},
            calibration=tiny_windows(),
        )
        rest = []
        for path, module in matrices(model).items():
            sparsity = float((weight_of(module) == 0).float().mean())
            if path.endswith("q_proj"):
                assert sparsity == 0.25
            elif "layers.1.mlp" in path:
                assert sparsity == 0
            else:
                rest.append(weight_of(module))
        assert 2 * sum(int((w == 0).sum()) for w in rest) == sum(w.numel() for w in rest)


def test_nothing_to_allocate(tmp_path: Path) -> None:
    model = tiny_model("llama")
    secateur.prune(
        model, method="magnitude", sparsity=0.5, allocation="owl", overrides={"*": 0.25},
        calibration=tiny_windows(),
    )  # fmt: skip
    assert {float((weight_of(m) == 0).float().mean()) for m in matrices(model).values()} == {0.25}


@pytest.mark.parametrize("allocation", NAMES)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pattern": "2:4"}, "2:4 has one sparsity for every linear"),
        ({"sparsity": 0.5, "scope": "global"}, "one threshold decides"),
    ],
)
def test_where_there_is_nothing_to_decide_it_is_refused(
    allocation: str, options: dict, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        secateur.prune(
            tiny_model("llama"), allocation=allocation, calibration=tiny_windows(), **options
        )


def test_plan_counts_what_an_allocation_needs(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    save_windows(tiny_windows(), tmp_path / "w.safetensors")
    plans = {
        name: secateur.prune(
            str(tmp_path / "source"), dry_run=True, sparsity=0.5, method="sparsegpt",
            allocation=name, calibration=str(tmp_path / "w.safetensors"),
        ).plan
        for name in ("uniform", *NAMES)
    }  # fmt: skip
    prunable = plans["uniform"].prunable_weights
    disk = {name: p.disk_bytes - plans["uniform"].disk_bytes for name, p in plans.items()}
    config = tiny_model("llama").config
    states = 120 * 4 * config.hidden_size * (config.num_hidden_layers + 3)
    assert disk == {
        "uniform": 0, "owl": 0, "layer-sensitivity": 0, "global": 4 * prunable,
        "divergence": states, "search": 7 * 4 * prunable,
    }  # fmt: skip
    flops = {name: p.flops / (2 * prunable * 120) for name, p in plans.items()}
    assert [flops[n] for n in ("uniform", "owl", "layer-sensitivity", "global")] == [1, 2, 2, 2]
    assert flops["divergence"] > 2
    assert flops["search"] > 2
