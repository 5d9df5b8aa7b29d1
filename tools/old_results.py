"""Which results are older than the code that they measure.

    python tools/old_results.py                       # all that are, cheapest first
    python tools/old_results.py --prove NAME NAME     # do both versions write the same weights?

A script says what it measures: `MEASURES`, files and folders, and `MINUTES`, how long it takes on
one quiet core. A row is old if their code has changed since its commit; comments and docstrings are
not code. Where some rows are those of other tools, `ours(row)` says whether a row is not.

A script whose numbers follow from the weights that the code writes also names command lines of
`same_bytes.yaml` that write such weights: `PROOF`, or `proof(row)`. `--prove` runs them with the
code of the row's commit and with the code of this branch, on the same inputs, without kernels. If
all files of weights are the same bytes, the row says so (`same_as`) and is as new as that commit.
Digests are kept in `build/same_bytes`, so a proof that was stopped goes on. Numbers that are times
have no such proof: they are measured again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from typing import Any

from measured_tables import RESULTS, ROOT, Result, read_results

KEPT = ROOT / "build/same_bytes"
WEIGHTS = "#tensors"

Digests = dict[str, str]


def git(*words: str) -> str:
    """What git prints; nothing if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    return done.stdout.strip() if not done.returncode else ""


def code(commit: str, file: str) -> str:
    """The code of a file at a commit: of Python without comments and docstrings."""
    text = git("show", f"{commit}:{file}")
    if not file.endswith(".py"):
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [x for x in body if not is_text(x)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def is_text(node: ast.AST) -> bool:
    """Whether a statement is a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def changed(commit: str, paths: Sequence[str]) -> Iterator[str]:
    """The files whose code has changed since a commit."""
    if paths:  # without one, git would name them all
        for file in git(
            "diff", "--name-only", "--no-renames", commit, "HEAD", "--", *paths
        ).split():
            if code(commit, file) != code("HEAD", file):
                yield file


Row = dict[str, Any]


def commit_of(row: Row) -> str:
    """The newest commit of which a row is known to be true."""
    return str(row.get("same_as", row["commit"]))


def why_old(result: Result, commit: str) -> str:
    """Why rows of a commit are old; nothing if they are not."""
    if not git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"):
        return f"commit {commit} is not here"
    return next((f"{x} has changed" for x in changed(commit, result.script.MEASURES)), "")


def old_rows(result: Result) -> Iterator[tuple[Row, str]]:
    """Each row that is older than the code that it measures, and why."""
    ours = getattr(result.script, "ours", lambda _: True)
    reason = cache(partial(why_old, result))
    for row in filter(ours, result.content["rows"]):
        if why := reason(commit_of(row)):
            yield row, why


def old(results: Iterable[Result]) -> Iterator[str]:
    """Each result with rows that are older than the code that they measure, the cheapest first."""
    for result in sorted(results, key=lambda result: result.script.MINUTES):
        if found := [*old_rows(result)]:
            count = f"{len(found)} of {len(result.content['rows'])} rows"
            yield f"{result.script.MINUTES:5} min  {result.name}, {count}: {found[0][1]}"


def weights(commit: str, cases: Sequence[str]) -> dict[str, Digests]:
    """The digests of the weights that command lines write with the code of a commit.

    None for a line that the code does not know, and for all where it does not run here.
    """
    kept = KEPT / f"{git('rev-parse', f'{commit}:src')}.json"
    known: dict[str, Digests] = json.loads(kept.read_text()) if kept.exists() else {}
    wanted = [case for case in cases if not known.get(case)]
    if not wanted:
        return known
    checkout, found = KEPT / commit, KEPT / "found.json"
    KEPT.mkdir(parents=True, exist_ok=True)
    git("worktree", "add", "--detach", str(checkout), commit)
    version = [sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "egg_info"]
    subprocess.run(version, cwd=checkout, capture_output=True)  # runs record the version
    found.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "tools/same_bytes.py"), "--source", str(checkout)]
    command += ["--only", ",".join(wanted), "--write", str(found)]
    subprocess.run(command, env={**os.environ, "SECATEUR_KERNELS": "none"})
    git("worktree", "remove", "--force", str(checkout))
    known |= {case: {} for case in wanted}
    for name, digest in json.loads(found.read_text() if found.exists() else "{}").items():
        case, _, file = name.partition(": ")
        if case in wanted and file.endswith(WEIGHTS):
            known[case][file] = digest
    kept.write_text(json.dumps(known, indent=0))
    return known


def prove(results: Sequence[Result]) -> Iterator[str]:
    """Compare each with the code of this branch; old rows whose weights are equal say so."""
    from benchmarks.stored import alone  # the root is on the path now

    here = git("merge-base", "main", "HEAD")
    if git("diff", "--name-only", "HEAD", "--", "src") or any(changed(here, ["src"])):
        sys.exit("src differs from main: land it, then prove")
    for result in results:
        script = result.script
        proof = getattr(script, "proof", lambda _: getattr(script, "PROOF", ()))  # noqa: B023
        found = [(row, proof(row)) for row, _ in old_rows(result)]
        wanted: dict[str, list[str]] = {here: []}
        for row, cases in found:
            wanted.setdefault(row["commit"], []).extend(cases)
            wanted[here].extend(cases)
        known = {at: weights(at, [*dict.fromkeys(cases)]) for at, cases in wanted.items()}
        after, proven = known[here], []
        for row, cases in found:
            before = known[row["commit"]]
            if cases and all(after[case] and before[case] == after[case] for case in cases):
                proven.append(row)
        file = RESULTS / f"{result.name}.json"
        with alone():  # a benchmark may have added rows in the meantime
            content = json.loads(file.read_text(encoding="utf-8"))
            for row in content["rows"]:
                row |= {"same_as": here[:8]} if row in proven else {}
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        yield f"{result.name}: {len(proven)} of {len(found)} old rows have the same weights"


def main() -> None:
    """List what is old, or prove that it is not."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prove", nargs="+", metavar="NAME", help="results to compare")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    results = read_results()
    for line in prove([results[x] for x in args.prove]) if args.prove else old(results.values()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
