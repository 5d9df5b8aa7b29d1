"""All parts on a device "cuda", on a machine without a GPU.

`parts/` holds the tests; they run in a process of their own, since the library that makes torch
believe in a device cannot be taken back. This file builds that library, starts the process once,
and reports: one test here for each file there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PARTS = sorted(path.stem for path in (HERE / "parts").glob("parts_*.py"))

PATHS = "tests tests/support tests/devices tests/structured tests/contracts"

Case = tuple[str, str, str]
"""The test, how it ended, and what it said."""


@pytest.fixture(scope="session")
def rehearsed(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Case]]:
    """How every test of `parts/` ended, by file."""
    report = tmp_path_factory.mktemp("rehearsal") / "report.xml"
    command = [
        sys.executable, str(HERE / "rehearse.py"), str(library), str(HERE / "parts"), "-q",
        "--rootdir", str(HERE.parent.parent), "-o", "python_files=parts_*.py",
        "-o", "junit_family=xunit1", "-o", f"pythonpath={PATHS}",
        "-p", "no:cacheprovider", f"--junitxml={report}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=HERE.parent.parent,
        env=environment, timeout=1800,
    )  # fmt: skip
    assert report.is_file(), (
        f"the rehearsal did not end:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    )
    found: dict[str, list[Case]] = {part: [] for part in PARTS}
    for case in ET.parse(report).getroot().iter("testcase"):
        found[Path(case.attrib["file"]).stem].append(ending(case))
    return found


def ending(case: Any) -> Case:
    """The outcome of one test in a report."""
    for child in case:
        if child.tag in ("failure", "error"):
            return case.attrib["name"], "failed", child.text or child.attrib.get("message", "")
        if child.tag == "skipped":
            return case.attrib["name"], "not runnable", child.attrib.get("message", "")
    return case.attrib["name"], "green", ""


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_on_cuda(part: str, rehearsed: dict[str, list[Case]]) -> None:
    """Lists what was rehearsed; shown with `pytest -rP`."""
    cases = rehearsed[part]
    assert cases, f"nothing was rehearsed of {part}"
    kinds = Counter(
        name.split("[")[0].removeprefix("test_") for name, how, _ in cases if how == "green"
    )
    print(f"{part}: " + ", ".join(f"{kind} × {count}" for kind, count in kinds.items()))
    for name, how, why in cases:
        if how == "not runnable":
            print(f"  not runnable: {name}: {why}")
    failed = [f"{name}\n{why[-1500:]}" for name, how, why in cases if how == "failed"]
    assert not failed, f"{len(failed)} failed:\n" + "\n\n".join(failed[:10])
