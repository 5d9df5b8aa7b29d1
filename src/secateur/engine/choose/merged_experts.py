"""Merges experts into the most similar ones that stay, a baseline for their removal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.models.experts import OpenExperts


def most_similar(router: Tensor, kept: Sequence[int]) -> list[int]:
    """For each expert the kept one that the router finds most similar; itself if it stays.

    Args:
        router: its weight [experts, hidden]; experts with similar rows receive similar tokens.
        kept: numbers of the experts that stay, ascending.

    Example:
        >>> import torch
        >>> from secateur.engine.choose.merged_experts import most_similar
        >>> most_similar(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), [0, 2])
        [0, 0, 2]
    """
    rows = nn.functional.normalize(router.float(), dim=-1)
    near = (rows @ rows[list(kept)].T).argmax(-1).tolist()
    return [e if e in kept else kept[near[e]] for e in range(len(rows))]


@torch.no_grad()
def merge_experts(
    experts: OpenExperts, router: Tensor, kept: Sequence[int], tokens: Tensor
) -> None:
    """Average experts into those that stay, in place.

        W_k <- sum over e merged into k of |T_e| * W_e, divided by the sum of |T_e|

    T_e are the tokens that are routed to expert e. Paper: Li et al. 2023, "Merge, Then Compress:
    Demystify Efficient SMoE with Hints from Its Routing Policy", arXiv:2310.01334. Deviations: the
    similarity is that of the router's rows and not of its logits, neurons are not permuted before
    they are averaged, and the router keeps the rows of the experts that stay.

    Args:
        experts: of one layer.
        router: its weight [experts, hidden].
        kept: numbers of the experts that stay, ascending.
        tokens: |T_e|, [experts].
    """
    home = most_similar(router, kept)
    for k in kept:
        members = [e for e in range(len(home)) if home[e] == k]
        share = tokens[members].double()
        if len(members) == 1 or not share.any():
            continue
        share = share / share.sum()
        for name, parameter in experts[k].named_parameters():
            parts = (
                w * experts[e].get_parameter(name).double()
                for w, e in zip(share.tolist(), members, strict=True)
            )
            parameter.copy_(sum(parts))
