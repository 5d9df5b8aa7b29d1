"""The card of a pruned model: how it was made, its measured properties, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.publishing import without_folders
from secateur.reporting.front_matter import front_matter, shown_place, source_name
from secateur.reporting.tables import by_layer
from secateur.reporting.wording import binary_size

TEMPLATE = """{front_matter}# {source}, pruned to {sparsity}

Made by secateur {version} with **{method[name]}** (score {score}, solver {solver}).

| | |
|---|---|
| source | `{source}` ({kind}) |
| zeros in the decoder's matrices | {decoder_sparsity} |
| zeros in all parameters | {model_sparsity} |
| pattern, scope | {method[pattern]}, {method[scope]} |
| calibration | {calibration} |
| wall time | {seconds} s on {hardware} |
| peak memory | {peak} |

The zeros are stored as zeros: these files are as large as those of the dense model in the same
dtype, and engines that do not know of sparsity run it at the dense model's speed. To pack it:
`secateur compress {place} --output {place}-small`.

Vectors (norms, biases) are never pruned. {left}

{evidence}## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```

## Make it again

`secateur prune recipe.yaml --output {place}` with `recipe.yaml`:

```yaml
{recipe}
```

The calibration windows are in `secateur/windows.safetensors`; per-layer records in
`secateur/layers.jsonl`; versions and hardware in `secateur/manifest.json`.
"""


def model_card(
    manifest: Mapping[str, Any],
    recipe_yaml: str,
    source_folder: Path,
    output: str | Path,
    evidence: str = "",
) -> str:
    """The text of README.md for the output folder.

    Args:
        manifest: the manifest of the run.
        recipe_yaml: the complete recipe.
        source_folder: the source checkpoint, for its licence and language.
        output: the folder of the model.
        evidence: sections with measurements of the model, if there are any.
    """
    source = manifest["source"]
    tags = ["pruned", "sparse", manifest["method"]["name"]]
    result, environment = manifest["result"], manifest["environment"]
    return TEMPLATE.format(
        front_matter=front_matter(source, source_folder, tags),
        place=shown_place(output),
        source=source_name(source),
        kind=source["kind"],
        sparsity=f"{result['decoder_sparsity']:.2%}",
        version=environment["secateur"],
        method=manifest["method"],
        score=manifest["method"]["score"].partition(",")[0],
        solver=manifest["method"]["solver"].partition(",")[0],
        decoder_sparsity=f"{result['decoder_sparsity']:.2%}",
        model_sparsity=f"{result['model_sparsity']:.2%}",
        calibration=describe_calibration(manifest.get("calibration")),
        seconds=f"{manifest['cost']['seconds']:.0f}",
        hardware=f"{environment['cpu']}, {environment['threads']} threads",
        peak=binary_size(manifest["cost"]["peak_resident_bytes"]),
        recipe=without_folders(recipe_yaml.rstrip()),
        left=_not_pruned(manifest.get("left", [])) + _without_tokens(manifest.get("experts")),
        evidence=f"{evidence}\n\n" if evidence else "",
    )


def _not_pruned(left: Sequence[Mapping[str, Any]]) -> str:
    """The matrices that were not pruned, one line per kind."""
    if not left:
        return "No matrix was left out."
    lines = [f"- `{x['names']}`: {x['reason']}, {x['weights']:,} weights" for x in left]
    return "These matrices were not pruned:\n\n" + "\n".join(lines)


def _without_tokens(experts: Mapping[str, Any] | None) -> str:
    """A sentence about experts that calibration did not reach; empty if it reached all."""
    silent = by_layer((experts or {}).get("silent", {}))
    return f"\n\nNo calibration token reached these experts, so they are dense: {silent}." * bool(
        silent
    )


def describe_calibration(calibration: Mapping[str, Any] | None) -> str:
    """The calibration text and its number of windows."""
    if not calibration:
        return "none needed"
    return (
        f"{calibration['samples']} windows of {calibration['sequence_length']} tokens "
        f"from `{without_folders(calibration['source'])}`"
    )
