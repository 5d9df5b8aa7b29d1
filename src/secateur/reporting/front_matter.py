"""The YAML block at the head of a model card, which the hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.models.samples import MODELS

OURS = "secateur"
"""The tag that marks cards written by secateur."""


def front_matter(source: Mapping[str, Any], folder: Path, tags: Sequence[str]) -> str:
    """The block with its fences: base model, licence, language, library and tags.

    The base model is included if it is a model on the hub. Licence and language come from the card
    of the source. Unknown entries are left out.

    Args:
        source: `name` and `kind` of the source model, as in a manifest.
        folder: folder of the source model.
        tags: tags of the new model.
    """
    from huggingface_hub import ModelCardData

    known = _source_card(folder)
    sample = MODELS.get(source["name"]) if source["kind"] == "sample" else None
    base = known.get("base_model")  # the source folder was itself made from another model
    if source["kind"] == "hub":
        base = source["name"].split("@")[0]
    elif sample is not None:
        base = sample.hub_id
    data = ModelCardData(
        base_model=base,
        license=known.get("license") or (sample.license if sample else None),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        language=known.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*_earlier_tags(known), *tags, OURS])),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def inherited_front_matter(source: Mapping[str, Any], folder: Path) -> str:
    """The block for a trained or packed model: the block of its source, if the source has one.

    Args:
        source: as for `front_matter`.
        folder: folder of the source.
    """
    card = folder / "README.md"
    front, _ = split_card(card.read_text(encoding="utf-8") if card.is_file() else "")
    return front if front and source["kind"] == "folder" else front_matter(source, folder, ())


def _earlier_tags(card: Mapping[str, Any]) -> list[str]:
    """The tags of a card written by secateur. Tags of other cards describe another model."""
    tags = card.get("tags") or []
    return [*tags] if OURS in tags else []


def _source_card(folder: Path) -> dict[str, Any]:
    """The front matter of the card in a folder; empty if there is none or it cannot be read."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.exists():
        return {}
    try:
        return ModelCard.load(card).data.to_dict()
    except ValueError:
        return {}


def split_card(card: str) -> tuple[str, str]:
    """Split a card into its front matter, with fences, and the rest.

    Example:
        >>> from secateur.reporting.front_matter import split_card
        >>> split_card("---\\nlicense: mit\\n---\\n# A model")
        ('---\\nlicense: mit\\n---\\n', '# A model')
    """
    if card.startswith("---\n"):
        end = card.find("\n---\n", 3)
        if end > 0:
            return card[: end + 5], card[end + 5 :]
    return "", card


def source_name(source: Mapping[str, Any]) -> str:
    """The name of a source model in a card: of a folder or file only the last part.

    Example:
        >>> from secateur.reporting.front_matter import source_name
        >>> source_name({"name": "/home/me/tiny", "kind": "folder"})
        'tiny'
    """
    local = source["kind"] in ("folder", "gguf")
    return Path(source["name"]).name if local else str(source["name"])


def shown_place(output: str | Path) -> str:
    """The name of a folder in its own card: the path as given, if it is relative.

    Of an absolute path only the last part is shown, because the rest describes one machine.

    Example:
        >>> from secateur.reporting.front_matter import shown_place
        >>> shown_place("runs/small"), shown_place("/home/me/runs/small")
        ('runs/small', 'small')
    """
    path = Path(output)
    return path.name if path.is_absolute() or ".." in path.parts else str(path)
