"""What the head of a model card tells the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import save_tiny

import secateur
from secateur.reporting.cards import front_matter, inherited_front_matter
from secateur.runs.records import Source

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


def source_of(name: str, kind: str) -> Source:
    return Source(name=name, kind=kind, revision=None, file_bytes=1)


def head_of(card: str) -> dict[str, Any]:
    """The front matter as the hub reads it."""
    opened, block, _ = card.split("---\n", 2)
    assert opened == ""
    head: dict[str, Any] = yaml.safe_load(block)
    return head


def test_a_model_of_the_hub_is_the_base_and_its_licence_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    source = source_of("org/name@v2", "hub")
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
    head = head_of(front_matter(source_of("smollm2-135m", "sample"), tmp_path, []))
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["license"] == "apache-2.0"


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    head = head_of(front_matter(source_of(str(tmp_path), "folder"), tmp_path, []))
    assert head.keys() == {"library_name", "pipeline_tag", "tags"}


def test_a_model_of_several_steps_keeps_base_and_tags(tmp_path: Path) -> None:
    first = front_matter(source_of("org/name", "hub"), tmp_path, ["structured-pruning"])
    (tmp_path / "README.md").write_text(first)
    second = head_of(front_matter(source_of(str(tmp_path), "folder"), tmp_path, ["sparse"]))
    assert second["base_model"] == "org/name"
    assert second["tags"] == ["structured-pruning", "secateur", "sparse"]
    assert inherited_front_matter(source_of(str(tmp_path), "folder"), tmp_path) == first


TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on; " * 60
MAKING: dict[str, tuple[str, dict[str, Any]]] = {
    "prune": ("dense", {"method": "wanda", "sparsity": 0.5}),
    "prune with fits": ("dense", {"method": "sparsegpt", "sparsity": 0.5}),
    "prune and pack": ("dense", {"method": "magnitude", "sparsity": 0.5, "compress": "int8"}),
    "structure": ("dense", {"keep_layers": 1, "effort": "fast"}),
    "train": ("pruned", {"steps": 1, "batch": 2}),
    "compress": ("pruned", {"values": "int8"}),
    "import_model": ("pruned", {}),
    "chain": (
        "dense",
        {
            "steps": [
                {"structure": {"ffn": 0.5, "effort": "fast"}},
                {"prune": {"method": "magnitude", "sparsity": 0.5}},
            ]
        },
    ),
}


@pytest.mark.parametrize("case", MAKING)
def test_a_card_names_no_folder_of_this_machine(case: str, tmp_path: Path) -> None:
    place = tmp_path / ("long " * 20 + "name") / "a user"
    save_tiny(place / "dense", num_hidden_layers=2)
    secateur.prune(place / "dense", output=place / "pruned", method="magnitude", sparsity=0.5)
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    verb, (source, options) = case.split()[0], MAKING[case]
    windows: dict[str, Any] = {"sequence_length": 16, "windows": 4}
    if verb == "train":
        options = {**options, **windows, "text": str(place / "text.txt")}
    elif verb in ("prune", "structure") and options.get("method") != "magnitude":
        options = {**options, **windows, "calibration": str(place / "text.txt")}
    elif verb == "chain":
        options["steps"][0]["structure"] |= {**windows, "calibration": str(place / "text.txt")}
    getattr(secateur, verb)(place / source, output=place / "out", **options)
    card = (place / "out" / "README.md").read_text(encoding="utf-8")
    assert "a user" not in card
    assert "out.partial" not in card
    words = card.partition("```python")[0].replace("(R)", "")  # of a processor's name
    assert not re.search(r"[A-Z]\w+\(", words)  # no Python
    title = card.partition("\n# ")[2].splitlines()[0]
    assert title.startswith(source)
    again = re.search(rf"`secateur {verb} recipe.yaml.*?```yaml\n(.*?)```", card, re.DOTALL)
    assert (again is None) == (verb in ("compress", "import_model"))
    if again is not None:
        made = yaml.safe_load(again[1])
        assert (made["model"], made["output"]) == (source, "out")
        if verb == "prune":
            assert f"**{made['method']}**" in card
    records = [x for x in (place / "out" / "secateur").rglob("*.json") if x.name != "run.json"]
    assert not [x for x in records if "out.partial" in x.read_text(encoding="utf-8")]
