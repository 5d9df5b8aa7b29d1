"""The card of a pruned model: how it was made, what is true of it, and what is not claimed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["model_card"]


def model_card(manifest: Mapping[str, Any], recipe_yaml: str, source_folder: Path) -> str:
    """The text of README.md for the output folder.

    Args:
        manifest: the manifest of the run.
        recipe_yaml: the resolved recipe.
        source_folder: the source checkpoint, for its licence and language.
    """
    from huggingface_hub import ModelCardData

    source = manifest["source"]
    inherited = source_card(source_folder)
    data = ModelCardData(
        base_model=source["name"] if source["kind"] == "hub" else None,
        license=inherited.get("license"),
        language=inherited.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", "sparse", "secateur", manifest["method"]["name"]],
    )
    result, cost = manifest["result"], manifest["cost"]
    lines = [
        "---",
        data.to_yaml(),
        "---",
        f"# {source['name']}, pruned to {result['decoder_sparsity']:.1%}",
        "",
        f"Made by [secateur]{{}} {manifest['environment']['secateur']} with "
        f"**{manifest['method']['name']}** ({describe_method(manifest['method'])}).".replace(
            "{}", ""
        ),
        "",
        "| | |",
        "|---|---|",
        f"| source | `{source['name']}` ({source['kind']}) |",
        f"| zeros in the decoder's matrices | {result['decoder_sparsity']:.4%} |",
        f"| zeros in all parameters | {result['model_sparsity']:.4%} |",
        f"| pattern, scope | {manifest['method']['pattern']}, {manifest['method']['scope']} |",
        f"| calibration | {describe_calibration(manifest.get('calibration'))} |",
        f"| wall time | {cost['seconds']:.0f} s on {manifest['environment']['cpu']}, "
        f"{manifest['environment']['threads']} threads |",
        f"| peak memory | {cost['peak_resident_bytes'] / 2**30:.2f} GiB |",
        "",
        "The zeros are stored as zeros: this folder is as large as the source, and engines that do "
        "not know of sparsity run it at the source's speed. Embeddings, norms and the output head "
        "are those of the source.",
        "",
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("DIR")',
        "```",
        "",
        "## Make it again",
        "",
        "`secateur prune recipe.yaml --output DIR` with `recipe.yaml`:",
        "",
        "```yaml",
        recipe_yaml.rstrip(),
        "```",
        "",
        "The calibration windows are in `secateur/windows.safetensors`; per-layer records in "
        "`secateur/layers.jsonl`; versions and hardware in `secateur/manifest.json`.",
        "",
    ]
    return "\n".join(lines)


def describe_method(method: Mapping[str, Any]) -> str:
    """Score and solver in words."""
    return f"score {method['score']}, solver {method['solver']}"


def describe_calibration(calibration: Mapping[str, Any] | None) -> str:
    """Which text, how much of it."""
    if not calibration:
        return "none needed"
    return (
        f"{calibration['samples']} windows of {calibration['sequence_length']} tokens "
        f"from `{calibration['source']}`"
    )


def source_card(folder: Path) -> dict[str, Any]:
    """What the source's own card declares, if it has one."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.exists():
        return {}
    try:
        return ModelCard.load(card).data.to_dict()
    except ValueError:
        return {}
