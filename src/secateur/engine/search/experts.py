"""Scores the experts of a model by how often the router chooses them and how much they add.

Calibration passes once through the dense model, with one decoder layer in memory, and gathers two
sums for each expert. `aimer` reads the weights alone, and `expert_divergence.py` needs gradients.
`best_experts` chooses the experts of a `Cut` by any of these scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.stream.calibration_stream import CalibrationStream
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.experts import OpenExperts, Sent
from secateur.models.targets import Target, walk_layers
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress


@dataclass(frozen=True)
class ExpertUse:
    """How much calibration uses the experts of one decoder layer.

        reap       S_j = 1/|T_j| · Σ_{t in T_j} g_j(t) · ‖f_j(t)‖₂
        frequency  |T_j|
        random     a number drawn for each expert, a baseline

    T_j are the tokens routed to expert j, f_j(t) is the expert's output for a token, and g_j(t) is
    the weight by which the model multiplies it. An expert without tokens has the score 0.

    Paper: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE
    Compression", arXiv:2510.13999. Deviation: the released code takes the softmax of all logits for
    g_j, divided by its sum over the chosen experts where the configuration has `norm_topk_prob`
    (since March 2026). Those are the model's weights in Qwen and OLMoE, but not where a model
    divides without that entry (Mixtral) or takes sigmoids (GLM-4.5, DeepSeek V3, Llama 4).

    Attributes:
        tokens: |T_j|, int64 [experts].
        outputs: Σ g_j(t) · ‖f_j(t)‖₂, float64 [experts].
    """

    tokens: Tensor
    outputs: Tensor

    def score(self, name: str, seed: int = 0) -> Tensor:
        """Float64 [experts], higher = keep.

        Args:
            name: reap, frequency or random.
            seed: of `random`.
        """
        if name == "frequency":
            return self.tokens.double()
        if name == "random":
            generator = torch.Generator().manual_seed(seed)
            return torch.rand(len(self.tokens), generator=generator, dtype=torch.float64)
        return self.outputs / self.tokens.clamp_min(1)

    def to_json(self) -> dict[str, Any]:
        """All scores."""
        return {"tokens": self.tokens.tolist(), "reap": self.score("reap").tolist()}


@contextmanager
def _measured(experts: OpenExperts) -> Iterator[ExpertUse]:
    """A context in which every forward adds to the use of opened experts."""
    count, device = len(experts), next(experts.parameters()).device
    outputs = torch.zeros(count, dtype=torch.float64, device=device)
    use = ExpertUse(torch.zeros(count, dtype=torch.int64), outputs)

    def add(stage: nn.Module, args: tuple[Tensor, Sent], outs: Sequence[Tensor]) -> None:
        (_, sent), (out,) = args, outs
        # g_j(t) · ‖f_j(t)‖₂ of all tokens that some experts have received
        added = sent.weights[:, 0].double() * out.double().norm(dim=-1)
        here, lengths = list(sent.experts), torch.tensor(sent.counts)
        use.tokens[here] += lengths
        outputs[here] += torch.segment_reduce(added, "sum", lengths=lengths.to(device))

    with experts.stages[-1].register_forward_hook(add):
        yield use


@torch.no_grad()
def expert_use(
    target: Target,
    windows: Tensor,
    micro_batch_tokens: int,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> dict[int, ExpertUse]:
    """Pass calibration through the dense model, and measure how much it uses its experts.

    Args:
        target: the model with opened experts.
        windows: token ids [samples, sequence_length].
        micro_batch_tokens: tokens that pass through a layer at once.
        progress: receives every layer.
        ranks: the processes that share the windows; all get the sums over all windows.

    Returns:
        The use of experts, by number of the layer, for layers with experts.

    Raises:
        ArchitectureError: no layer has experts.
    """
    calibration = CalibrationStream(target, windows, micro_batch_tokens, True, None, ranks).open()
    found: dict[int, ExpertUse] = {}
    progress.start("experts", len(target.layers))
    for number, layer in calibration.walk():
        opened = [module for module in layer.modules() if isinstance(module, OpenExperts)]
        with ExitStack() as stack:
            uses = [stack.enter_context(_measured(experts)) for experts in opened]
            calibration.layer_inputs(number).pass_through(layer)
        for use in uses:
            found[number] = ExpertUse(use.tokens, use.outputs.cpu())
            ranks.total(found[number].tokens)
            ranks.total(found[number].outputs)
        progress.step(note=f"layer {number}")
    progress.finish()
    if not found:
        raise ArchitectureError(
            f"no decoder layer of {type(target.model).__name__} has experts that can be told apart",
            remedy="the model is dense; or a loaded model needs opened_experts",
        )
    return found


def aimer(weights: Iterable[Tensor]) -> float:
    """The score of an expert by its weights alone; higher = keep.

        sqrt(1/n · Σ w²) / (1/n · Σ |w|)    over all n weights of gate, up and down

    Few large weights among many small ones give a high score, equal magnitudes give the least, 1.
    Biases are left out.

    Paper: Liu et al. 2026, "AIMER: Calibration-Free Task-Agnostic MoE Pruning", arXiv:2603.18492.
    Deviation: the paper removes the experts with the largest mean over root mean square. This is
    its inverse, so the order is the same and higher means keep, as for all scores.

    Args:
        weights: the matrices [out, in] of one expert.

    Returns:
        The score; 0 for an expert without any weight that is not 0.

    Example:
        >>> import torch
        >>> from secateur.engine.search.experts import aimer
        >>> aimer([torch.ones(1, 4)]), aimer([torch.tensor([[2.0, 0.0], [0.0, 0.0]])])
        (1.0, 2.0)
    """
    absolute = squares = count = 0.0
    for weight in weights:
        rows = weight.float()  # a row is short enough for sums in float32
        absolute += float(torch.linalg.vector_norm(rows, 1, dim=-1).double().sum())
        squares += float(torch.linalg.vector_norm(rows, dim=-1).double().square().sum())
        count += weight.numel()
    return (squares * count) ** 0.5 / absolute if absolute else 0.0


@torch.no_grad()
def aimer_scores(target: Target, progress: Progress) -> dict[int, Tensor]:
    """The score `aimer` of all experts, float64 [experts], by number of the layer.

    Args:
        target: the model with opened experts.
        progress: receives every layer.
    """
    found = {}
    progress.start("experts", len(target.layers))
    for number, layer in walk_layers(target):
        for experts in (m for m in layer.modules() if isinstance(m, OpenExperts)):
            each = (aimer(w for w in e.parameters() if w.ndim > 1) for e in experts)
            found[number] = torch.tensor([*each], dtype=torch.float64)
        progress.step(note=f"layer {number}")
    progress.finish()
    return found


def scores_of(use: Mapping[int, ExpertUse], name: str = "reap", seed: int = 0) -> dict[int, Tensor]:
    """The scores of each layer, float64 [experts]: reap, frequency, or random by a seed."""
    return {layer: own.score(name, seed + layer) for layer, own in use.items()}


def best_experts(
    scores: Mapping[int, Tensor],
    keep: int,
    top_k: int,
    *,
    groups: int = 1,
    scope: str = "layer",
    nats: bool = False,
) -> dict[int, tuple[int, ...]]:
    """Return the experts with the highest scores. Ties go to the first expert.

    Args:
        scores: of all experts, [experts] by number of the layer.
        keep: number of experts to keep in each layer; with the scope `global` on average.
        top_k: number of experts that each layer keeps at least, as `Experts.fewest` of the family:
            the router chooses as many for each token.
        groups: number of groups into which the router divides the experts, in their order. Those
            of a layer keep the same number each.
        scope: `layer`, where each layer keeps the same number; or `global`, where scores compete
            in the whole model, as multiples of the mean of their layer.
        nats: scores of different layers are comparable, so they compete as they are.

    Returns:
        Ascending numbers of experts by layer, as in `Cut.experts`.

    Raises:
        RecipeError: `keep` exceeds the number of experts, is below the router's choice, or leaves
            uneven groups.
    """
    fewest = min(map(len, scores.values()))
    if not top_k <= keep <= fewest:
        raise RecipeError(
            f"{keep} experts cannot be kept: the router needs {top_k} of a layer, which has "
            f"{fewest}",
            remedy=f"keep from {top_k} to {fewest}",
        )
    if keep % groups:
        raise RecipeError(
            f"{keep} experts cannot be kept: the router chooses between {groups} groups of "
            "them, which stay equally large",
            remedy=f"keep a multiple of {groups}",
        )
    counts = dict.fromkeys(scores, keep)
    if scope == "global":
        counts = _global_counts(scores, keep, top_k, groups, nats=nats)
    return {layer: _best(own, counts[layer], groups) for layer, own in scores.items()}


def _global_counts(
    scores: Mapping[int, Tensor], keep: int, top_k: int, groups: int, *, nats: bool
) -> dict[int, int]:
    """How many experts each layer keeps if all compete; those of one rank in each group do so."""
    keep, least = keep // groups, -(-top_k // groups)
    ranked = []
    for layer, score in scores.items():
        # a layer's best top_k stay; the others compete as multiples of the layer's mean
        order = score.view(groups, -1).sort(descending=True).values.sum(0)
        order = order if nats else order / score.mean().clamp_min(1e-300)
        ranked += [(-float(value), layer) for value in order[least:]]
    counts = dict.fromkeys(scores, least * groups)
    for _, layer in sorted(ranked)[: (keep - least) * len(scores)]:
        counts[layer] += groups
    return counts


def _best(score: Tensor, keep: int, groups: int) -> tuple[int, ...]:
    """The indices of the highest scores, as many of each group, ascending."""
    size = len(score) // groups
    order = [torch.argsort(own, descending=True, stable=True) for own in score.split(size)]
    # numbers within a group become numbers of the layer
    first = [own[: keep // groups] + size * group for group, own in enumerate(order)]
    return tuple(sorted(torch.cat(first).tolist()))
