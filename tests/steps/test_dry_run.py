"""A dry run says what the run would need, refuses what the run would refuse, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny, tiny_tokenizer
from trained import source_text

import secateur
from secateur.errors import MemoryBudgetError, RecipeError, SourceError
from secateur.reporting.plan import PlanResult

VERBS: dict[str, dict[str, Any]] = {
    "prune": {"method": "wanda", "sparsity": 0.5, "calibration": "text.txt"},
    "structure": {"ffn": 0.5, "effort": "fast", "calibration": "text.txt"},
    "train": {"text": "text.txt", "steps": 3},
    "fit": {"max_size": "60KiB", "calibration": "text.txt"},
    "draft": {"calibration": "text.txt"},
}
LENGTH = {"sequence_length": 32, "windows": 24}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and a text."""
    save_tiny(tmp_path / "model")
    (tmp_path / "text.txt").write_text(source_text()[:30_000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def dry(verb: str, **options: Any) -> Any:
    """Plan a verb in Python."""
    values = {**LENGTH, **VERBS[verb], **options}
    return getattr(secateur, verb)("model", dry_run=True, **values)


@pytest.mark.parametrize("verb", VERBS)
def test_nothing_is_written(verb: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    plan = dry(verb, output="out")
    assert json.dumps(plan.to_json(), default=str)
    assert "plan" in str(plan) or "bounds" in str(plan)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("verb", VERBS)
def test_what_the_run_would_refuse_is_refused(verb: str, place: Path) -> None:
    (place / "taken").mkdir()
    with pytest.raises(RecipeError, match="exists"):
        dry(verb, output="taken")
    with pytest.raises(RecipeError, match="source itself"):
        dry(verb, output="model", overwrite=True)
    with pytest.raises(SourceError):
        getattr(secateur, verb)("nowhere", dry_run=True, **{**LENGTH, **VERBS[verb]})


@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_needs_no_output(verb: str, place: Path, secateur: Any) -> None:
    given = {**LENGTH, **VERBS[verb]}
    words = [w for k, v in given.items() for w in ("--" + k.replace("_", "-"), v)]
    done = secateur(verb, "model", *words, "--dry-run", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)
    assert not list(place.glob("*.partial"))


def test_a_cut_has_the_planned_sizes(place: Path) -> None:
    for options in ({"ffn": 0.5}, {"keep_layers": 1}, {"keep_parameters": 0.8, "ffn": None}):
        plan = dry("structure", **options)
        made = secateur.structure(
            "model", output="out", overwrite=True, **{**LENGTH, **VERBS["structure"], **options}
        )
        after = made.manifest.structure.after
        assert plan.to_json()["after"] == after.to_json()
    timed = dry("structure", ffn=None, decode_latency=0.5)
    assert (timed.after, timed.unknown) == (None, ("--decode-latency",))


def test_a_training_needs_what_was_planned(place: Path) -> None:
    plan = dry("train", batch=2)
    done = secateur.train("model", output="out", batch=2, **{**LENGTH, **VERBS["train"]})
    planned = done.manifest.planned
    names = ("weights", "optimizer", "forward", "logits", "teacher")
    assert {n: plan.memory[n] for n in names} == {n: planned[n] for n in names}
    assert (plan.steps, plan.tokens) == (done.steps, done.tokens)
    assert plan.minutes is None
    assert dry("train", steps=None, minutes=2).tokens is None
    tiny_tokenizer(["other"]).save_pretrained(save_tiny(place / "other", tokenizer=False))
    with pytest.raises(RecipeError, match="different vocabularies"):
        dry("train", teacher="other")


def test_a_fit_names_the_nearest_bounds(place: Path) -> None:
    plan = dry("fit")
    given, nearest = plan.bounds["max_size"]
    assert given == "60KiB"
    assert 0 < float(nearest.removesuffix("KiB")) < 60
    with pytest.raises(RecipeError, match="1KiB"):
        dry("fit", max_size="1KiB")


def test_a_plan_of_several_processes_is_the_plan_of_the_first(place: Path) -> None:
    alone = secateur.prune("model", dry_run=True, sparsity=0.5)
    four = secateur.prune("model", dry_run=True, sparsity=0.5, processes=4)
    assert isinstance(alone, PlanResult)
    assert isinstance(four, PlanResult)
    assert four.to_json()["processes"] == 4
    assert four.plan.sizes["activation"] * 4 == alone.plan.sizes["activation"]
    assert four.plan.disk_bytes == alone.plan.disk_bytes
    with pytest.raises(RecipeError, match="dry_run"):
        secateur.prune("model", sparsity=0.5, output="out", processes=8)
    with pytest.raises(RecipeError, match="dry_run"):
        secateur.prune(secateur.load("model"), dry_run=True, sparsity=0.5)


def test_too_little_memory_is_refused(place: Path) -> None:
    for verb in ("prune", "train", "structure"):
        with pytest.raises(MemoryBudgetError):
            dry(verb, max_memory="1MiB")


TEXT = {"calibration": {"source": "text.txt", **LENGTH}}
STEPS = [
    {"structure": {"keep_layers": 2, "effort": "fast", **TEXT}},
    {"prune": {"sparsity": 0.5, "effort": "fast", **TEXT}},
    {"train": {"text": "text.txt", "steps": 2, **LENGTH}},
    {"compress": {"values": "int8"}},
]


def test_a_chain_tells_what_each_step_leaves(place: Path) -> None:
    before = sorted(place.rglob("*"))
    plan = secateur.chain("model", steps=STEPS, output="out", dry_run=True)
    assert sorted(place.rglob("*")) == before
    made = secateur.chain("model", steps=STEPS, output="out")
    assert [x.step for x in plan.steps] == [x.step for x in made.links]
    for planned, link in zip(plan.steps[:2], made.links, strict=False):
        assert planned.parameters == link.parameters
        assert 0 <= link.file_bytes - planned.file_bytes <= 200 * 41  # headers of tiny tensors
    structure, prune, train, compress = plan.steps[1:]
    assert prune.peak_bytes > 0
    assert prune.seconds is not None
    assert train.peak_bytes > 0
    assert structure.unknown is prune.unknown is train.unknown is compress.unknown is None
    assert all(step in str(plan) for step in ("structure", "prune", "train", "compress"))


def test_a_later_step_that_the_source_cannot_plan_says_why(place: Path) -> None:
    steps = [STEPS[0], {"train": {**STEPS[2]["train"], "teacher": "nowhere/near"}}]
    with pytest.raises(RecipeError, match="source itself"):
        secateur.chain("model", steps=STEPS, output="model", dry_run=True, overwrite=True)
    with pytest.raises(SourceError, match="nowhere"):
        secateur.chain("model", steps=[{"train": {"teacher": "./nowhere"}}], dry_run=True)
    plan = secateur.chain("model", steps=steps, output="out", dry_run=True)
    assert "train: " in str(plan)
    assert plan.steps[2].unknown
    assert plan.steps[2].peak_bytes is None
