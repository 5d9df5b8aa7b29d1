"""The files of a release agree with each other."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import secateur
from secateur.recipes.verbs import VERBS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    document: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return document["project"]


def test_one_version(project: dict[str, Any]) -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert project["version"] == secateur.__version__ == cited["version"]
    assert cited["license"] == project["license"]


def test_the_workflow_tests_every_python_that_is_promised(project: dict[str, Any]) -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    promised = [
        kind.rpartition(" ")[2]
        for kind in project["classifiers"]
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", kind)
    ]
    assert promised[0] == project["requires-python"].removeprefix(">=")
    for job in ("test", "install"):
        assert workflow["jobs"][job]["strategy"]["matrix"]["python-version"] == promised
    makes = {
        step["run"].removeprefix("make ")
        for job in workflow["jobs"].values()
        for step in job["steps"]
        if step.get("run", "").startswith("make ")
    }
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert makes <= set(targets)


def test_the_image_copies_what_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        name
        for names in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M)
        for name in names.split()
    ]
    assert "src" in copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert [name for name in copied if f"!{name}" not in ignored] == []
    used = re.findall(r"^#     docker run .* secateur (\w+)", text, re.M)
    assert used
    assert set(used) <= VERBS.keys() | {"serve"}


def test_templates_of_issues_are_forms() -> None:
    forms = [
        yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
        if file.name != "config.yml"
    ]
    assert len(forms) == 3
    for form in forms:
        assert {"name", "description", "body"} <= form.keys()
        assert all(part["type"] in ("markdown", "textarea", "input") for part in form["body"])
