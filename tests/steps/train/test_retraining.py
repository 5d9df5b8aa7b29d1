"""From a pruned folder to a trained one, by Python and by the command line."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_tokenizer
from trained import source_text
from trainings import assert_same, make_place, stopped_at, tensors, train_in

import secateur
from secateur.cli import main
from secateur.errors import CheckpointError, NumericalError, RecipeError, SourceError
from secateur.training import loop
from secateur.training.setup import TrainingSetup

OPTIONS: dict[str, Any] = {"steps": 8, "save_minutes": 0, "learning_rate": 5e-3, "validations": 2}


train = partial(train_in, **OPTIONS)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training begins with, and a text to judge it by."""
    place = make_place(tmp_path_factory.mktemp("retraining"), torch.bfloat16, pattern="2:4")
    (place / "pruned" / "secateur" / "evaluation.json").write_text("{}")
    (place / "watched.txt").write_text(source_text(held_out=True)[:4_000])
    return place


def assert_zeros(before: Path, after: Path, moved: bool = True) -> None:
    """Wherever a matrix of the layers was zero, it is; the rest has moved."""
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    assert {n: t.dtype for n, t in old.items()} == {n: t.dtype for n, t in new.items()}
    gone = {n: t == 0 for n, t in old.items() if n.endswith("proj.weight")}
    assert gone
    assert all(not new[n][where].any() for n, where in gone.items())
    assert not moved or any(not torch.equal(old[n], new[n]) for n in gone)


def test_a_teacher_teaches(places: Path, tmp_path: Path) -> None:
    watched = str(places / "watched.txt")
    done = train(
        places, tmp_path / "out", validation_text=watched, teacher=places / "dense", steps=4
    )
    assert done.manifest.objective == "forward KL, T = 1"
    assert done.perplexity_after <= done.perplexity_before
    assert_zeros(places / "pruned", tmp_path / "out")


def test_a_run_folder_that_the_other_verbs_read(places: Path, tmp_path: Path) -> None:
    watched = places / "watched.txt"
    done = train(places, tmp_path / "out", validation_text=str(watched))
    assert done.manifest.objective == "next token"
    assert (done.steps, done.sparsity) == (8, pytest.approx(0.5))
    assert done.perplexity_after <= done.perplexity_before
    assert_zeros(places / "pruned", tmp_path / "out")
    notes = tmp_path / "out" / "secateur"
    written = {p.name for p in notes.iterdir()}
    assert {"manifest.json", "recipe.yaml", "training.json", "training.yaml"} <= written
    assert "evaluation.json" not in written  # of other weights
    assert not (tmp_path / "out.partial").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "secateur train recipe.yaml" in card
    assert "Made by secateur" in card
    judged = secateur.evaluate(tmp_path / "out", text=watched, sequence_length=64, windows=16)
    assert judged.perplexity == pytest.approx(done.perplexity_after, rel=0.02)
    small = secateur.compress(tmp_path / "out", output=tmp_path / "small", values="keep")
    assert small.sparsity == pytest.approx(0.5)
    secateur.report([tmp_path / "out"], tmp_path / "page.html")
    assert (notes / "training.jsonl").is_file()
    found = secateur.diagnose(tmp_path / "out")
    assert not [x for x in found.findings if x.severity == "error"]
    again = train(places, tmp_path / "again", tmp_path / "out", steps=2)
    assert len(json.loads((tmp_path / "again/secateur/training.json").read_text())) == 2
    assert again.sparsity == pytest.approx(0.5)


def test_a_teacher_that_is_written_down_is_read_again(places: Path, tmp_path: Path) -> None:
    options = {"teacher": places / "dense", "top_k": 8, "windows": 64, "validation_windows": 8}
    train(places, tmp_path / "one", **options)
    with stopped_at(5):
        train(places, tmp_path / "two", **options)
    file = tmp_path / "two.partial" / "work" / "teacher.safetensors"
    stamp = file.stat().st_mtime_ns
    with stopped_at(7):
        train(places, tmp_path / "two", resume=True, **options)
    assert file.stat().st_mtime_ns == stamp
    train(places, tmp_path / "two", resume=True, **options)
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_cut_student_learns_from_the_whole_model(places: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "short", num_hidden_layers=1, intermediate_size=32)
    done = train(
        places, tmp_path / "out", model=tmp_path / "short", teacher=places / "dense",
        hidden_weight=0.1, next_token=0.1, kind="total_variation",
    )  # fmt: skip
    assert done.sparsity == 0
    assert done.perplexity_after <= done.perplexity_before


def test_a_student_knows_which_layers_it_has(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "deep", num_hidden_layers=5)
    windows = torch.randint(4, 90, (4, 16))
    save_file({"input_ids": windows}, tmp_path / "w.safetensors")
    cut = tmp_path / "cut"
    secateur.structure(
        tmp_path / "deep", output=cut, keep_layers=3, depth_by="influence", effort="fast",
        calibration=tmp_path / "w.safetensors",
    )  # fmt: skip
    kept = json.loads((cut / "secateur" / "steps.json").read_text())[0]["cut"]["layers"]
    layers = []
    plain = TrainingSetup.objective

    def seen(*args: Any) -> Any:
        objective: Any = plain(*args)
        layers.append([j for _, j in objective.pairs])
        return objective

    monkeypatch.setattr(TrainingSetup, "objective", seen)
    options = {"hidden_weight": 1.0, "validation_windows": 0, "steps": 1, "model": cut}
    train(places, tmp_path / "known", teacher=tmp_path / "deep", **options)
    shutil.copytree(tmp_path / "deep", tmp_path / "other")
    train(places, tmp_path / "unknown", teacher=tmp_path / "other", **options)
    assert layers == [[kept[1] - 1, kept[2] - 1, 4], [1, 3, 4]]


def test_a_stopped_run_goes_on_to_the_same_files(places: Path, tmp_path: Path) -> None:
    train(places, tmp_path / "straight")
    with stopped_at(5):
        train(places, tmp_path / "out")
    with pytest.raises(RecipeError, match="stopped"):
        train(places, tmp_path / "out")
    with pytest.raises(RecipeError, match="clip"):
        train(places, tmp_path / "out", resume=True, clip=2.0)
    train(places, tmp_path / "out", resume=True)
    assert_same(tmp_path / "straight", tmp_path / "out")
    with pytest.raises(RecipeError, match="exists"):
        train(places, tmp_path / "out")


def test_what_was_saved_survives_a_training_that_goes_wrong(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.Loop.backward

    def failing(self: loop.Loop) -> float:
        return self.refuse(float("nan"), "the loss") if self.outcome.step == 5 else plain(self)

    monkeypatch.setattr(loop.Loop, "backward", failing)
    with pytest.raises(NumericalError, match="nan") as wrong:
        train(places, tmp_path / "out")
    assert "resume" in str(wrong.value.remedy)
    work = tmp_path / "out.partial" / "work"
    saved = load_file(work / "state.safetensors")
    assert all(bool(t.isfinite().all()) for t in saved.values())
    monkeypatch.setattr(loop.Loop, "backward", plain)
    assert train(places, tmp_path / "out", resume=True, learning_rate=1e-3).steps == 8


def test_what_cannot_be_trained_is_refused(places: Path, tmp_path: Path) -> None:
    copied = shutil.copy(places / "text.txt", tmp_path / "copied.txt")
    with Path(copied).open("a") as longer:
        longer.write("And more.")
    for same in (places / "text.txt", copied):
        with pytest.raises(RecipeError, match="%"):
            train(places, tmp_path / "out", validation_text=str(same))
    for options, said in (({"lr": 1}, "lr=1"), ({"speed": 1}, "speed")):
        with pytest.raises(RecipeError, match=said):
            train(places, tmp_path / "out", optimizer_options=options, restart=True)
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(SourceError):
        train(places, tmp_path / "out", text=str(tmp_path / "empty.txt"), restart=True)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(SourceError, match="needs 4"):
        train(places, tmp_path / "out", text=str(tmp_path / "short.txt"), restart=True)
    with pytest.raises(RecipeError, match="steps with minutes"):
        train(places, tmp_path / "out", minutes=1, restart=True)
    with pytest.raises(RecipeError, match="'optimizer'"):
        train(places, tmp_path / "out", optimiser="SGD", restart=True)
    for name, value in {"kind": "reverse", "next_token": 0.5, "top_k": 8}.items():
        with pytest.raises(RecipeError, match=f"{name}: "):
            train(places, tmp_path / "x", **{name: value})


def test_a_damaged_record_of_an_earlier_training_is_named(places: Path, tmp_path: Path) -> None:
    model = shutil.copytree(places / "pruned", tmp_path / "model")
    file = model / "secateur" / "training.json"
    for text in ("[{", '[{"objective": 3}]'):
        file.write_text(text)
        with pytest.raises(CheckpointError) as raised:
            train(places, tmp_path / "out", model)
        assert str(file) in str(raised.value.where)
    assert not list(tmp_path.glob("out*"))


def test_a_teacher_with_another_vocabulary_is_refused(places: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "other", tokenizer=False)
    tiny_tokenizer([f"w{i}" for i in range(92)]).save_pretrained(folder)
    with pytest.raises(RecipeError, match="vocabularies"):
        train(places, tmp_path / "out", teacher=folder)


def test_the_command_line(
    places: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    text = places / "text.txt"
    code, printed = command(
        "train", places / "pruned", "-o", tmp_path / "one", "--text", text, "--steps", 3,
        "--optimizer", "SGD", "--gradient-checkpointing", "--set", "rates={'*norm*': 0}",
    )  # fmt: skip
    assert code == 0, printed
    assert "validation perplexity" in printed
    norm = "model.norm.weight"
    assert torch.equal(tensors(tmp_path / "one")[norm], tensors(places / "pruned")[norm])
    code, printed = command(
        "train", tmp_path / "one" / "secateur" / "training.yaml", "-o", tmp_path / "two",
        "--teacher", places / "dense", "--kind", "reverse", "--temperature", 2, "--json",
    )  # fmt: skip
    assert code == 0, printed
    assert '"objective": "reverse KL, T = 2"' in printed
    assert_zeros(places / "pruned", tmp_path / "two", moved=False)
    code, printed = command("train", places / "pruned", "-o", tmp_path / "x", "--set", "steps")
    assert code == 2
    assert "is not KEY=VALUE" in printed


def test_of_several_texts_equal_parts_are_read(places: Path, tmp_path: Path) -> None:
    long, short = torch.randint(4, 50, (60, 16)), torch.randint(50, 90, (20, 16))
    texts = [str(tmp_path / name) for name in ("long.safetensors", "short.safetensors")]
    for file, ids in zip(texts, (long, short), strict=True):
        save_file({"input_ids": ids}, file)
    done = train(places, tmp_path / "out", text=texts, validation_windows=0)
    assert done.manifest.text["windows"] == 40
    assert done.manifest.text["source"] == ", ".join(texts)
    together = torch.stack([long[:20], short], 1).flatten(0, 1)
    digest = hashlib.sha256(together.contiguous().numpy().tobytes()).hexdigest()
    assert done.manifest.text["sha256"] == digest
    save_file({"input_ids": short[:, :8].contiguous()}, texts[1])
    with pytest.raises(SourceError, match=r": 16, .*: 8"):
        train(places, tmp_path / "other", text=texts)


def test_ready_windows_are_used_as_they_are(places: Path, tmp_path: Path) -> None:
    ids = torch.randint(4, 90, (40, 16))
    save_file({"input_ids": ids}, tmp_path / "w.safetensors")
    done = train(places, tmp_path / "out", text=str(tmp_path / "w.safetensors"))
    assert done.manifest.text["sequence_length"] == 16
    assert done.manifest.text["windows"] == 35  # 5 are held out
