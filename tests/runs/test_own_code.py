"""Code that comes with a checkpoint runs when the user says so, then in every part of a verb."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from cases import CASES, make_sources
from transformers import LlamaForCausalLM

from secateur.models.configuration import TrustedFolder, trusted_folder

CODE = "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    pass\n"
OURS = {"VariedLlamaForCausalLM"}
"""Of a cut model: secateur's, which comes with it."""
OWN = {"AutoModelForCausalLM": "modeling_own.Own"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and texts; every Llama among them has a class of its own."""
    place = tmp_path_factory.mktemp("own") / "sources"
    make_sources(place)
    for file in place.glob("*/config.json"):
        config = json.loads(file.read_text())
        if config["model_type"] == "llama":
            file.write_text(json.dumps({**config, "auto_map": OWN}))
            file.with_name("modeling_own.py").write_text(CODE)
    return place


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the classes whose objects a Llama is."""
    names, make = set[str](), LlamaForCausalLM.__init__

    def noted(self: LlamaForCausalLM, *given: object, **named: object) -> None:
        names.add(type(self).__name__)
        make(self, *given, **named)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", noted)
    return names


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sweep", "fit", "draft")]


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    "name",
    ["prune best", "structure best", "train with a teacher", "chain", "compress int8", *SLOW],
)
def test_a_verb_runs_the_code_of_all_its_models_or_none(
    name: str, trust: bool, sources: Path, built: set[str], tmp_path: Path
) -> None:
    given = {"trust_remote_code": True} if trust else {}
    CASES[name].call(sources, tmp_path / "out", None, **given)
    assert built - OURS == {"Own" if trust else "LlamaForCausalLM"}


def test_what_is_made_of_a_trusted_folder(tmp_path: Path) -> None:
    folder = trusted_folder(str(tmp_path), True)
    sent = pickle.loads(pickle.dumps(folder))
    for trusted in (folder, trusted_folder(folder, False), folder / "in", folder.absolute(), sent):
        assert isinstance(trusted, TrustedFolder)
        assert trusted in (tmp_path, tmp_path / "in")
    for plain in (Path(str(folder)), trusted_folder(tmp_path, False), tmp_path / folder.name):
        assert not isinstance(plain, TrustedFolder)
