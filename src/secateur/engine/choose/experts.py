"""Scores the experts of a model by how often the router chooses them and how much they add.

Calibration passes once through the dense model, with one decoder layer in memory, and gathers two
sums for each expert. `kept_experts` uses them to choose the experts of a `Cut`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.stream.calls import call_layer
from secateur.engine.stream.passage import Passage
from secateur.engine.stream.targets import Target
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.experts import OpenExperts
from secateur.progress import Progress

__all__ = ["SCORES", "ExpertUse", "expert_use", "kept_experts"]

SCORES = ("reap", "frequency")


@dataclass(frozen=True)
class ExpertUse:
    """How much calibration uses the experts of one decoder layer.

        reap       S_j = 1/|T_j| · Σ_{t in T_j} g_j(t) · ‖f_j(t)‖₂
        frequency  |T_j|

    T_j are the tokens routed to expert j, f_j(t) is the expert's output for a token, and g_j(t) is
    the weight by which the model multiplies it. An expert without tokens has the score 0.

    Paper: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE
    Compression", arXiv:2510.13999. Deviation: if a model normalises the weights of the chosen
    experts (Mixtral, most of Qwen3), g_j are the normalised weights; in the released code this is
    an option.

    Attributes:
        tokens: |T_j|, int64 [experts].
        outputs: Σ g_j(t) · ‖f_j(t)‖₂, float64 [experts].
    """

    tokens: Tensor
    outputs: Tensor

    def score(self, name: str) -> Tensor:
        """Float64 [experts], higher = keep.

        Raises:
            RecipeError: there is no such score.
        """
        if name not in SCORES:
            raise RecipeError(
                f"there is no score {name!r} for experts", remedy=f"use {' or '.join(SCORES)}"
            )
        if name == "frequency":
            return self.tokens.double()
        return self.outputs / self.tokens.clamp_min(1)

    def to_json(self) -> dict[str, Any]:
        """All scores."""
        return {
            "tokens": self.tokens.tolist(),
            "reap": self.score("reap").tolist(),
        }


class Listener:
    """Hooks on the experts of a layer that add up the outputs of each expert.

    Args:
        experts: the opened experts.
    """

    def __init__(self, experts: OpenExperts) -> None:
        self.experts, count = experts, len(experts)
        self.tokens = torch.zeros(count, dtype=torch.int64)
        self.outputs = torch.zeros(count, dtype=torch.float64)
        self.routing: tuple[Tensor, Tensor]
        self.handles = [experts.register_forward_pre_hook(self.note, with_kwargs=True)]
        self.handles += [
            expert.register_forward_hook(self.hook(j)) for j, expert in enumerate(experts)
        ]

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember the routing of this forward."""
        names = ("hidden_states", "top_k_index", "top_k_weights")
        given = dict(zip(names, args, strict=False)) | dict(kwargs)
        self.routing = given["top_k_index"], given["top_k_weights"]

    def hook(self, expert: int) -> Any:
        """The hook of one expert."""

        def after(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            index, weights = self.routing
            token, place = self.experts.routed(index, expert)
            added = weights[token, place].double() * out.double().norm(dim=-1)
            self.tokens[expert] += len(token)
            self.outputs[expert] += float(added.sum())

        return after

    def close(self) -> ExpertUse:
        """Remove the hooks and return the sums."""
        for handle in self.handles:
            handle.remove()
        return ExpertUse(self.tokens, self.outputs)


@torch.no_grad()
def expert_use(
    target: Target, windows: Tensor, micro_batch_tokens: int, progress: Progress
) -> dict[int, ExpertUse]:
    """Pass calibration through the dense model, and measure how much it uses its experts.

    Args:
        target: the model with opened experts.
        windows: token ids [samples, sequence_length].
        micro_batch_tokens: tokens that pass through a layer at once.
        progress: receives every layer.

    Returns:
        The use of experts, by number of the layer, for layers with experts.

    Raises:
        ArchitectureError: no layer has experts.
    """
    passage = Passage(target, windows, micro_batch_tokens, True, None)
    passage.open(0, dense=False)
    found: dict[int, ExpertUse] = {}
    progress.start("experts", len(target.layers))
    for number, layer in passage.walk():
        listeners = [Listener(m) for m in layer.modules() if isinstance(m, OpenExperts)]
        for batch in passage.batches():
            out = call_layer(layer, passage.read(batch), passage.call(number, batch))
            passage.write(batch, out)
        for listener in listeners:
            found[number] = listener.close()
        progress.step(note=f"layer {number}")
    passage.close()
    progress.finish()
    if not found:
        raise ArchitectureError(
            f"no decoder layer of {type(target.model).__name__} has experts that can be told apart",
            remedy="mixtral, qwen2_moe and qwen3_moe have; a loaded model needs opened_experts",
        )
    return found


def kept_experts(
    use: Mapping[int, ExpertUse], keep: int, top_k: int, score: str = "reap"
) -> dict[int, tuple[int, ...]]:
    """Return the experts with the highest scores in each layer. Ties go to the first expert.

    Args:
        use: the result of `expert_use`.
        keep: number of experts to keep in each layer.
        top_k: number of experts that the router chooses for each token.
        score: `reap` or `frequency`.

    Returns:
        Ascending numbers of experts by layer, as in `Cut.experts`.

    Raises:
        RecipeError: `keep` exceeds the number of experts, or is below the router's choice.
    """
    fewest = min(len(layer.tokens) for layer in use.values())
    if not top_k <= keep <= fewest:
        raise RecipeError(
            f"{keep} experts cannot be kept: the router sends each token to {top_k}, and a layer "
            f"has {fewest}",
            remedy=f"keep from {top_k} to {fewest}",
        )
    return {layer: tuple(sorted(first(heard.score(score), keep))) for layer, heard in use.items()}


def first(score: Tensor, count: int) -> Sequence[int]:
    """The indices of the highest scores."""
    places: list[int] = torch.argsort(score, descending=True, stable=True)[:count].tolist()
    return places
