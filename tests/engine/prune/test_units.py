"""Whole units cut by a run: patterns by linear, coupled budgets, whole blocks gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.engine.prune.run import prune_layers
from secateur.engine.prune.tasks import Selection, Settings, tasks_of, with_sparsities
from secateur.engine.search.allocation import allocate
from secateur.engine.search.survey import Survey, grains_of
from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.models.checkpoint import CheckpointReader
from secateur.models.targets import ModelTarget
from secateur.progress import Silent
from secateur.runs.ledger import Ledger
from secateur.sparsity.allocation import allocations
from secateur.sparsity.allocation.global_threshold import GlobalThreshold
from secateur.sparsity.allocation.layer_sensitivity import LayerSensitivity
from secateur.sparsity.allocation.owl import OWL
from secateur.sparsity.allocation.search import Search
from secateur.sparsity.methods import compose
from secateur.structured.cut import Cut, consumers, sizes_of, unit_width
from secateur.structured.design import accounting
from secateur.structured.surgery import VariedSizesWarning, cut_from_zeros, cut_model

SEARCH = Search(levels=4, step=0.25, generations=3, offspring=4, stages=((2, 40), (1, 80)))
ALLOCATIONS = [
    allocations["uniform"](),
    OWL(),
    LayerSensitivity(),
    GlobalThreshold(),
    GlobalThreshold(1.0),
    SEARCH,
]


pytestmark = pytest.mark.usefixtures("exact_matmuls")


def unit_costs(model) -> dict[str, int]:
    """The parameters that really go with one unit, counted by surgery's accounting."""
    sizes = sizes_of(model)
    cuts = {
        "groups": Cut(groups={0: tuple(range(1, sizes.groups[0]))}),
        "neurons": Cut(neurons={0: tuple(range(1, sizes.neurons[0]))}),
    }
    found = {}
    for kind, cut in cuts.items():
        counted = accounting(model, cut)
        found[kind] = counted.before.decoder - counted.after.decoder
    return found


def unit_survey(model, work: Path, solver="osscar", score="obs", multiple=1, shares=None) -> Survey:
    sizes, readers, costs = sizes_of(model), consumers(model), unit_costs(model)
    target, each = ModelTarget(model), {"groups": 1, "neurons": multiple}
    shares = shares or dict.fromkeys(readers, 0.5)
    calibration = CalibrationStream(target, tiny_windows(), 40, True, work)
    tasks = tasks_of(
        target,
        Selection(
            include=tuple(f"*.{name}" for name in readers.values()),
            starts={f"*.{readers[kind]}": share for kind, share in shares.items()},
        ),
        compose(None, "unstructured", score=score, solver=solver),
        0.0,
        calibration.layouts,
        methods={
            f"*.{name}": compose(
                None, f"*x{unit_width(sizes, kind)}/{each[kind]}", score=score, solver=solver
            )
            for kind, name in readers.items()
        },
        costs={
            f"{target.architecture.layer_name(layer)}.{name}": costs[kind] * each[kind]
            for kind, name in readers.items()
            for layer in range(len(target.layers))
        },
    )
    return Survey(target, tasks, calibration, Settings(micro_batch_tokens=40, work=work), Silent())


def execute(survey: Survey, tasks=None) -> Ledger:
    ledger = Ledger()
    tasks = survey.tasks if tasks is None else tasks
    prune_layers(survey.target, tasks, survey.calibration, survey.settings, ledger, survey.progress)
    return ledger


def decoder(model, cut: Cut) -> int:
    return accounting(model, cut).after.decoder


@pytest.mark.parametrize(
    ("allocation", "multiple"),
    [*((allocation, 4) for allocation in ALLOCATIONS), (allocations["uniform"](), 1), (SEARCH, 1)],
)
def test_every_allocation_removes_the_same_coupled_parameters(allocation, multiple, tmp_path):
    model = tiny_model("llama")
    before, costs = decoder(model, Cut()), unit_costs(model)
    sizes = sizes_of(model)
    survey = unit_survey(model, tmp_path, multiple=multiple)
    execute(survey, allocate(survey, allocation, 0.0))
    cut = cut_from_zeros(model)
    asked = costs["groups"] * sum(sizes.groups) // 2 + costs["neurons"] * sum(sizes.neurons) // 2
    if all(cut.groups.get(i) != () and cut.neurons.get(i) != () for i in range(3)):
        assert before - decoder(model, cut) == asked
    gone = {
        "groups": sum(g - len(cut.groups.get(i, range(g))) for i, g in enumerate(sizes.groups)),
        "neurons": sum(n - len(cut.neurons.get(i, range(n))) for i, n in enumerate(sizes.neurons)),
    }
    assert sum(gone[kind] * costs[kind] for kind in gone) == asked
    kept = [len(cut.neurons.get(i, range(n))) for i, n in enumerate(sizes.neurons)]
    assert all(count % multiple == 0 for count in kept)


def test_a_search_may_take_a_whole_block(tmp_path):
    survey = unit_survey(tiny_model("llama"), tmp_path)
    rungs = SEARCH.ladders(grains_of(survey.tasks, SEARCH))
    assert {ladder.sparsity(ladder.highest) for ladder in rungs.values()} == {1.0}
    assert {ladder.sparsity(ladder.lowest) for ladder in rungs.values()} == {0.0}


def test_a_block_without_units_adds_nothing_and_is_cut_away(tmp_path, caplog):
    model = tiny_model("mistral")
    survey = unit_survey(model, tmp_path)
    gone = [n for n in survey.tasks if n.endswith(("1.self_attn.o_proj", "2.mlp.down_proj"))]
    execute(survey, with_sparsities(survey.tasks, dict.fromkeys(gone, 1.0)))
    cut = cut_from_zeros(model)
    assert cut.groups[1] == ()
    assert cut.neurons[2] == ()
    with pytest.warns(VariedSizesWarning):
        smaller = cut_model(model, cut)
    assert not caplog.records  # that a block is gone was asked for: it has not collapsed
    with torch.no_grad():
        expected = model(input_ids=tiny_windows()).logits
        torch.testing.assert_close(
            smaller(input_ids=tiny_windows()).logits, expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("score", "solver"),
    [("activation", "least-squares"), ("fluctuation", "zero"), ("activation", "osscar")],
)
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt", "gpt_neox"])
def test_scores_cut_units_of_every_consumer(family, score, solver, tmp_path):
    model = tiny_model(family)
    sizes = sizes_of(model)
    execute(unit_survey(model, tmp_path, solver, score))
    cut = cut_from_zeros(model)
    assert all(len(cut.groups[i]) == n // 2 for i, n in enumerate(sizes.groups))
    assert all(len(cut.neurons[i]) == n // 2 for i, n in enumerate(sizes.neurons))


@pytest.mark.parametrize("score", ["coupled-taylor", "fluctuation"])
def test_biases_make_up_for_means_on_disk(score, tmp_path):
    source = save_tiny(tmp_path / "source", "gpt2")
    save_windows(tiny_windows(), tmp_path / "windows.safetensors")
    secateur.prune(
        source,
        output=tmp_path / "pruned",
        calibration=tmp_path / "windows.safetensors",
        sparsity=0.25,
        score=score,
        solver="bias",
        pattern="*x1",
        include=["*.mlp.c_proj"],
    )
    before, after = CheckpointReader(source), CheckpointReader(tmp_path / "pruned")
    for layer in range(3):
        name = f"transformer.h.{layer}.mlp.c_proj"
        gone = (after.read(f"{name}.weight") == 0).all(1)
        assert int(gone.sum()) == 32
        assert not torch.equal(after.read(f"{name}.bias"), before.read(f"{name}.bias"))
        other = f"transformer.h.{layer}.attn.c_proj.bias"
        assert torch.equal(after.read(other), before.read(other))
