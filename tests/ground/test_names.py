"""The name of the package, and what pages and messages tell users to install."""

import re
from pathlib import Path

import tomllib

from secateur.errors import DISTRIBUTION, install_extra

HOME = Path(__file__).parents[2]
PROJECT = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_package_has_a_name_of_its_own():
    """The package index knows `secateur` as another project's."""
    assert PROJECT["name"] == DISTRIBUTION == "secateur-llm"


def test_remedies_install_extras_that_exist():
    for extra in PROJECT["optional-dependencies"]:
        assert f"'.[{extra}]'" in install_extra(extra)


def test_nothing_tells_users_to_install_the_other_secateur():
    """`pip install secateur` would bring another project's code."""
    pages = [*HOME.glob("*.md"), *HOME.glob("docs/**/*.md"), *HOME.glob("src/**/*.py")]
    wrong = re.compile(r"pip install '?secateur(?!-llm)")
    found = [page.name for page in pages if wrong.search(page.read_text(encoding="utf-8"))]
    assert not found
    assert wrong.search("pip install 'secateur[serve]'")


def test_extras_that_pages_name_exist():
    pages = [*HOME.glob("*.md"), *HOME.glob("docs/**/*.md")]
    named = {
        extra
        for page in pages
        for extras in re.findall(r"'\.\[([\w,]+)\]'", page.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert named <= PROJECT["optional-dependencies"].keys()
    assert {"serve", "lora", "onnx"} <= named
