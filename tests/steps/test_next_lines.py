"""Every command that a verb prints under `next:` can be run as it is printed, without a hub."""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Outcome, runner
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_tiny

import secateur
from secateur.calibration import documents
from secateur.reporting.next_steps import command, dense_model, free_place
from secateur.steps.demo import DemoWay

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on; " * 60
OWN = ("--calibration", "my text.txt", "--windows", 4, "--sequence-length", 16)
SAMPLE = ("--calibration", "boolq-calibration", *OWN[2:])
TRAINING = ("--text", "my text.txt", "--steps", 2, "--sequence-length", 16, "--batch", 2)
HALF = ("--method", "wanda", "--sparsity", 0.5)
OUT = ("--output", "a result")
CHAIN = """
model: dense
output: a result
steps:
  - prune: {method: magnitude, sparsity: 0.5}
  - compress: {values: int8}
"""

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a pruned one and a text; tests work in copies."""
    place = tmp_path_factory.mktemp("next")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        save_tiny(Path("dense"), tokenizer=False, num_hidden_layers=2, vocab_size=256)
        byte_tokenizer().save_pretrained("dense")
        secateur.prune("dense", output="pruned", method="magnitude", sparsity=0.5)
        Path("my text.txt").write_text(TEXT, encoding="utf-8")
        Path("chain.yaml").write_text(CHAIN, encoding="utf-8")
        weights = load_file("pruned/model.safetensors")
        masks = {n: weight != 0 for n, weight in weights.items() if n.endswith("proj.weight")}
        save_file(masks, "masks.safetensors")
    return place


@pytest.fixture
def run(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> Run:
    """Run a command in such a folder; samples need no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(documents, "sample_text", lambda name: [TEXT * 3])
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.chdir(shutil.copytree(place, tmp_path / "here"))
    return runner(monkeypatch, capsys)


def commands_in(text: str) -> list[list[str]]:
    """The commands under `next:`, each as its words."""
    _, found, after = text.rpartition("next:\n")
    assert found, text
    lines = [line.strip() for line in after.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("secateur ")]


def follow(run: Run, commands: list[list[str]]) -> None:
    """Run commands; none may fail."""
    for words in commands:
        verb, *options = words
        if verb == "push":  # nothing is sent
            options = ["--dry-run", *options]
        done = run(verb, *options)
        assert done.code == 0, f"{shlex.join(words)}: {done.err}"


CASES = [
    (("prune", "dense", *HALF, *OWN, *OUT), "--text 'my text.txt' --sequence-length 16"),
    (("prune", "dense", *HALF, *SAMPLE, *OUT), "--dense dense --text boolq-held-out"),
    (("prune", "dense", *HALF[2:], "--method", "magnitude", *OUT), "--text boolq-held-out"),
    (("structure", "dense", "--ffn", 0.5, "--effort", "fast", *OWN, *OUT), "weights in 8 bits"),
    (("train", "pruned", *TRAINING, *OUT), "--dense dense"),
    (("train", "pruned", "--teacher", "dense", *TRAINING, *OUT), "--dense dense"),
    (("import", "dense", *OUT), "measure its perplexity"),
    (("import", "dense", "--masks", "masks.safetensors", *OUT), "--dense dense"),
    (("compress", "pruned", *OUT), "--dense dense --text boolq-held-out"),
    (("compress", "dense", "--values", "int8", *OWN, *OUT), "--dense dense --text 'my text.txt'"),
    (("prune", "dense", *HALF, *OWN, "--compress", "int8", *OUT), "--dense dense"),
    (("chain", "chain.yaml"), "--dense dense --text boolq-held-out"),
]


@pytest.mark.parametrize(("words", "said"), CASES, ids=lambda x: x[0] if len(x[0]) > 1 else "")
def test_next_lines_run(run: Run, words: tuple[object, ...], said: str) -> None:
    done = run(*words)
    assert done.code == 0, done.err
    assert said in done.out
    commands = commands_in(done.out)
    assert {x[0] for x in commands} >= {"evaluate", "generate"}
    follow(run, [x for x in commands if x[0] != "bench"])


@pytest.mark.slow
def test_the_bench_line_runs(run: Run) -> None:
    done = run("compress", "pruned", *OUT)
    follow(run, [x for x in commands_in(done.out) if x[0] == "bench"])


@pytest.mark.slow
def test_next_lines_of_a_fit_run(run: Run) -> None:
    small = ("--max-size", "60KiB", "--effort", "fast")
    done = run("fit", "dense", *small, *OWN, *OUT)
    assert done.code == 0, done.err
    commands = commands_in(done.out)
    assert [x[0] for x in commands] == ["chat", "serve", "evaluate", "push", "export", "chain"]
    follow(run, [x for x in commands if x[0] != "serve"])


def test_next_lines_of_a_sweep_make_its_best_point(run: Run) -> None:
    methods = ("--methods", "magnitude,wanda", "--sparsities", "0.3,0.5", "--patterns", "2:4")
    judged = ("--text", "my text.txt", "--text-windows", 2)
    done = run("sweep", "dense", *methods, *judged, *OWN, "--output", "a sweep")
    assert done.code == 0, done.err
    [words] = commands_in(done.out)
    follow(run, [words])
    made = json.loads(Path(words[-1], "secateur", "manifest.json").read_text())
    points = json.loads(Path("a sweep/sweep.json").read_text())["points"]
    half = [p for p in points if abs(p["zeros"] - 0.5) < 0.005]
    best = min(half, key=lambda p: p["excess"]["my text.txt"])
    assert (made["method"]["name"], made["method"]["pattern"]) == (best["method"], best["pattern"])


def test_the_commands_of_a_demo_make_its_model(run: Run) -> None:
    text = {"calibration": "my text.txt", "windows": 4, "sequence_length": 16}
    calls = (("structure", {"ffn": 0.5, **text}), ("compress", {"values": "int4", **text}))
    typed = DemoWay("narrower, int4", calls).commands("dense")
    follow(run, [shlex.split(line)[1:] for line in typed])
    assert Path("narrower-int4/secateur.safetensors").is_file()


def test_a_packed_model_is_not_advised_to_be_packed(run: Run) -> None:
    run("compress", "pruned", *OUT)
    done = run("diagnose", "a result")
    assert "healthy" in done.out
    assert "secateur compress" not in done.out


def test_a_path_that_is_gone_is_not_named(run: Run) -> None:
    run("compress", "pruned", *OUT)
    Path("dense").rename("elsewhere")
    assert dense_model(Path("a result")) == "pruned"


def test_words_are_quoted_and_no_folder_is_overwritten(tmp_path: Path) -> None:
    assert command("bench", "my model") == "secateur bench 'my model'"
    (tmp_path / "small").mkdir()
    assert free_place(tmp_path / "small") == f"{tmp_path}/small-2"
