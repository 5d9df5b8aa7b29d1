"""The card of a pruned model: how it was made, what is true of it, and what is not claimed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["model_card"]

TEMPLATE = """---
{front_matter}
---
# {source}, pruned to {sparsity}

Made by secateur {version} with **{method[name]}** (score {method[score]}, solver {method[solver]}).

| | |
|---|---|
| source | `{source}` ({kind}) |
| zeros in the decoder's matrices | {decoder_sparsity} |
| zeros in all parameters | {model_sparsity} |
| pattern, scope | {method[pattern]}, {method[scope]} |
| calibration | {calibration} |
| wall time | {seconds} s on {hardware} |
| peak memory | {peak} GiB |

The zeros are stored as zeros: this folder is as large as the source, and engines that do not know
of sparsity run it at the source's speed.

Vectors (norms, biases) are never pruned. {left}

{evidence}## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("DIR", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```

## Make it again

`secateur prune recipe.yaml --output DIR` with `recipe.yaml`:

```yaml
{recipe}
```

The calibration windows are in `secateur/windows.safetensors`; per-layer records in
`secateur/layers.jsonl`; versions and hardware in `secateur/manifest.json`.
"""


def model_card(
    manifest: Mapping[str, Any], recipe_yaml: str, source_folder: Path, evidence: str = ""
) -> str:
    """The text of README.md for the output folder.

    Args:
        manifest: the manifest of the run.
        recipe_yaml: the resolved recipe.
        source_folder: the source checkpoint, for its licence and language.
        evidence: sections about what was measured of the model, if anything was.
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
    result, environment = manifest["result"], manifest["environment"]
    return TEMPLATE.format(
        front_matter=data.to_yaml(),
        source=source["name"],
        kind=source["kind"],
        sparsity=f"{result['decoder_sparsity']:.1%}",
        version=environment["secateur"],
        method=manifest["method"],
        decoder_sparsity=f"{result['decoder_sparsity']:.4%}",
        model_sparsity=f"{result['model_sparsity']:.4%}",
        calibration=describe_calibration(manifest.get("calibration")),
        seconds=f"{manifest['cost']['seconds']:.0f}",
        hardware=f"{environment['cpu']}, {environment['threads']} threads",
        peak=f"{manifest['cost']['peak_resident_bytes'] / 2**30:.2f}",
        recipe=recipe_yaml.rstrip(),
        left=not_pruned(manifest.get("left", [])),
        evidence=f"{evidence}\n\n" if evidence else "",
    )


def not_pruned(left: Sequence[Mapping[str, Any]]) -> str:
    """The matrices that were left as they are, one sort a line."""
    if not left:
        return "No matrix was left out."
    lines = [f"- `{x['names']}`: {x['reason']}, {x['weights']:,} weights" for x in left]
    return "These matrices were not pruned:\n\n" + "\n".join(lines)


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
