"""Lists what secateur is installed with (an SBOM), and asks whether any of it has known faults.

    python tools/audit.py [--strict] [--output build/sbom.json]

The list is CycloneDX 1.6 (by `cyclonedx-bom`), made from the environment that runs this script. The
question goes to the advisory database that `pip-audit` reads. Both tools live in an environment of
their own, build/audit, so that they are not in the list. Without a network there is no answer, and
the script says so. With `--strict`, a known fault and a missing answer end it with code 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path

HOME = Path(__file__).parents[1] / "build"
TOOLS = ("cyclonedx-bom>=7,<8", "pip-audit>=2.9,<3")
SILENCE_SECONDS = 120


class UnansweredError(Exception):
    """There is no network, or it does not lead to the database."""


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it prints.

    Raises:
        UnansweredError: it takes too long.
    """
    try:
        return subprocess.run(
            [str(word) for word in words], capture_output=True, text=True, timeout=SILENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UnansweredError(
            f"{Path(words[0]).name} gave no answer in {SILENCE_SECONDS} s"
        ) from None


def tools() -> Path:
    """The folder of the two tools' commands; installs them the first time.

    Raises:
        UnansweredError: they cannot be installed.
    """
    place = HOME / "audit"
    commands = place / ("Scripts" if sys.platform == "win32" else "bin")
    if not (place / "ready").exists():
        venv.create(place, with_pip=True, clear=True)
        quiet = ("--quiet", "--retries", "1", "--disable-pip-version-check")
        done = run(commands / "python", "-m", "pip", "install", *quiet, *TOOLS)
        if done.returncode:
            raise UnansweredError(f"the tools cannot be installed: {last_line(done.stderr)}")
        (place / "ready").touch()
    return commands


def last_line(text: str) -> str:
    """The last line that is not empty."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def write_sbom(commands: Path, output: Path) -> int:
    """Write the list. Return the number of packages in it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    project = Path(__file__).parents[1] / "pyproject.toml"
    done = run(
        commands / "cyclonedx-py", "environment", "--pyproject", project, "--spec-version", "1.6",
        "--output-reproducible", "--output-file", output, sys.executable,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"no SBOM: {last_line(done.stderr)}")
    return len(json.loads(output.read_text(encoding="utf-8"))["components"])


def known_faults(commands: Path) -> tuple[list[str], int]:
    """Known faults of this environment, a line each, and the number of packages asked about.

    Raises:
        UnansweredError: the database cannot be reached, or knows no package.
    """
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    done = run(
        commands / "pip-audit", "--path", packages, "--format", "json", "--progress-spinner", "off",
        "--skip-editable", "--timeout", "15",
    )  # fmt: skip
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        raise UnansweredError(f"no answer about known faults: {last_line(done.stderr)}") from None
    known = [one for one in found if "skip_reason" not in one]
    if not known:
        raise UnansweredError(f"no answer about known faults: {found[0]['skip_reason']}")
    faults = [
        f"{one['name']} {one['version']}: {fault['id']}, mended in "
        f"{', '.join(fault['fix_versions']) or 'no version yet'}"
        for one in known
        for fault in one["vulns"]
    ]
    return faults, len(known)


def main() -> None:
    """Write the list, then ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strict", action="store_true", help="fail on a fault or without answer")
    parser.add_argument("--output", type=Path, default=HOME / "sbom.json")
    args = parser.parse_args()
    try:
        commands = tools()
        print(f"{args.output}: {write_sbom(commands, args.output)} packages")
        faults, asked = known_faults(commands)
    except UnansweredError as reason:
        print(f"not checked for known faults: {reason}")
        sys.exit(1 if args.strict else 0)
    print("\n".join(faults) or f"none of {asked} packages has a known fault")
    sys.exit(1 if faults and args.strict else 0)


if __name__ == "__main__":
    main()
