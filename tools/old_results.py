"""Which results are older than the code that they measure.

    python tools/old_results.py                       # all that are, cheapest first
    python tools/old_results.py --prove NAME NAME     # do both versions write the same weights?

A script says what it measures: `MEASURES`, files and folders, and `MINUTES`, how long it takes on
one quiet core. A result is old if their code has changed since its commit; comments and docstrings
are not code.

A script whose numbers follow from the weights that the code writes also names command lines of
`same_bytes.yaml` that write such weights: `PROOF`. `--prove` runs them with the code of the
result's commit and with the code of this branch, on the same inputs, without kernels. If all files
of weights are the same bytes, the result says so (`same_as`) and is as new as that commit. Digests
are kept in `build/same_bytes`, so a proof that was stopped goes on. Numbers that are times have no
such proof: they are measured again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

from measured_tables import RESULTS, ROOT, Result, read_results

KEPT = ROOT / "build/same_bytes"
WEIGHTS = (".safetensors#tensors", ".gguf")

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


def old(results: Iterable[Result]) -> Iterator[str]:
    """Each result that is older than the code that it measures, the cheapest first, and why."""
    for result in sorted(results, key=lambda result: result.script.MINUTES):
        commit = result.content.get("same_as", {}).get("commit", result.content["commit"])
        why = next((f"{x} has changed" for x in changed(commit, result.script.MEASURES)), "")
        if not git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"):
            why = f"commit {commit} is not here"
        if why:
            day = result.content["heading"].rpartition("; ")[2]
            yield f"{result.script.MINUTES:5} min  {result.name}, of {day}: {why}"


def weights(commit: str, cases: Sequence[str]) -> dict[str, Digests]:
    """The digests of the weights that command lines write with the code of a commit."""
    kept = KEPT / f"{git('rev-parse', f'{commit}:src')}.json"
    known: dict[str, Digests] = json.loads(kept.read_text()) if kept.exists() else {}
    wanted = [case for case in cases if not known.get(case)]
    if not wanted:
        return known
    checkout, found = KEPT / commit, KEPT / "found.json"
    KEPT.mkdir(parents=True, exist_ok=True)
    git("worktree", "add", "--detach", str(checkout), commit)
    version = [sys.executable, "setup.py", "-q", "egg_info"]  # runs record it
    subprocess.run(version, check=True, cwd=checkout, capture_output=True)
    command = [sys.executable, str(ROOT / "tools/same_bytes.py"), "--source", str(checkout)]
    command += ["--only", ",".join(wanted), "--write", str(found)]
    subprocess.run(command, check=True, env={**os.environ, "SECATEUR_KERNELS": "none"})
    git("worktree", "remove", "--force", str(checkout))
    known |= {case: {} for case in wanted}
    for name, digest in json.loads(found.read_text()).items():
        case, _, file = name.partition(": ")
        if case in wanted and file.endswith(WEIGHTS):
            known[case][file] = digest
    kept.write_text(json.dumps(known, indent=0))
    return known


def prove(results: Sequence[Result]) -> Iterator[str]:
    """Compare each with the code of this branch; writes `same_as` where all weights are equal."""
    here = git("merge-base", "main", "HEAD")
    if git("diff", "--name-only", "HEAD", "--", "src") or any(changed(here, ["src"])):
        sys.exit("src differs from main: land it, then prove")
    after = weights(here, [*dict.fromkeys(x for one in results for x in one.script.PROOF)])
    for result in results:
        cases = result.script.PROOF
        before = weights(result.content["commit"], cases)
        other = [case for case in cases if not after[case] or before[case] != after[case]]
        if other:
            yield f"{result.name}: other weights, or none, from {', '.join(other)}"
            continue
        count = sum(len(after[case]) for case in cases)
        proof = f"{count} equal files of weights, written by {', '.join(cases)} of same_bytes.yaml"
        content = {**result.content, "same_as": {"commit": here[:8], "proof": proof}}
        content["rows"] = content.pop("rows")  # they stay last
        file = RESULTS / f"{result.name}.json"
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        yield f"{result.name}: {proof}"


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
