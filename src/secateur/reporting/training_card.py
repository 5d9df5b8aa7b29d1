"""The card of a trained model: how it was trained, followed by the card of its source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.publishing import without_folders
from secateur.reporting.front_matter import (
    inherited_front_matter,
    shown_place,
    source_name,
    split_card,
)

TEMPLATE = """{front_matter}# {name}, trained

Trained by `secateur train` with its zeros held at every step, and looked at again in these files:
{sparsity} of the weights in the decoder's matrices are zero.

| | |
|---|---|
| text | {text} |
| read | {tokens:,} tokens in {steps:,} steps |
| objective | {objective} |
| learning rate, optimizer | {learning_rate:.2g} at most, {optimizer} |
| perplexity of the validation windows | {perplexity} |
| wall time | {seconds:.0f} s on {hardware} |

Training watched this perplexity. `secateur evaluate` measures one by a protocol.

## Make it again

`secateur train recipe.yaml --output {place}` with `recipe.yaml`:

```yaml
{recipe}
```

The card of the model that was trained follows; what it says of weights is about that model.

{body}"""


def training_card(
    manifest: Mapping[str, Any], recipe_yaml: str, source_folder: Path, output: str | Path
) -> str:
    """The text of README.md for the output folder.

    Args:
        manifest: the manifest of the training.
        recipe_yaml: the complete recipe.
        source_folder: the model before the training; its card is appended.
        output: the folder of the trained model.
    """
    card = source_folder / "README.md"
    _, body = split_card(card.read_text(encoding="utf-8") if card.is_file() else "")
    result, environment = manifest["result"], manifest["environment"]
    before, after = result["perplexity_before"], result["perplexity_after"]
    return TEMPLATE.format(
        front_matter=inherited_front_matter(manifest["source"], source_folder),
        place=shown_place(output),
        name=source_name(manifest["source"]),
        sparsity=f"{result['decoder_sparsity']:.2%}",
        text=f"`{without_folders(manifest['text']['source'])}`",
        tokens=result["tokens"],
        steps=result["step"],
        objective=manifest["objective"],
        learning_rate=manifest["learning_rate"],
        optimizer=manifest["optimizer"],
        perplexity="not watched" if after is None else f"{before:.3f} → {after:.3f}",
        seconds=manifest["cost"]["seconds"],
        hardware=f"{environment['cpu']}, {environment['threads']} threads",
        recipe=without_folders(recipe_yaml.rstrip()),
        body=body,
    )
