"""Prove that a change of the code changes no output: digests of what every verb writes and prints.

    python tools/same_bytes.py --write FILE      # at the commit before the change
    python tools/same_bytes.py --compare FILE    # after it: names what changed, and exits with 1
    python tools/same_bytes.py --compare FILE --only 'llama/*,help' --keep FOLDER
    python tools/same_bytes.py --write FILE --only 'llama/*' --source CHECKOUT

It runs the command lines of `same_bytes.yaml` on tiny models, kills the cases of
`tests/runs/cases.py` at a few points and resumes them, and reads every `--help`. A digest stands
for a file, or for an entry at the top of a JSON file, so the comparison names the entry; a second
one of a safetensors or GGUF file for its tensors alone. `--keep` copies all files to a folder;
`diff -r` of two such folders shows what is different. `--only` takes names such as `llama/wanda`,
`killed/prune`, `help`, `options.md`, `python` and `refused`.
`--source` runs the command lines with the code of another checkout, on inputs that this one makes.

Only what is public is called: the command line, functions of `secateur`, models and cases of the
tests. Clock and hardware are pretended (`pretended_machine.py`), and all files lie in one folder.
So two runs of the same code give equal digests, on one machine: kernels and torch round as the
processor does.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import fnmatch
import gc
import hashlib
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from gguf import GGUFReader

from pretended_machine import REAL_CLOCK, in_fork, pretend
from same_bytes_inputs import loaded_values, make_inputs, mistakes

ROOT = Path(__file__).resolve().parents[1]
PLACE = Path("/tmp/secateur-same-bytes")
SOURCES, MADE, KILLED, PRINTED = (PLACE / x for x in ("sources", "made", "killed", "printed"))
KILLS = 2
"""At so many points a case is killed."""

WRITING = ("prune", "structure", "train", "compress", "fit", "draft", "chain", "sweep", "export",
           "import", "decompress")  # fmt: skip
AGAIN = {"export": [], "import": ["--overwrite"], "decompress": ["--overwrite"]}
"""What a second call needs, that prints a table. Verbs that are not here take `--resume`."""
FORMER = {"--keep-parameters": "--parameters", "--hidden-size": "--hidden",
          "--tune-passes": "--passes"}  # fmt: skip
"""What options are called in checkouts that do not know them."""

Digests = dict[str, str]


def command(*words: str) -> None:
    """Run a command of `secateur` in this process."""
    from secateur.cli import main as run

    os.chdir(SOURCES / "mistakes")
    sys.argv = ["secateur", *words]
    run()


def warm_up() -> None:
    """Prune once here, so that forks find the tables of transformers and the registries filled."""
    from secateur import prune

    windows = SOURCES / "windows.safetensors"
    prune(SOURCES / "dense", output=PLACE / "warm", sparsity=0.5, calibration=windows)


def tables() -> dict[str, dict[str, str]]:
    """What is in the file of command lines."""
    import yaml

    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    read: dict[str, dict[str, str]] = yaml.safe_load(text)
    return read


def families() -> list[str]:
    """The families on which every command of `every family` runs."""
    return [x for x in tables() if x not in ("words", "llama", "every family")]


def command_lines() -> dict[str, str]:
    """The command lines by their names."""
    read, found = tables(), dict[str, str]()
    for family in ("llama", *families()):
        lines = dict(read[family])
        if family != "llama":
            every = read["every family"].items()
            lines |= {name: line.replace("FAMILY", family) for name, line in every}
        found |= {f"{family}/{name}": line for name, line in lines.items()}
    return found


def run_command(name: str, lines: Mapping[str, str], done: dict[str, Digests]) -> None:
    """Run a command line and those whose results it reads; enters the digests of each."""
    if name in done:
        return
    line, output = lines[name], MADE / name.replace(" ", "-")
    for needed in re.findall("@(.+?)@", line):
        run_command(needed, lines, done)
        line = line.replace(f"@{needed}@", str(MADE / needed.replace(" ", "-")))
    places = {x.name: str(x) for x in SOURCES.iterdir()}
    places |= {"sources": str(SOURCES), "made": str(MADE)}
    words = shlex.split(line.format(**tables()["words"], **places).format(**places))
    writes = words[0] in WRITING and "--dry-run" not in words
    words += ["--output", str(output)] if writes else []
    again = AGAIN.get(words[0], ["--resume"]) if writes else []
    found: Digests = {}
    modes = {"json": ["--json"], "text": again}
    if words[0] == "bench":  # it starts processes, each of which imports torch
        del modes["text"]
    for mode, more in modes.items():
        if words[0] == "export":
            shutil.rmtree(output, ignore_errors=True)
        out, err = (PRINTED / name.replace(" ", "-") / f"{mode}.{x}" for x in ("out", "err"))
        status = in_fork(partial(command, *words, *more), out, err)
        while (unknown := re.search(r"No such option: (\S+)", err.read_text())) and (
            former := FORMER.get(unknown[1])
        ):
            words = [former if word == unknown[1] else word for word in words]
            status = in_fork(partial(command, *words, *more), out, err)
        if status not in (0, 3) and "refused" not in name:
            print(f"{name} ended with {status}: {err.read_text()[-600:]}", file=sys.stderr)
        if words[0] == "bench":  # the processes that it measures have a clock of their own
            out.write_text(re.sub(r"[\d., ─━]+", " ", out.read_text()))
        found |= {f"{mode} exit": str(status), f"{mode} err": digest(err.read_bytes())}
        found |= entries(out, mode, f"{mode} out")
    written = [x for x in words if Path(x).is_file() and MADE in Path(x).parents]
    done[name] = found | (digests_below(output) if writes else {})
    done[name] |= {Path(x).name: digest(Path(x).read_bytes()) for x in written}


def digest(content: bytes) -> str:
    """A short digest."""
    return hashlib.sha256(content).hexdigest()[:16]


def digests_below(folder: Path) -> Digests:
    """The digests of all files in a folder, and the targets of links."""
    found: Digests = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_symlink():
            found[name] = f"link to {os.readlink(file)}"
        elif file.is_file():
            found |= entries(file, file.suffix[1:], name)
    return found


def entries(file: Path, kind: str, name: str) -> Digests:
    """The digest of a file; of ours in JSON, one of each entry at the top and one of the keys."""
    content = file.read_bytes()
    if kind == "json" and "tokenizer" not in name and "generation" not in name:
        with contextlib.suppress(ValueError):
            values = json.loads(content)
            if isinstance(values, dict) and values:
                parts = {f"{name}#": [*values], **{f"{name}#{k}": x for k, x in values.items()}}
                return {key: digest(json.dumps(x).encode()) for key, x in parts.items()}
    found = {name: digest(content)}
    if kind == "gguf":
        read = GGUFReader(file).tensors
        found[f"{name}#tensors"] = digest(repr([(x.name, x.data.tobytes()) for x in read]).encode())
    if kind == "safetensors":
        with contextlib.suppress(ValueError):  # a case may write half a file
            found[f"{name}#tensors"] = digest(tensors(content))
    return found


def tensors(content: bytes) -> bytes:
    """The content of a safetensors file without what its header says beside the tensors."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    return json.dumps(header, sort_keys=True).encode() + content[8 + size :]


def helps() -> Digests:
    """The digests of every help."""
    from secateur.recipes.verbs import VERBS

    found: Digests = {}
    for verb in ("secateur", *VERBS):
        words = [*([verb] if verb in VERBS else []), "--help"]
        out, err = (PRINTED / "help" / f"{verb}.{x}" for x in ("out", "err"))
        in_fork(partial(command, *words), out, err)
        found[verb] = digest(out.read_bytes())
    return found


def options() -> Digests:
    """The digests of the page of options."""
    from option_files import pages as option_pages

    return {file: digest(text.encode()) for file, text in option_pages().items()}


def public() -> Digests:
    """The digests of every public function, and of what those without a command line give."""
    import secateur

    out, err = PRINTED / "python.out", PRINTED / "python.err"
    in_fork(partial(loaded_values, SOURCES), out, err)
    shown = {"names": digest(repr(secateur.__all__).encode())}
    for name in secateur.__all__:
        function = getattr(secateur, name)
        if inspect.isfunction(function):
            parameters = inspect.signature(function).parameters.values()
            each = [(p.name, str(p.kind), repr(p.default)) for p in parameters]
            text = re.sub(" at 0x[0-9a-f]+", "", f"{each} {inspect.getdoc(function)}")
            shown[name] = digest(text.encode())
    return shown | entries(out, "json", "values")


def refusals() -> Digests:
    """The digests of what is said of mistakes."""
    out, err = PRINTED / "refused.out", PRINTED / "refused.err"
    found: Digests = {}
    for line in mistakes():
        if not line.startswith("serve"):
            in_fork(partial(command, *shlex.split(line)), out, err)
            found[line] = digest(out.read_bytes() + err.read_bytes())
    return found


DOCUMENTS = {"help": helps, "options.md": options, "python": public, "refused": refusals}


class Events:
    """Counts the progress and the changes of folders, and ends the process at one of them."""

    def __init__(self, kill_at: int) -> None:
        self.count, self.kill_at = 0, kill_at
        for name in ("replace", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, change: Callable[..., Any]) -> Callable[..., Any]:
        """A change of folders that counts."""

        def changed(*values: Any, **options: Any) -> Any:
            self.step()
            return change(*values, **options)

        return changed

    def start(self, label: str, steps: int) -> None:
        """A stage begins."""
        self.step()

    def step(self, count: int = 1, note: str = "") -> None:
        """A step is done, or comes next."""
        self.count += 1
        if self.count == self.kill_at:
            os._exit(9)

    def finish(self) -> None:
        """A stage ends."""
        self.step()


def run_killed(name: str) -> Iterator[Digests]:
    """The digests of a case of the tests: not killed, then killed at some points and resumed."""
    from cases import CASES

    case, counted = CASES[name], PLACE / "count"
    out, err = (PRINTED / "killed" / f"{name.replace(' ', '-')}.{x}" for x in ("out", "err"))

    def run(kill_at: int = 0, **options: bool) -> int:
        def work() -> None:
            ours = [m for n, m in sys.modules.items() if n.startswith("secateur")]
            for module in [m for m in ours if case.saves and hasattr(m, "SAVE_MINUTES")]:
                module.SAVE_MINUTES = 0.0  # type: ignore[attr-defined]
            events = Events(kill_at)
            case.call(SOURCES, KILLED / "out", events, **options)
            counted.write_text(str(events.count), encoding="utf-8")

        return in_fork(work, out, err)

    kills, count = 1 if case.verb in ("fit", "draft") else KILLS, 0  # these take long
    for kill in range(kills + 1):
        shutil.rmtree(KILLED, ignore_errors=True)
        KILLED.mkdir()
        found: Digests = {}
        if kill:
            found["killed exit"] = str(run(count * kill // (kills + 1)))
        found["exit"] = str(run(**case.retry(False) if kill else {}))
        if found["exit"] != "0":
            print(f"killed/{name} ended: {err.read_text()[-600:]}", file=sys.stderr)
        count = count or int(counted.read_text())
        yield {f"{kill} {key}": x for key, x in (found | digests_below(KILLED)).items()}


def is_asked(name: str, only: str) -> bool:
    """Whether a name matches one of the patterns, separated by commas."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in only.split(","))


def digests(only: str) -> Digests:
    """The digests of all that has such a name."""
    from cases import CASES

    lines, done, parts = command_lines(), dict[str, Digests](), dict[str, Digests]()
    parts |= {name: read() for name, read in DOCUMENTS.items() if is_asked(name, only)}
    for name in [*lines, *(f"killed/{x}" for x in CASES)]:
        if not is_asked(name, only):
            continue
        began = REAL_CLOCK()
        if name in lines:
            run_command(name, lines, done)
            parts[name] = done[name]
        else:
            each = run_killed(name.removeprefix("killed/"))
            parts[name] = {key: x for found in each for key, x in found.items()}
        print(f"{REAL_CLOCK() - began:5.1f} s  {name}", flush=True)
    return {f"{n}: {key}": x for n in sorted(parts) for key, x in sorted(parts[n].items())}


def compare(before: Digests, after: Digests) -> int:
    """Print what differs; returns 1 if anything does."""
    names = sorted(before.keys() | after.keys())
    for name in names:
        if before.get(name) != after.get(name):
            word = "vanished" if name not in after else "changed"
            print(f"{word if name in before else 'appeared'}  {name}")
    print(f"{sum(before.get(n) == after.get(n) for n in names)} of {len(names)} entries are equal")
    return int(before != after)


def start(source: Path, stage: str) -> None:
    """Run this program anew, in the environment that everything runs in, with a checkout's code."""
    tests = sorted({x.parent for x in (ROOT / "tests").rglob("*.py")})
    folders = [source / "src", ROOT / "tools", *tests]
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    ours = {name: value for name, value in os.environ.items() if name.startswith("SECATEUR_")}
    environment = ours | {
        "PATH": os.environ["PATH"], "HOME": str(PLACE / "home"), "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(map(str, folders)), "COLUMNS": "100",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "SOURCE_DATE_EPOCH": "0",
        "MPLBACKEND": "agg", "LANG": "C.UTF-8", "TZ": "UTC", "SAME_BYTES": stage, **threads,
    }  # fmt: skip
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)


def prepare(source: Path) -> None:
    """Make the inputs with the code of this checkout, and fill what forks would fill anew."""
    pretend()
    if os.environ["SAME_BYTES"] == "own":
        shutil.rmtree(PLACE, ignore_errors=True)
        (PLACE / "home").mkdir(parents=True)
        importlib.import_module("everywhere").warm_up()
        out, err = PRINTED / "inputs.out", PRINTED / "inputs.err"
        if in_fork(partial(make_inputs, SOURCES, families()), out, err):
            sys.exit(err.read_text())
        if source != ROOT:
            start(source, "other")
    warm_up()
    gc.collect()
    gc.freeze()  # or the first collection in a fork copies every page


def main() -> int:
    """Write or compare the digests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE", help="write the digests")
    what.add_argument("--compare", type=Path, metavar="FILE", help="compare with such a file")
    parser.add_argument("--only", default="*", metavar="PATTERNS", help="only names like these")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="copy all files to there")
    parser.add_argument("--source", type=Path, default=ROOT, metavar="CHECKOUT", help="whose code")
    args = parser.parse_args()
    if "SAME_BYTES" not in os.environ:
        start(ROOT, "own")
    with PLACE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run uses the same folder
        prepare(args.source)
        found = digests(args.only)
        if args.keep:
            shutil.copytree(PLACE, args.keep, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(PLACE)
    if args.write:
        args.write.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
        print(f"{len(found)} entries")
        return 0
    before: Digests = json.loads(args.compare.read_text(encoding="utf-8"))
    wanted = {n: x for n, x in before.items() if is_asked(n.partition(": ")[0], args.only)}
    return compare(wanted, found)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # torch's libraries would print what they leak
