"""The command line as a user meets it: results, faults, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import pytest
from commands import Outcome
from slow import slow_but

from secateur.cli import main
from secateur.cli.app import make_app
from secateur.recipes.verbs import STAGES, VERBS


def test_prune_eval_inspect_in_json(secateur, model: Path, windows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = secateur(
        "prune", model, "-o", out, "--method", "wanda", "--sparsity", "0.5",
        "--calibration", windows, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    manifest = json.loads(done.out)
    assert manifest["result"]["decoder_sparsity"] == 0.5
    assert manifest["output"] == str(out)
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 w5 w6 " * 40)
    judged = json.loads(
        secateur("evaluate", out, "--text", text, "--sequence-length", "16", "--json").out
    )
    assert judged["perplexity"][0]["perplexity"] > 1
    assert judged["perplexity"][0]["protocol"]["sequence_length"] == 16
    seen = json.loads(secateur("inspect", out, "--json").out)
    assert seen["decoder_sparsity"] == 0.5
    assert seen["family"] == "llama"
    assert len(seen["linears"]) == 21


def test_a_recipe_with_options_over_it(
    secateur, model: Path, windows: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\noutput: {tmp_path / 'out'}\nmethod: wanda\nsparsity: 0.25\n"
        f"calibration: {{source: {windows}}}\n"
    )
    done = secateur(
        "prune", recipe, "--sparsity", "0.5", "--set", "memory.micro_batch_tokens=40", "--json"
    )
    manifest = json.loads(done.out)
    assert manifest["method"]["asked_sparsity"] == 0.5
    resolved = (tmp_path / "out" / "secateur" / "recipe.yaml").read_text()
    assert "micro_batch_tokens: 40" in resolved


def test_all_faults_of_a_recipe_at_once(secateur, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modle: x\nsparsity: a lot\ncalibration: {windwos: 3, seed: -1}\n")
    done = secateur("prune", recipe)
    assert done.code == 2
    assert "error: 5 faults:" in done.err
    for message in (
        "modle: unknown key; did you mean 'model'",
        "model: Field required",
        "sparsity='a lot':",
        "did you mean 'windows'",
        "calibration.seed=-1:",
    ):
        assert message in done.err


def prune(secateur, model: Path, windows: Path, out: Path) -> Outcome:
    options = ("--method", "wanda", "--sparsity", "0.5", "--calibration", windows)
    return secateur("prune", model, "-o", out, *options)


def test_an_unreachable_hub(secateur, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = secateur("prune", "some-org/some-model", "-o", tmp_path / "out", "--sparsity", "0.5")
    assert done.code == 2
    assert "some-org/some-model" in done.err
    assert "remedy" in done.err


WRONG = [
    "frune",
    "prune",
    "prune --sparsty 0.5",
    "prune m --sparsity 0.5",
    "prune m --windows 0 -o out",
    "prune m --sparsity 2 -o out",
    "prune m --effort quick -o out",
    "prune m --device tpu -o out",
    "prune m --set windwos=3 -o out",
    "prune ./nowhere --sparsity 0.5 -o out",
    "prune nowhere.yaml -o out",
    "compress m --values int5 -o out",
    "export m --to tensorrt -o out",
    "bench m --contenders dense",
    "push m noslash",
    "sweep m --sparsities 0.5,1.5 -o out",
    "fit m -o out",
    "fit m --max-size wat -o out",
    "diagnose",
    "generate m --top-p 2",
    "advise m --new-tokens 0",
    "report",
]


HELPED = [f"{verb} --help" for verb in ("prune", "structure", "train", "evaluate", "compress")]
HEAVY = {"torch", "transformers", "numpy"}


@pytest.mark.parametrize(
    ("lines", "code", "heavy"),
    [(["--help"], 0, HEAVY | {"pydantic", "yaml"}), (HELPED, 0, HEAVY), (WRONG, 2, HEAVY)],
)
def test_help_and_a_wrong_command_are_answered_before_torch_is_imported(
    lines: list[str], code: int, heavy: set[str]
) -> None:
    script = (
        "import sys\n"
        "from secateur.cli import main\n"
        f"for words in {lines!r}:\n"
        "    sys.argv = ['secateur', *words.split()]\n"
        "    try: main()\n"
        f"    except SystemExit as ended: assert ended.code == {code}, words\n"
        f"    heavy = {heavy!r} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: ") == len(lines) * bool(code)


def test_quiet_shows_neither_progress_nor_log(
    secateur, model: Path, windows: Path, tmp_path: Path
) -> None:
    done = prune(secateur, model, windows, tmp_path / "loud")
    assert done.code == 0
    quiet = secateur(
        "prune", model, "-o", tmp_path / "out", "--method", "wanda", "--sparsity", "0.5",
        "--calibration", windows, "--quiet",
    )  # fmt: skip
    assert quiet.code == 0
    assert quiet.err == ""
    assert "50.00%" in quiet.out
    refused = secateur("inspect", tmp_path / "nowhere", "-q")
    assert refused.code == 2
    assert refused.err.startswith("error: ")


def test_help_lists_the_verbs_in_four_groups(secateur) -> None:
    shown = secateur("--help").out
    places = [shown.index(f"─ {stage} ─") for stage in STAGES]
    assert places == sorted(places)
    assert places[2] < shown.index("│ evaluate") < places[3]


def test_the_shell_completes_verbs_choices_and_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    script = make_app().generate_completion(shell="bash")
    assert "compgen -f" in script
    with contextlib.redirect_stdout(io.StringIO()) as candidates:
        monkeypatch.setattr(sys, "argv", ["secateur", "__complete", "export", "--to", ""])
        with pytest.raises(SystemExit):
            main()
    assert "compressed-tensors" in candidates.getvalue()


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_every_word_that_was_written(
    verb: str, secateur, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets and stars mean something to what draws it."""
    monkeypatch.setenv("COLUMNS", "800")
    done = secateur(verb, "--help")
    assert done.code == 0
    shown = " ".join(done.out.split())
    texts = [x.parameter.help for x in make_app()[verb].assemble_argument_collection()]
    assert texts
    assert [text for text in texts if text not in shown] == []
    assert VERBS[verb].summary in shown


@pytest.mark.parametrize("columns", ["0", "-5", "abc", "²", ""])
def test_a_width_that_is_none_is_unknown(secateur, model: Path, monkeypatch, columns: str) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    usual = secateur("inspect", model).out
    assert "decoder layers" in usual
    monkeypatch.setenv("COLUMNS", columns)
    assert secateur("inspect", model).out == usual


@pytest.mark.parametrize("columns", ["1", "20"])
def test_a_narrow_terminal_hides_no_cell(secateur, model: Path, monkeypatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    folded = secateur("inspect", model).out
    cells = [[x.strip() for x in line.split("│")] for line in folded.splitlines()]
    counts = zip(*(line for line in cells if len(line) == 8), strict=True)
    assert list(filter(None, map("".join, counts)))[1:] == ["7", "7,680", "0.0%"]


Forked = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Carries out a command in a process of its own: its exit code, and its stderr."""
    log = tmp_path_factory.mktemp("forked") / "stderr.txt"
    command = [sys.executable, str(Path(__file__).with_name("forking.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:

        def run(*words: object, closed: Sequence[str] = (), **streams: str) -> tuple[int, str]:
            log.unlink(missing_ok=True)
            asked = {"words": [*map(str, words)], "closed": closed, "stderr": str(log), **streams}
            print(json.dumps(asked), file=server.stdin, flush=True)
            return int(server.stdout.readline()), log.read_text()

        yield run
        server.stdin.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize(
    ("verb", "form"),
    slow_but([("prune", [])], product(["inspect", "prune"], [[], ["--json"]])),
)
def test_a_full_stdout_is_named_and_the_model_is_whole(
    verb: str, form: list[str], model: Path, tmp_path: Path, forked: Forked
) -> None:
    out = ["--sparsity", "0.5", "--method", "magnitude", "--output", tmp_path / "out"]
    code, err = forked(verb, model, *form, *(out if verb == "prune" else []), stdout="/dev/full")
    assert code == 1
    assert "stdout" in err
    assert "Traceback" not in err
    assert "--output" not in err
    if verb == "prune":
        assert str(tmp_path / "out") in err
        assert (tmp_path / "out" / "model.safetensors").is_file()


STREAMS = ["stdin", "stdout", "stderr"]


@pytest.mark.parametrize("closed", slow_but([STREAMS], [*([name] for name in STREAMS), STREAMS]))
def test_streams_may_be_closed(
    closed: list[str], model: Path, tmp_path: Path, forked: Forked
) -> None:
    options = ["--sparsity", "0.5", "--method", "magnitude", "--output", tmp_path / "out"]
    code, err = forked("prune", model, *options, closed=closed, stdout=os.devnull)
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_removed_working_folder_is_named(secateur, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    done = secateur("methods")
    monkeypatch.chdir(tmp_path)
    assert done.code == 1
    assert "working folder" in done.err


@pytest.mark.parametrize("place", ["model", "output"])
def test_names_of_other_bytes_are_refused(
    place: str, secateur, model: Path, tmp_path: Path
) -> None:
    other = f"{tmp_path}/\udcff"
    words = [model, "-o", other] if place == "output" else [other, "-o", tmp_path / "out"]
    done = secateur("prune", *words, "--sparsity", "0.5", "--method", "magnitude")
    assert done.code == 2
    assert "a name is not UTF-8: " in done.err
    assert "\\udcff" in done.err
    assert [x.name for x in tmp_path.iterdir()] == ["model"]


def test_an_endless_file_is_no_recipe(secateur, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("x" * 2**21)
    assert "too large" in secateur("prune", tmp_path / "r.yaml").err


def print_arrow() -> None:
    """A command."""
    print("a → b", flush=True)


def test_a_pipe_of_windows_gets_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its encoding does not have every character."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr("secateur.cli.commands.make_command", lambda verb: print_arrow)
    monkeypatch.setattr(sys, "argv", ["secateur", "methods"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert written.getvalue().split() == [b"a", b"?", b"b"]
