"""How far each decoder layer is from the dense one, with one layer of each model in memory.

For a token x that enters a layer, y is the output of the dense layer and ŷ that of the pruned one.

    stream   each model on its own hidden states: the error accumulated up to this layer own
    both layers on the dense hidden states: the error of this layer alone,
             ‖(ŷ − x) − (y − x)‖ / ‖y − x‖, measured on the layer's addition to the stream

Every number is the median over tokens. A few tokens would dominate a mean: in any healthy model,
the first token and some delimiters have hidden states a thousand times as large as the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.passage import Passage
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import RecipeError
from secateur.progress import Progress

TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class LayerDrift:
    """A pruned decoder layer compared with the dense one; medians over tokens.

    Attributes:
        layer: its number.
        relative_error: of the stream, ‖ŷ − y‖ / ‖y‖.
        cosine: of the stream.
        norm_ratio: of the stream, ‖ŷ‖ / ‖y‖.
        own_error: of the layer alone, relative to the dense layer's addition.
        contribution: the layer's own addition, relative to the dense layer's.
        kept_input: how much of its input the output of the layer alone contains, ⟨ŷ, x⟩ / ⟨x, x⟩.
        dense_kept_input: the same of the dense layer.
        not_finite: hidden states of the pruned model that are NaN or infinite.
    """

    layer: int
    relative_error: float
    cosine: float
    norm_ratio: float
    own_error: float
    contribution: float
    kept_input: float
    dense_kept_input: float
    not_finite: int = 0


def check_same_model(pruned: CheckpointTarget, dense: CheckpointTarget) -> None:
    """Refuse a reference that is a different model.

    Raises:
        RecipeError: layers, hidden size or vocabulary differ.
    """
    ours, theirs = (t.model.config.get_text_config() for t in (pruned, dense))
    differences = []
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        a, b = getattr(ours, name, None), getattr(theirs, name, None)
        if a != b:
            differences.append(f"{name}: {a}, but {b} in the reference")
    if differences:
        raise RecipeError(
            f"the reference is a different model ({'; '.join(differences)})",
            where=str(dense.reader.folder),
            remedy="name the dense model that was pruned with --dense",
        )


@torch.no_grad()
def layer_drifts(
    pruned: CheckpointTarget, dense: CheckpointTarget, windows: Tensor, progress: Progress
) -> list[LayerDrift]:
    """Pass windows through both models, layer by layer, and compare them.

    Ends after the first layer whose hidden states are not finite: later ones mean nothing.

    Args:
        pruned: the model.
        dense: its reference, of the same layers, hidden size and vocabulary.
        windows: token ids [windows, sequence_length].
        progress: hears of every layer.
    """
    ours, theirs = (Passage(t, windows, TOKENS_AT_ONCE, True, None) for t in (pruned, dense))
    for passage in (ours, theirs):
        passage.open(0, dense=False)
    found = []
    progress.start("layers", len(pruned.layers))
    for (index, layer), (_, dense_layer) in zip(ours.walk(), theirs.walk(), strict=True):
        measured: dict[str, list[Tensor]] = {}
        for batch in ours.batches():
            own, other = ours.call(index, batch), theirs.call(index, batch)
            x, dense_x = ours.read(batch), theirs.read(batch)
            y, dense_y = call_layer(layer, x, own), call_layer(dense_layer, dense_x, other)
            alone = call_layer(layer, dense_x, own)
            states = [own.states(each) for each in (y, dense_y, alone, dense_x)]
            for name, values in compared(*states).items():
                measured.setdefault(name, []).append(values)
            ours.write(batch, y)
            theirs.write(batch, dense_y)
        found.append(summed_up(index, measured))
        progress.step(note=f"layer {index}")
        if found[-1].not_finite:
            break
    progress.finish()
    return found


def compared(y: Tensor, dense_y: Tensor, alone: Tensor, dense_x: Tensor) -> dict[str, Tensor]:
    """The measures of `LayerDrift` for each token of a micro-batch."""
    y, dense_y, alone, x = (t.flatten(0, -2) for t in (y, dense_y, alone, dense_x))
    added, dense_added = alone - x, dense_y - x
    length, step = never_zero(dense_y.norm(dim=-1)), never_zero(dense_added.norm(dim=-1))
    energy = never_zero(x.square().sum(-1))
    return {
        "relative_error": (y - dense_y).norm(dim=-1) / length,
        "cosine": functional.cosine_similarity(y, dense_y, dim=-1),
        "norm_ratio": y.norm(dim=-1) / length,
        "own_error": (added - dense_added).norm(dim=-1) / step,
        "contribution": added.norm(dim=-1) / step,
        "kept_input": (alone * x).sum(-1) / energy,
        "dense_kept_input": (dense_y * x).sum(-1) / energy,
        "not_finite": (~torch.isfinite(y + alone)).sum(-1),
    }


def never_zero(x: Tensor) -> Tensor:
    """Divisors with zeros replaced by the smallest number."""
    return x.clamp_min(torch.finfo(x.dtype).tiny)


def summed_up(index: int, measured: dict[str, list[Tensor]]) -> LayerDrift:
    """The medians over all tokens."""
    joined = {name: torch.cat(values) for name, values in measured.items()}
    bad = int(joined.pop("not_finite").sum())
    return LayerDrift(index, **{n: float(v.median()) for n, v in joined.items()}, not_finite=bad)
