"""`--must-keep`: what a result has to keep before it gets its name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import runner
from task_rows import write_task
from tiny import byte_tokenizer, save_tiny
from torch.nn import functional

import secateur
from secateur.calibration.windows import evaluation_windows
from secateur.errors import RecipeError, SecateurError, SourceError, VerificationError
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.shared import Bound
from secateur.runs.measured import SampleRecord, TaskRecord
from secateur.runs.records import MustKeep
from secateur.steps import gate as room
from secateur.steps.prune import Prune
from secateur.steps.structure import CutStructure

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on; " * 60
LENGTH = 32

Options = dict[str, Any]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "dense", num_hidden_layers=2)
    (tmp_path / "made.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "other.txt").write_text(TEXT.replace("fox", "cat"), encoding="utf-8")
    return tmp_path


def options_of(place: Path, *bounds: str) -> Options:
    """The options that all calls share."""
    return {
        "output": place / "out",
        "calibration": str(place / "made.txt"),
        "windows": 4,
        "sequence_length": LENGTH,
        "must_keep": [bound.replace("@other", f"@{place / 'other.txt'}") for bound in bounds],
        "must_keep_items": 3,
    }


VERBS: Mapping[str, Options] = {
    "prune": {"method": "wanda", "sparsity": 0.5},
    "structure": {"ffn": 0.5, "effort": "fast"},
}
WORKS: Mapping[str, Any] = {"prune": Prune, "structure": CutStructure}


def distances(place: Path) -> tuple[list[float], list[float]]:
    """KL(source ‖ result) and the rise of the loss of each window, by whole models in float64."""
    tokenizer = load_tokenizer(place / "dense")
    text = (place / "other.txt").read_text(encoding="utf-8")
    windows = evaluation_windows(text, tokenizer, LENGTH, max_windows=3)
    ours, theirs = (secateur.load(place / name).double() for name in ("out", "dense"))
    kl, rise = [], []
    with torch.no_grad():
        for ids in windows:
            q, p = (model(ids[None]).logits[0, :-1].log_softmax(-1) for model in (ours, theirs))
            kl.append(float((p.exp() * (p - q)).sum(-1).mean()))
            losses = [float(functional.nll_loss(x, ids[1:])) for x in (q, p)]
            rise.append(losses[0] - losses[1])
    return kl, rise


@pytest.mark.parametrize("verb", VERBS)
def test_broken_then_published_with_a_looser_limit(
    verb: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = getattr(secateur, verb)
    tight = options_of(place, "divergence@other:1e-9", "loss@other:9") | VERBS[verb]
    with pytest.raises(VerificationError) as raised:
        call(place / "dense", **tight)
    assert raised.value.exit_code == 3
    broken, held = raised.value.measured
    assert (broken["holds"], held["holds"]) == (False, True)
    assert f"{broken['value']:.4f}" in raised.value.what
    assert not (place / "out").exists()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("done before")

    monkeypatch.setattr(WORKS[verb], "work", never)
    monkeypatch.setattr(room, "run_evaluation", never)
    loose = options_of(place, "divergence@other:5", "loss@other:9") | VERBS[verb]
    result = call(place / "dense", **loose, resume=True)
    assert not (place / "out.partial").exists()
    kept = result.manifest.must_keep
    assert [one.bound for one in kept] == loose["must_keep"]
    assert [one.value for one in kept] == [broken["value"], held["value"]]
    for one, windows in zip(kept, distances(place), strict=True):
        mean = math.fsum(windows) / 3
        spread = math.sqrt(sum((x - mean) ** 2 for x in windows) / 2 / 3)
        assert (one.value, one.standard_error) == pytest.approx((mean, spread), rel=2e-3, abs=1e-7)
    notes = place / "out" / "secateur"
    manifest = json.loads((notes / "manifest.json").read_text(encoding="utf-8"))
    assert [MustKeep(**x) for x in manifest["must_keep"]] == [*kept]
    evaluation = json.loads((notes / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["divergence"][0]["protocol_id"] == kept[0].protocol_id
    for shown in (str(result), (place / "out" / "README.md").read_text(encoding="utf-8")):
        assert f"{kept[0].value:.4f}" in shown
    assert "divergence@other.txt:5" in shown
    assert str(place) not in shown
    again = call(place / "dense", **loose, resume=True)
    assert again.manifest == result.manifest
    with pytest.raises(RecipeError, match="must_keep"):
        call(place / "dense", **tight, resume=True)


def test_other_weights_are_judged_anew(place: Path) -> None:
    options = options_of(place, "divergence@other:1e-9") | VERBS["prune"]
    values = []
    for sparsity in (0.5, 0.75):
        with pytest.raises(VerificationError) as raised:
            secateur.prune(
                place / "dense", **options | {"sparsity": sparsity}, restart=sparsity > 0.5
            )
        values.append(raised.value.measured[0]["value"])
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("bound", "kind"),
    [
        ("gsm8k", RecipeError),
        ("gsm8k:much", RecipeError),
        ("gsm8k:nan", RecipeError),
        ("gsm8k:0", RecipeError),
        ("gsm8k:1.5", RecipeError),
        (":0.5", RecipeError),
        ("loops:-0.1", RecipeError),
        ("divergence:0.1", RecipeError),
        ("divergence@:0.1", RecipeError),
        ("piqa@other:0.1", RecipeError),
        ("loss@other:0", RecipeError),
        ("loss@missing.txt:0.1", SourceError),
        ("pika:0.9", RecipeError),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_refused_before_any_work(
    bound: str, kind: type[SecateurError], dry_run: bool, place: Path
) -> None:
    write_task(place / "rows", "piqa", 2)
    options = options_of(place, bound) | VERBS["structure"] | {"task_data": place / "rows"}
    with pytest.raises(kind) as raised:
        secateur.structure(place / "nowhere", **options, dry_run=dry_run)
    assert "nowhere" not in str(raised.value)
    assert not (place / "out.partial").exists()


def test_the_text_that_made_the_result(place: Path) -> None:
    options = options_of(place, f"loss@{place / 'made.txt'}:1") | VERBS["prune"]
    with pytest.raises(RecipeError, match="made the result"):
        secateur.prune(place / "dense", **options)
    del options["must_keep"]
    with pytest.raises(RecipeError, match="must_keep"):
        secateur.prune(place / "dense", **options)


def test_a_text_that_the_result_reads_as_other_tokens(place: Path) -> None:
    options = options_of(place, "loss@other:1") | {"vocabulary": str(place / "made.txt")}
    with pytest.raises(RecipeError, match="tokens"):
        secateur.structure(place / "dense", **options)


def test_how_bounds_are_read() -> None:
    found = [Bound.read(x) for x in ("loops:0", "loops@a:b.txt:0.5", "hub/x:1", "loss@c@d:3")]
    assert [(x.kind, x.name, x.limit) for x in found] == [
        ("loops", "", 0.0),
        ("loops", "a:b.txt", 0.5),
        ("task", "hub/x", 1.0),
        ("loss", "c@d", 3.0),
    ]


def test_on_the_command_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3, and all numbers on stdout."""
    run_command = runner(monkeypatch, capsys)
    text = place / "other.txt"
    words = ["prune", str(place / "dense"), "--method", "wanda", "--sparsity", "0.5", "--output"]
    words += [str(place / "out"), "--calibration", str(place / "made.txt"), "--windows", "4"]
    words += ["--sequence-length", "32", "--must-keep-items", "2", "--json", "--must-keep"]
    done = run_command(*words, f"loss@{text}:9,divergence@{text}:1e-9")
    assert done.code == 3
    error = json.loads(done.out)["error"]
    assert [one["holds"] for one in error["measured"]] == [True, False]
    done = run_command(*words, f"loss@{text}:9,divergence@{text}:5", "--resume")
    assert done.code == 0
    values = [one["value"] for one in json.loads(done.out)["must_keep"]]
    assert values == [one["value"] for one in error["measured"]]


def test_a_task_and_the_compressed_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `prune --compress` the packed folder is judged, and opened once for all bounds."""
    calls, run = list[Any](), room.run_evaluation
    monkeypatch.setattr(room, "run_evaluation", lambda *a, **o: calls.append(a) or run(*a, **o))
    write_task(place / "rows", "piqa", 6)
    options = options_of(place, "piqa:0.01", "divergence@other:9") | VERBS["prune"]
    options |= {"must_keep_items": None, "task_data": place / "rows", "compress": "int4"}
    result = secateur.prune(place / "dense", **options)
    assert len(calls) == 1
    found = secateur.evaluate(
        place / "out", dense=place / "dense", text=place / "other.txt", windows=64,
        sequence_length=LENGTH, tasks=["piqa"], task_data=place / "rows",
    ).record  # fmt: skip
    best = max(found.tasks, key=lambda one: one.reference_value or 0.0)
    share, moved = result.manifest.must_keep
    assert share.value == pytest.approx(best.value / best.reference_value)
    assert moved.value == found.divergence[0].kl


@pytest.mark.parametrize("target", ["cpu", pytest.param("llama.cpp", marks=pytest.mark.slow)])
def test_a_fit(target: str, place: Path) -> None:
    wide = {"num_hidden_layers": 1, "vocab_size": 256, "intermediate_size": 64}
    save_tiny(place / "bytes", tokenizer=False, **wide)
    byte_tokenizer().save_pretrained(place / "bytes")
    options = options_of(place, "divergence@other:1e-9")
    options |= {"max_size": "20KB", "effort": "fast", "target": target, "windows": 8}
    with pytest.raises(VerificationError) as raised:
        secateur.fit(place / "bytes", **options)
    assert not (place / "out").exists()
    options |= options_of(place, "divergence@other:9") | {"windows": 8}
    result = secateur.fit(place / "bytes", **options, resume=True)
    assert [one.value for one in result.must_keep] == [raised.value.measured[0]["value"]]
    assert str(result).count(f"{result.must_keep[0].value:.4f}") >= 1


def test_a_step_of_a_chain(place: Path) -> None:
    options = options_of(place, "loss@other:1e-9")
    output = options.pop("output")
    calibration = {key: options.pop(key) for key in ("windows", "sequence_length")}
    calibration["source"] = options.pop("calibration")
    step = {**VERBS["prune"], "gate": options, "calibration": calibration}
    with pytest.raises(VerificationError, match="loss@"):
        secateur.chain(place / "dense", output=output, steps=[{"prune": step}])
    options["must_keep"] = [f"loss@{place / 'other.txt'}:9"]
    secateur.chain(place / "dense", output=output, steps=[{"prune": step}], resume=True)
    notes = output / "secateur" / "manifest.json"
    assert json.loads(notes.read_text(encoding="utf-8"))["must_keep"][0]["holds"]


def task(metric: str, items: int, value: float, dense: float, error: float) -> TaskRecord:
    """One metric of a task."""
    return TaskRecord(
        task="t", metric=metric, value=value, standard_error=0.1, chance=0.0, items=items, shots=0,
        reference_value=dense, difference=value - dense, difference_standard_error=error,
        significant=None, retention=None, protocol={}, protocol_id="task-1", reference="d",
        environment={},
    )  # fmt: skip


def test_the_share_of_a_score() -> None:
    every = [task("acc", 10, 0.3, 0.4, 0.1), task("exact_match,way", 10, 0.4, 0.5, 0.05)]
    value, error, measure = room._kept_score(every)
    assert (value, error) == pytest.approx((0.8, 0.1))
    assert "exact_match,way" in measure
    group = [task("acc", 30, 0.4, 0.8, 0.1), task("acc", 10, 0.8, 0.8, 0.3)]
    value, error, _ = room._kept_score(group)
    # (30 · 0.4 + 10 · 0.8) / (40 · 0.8), and √(3² + 3²) / 40 / 0.8
    assert (value, error) == pytest.approx((20 / 32, math.sqrt(18) / 32))
    assert room._kept_score([task("acc", 10, 0.0, 0.0, 0.0)]) is None


def sample(text: str, share: float, dense: str, dense_share: float) -> SampleRecord:
    """A text of both models."""
    return SampleRecord(
        prompt="p", text=text, repetition=share, degenerate=share > 0.5 or not text.strip(),
        reference_text=dense, reference_repetition=dense_share,
    )  # fmt: skip


def test_the_share_of_texts_that_loop() -> None:
    samples = [
        sample("x", 0.9, "x", 0.9),  # the source loops too
        sample("x", 0.9, " ", 0.0),  # or says nothing
        sample("x", 0.9, "x", 0.1),
        sample(" ", 0.0, "x", 0.5),
        sample("x", 0.5, "x", 0.0),
        sample("x", 0.1, "x", 0.0),
    ]
    value, error, measure = room._loops(samples)
    assert (value, error) == pytest.approx((0.5, math.sqrt(1 / 3 / 4)))
    assert "4 texts" in measure
    assert room._loops(samples[:2]) is None


def test_prompts_of_a_text(place: Path) -> None:
    prompts = room._prompts(str(place / "other.txt"))
    text = (place / "other.txt").read_text(encoding="utf-8")
    assert len(prompts) == round(len(text) / room.PASSAGE)
    assert all(len(x) <= room.BEGINNING and f"{x} " in text for x in prompts)
    assert len(room._prompts("")) == 24


def test_a_source_that_answers_nothing(place: Path) -> None:
    """The work waits for other bounds."""
    rows = place / "rows"
    rows.mkdir()
    (rows / "rows.jsonl").write_text(json.dumps({"q": "abc", "a": "no such answer"}) + "\n")
    held = {
        "task": "words", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(rows / "rows.jsonl")}},
        "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    }  # fmt: skip
    (rows / "words.yaml").write_text(yaml.safe_dump(held))
    options = options_of(place, "words:0.9") | VERBS["prune"] | {"task_data": rows}
    with pytest.raises(RecipeError, match="nothing right"):
        secateur.prune(place / "dense", **options)
    options |= options_of(place, "loss@other:9")
    del options["task_data"]
    assert secateur.prune(place / "dense", **options, resume=True).manifest.must_keep[0].holds


def test_not_for_a_loaded_model(place: Path) -> None:
    with pytest.raises(RecipeError, match="must_keep"):
        secateur.prune(secateur.load(place / "dense"), sparsity=0.5, must_keep=["loops:0.1"])
