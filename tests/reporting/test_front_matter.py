"""What the head of a model card tells the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import secateur
from secateur.calibration.windows import save_windows
from secateur.reporting.front_matter import front_matter, inherited_front_matter
from tiny import save_tiny
from zoo import tiny_windows

CARD = """---
license: other
license_name: house-licence
license_link: https://example.org/licence
language: [en, de]
tags: [conversational]
widget: [{text: hello}]
---
# A dense model
"""


def head_of(card: str) -> dict[str, Any]:
    """The front matter as the hub reads it."""
    opened, block, _ = card.split("---\n", 2)
    assert opened == ""
    head: dict[str, Any] = yaml.safe_load(block)
    return head


def test_a_model_of_the_hub_is_the_base_and_its_licence_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    source = {"name": "org/name@v2", "kind": "hub"}
    assert head_of(front_matter(source, tmp_path, ["pruned"])) == {
        "base_model": "org/name",
        "license": "other",
        "license_name": "house-licence",
        "license_link": "https://example.org/licence",
        "language": ["en", "de"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "secateur"],
    }


def test_a_sample_names_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    head = head_of(front_matter({"name": "smollm2-135m", "kind": "sample"}, tmp_path, []))
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["license"] == "apache-2.0"


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    head = head_of(front_matter({"name": str(tmp_path), "kind": "folder"}, tmp_path, []))
    assert head.keys() == {"library_name", "pipeline_tag", "tags"}


def test_a_model_of_several_steps_keeps_base_and_tags(tmp_path: Path) -> None:
    first = front_matter({"name": "org/name", "kind": "hub"}, tmp_path, ["structured-pruning"])
    (tmp_path / "README.md").write_text(first)
    second = head_of(front_matter({"name": str(tmp_path), "kind": "folder"}, tmp_path, ["sparse"]))
    assert second["base_model"] == "org/name"
    assert second["tags"] == ["structured-pruning", "secateur", "sparse"]
    assert inherited_front_matter({"name": str(tmp_path), "kind": "folder"}, tmp_path) == first


@pytest.mark.parametrize("relative", [True, False])
def test_cards_name_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("m"))
    save_windows(tiny_windows(), tmp_path / "w.safetensors")
    place = Path("runs") if relative else tmp_path / "runs"
    secateur.prune(
        "m", output=place / "half", method="wanda", sparsity=0.5, calibration="w.safetensors"
    )
    secateur.compress(place / "half", output=place / "small")
    shown = {True: "runs/", False: ""}[relative]
    dense, packed = ((place / name / "README.md").read_text() for name in ("half", "small"))
    assert f'from_pretrained("{shown}half", dtype="auto")' in dense
    assert f"secateur compress {shown}half --output {shown}half-small" in dense
    assert f'secateur.load("{shown}small")' in packed
    assert '"DIR"' not in dense + packed
    assert head_of(packed) == head_of(dense)
