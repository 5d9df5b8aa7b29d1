"""A distillation reads more windows of the text than the statistics do."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import save_tiny, tiny_tokenizer
from zoo import tiny_windows, zeros_of

import secateur
from secateur.calibration.run_windows import load_calibration
from secateur.calibration.windows import (
    EXTRA,
    WindowPlan,
    load_windows,
    save_windows,
    stored_extra,
)
from secateur.models.skeleton import quiet_transformers
from secateur.progress import Silent
from secateur.recipes.prune import PruneRecipe
from secateur.reporting.models import PruneResult
from secateur.steps.prune import plan_pruning

LENGTH = 16
RUN = {"method": "wanda", "sparsity": 0.5, "windows": 4, "sequence_length": LENGTH,
       "packing": "random-crop", "distill_learning_rate": 1e-3}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [
        json.dumps({"text": f"document {i} says: " + "abcdefgh"[i % 8] * 90}) for i in range(9)
    ]
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "model")


def loaded(folder: Path) -> torch.nn.Module:
    import transformers

    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(folder)


class Counter(Silent):
    """Counts the steps of a stage."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}

    def start(self, label: str, steps: int) -> None:
        self.steps[label] = steps


TAUGHT = {**RUN, "distill_epochs": 2, "distill_tokens": 10 * LENGTH - 5}


class Taught(NamedTuple):
    """A run with a distillation."""

    output: Path
    result: PruneResult
    steps: dict[str, int]


@pytest.fixture(scope="module")
def taught(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    output, progress = tmp_path_factory.mktemp("taught") / "out", Counter()
    result = secateur.prune(
        folder, output=output, calibration=str(text), **TAUGHT, progress=progress
    )
    return Taught(output, result, progress.steps)


def assert_same(one: Path, other: Path) -> None:
    found = loaded(other).state_dict()
    for name, tensor in loaded(one).state_dict().items():
        assert torch.equal(tensor, found[name]), name


def test_statistics_read_the_first_windows_and_the_distillation_all(
    folder: Path, text: Path, tmp_path: Path, taught: Taught
) -> None:
    plain = secateur.prune(
        folder, output=tmp_path / "plain", calibration=str(text), **RUN, distill_epochs=0
    )
    assert taught.steps["distilling"] == 2 * 10
    record = taught.result.manifest.calibration
    assert (record["samples"], record["tokens"], record[EXTRA]) == (4, 4 * LENGTH, 6)
    assert record["sha256"] == plain.manifest.calibration["sha256"]
    file = taught.output / "secateur" / "windows.safetensors"
    assert (len(load_windows(file)), stored_extra(file)) == (10, 6)
    masks = zeros_of(loaded(tmp_path / "plain"))
    for name, zeros in zeros_of(loaded(taught.output)).items():
        assert torch.equal(zeros, masks[name]), name  # Wanda saw the same four windows


def test_a_rate_is_judged_on_windows_that_the_statistics_have_not_read(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    progress = Counter()
    run = {**RUN, "distill_learning_rate": None, "calibration": str(text), "distill_epochs": 1}
    report = secateur.prune(folder, output=tmp_path / "out", **run, progress=progress)
    assert report.manifest.calibration[EXTRA] == 8
    assert progress.steps["choosing the learning rate"] == 1  # an eighth of the 12 windows
    assert progress.steps["distilling"] == 11  # a trial was the first


def test_the_file_of_windows_says_which_are_extra(
    folder: Path, tmp_path: Path, taught: Taught
) -> None:
    file = taught.output / "secateur" / "windows.safetensors"
    again = secateur.prune(folder, output=tmp_path / "two", calibration=str(file), **TAUGHT)
    assert again.manifest.calibration[EXTRA] == 6
    assert_same(taught.output, tmp_path / "two")


def test_a_short_text_gives_what_it_has(
    folder: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = {**RUN, "packing": "concatenate", "calibration": str(text), "distill_epochs": 1}
    with caplog.at_level(logging.WARNING):
        report = secateur.prune(folder, output=tmp_path / "out", **run, distill_tokens=10**5)
    found = report.manifest.calibration[EXTRA]
    assert 0 < found < 10**5 // LENGTH - 4
    wanted = 10**5 // LENGTH - 4
    assert f"wants {wanted} extra windows, and {text} has {found}" in caplog.text


def test_a_file_of_windows_has_no_more(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "windows.safetensors"
    save_windows(tiny_windows(4, LENGTH), file)
    run = {"method": "wanda", "sparsity": 0.5, "distill_epochs": 1, "calibration": str(file)}
    with caplog.at_level(logging.WARNING):
        secateur.prune(folder, output=tmp_path / "out", **run, distill_tokens=10 * LENGTH)
    assert f"8 extra windows, and {file} has 0" in caplog.text


def test_generated_windows_count(folder: Path, text: Path, tmp_path: Path) -> None:
    run = {**RUN, "sequence_length": 32, "calibration": str(text), "generated_windows": 3}
    report = secateur.prune(
        folder, output=tmp_path / "out", **run, distill_epochs=1, distill_tokens=9 * 32
    )
    record = report.manifest.calibration
    assert (record["samples"], record["generated"], record[EXTRA]) == (4, 3, 2)
    file = tmp_path / "out" / "secateur" / "windows.safetensors"
    assert (len(load_windows(file)), stored_extra(file)) == (9, 2)


def test_a_mix_has_extra_windows_of_all_texts(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "Z" * 2000}) + "\n", encoding="utf-8")
    tokenizer = tiny_tokenizer()
    windows, record = load_calibration(
        f"{text}=3,{other}=1", tokenizer, WindowPlan(8, LENGTH, 0, extra=4), vocab_size=200
    )
    assert (record["samples"], record[EXTRA], len(windows)) == (8, 4, 12)
    (z,) = tokenizer("Z")["input_ids"]
    of_other = (windows == z).all(1)
    assert (int(of_other[:8].sum()), int(of_other[8:].sum())) == (2, 1)


def test_structure_and_a_loaded_model_read_them_too(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    progress = Counter()
    shared = {"calibration": str(text), "windows": 4, "sequence_length": LENGTH,
              "packing": "random-crop", "distill_epochs": 1,
              "distill_tokens": 10 * LENGTH, "distill_learning_rate": 1e-3}  # fmt: skip
    report = secateur.structure(
        folder, output=tmp_path / "cut", ffn=0.5, **shared, effort="fast", progress=progress
    )
    assert progress.steps["distilling"] == 10
    assert report.manifest.calibration[EXTRA] == 6
    progress = Counter()
    secateur.prune(
        loaded(folder), tokenizer=tiny_tokenizer(), **RUN, calibration=str(text), distill_epochs=1,
        distill_tokens=10 * LENGTH, progress=progress,
    )  # fmt: skip
    assert progress.steps["distilling"] == 10


def test_the_plan_counts_them(folder: Path, text: Path) -> None:
    passed = []
    for tokens in (0, 4 * LENGTH, 40 * LENGTH):
        recipe = PruneRecipe(
            model=str(folder), method="wanda", sparsity=0.5,
            calibration={"source": str(text), "windows": 4, "sequence_length": LENGTH},
            distillation={"epochs": 1, "tokens": tokens, "peak_learning_rate": 1e-3},
        )  # fmt: skip
        passed.append(plan_pruning(recipe, Silent()).plan.passed_tokens)
    assert passed[0] == passed[1]
    assert passed[2] - passed[0] == 4 * 36 * LENGTH


def test_no_extra_windows_leave_no_trace(tmp_path: Path) -> None:
    save_windows(tiny_windows(3), tmp_path / "w.safetensors")
    assert stored_extra(tmp_path / "w.safetensors") == 0
    _, record = load_calibration(
        str(tmp_path / "w.safetensors"), None, WindowPlan(), vocab_size=999
    )
    assert EXTRA not in record
