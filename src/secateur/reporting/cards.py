"""Model cards: the README.md of a pruned, cut, trained, compressed or imported model.

A card has the YAML block that the hub reads, a title, and sections with a blank line between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.models.samples import MODELS
from secateur.reporting.models import cut, imported, packed, pruned, similarity_of, trained
from secateur.reporting.tables import Block, markdown
from secateur.runs.records import Compression, Import, Manifest, Source, Training

TEMPLATES = Path(__file__).parent / "templates"

OURS = "secateur"
"""The tag that marks cards written by secateur."""

MARK = "<!-- the card of the dense folder -->"
"""Stands in the card of a compressed model, before the card of the dense folder."""

REFITTED = ("refit", "queries", "width")
"""Steps after which the weights that read the units were fitted again, unless by `zero`."""

TUNED = (
    "Layer by layer, routers were tuned to the outputs of the uncut model; so were the experts, "
    "unless they are stored in fewer bits: their last linear layers were fitted, and neurons of "
    "removed experts took the places of some of theirs. "
)

VARIED = """# No class of transformers has its sizes; importing secateur adds one.
# Without secateur, pass trust_remote_code=True: the folder has the modelling file.
import secateur
"""


def prune_card(
    manifest: Manifest, recipe_yaml: str, source_folder: Path, output: str | Path
) -> str:
    """The card of a pruned model: how it was made, its measured properties, and its limits.

    Args:
        manifest: the manifest of the run.
        recipe_yaml: the complete recipe; empty if it is not shown.
        source_folder: the source checkpoint, for its licence and language.
        output: the folder of the model.
    """
    method, place = manifest.method, shown_place(output)
    score, solver = (method[part].partition(",")[0] for part in ("score", "solver"))
    tags = ["pruned", "sparse", method["name"]]
    return front_matter(manifest.source, source_folder, tags) + _card(
        "prune", pruned(manifest), of=manifest, source=source_name(manifest.source), score=score,
        solver=solver, place=place, again=made_again("prune", recipe_yaml, place),
    )  # fmt: skip


def structure_card(
    manifest: Manifest, recipe_yaml: str, source_folder: Path, output: str | Path
) -> str:
    """The card of a cut model: what was removed, how it was chosen, and how the model loads.

    Args: as of `prune_card`.
    """
    structure, place = manifest.structure, shown_place(output)
    assert structure is not None
    names = {step["step"] for step in structure.steps}
    refitted = any(x["step"] in REFITTED and x["by"] != "zero" for x in structure.steps)
    learned = "" if "routers" in names else "Nothing was trained."
    if manifest.distillation:
        teacher = manifest.method["distillation"].get("teacher")
        taught = "the uncut model" if teacher is None else f"`{Path(teacher).name}`"
        learned = f"The cut model learned from {taught} on the same windows."
    tags, embeds = ["pruned", "structured-pruning"], similarity_of(structure) is not None
    task = "feature-extraction" if embeds else "text-generation"
    return front_matter(manifest.source, source_folder, tags, task) + _card(
        "structure", cut(manifest), of=manifest, source=source_name(manifest.source),
        kept=1 - (structure.removed if embeds else structure.decoder_removed),
        whole="weights" if embeds else "decoder",
        auto="AutoModel" if embeds else "AutoModelForCausalLM",
        learned=learned, varied=VARIED * structure.varied,
        fitted="The weights that read the units were fitted again. " * refitted
        + TUNED * ("routers" in names),
        place=place, again=made_again("structure", recipe_yaml, place),
    )  # fmt: skip


def training_card(
    training: Training, recipe_yaml: str, source_folder: Path, output: str | Path
) -> str:
    """The card of a trained model: how it was trained, followed by the card of its source.

    Args: as of `prune_card`, with the record of the training.
    """
    again = made_again("train", recipe_yaml, shown_place(output))
    front, source = inherited_front_matter(training.source, source_folder), training.source
    card = _card("train", trained(training), source=source_name(source), again=again)
    return front + _followed(card, _body(source_folder))


def compression_card(
    record: Compression, source: Source, source_folder: Path, output: str | Path
) -> str:
    """The card of a compressed model: how it is stored, followed by the card of the model itself.

    Args:
        record: the record of the compression.
        source: the source.
        source_folder: the source checkpoint; its card is appended.
        output: the output folder.
    """
    name, place = Path(source.name).name, shown_place(output)
    card = _card("compress", packed(record), source=name, place=place)
    front = inherited_front_matter(source, source_folder)
    return front + _followed(card, f"{MARK}\n{_body(source_folder)}")


def import_card(record: Import, source_folder: Path, output: str | Path) -> str:
    """The card of an imported model: where it came from, its zeros, then the card of its source.

    Args:
        record: what was imported.
        source_folder: the source; its card is appended.
        output: the folder of the model.
    """
    source, place = record.source, shown_place(output)
    packing = (
        f"`secateur compress {place} --output {place}-small` stores the model without its zeros."
    )
    name = Path(source.name.partition("@")[0]).name
    card = _card(
        "import", imported(record), name=name, source=source_name(source),
        packing=packing * bool(record.sparsity),
    )  # fmt: skip
    return front_matter(source, source_folder, ["pruned", "sparse"]) + _followed(
        card, _body(source_folder)
    )


def with_measurements(card: str, sections: Mapping[str, Sequence[Block]]) -> str:
    """A card with sections, by heading, of what was measured; it may have them already."""
    found = [f"## {name}\n\n{markdown(blocks)}" for name, blocks in sections.items() if blocks]
    parts = [card.rstrip(), *(section for section in found if section not in card)]
    return "\n\n".join(filter(None, parts)) + "\n"


# -- sections ------------------------------------------------------------------------------------


def _card(template: str, tables: Sequence[Block], **values: Any) -> str:
    """A card without its front matter; its tables name no folder of this machine."""
    text = (TEMPLATES / f"{template}.txt").read_text(encoding="utf-8")
    shown = without_folders(markdown(tables))
    shown = shown.partition("\n\n")[2]  # the title of the card says what the first table is about
    card = text.format(tables=shown, **values)
    return re.sub(r"\n{3,}", "\n\n", card).rstrip("\n") + "\n"  # a part may be empty


def _followed(card: str, body: str) -> str:
    """A card with the card of the model's source below it; that may be empty."""
    return f"{card}\n{body}".rstrip("\n") + "\n"


def made_again(verb: str, recipe_yaml: str, place: str) -> str:
    """The section with the recipe; empty without one."""
    if not recipe_yaml:
        return ""
    recipe = without_folders(recipe_yaml.rstrip())
    command = f"`secateur {verb} recipe.yaml --output {place}` with `recipe.yaml`:"
    return f"## Make it again\n\n{command}\n\n```yaml\n{recipe}\n```"


def _body(folder: Path) -> str:
    """The card in a folder without its front matter; empty if there is none."""
    return split_card(_read_card(folder))[1]


# -- the YAML block at the head ------------------------------------------------------------------


def front_matter(
    source: Source, folder: Path, tags: Sequence[str], task: str = "text-generation"
) -> str:
    """The block with its fences: base model, licence, language, library and tags.

    The base model is included if it is a model on the hub. Licence and language come from the card
    of the source. Unknown entries are left out.

    Args:
        source: the source model, as in a manifest.
        folder: folder of the source model.
        tags: tags of the new model.
        task: what the hub calls the task of the model.
    """
    from huggingface_hub import ModelCard, ModelCardData

    known: dict[str, Any] = {}
    with suppress(ValueError):  # there is none, or nobody can read it
        known = ModelCard.load(folder / "README.md").data.to_dict()
    earlier = known.get("tags") or []
    # tags of a card that secateur wrote stay: the model is that one, changed once more
    earlier = earlier if OURS in earlier else []  # they describe another model
    sample = MODELS.get(source.name) if source.kind == "sample" else None
    base = known.get("base_model")  # the source folder was itself made from another model
    if source.kind == "hub":
        base = source.name.split("@")[0]
    elif sample is not None:
        base = sample.hub_id
    data = ModelCardData(
        base_model=base,
        license=known.get("license") or (sample.license if sample else None),
        license_name=known.get("license_name"),
        license_link=known.get("license_link"),
        language=known.get("language"),
        library_name="transformers",
        pipeline_tag=task,
        tags=list(dict.fromkeys([*earlier, *tags, OURS])),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def inherited_front_matter(source: Source, folder: Path) -> str:
    """The block for a trained or packed model: the block of its source, if the source has one.

    Args:
        source: as for `front_matter`.
        folder: folder of the source.
    """
    front, _ = split_card(_read_card(folder))
    return front if front and source.kind == "folder" else front_matter(source, folder, ())


def _read_card(folder: Path) -> str:
    card = folder / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else ""


def split_card(card: str) -> tuple[str, str]:
    """Split a card into its front matter, with fences, and the rest.

    Example:
        >>> from secateur.reporting.cards import split_card
        >>> split_card("---\\nlicense: mit\\n---\\n# A model")
        ('---\\nlicense: mit\\n---\\n', '# A model')
    """
    if card.startswith("---\n"):
        end = card.find("\n---\n", 3)
        if end > 0:
            return card[: end + 5], card[end + 5 :]
    return "", card


def source_name(source: Source) -> str:
    """The name of a source model in a card: of a folder or file only the last part.

    Example:
        >>> from secateur.reporting.cards import source_name
        >>> from secateur.runs.records import Source
        >>> source_name(Source(name="/home/me/tiny", kind="folder", revision=None, file_bytes=1))
        'tiny'
    """
    local = source.kind in ("folder", "gguf")
    return Path(source.name).name if local else source.name


def shown_place(output: str | Path) -> str:
    """The name of a folder in its own card: the path as given, if it is relative.

    Of an absolute path only the last part is shown, because the rest describes one machine.

    Example:
        >>> from secateur.reporting.cards import shown_place
        >>> shown_place("runs/small"), shown_place("/home/me/runs/small")
        ('runs/small', 'small')
    """
    path = Path(output)
    return path.name if path.is_absolute() or ".." in path.parts else str(path)


_NAME = r"[^\s/\\\"'`,=|](?:[^/\\\"'`,=|\n]*[^\s/\\\"'`,=|])?"
_FOLDERS = re.compile(rf"(?<![^\s\"'`=,@])(?:/|[A-Z]:\\+)(?:{_NAME}[/\\]+)+(?={_NAME})")
"""The folders of an absolute path, up to its last name."""


def without_folders(text: str) -> str:
    """A text in which every absolute path is reduced to its last name.

    Folders describe one machine, and often its user. Relative paths and addresses stay.

    Example:
        >>> from secateur.reporting.cards import without_folders
        >>> without_folders("model: /home/me/my models/tiny")
        'model: tiny'
    """
    return _FOLDERS.sub("", text)
