"""Model cards: the README.md of a pruned, cut, trained, compressed or imported model.

A card has the YAML block that the hub reads, a title, and sections with a blank line between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.models.hub import MODELS
from secateur.reporting.models import CompressResult, ImportResult
from secateur.reporting.tables import Block, binary_size, by_layer, markdown, markdown_table
from secateur.runs.records import Manifest, SkippedMatrix, Source, Training

OURS = "secateur"
"""The tag that marks cards written by secateur."""

MARK = "<!-- the card of the dense folder -->"
"""Stands in the card of a compressed model, before the card of the dense folder."""

REFITTED = ("refit", "queries", "width")
"""Steps after which the weights that read the units were fitted again, unless by `zero`."""

TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""

VARIED = """# No class of transformers has its sizes; importing secateur adds one.
# Without secateur, pass trust_remote_code=True: the folder has the modelling file.
import secateur
"""


def prune_card(
    manifest: Manifest,
    recipe_yaml: str,
    source_folder: Path,
    output: str | Path,
) -> str:
    """The card of a pruned model: how it was made, its measured properties, and its limits.

    Args:
        manifest: the manifest of the run.
        recipe_yaml: the complete recipe; empty if it is not shown.
        source_folder: the source checkpoint, for its licence and language.
        output: the folder of the model.
    """
    method, result, cost = manifest.method, manifest.result, manifest.cost
    source, place = source_name(manifest.source), shown_place(output)
    score, solver = (method[part].partition(",")[0] for part in ("score", "solver"))
    facts = [
        ("source", f"`{source}` ({manifest.source.kind})"),
        ("zeros in the decoder's matrices", f"{result.decoder_sparsity:.2%}"),
        ("zeros in all parameters", f"{result.model_sparsity:.2%}"),
        ("pattern, scope", f"{method['pattern']}, {method['scope']}"),
        ("calibration", _calibration(manifest.calibration)),
        ("wall time", f"{cost.seconds:.0f} s on {_hardware(manifest.environment)}"),
        ("peak memory", binary_size(cost.peak_resident_bytes)),
    ]
    silent = by_layer((manifest.experts or {}).get("silent", {}))
    return _card(
        front_matter(manifest.source, source_folder, ["pruned", "sparse", method["name"]]),
        f"{source}, pruned to {result.decoder_sparsity:.2%}",
        f"Made by secateur {manifest.environment['secateur']} with **{method['name']}** (score "
        f"{score}, solver {solver}).",
        markdown_table(("", ""), facts),
        "The zeros are stored as zeros: these files are as large as those of the dense model in "
        "the same\ndtype, and engines that do not know of sparsity run it at the dense model's "
        f"speed. To pack it:\n`secateur compress {place} --output {place}-small`.",
        f"Vectors (norms, biases) are never pruned. {_not_pruned(manifest.left)}",
        f"No calibration token reached these experts, so they are dense: {silent}." * bool(silent),
        _use(TRANSFORMERS, place),
        made_again("prune", recipe_yaml, place),
        "The calibration windows are in `secateur/windows.safetensors`; per-layer records in\n"
        "`secateur/layers.jsonl`; versions and hardware in `secateur/manifest.json`.\n",
    )


def structure_card(
    manifest: Manifest, recipe_yaml: str, source_folder: Path, output: str | Path
) -> str:
    """The card of a cut model: what was removed, how it was chosen, and how the model loads.

    Args:
        manifest: the manifest of the run.
        recipe_yaml: the complete recipe; empty if it is not shown.
        source_folder: the source checkpoint, for its licence and language.
        output: the folder of the model.
    """
    cut, place = manifest.structure, shown_place(output)
    assert cut is not None
    before, after = both = cut.before, cut.after
    rows = [
        ("parameters", f"{before.parameters:,}", f"{after.parameters:,}"),
        ("of them in decoder layers", f"{before.decoder:,}", f"{after.decoder:,}"),
        ("KV cache of a token", *(f"{x.kv_cache_bytes_per_token:,} bytes" for x in both)),
        ("weight files", *(f"{x.file_bytes / 2**20:.1f} MiB" for x in both)),
    ]
    if (measured := cut.latency) is not None:
        name = (
            f"time of a token, batch 1, {measured['context_tokens']} tokens before it, "
            f"{measured['dtype']}, {measured['threads']} threads"
        )
        then, now = (f"{measured[f'milliseconds_{when}']:.2f} ms" for when in ("before", "after"))
        rows.append((name, then, now))
    steps = ", then ".join(f"{step['step']} by {step['by']}" for step in cut.steps)
    learned = any(step["step"] == "learned" for step in cut.steps)
    distilled = "" if learned else "Nothing was trained."
    if manifest.distillation:
        teacher = manifest.method["distillation"].get("teacher")
        taught = "the uncut model" if teacher is None else f"`{Path(teacher).name}`"
        distilled = f"It then learned from {taught} on the same windows."
    return _card(
        front_matter(manifest.source, source_folder, ["pruned", "structured-pruning"]),
        f"{source_name(manifest.source)}, cut to {1 - cut.decoder_removed:.2%} of its decoder",
        f"Made by secateur {manifest.environment['secateur']}: {steps}.",
        markdown_table(("", "before", "after"), rows),
        _chosen_on(manifest.calibration, cut.steps) + distilled,
        _use(VARIED + TRANSFORMERS if cut.varied else TRANSFORMERS, place),
        made_again("structure", recipe_yaml, place),
        "Which units stayed is in `secateur/steps.json`; versions and hardware in "
        "`secateur/manifest.json`.\n",
    )


def training_card(
    training: Training, recipe_yaml: str, source_folder: Path, output: str | Path
) -> str:
    """The card of a trained model: how it was trained, followed by the card of its source.

    Args:
        training: the record of the training.
        recipe_yaml: the complete recipe; empty if it is not shown.
        source_folder: the model before the training; its card is appended.
        output: the folder of the trained model.
    """
    result = training.result
    before, after = result["perplexity_before"], result["perplexity_after"]
    optimizer = f"{training.learning_rate:.2g} at most, {training.optimizer}"
    watched = "not watched" if after is None else f"{before:.3f} → {after:.3f}"
    facts = [
        ("text", f"`{without_folders(training.text['source'])}`"),
        ("read", f"{result['tokens']:,} tokens in {result['step']:,} steps"),
        ("objective", training.objective),
        ("learning rate, optimizer", optimizer),
        ("perplexity of the validation windows", watched),
        ("wall time", f"{training.cost.seconds:.0f} s on {_hardware(training.environment)}"),
    ]
    return _card(
        inherited_front_matter(training.source, source_folder),
        f"{source_name(training.source)}, trained",
        "Trained by `secateur train` with its zeros held at every step, and looked at again in "
        f"these files:\n{result['decoder_sparsity']:.2%} of the weights in the decoder's matrices "
        "are zero.",
        markdown_table(("", ""), facts),
        "Training watched this perplexity. `secateur evaluate` measures one by a protocol.",
        made_again("train", recipe_yaml, shown_place(output)),
        "The card of the model that was trained follows; what it says of weights is about that "
        "model.",
        _body(source_folder),
    )


def compression_card(
    result: CompressResult, source: Source, source_folder: Path, output: str | Path
) -> str:
    """The card of a compressed model: how it is stored, followed by the card of the model itself.

    Args:
        result: the result of the compression.
        source: the source.
        source_folder: the source checkpoint; its card is appended.
        output: the output folder.
    """
    place, linears = shown_place(output), result.linears
    zeros = f"prunable matrices, {result.sparsity:.2%} zeros"
    sizes = [
        ("weight files", f"{result.file_bytes:,}", f"{result.ratio:.1%}"),
        (zeros, f"{linears.bytes:,}", f"{linears.ratio:.1%}"),
    ]
    stored = {**result.formats}
    if result.embeddings.matrices:
        stored[f"embeddings and head, {result.embedding_values}"] = result.embeddings
    formats = [(kind, str(x.matrices), f"{x.bits_per_weight:.2f}") for kind, x in stored.items()]
    return _card(
        inherited_front_matter(source, source_folder),
        f"{Path(source.name).name}, compressed",
        "The zeros of this model are not stored. Made by `secateur compress`; `docs/format.md` of "
        "secateur\nspecifies the files."
        + (f" Before it was packed, it learned {result.learned}." if result.learned else ""),
        markdown_table(("", "bytes", "of dense bfloat16"), sizes, range(1, 3)),
        markdown_table(("stored as", "matrices", "bits per weight"), formats, range(1, 3)),
        _use('import secateur\nmodel = secateur.load("{place}")', place),
        f"For engines that do not know of this format: `secateur decompress {place} --output "
        f"{place}-dense`.",
        "The card of the dense folder follows; what it says of sizes and of loading is about that "
        "folder.",
        f"{MARK}\n{_body(source_folder)}",
    )


def import_card(result: ImportResult, source_folder: Path, output: str | Path) -> str:
    """The card of an imported model: where it came from, its zeros, then the card of its source.

    Args:
        result: what was imported.
        source_folder: the source; its card is appended.
        output: the folder of the model.
    """
    source, place = result.record.source, shown_place(output)
    packing = (
        f" The zeros are stored as zeros; `secateur compress {place} --output\n{place}-small` "
        "stores the model without them."
    )
    return _card(
        front_matter(source, source_folder, ["pruned", "sparse"]),
        f"{Path(source.name.partition('@')[0]).name}, imported",
        "Made by `secateur import` from a folder that another tool wrote. The zeros were counted "
        "in these\nfiles.",
        markdown_table(("", ""), [("source", f"`{source_name(source)}`"), *result.facts()]),
        "Each matrix is listed in `secateur/import.json`." + packing * bool(result.sparsity),
        _body(source_folder),
    )


def source_part(card: str) -> str:
    """The card of the dense model, taken from the card of a compressed one."""
    front, body = split_card(card)
    _, found, dense = body.partition(MARK + "\n")
    return front + dense if found else card


def with_measurements(card: str, sections: Mapping[str, Sequence[Block]]) -> str:
    """A card with sections, by heading, of what was measured; it may have them already."""
    found = [f"## {name}\n\n{markdown(blocks)}" for name, blocks in sections.items() if blocks]
    parts = [card.rstrip(), *(section for section in found if section not in card)]
    return "\n\n".join(filter(None, parts)) + "\n"


# -- sections ------------------------------------------------------------------------------------


def _card(front: str, title: str, *sections: str) -> str:
    return front + "\n\n".join([f"# {title}", *filter(None, sections)]).rstrip("\n") + "\n"


def _use(code: str, place: str) -> str:
    return f"## Use\n\n```python\n{code.format(place=place)}\n```"


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


def _hardware(environment: Mapping[str, Any]) -> str:
    return f"{environment['cpu']}, {environment['threads']} threads"


def _not_pruned(left: Sequence[SkippedMatrix]) -> str:
    """The matrices that were not pruned, one line per kind."""
    if not left:
        return "No matrix was left out."
    lines = [f"- `{x.names}`: {x.reason}, {x.weights:,} weights" for x in left]
    return "These matrices were not pruned:\n\n" + "\n".join(lines)


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    """The calibration text and its number of windows."""
    if not calibration:
        return "none needed"
    return (
        f"{calibration['samples']} windows of {calibration['sequence_length']} tokens "
        f"from `{without_folders(calibration['source'])}`"
    )


def _chosen_on(calibration: Mapping[str, Any] | None, steps: Sequence[Mapping[str, Any]]) -> str:
    """The sentence about the text of the calibration; empty if no step read one."""
    if calibration is None:
        return ""
    refitted = any(step["step"] in REFITTED and step["by"] != "zero" for step in steps)
    done = " and the weights that read it were fitted again" * refitted
    return f"What stays was chosen{done} on {_calibration(calibration)}. "


# -- the YAML block at the head ------------------------------------------------------------------


def front_matter(source: Source, folder: Path, tags: Sequence[str]) -> str:
    """The block with its fences: base model, licence, language, library and tags.

    The base model is included if it is a model on the hub. Licence and language come from the card
    of the source. Unknown entries are left out.

    Args:
        source: the source model, as in a manifest.
        folder: folder of the source model.
        tags: tags of the new model.
    """
    from huggingface_hub import ModelCardData

    known = _source_card(folder)
    earlier = known.get("tags") or []
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
        pipeline_tag="text-generation",
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


def _source_card(folder: Path) -> dict[str, Any]:
    """The front matter of the card in a folder; empty if there is none or it cannot be read."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    try:
        return ModelCard.load(card).data.to_dict() if card.exists() else {}
    except ValueError:
        return {}


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
_FOLDERS = re.compile(rf"(?<![^\s\"'`=,])(?:/|[A-Z]:\\+)(?:{_NAME}[/\\]+)+(?={_NAME})")
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
