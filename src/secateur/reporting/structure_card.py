"""The card of a cut model: what was removed, how it was chosen, and how the model loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.publishing import without_folders
from secateur.reporting.front_matter import front_matter, shown_place, source_name
from secateur.reporting.model_card import describe_calibration

TEMPLATE = """{front_matter}# {source}, cut to {kept} of its decoder

Made by secateur {version}: {steps}.

| | before | after |
|---|---|---|
| parameters | {before:,} | {after:,} |
| of them in decoder layers | {decoder_before:,} | {decoder_after:,} |
| KV cache of a token | {cache_before:,} bytes | {cache_after:,} bytes |
| weight files | {file_before:.1f} MiB | {file_after:.1f} MiB |
{latency}
{chosen}{distilled}

## Use

```python
{use}
```

## Make it again

`secateur structure recipe.yaml --output {place}` with `recipe.yaml`:

```yaml
{recipe}
```

Which units stayed is in `secateur/steps.json`; versions and hardware in `secateur/manifest.json`.
"""

REFITTED = ("refit", "queries", "width")
"""Steps after which the weights that read the units were fitted again, unless by `zero`."""

LATENCY = """| time of a token, batch 1, {context} tokens before it, {dtype}, {threads} threads | \
{before:.2f} ms | {after:.2f} ms |
"""

PLAIN = """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""

VARIED = """# No class of transformers has its sizes; importing secateur adds one.
# Without secateur, pass trust_remote_code=True: the folder has the modelling file.
import secateur
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{place}")"""


def structure_card(
    manifest: Mapping[str, Any], recipe_yaml: str, source_folder: Path, output: str | Path
) -> str:
    """The text of README.md for the output folder.

    Args:
        manifest: the manifest of the run.
        recipe_yaml: the complete recipe.
        source_folder: the source checkpoint, for its licence and language.
        output: the folder of the model.
    """
    source, told = manifest["source"], manifest["structure"]
    before, after = told["before"], told["after"]
    place, tags = shown_place(output), ["pruned", "structured-pruning"]
    learned = any(step["step"] == "learned" for step in told["steps"])
    distilled = "" if learned else "Nothing was trained."
    if manifest["distillation"]:
        distilled = "It then learned from the uncut model on the same windows."
    return TEMPLATE.format(
        front_matter=front_matter(source, source_folder, tags),
        place=place,
        source=source_name(source),
        kept=f"{1 - told['decoder_removed']:.2%}",
        version=manifest["environment"]["secateur"],
        steps=", then ".join(f"{step['step']} by {step['by']}" for step in told["steps"]),
        before=before["parameters"],
        after=after["parameters"],
        decoder_before=before["decoder"],
        decoder_after=after["decoder"],
        cache_before=before["kv_cache_bytes_per_token"],
        cache_after=after["kv_cache_bytes_per_token"],
        file_before=before["file_bytes"] / 2**20,
        file_after=after["file_bytes"] / 2**20,
        latency=_latency_row(told["latency"]),
        chosen=_chosen_on(manifest["calibration"], told["steps"]),
        distilled=distilled,
        use=(VARIED if told["varied"] else PLAIN).format(place=place),
        recipe=without_folders(recipe_yaml.rstrip()),
    )


def _chosen_on(calibration: Mapping[str, Any] | None, steps: Sequence[Mapping[str, Any]]) -> str:
    """The sentence about the text of the calibration; empty if no step read one."""
    if calibration is None:
        return ""
    done = ["what stays was chosen"]
    if any(step["step"] in REFITTED and step["by"] != "zero" for step in steps):
        done.append("the weights that read it were fitted again")
    told = f"{' and '.join(done)} on {describe_calibration(calibration)}. "
    return told[0].upper() + told[1:]


def _latency_row(told: Mapping[str, Any] | None) -> str:
    """The table row of a target in time; empty if there was none."""
    if told is None:
        return ""
    return LATENCY.format(
        context=told["context_tokens"],
        dtype=told["dtype"],
        threads=told["threads"],
        before=told["milliseconds_before"],
        after=told["milliseconds_after"],
    )
