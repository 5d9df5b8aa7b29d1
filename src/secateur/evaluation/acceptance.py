"""How much of a draft's text its parent takes, and what speculative decoding gains by it.

A draft proposes k tokens, one call of the parent reads all of them, and rejection sampling keeps
the first ones (Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2023,
arXiv 2211.17192). The text has the parent's distribution p exactly. A proposed token, drawn from
the draft's distribution q, is taken with the probability

    a_t = Σ_x min(p_t(x), q_t(x)) = 1 − TV(p_t, q_t)

at temperature 1; in greedy decoding it is taken where both rank the same token first. Of k proposed
tokens, the first i are all taken with the probability Π_{j<i} a_{t+j}, so

    accepted(k) = Σ_{i=1..k} mean_t Π_{j<i} a_{t+j}

a_t of neighbouring positions are not independent, so the products are taken before the mean.
Nothing is generated: both models read the same held-out windows once. In text that the parent
writes itself a_t is higher than in text that people wrote, because the parent is surer of it.

A round costs k calls of the draft and one call of k + 1 tokens of the parent, and gives one token
more than it takes: the parent's own, where a token is refused and after the last one. Each token of
the draft is drawn from its logits, and each token of the text from those of the parent.

    speed-up(k) = (1 + accepted(k)) · (c(1) + judged)
                  / (k · (c_draft + proposed) + c(k + 1) + (1 + accepted(k)) · judged)

c(n) are the seconds of one call of the parent with n tokens, `proposed` and `judged` those of
drawing a token. For k = 0 it is 1.

A draft may have a head over some tokens only: q is then renormalised over these, and 0 elsewhere.

A draft head and an MTP layer read the parent's hidden states, and further on in a chain their own.
So a_{t+j} is another number in every chain: for each position t, one chain of the text's own tokens
begins there, and the products are those of its places (`chained_acceptance`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import NumericalError
from secateur.evaluation.perplexity import LOGITS_BYTES, numbers_of
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.runs.measured import Acceptance, Drawing, Speculation
from secateur.types import Windows

MOST_PROPOSED = 7
"""One call reads eight tokens: the last one that is known, and so many proposed ones."""


def acceptance(
    draft: nn.Module,
    parent: nn.Module,
    windows: Windows,
    *,
    heads: Sequence[Tensor | None] = (None,),
    start_tokens: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Acceptance]:
    """Measure what a parent takes of a draft's text, in one pass of both over windows of text.

    Args:
        draft: proposes; it runs on the device of its weights.
        parent: takes or refuses, with the same vocabulary; it runs on its own device.
        windows: token ids [windows, sequence_length].
        heads: for each result, the token ids that the head of the draft is restricted to, or None
            for all. All of them are measured in the same pass.
        start_tokens: number of start tokens in each window; none of them is predicted.
        batch_size: windows in one forward; by default about 2048 tokens.
        progress: called after each forward with the number of windows done and in total.

    Returns:
        An acceptance for each of the heads.

    Raises:
        NumericalError: an acceptance is not a number.
        RecipeError: the vocabularies differ, or the windows are too long for a model.
        SourceError: a token id is not in a vocabulary.
    """

    def of_heads(logits: Tensor, parents: Tensor, _: Tensor) -> Tensor:
        p = torch.softmax(parents, dim=-1)
        return torch.cat([_of_tokens(logits, p, only) for only in heads])

    found = numbers_of(
        [draft, parent], windows, of_heads, start_tokens=start_tokens, batch_size=batch_size,
        progress=progress,
    )  # fmt: skip
    # [heads, rate or agreement, windows, positions]
    return [_summary(*values) for values in found.unflatten(0, (len(heads), 2))]


class Chains(NamedTuple):
    """What is known of a batch of windows: chains of so many places, and their parent.

    Attributes:
        drafts: for each draft, what its head reads at each place, [windows, positions, …], and the
            head, which gives logits [tokens, vocabulary]. Place i of the chain at position t
            proposes token t + 2 + i.
        states: of the parent at all positions, [windows, positions + places, hidden], which
            `parent` reads.
        parent: gives logits [tokens, vocabulary].
    """

    drafts: Sequence[tuple[Sequence[Tensor], Callable[[Tensor], Tensor]]]
    states: Tensor
    parent: Callable[[Tensor], Tensor]


@torch.no_grad()
def chained_acceptance(
    batches: Iterable[Chains], *, heads: Sequence[Tensor | None] = (None,), start_tokens: int = 0
) -> list[Acceptance]:
    """Measure what a parent takes of chains. Its probabilities are computed once for all drafts.

    Args:
        batches: of windows.
        heads: as in `acceptance`.
        start_tokens: number of start tokens in each window; none of them is predicted.

    Returns:
        Of each draft, an acceptance for each of the heads. Its mean is that of the first place.

    Raises:
        NumericalError: an acceptance is not a number.
    """
    found = []
    for drafts, states, parent in batches:
        places, (windows, positions) = len(drafts[0][0]), drafts[0][0][0].shape[:2]
        chunk, first, rows = 0, max(0, start_tokens - 2), list[Tensor]()
        for place in range(places):
            theirs = states[:, place + 1 + first : place + 1 + positions].flatten(0, 1)
            # float32 logits of so many tokens take at most 64 MiB
            chunk = chunk or max(1, LOGITS_BYTES // (4 * parent(theirs[:1]).shape[-1]))
            own = [read[place][:, first:].flatten(0, 1).split(chunk) for read, _ in drafts]
            for p, *some in zip(theirs.split(chunk), *own, strict=True):
                p, every = torch.softmax(parent(p).float(), dim=-1), []
                for x, (_, head) in zip(some, drafts, strict=True):
                    logits = head(x).float()
                    every += [_of_tokens(logits, p, only) for only in heads]
                rows.append(torch.cat(every))
        # [drafts and heads, rate or agreement, places, windows, positions]
        shape = (len(drafts) * len(heads), 2, places, windows, -1)
        found.append(torch.cat(rows, dim=1).reshape(shape).cpu())
    return [_summary(*values) for values in torch.cat(found, dim=3)]


def _of_tokens(logits: Tensor, p: Tensor, only: Tensor | None) -> Tensor:
    """a_t and agreement of a few tokens, float32 [2, tokens], with the draft's head on some ids.

    Example:
        >>> import torch
        >>> from secateur.evaluation.acceptance import _of_tokens
        >>> draft, parent = torch.zeros(1, 4), torch.tensor([[0.1, 0.2, 0.3, 0.4]])
        >>> _of_tokens(draft, parent, None)[0]
        tensor([0.8000])
        >>> _of_tokens(draft, parent, torch.tensor([2, 3])).tolist()
        [[0.7000000476837158], [0.0]]
    """
    best = p.argmax(dim=-1)  # over the whole vocabulary, whatever the head proposes
    if only is not None:
        only = only.to(logits.device)
        logits, p = logits[:, only], p[:, only]
    proposed = logits.argmax(dim=-1)
    proposed = proposed if only is None else only[proposed]
    # q is normalised over the head's tokens, and p is not: it has the others too
    taken = torch.minimum(torch.softmax(logits, dim=-1), p).sum(dim=-1)
    return torch.stack([taken, (proposed == best).float()])


def _summary(rates: Tensor, agreements: Tensor) -> Acceptance:
    """The numbers of one head by its values at all positions.

    They are [windows, positions], or [places, windows, positions] of chains.
    """
    rates, agreements = rates.double().clamp(max=1.0), agreements.double()
    runs, greedy = (_runs(x) for x in (rates, agreements))
    if rates.ndim == 3:
        rates, agreements = rates[0], agreements[0]
    means, same = rates.mean(dim=1).tolist(), agreements.mean(dim=1).tolist()
    if not bool(rates.isfinite().all()):
        where = rates.isfinite().all(dim=1).tolist().index(False)
        raise NumericalError(
            "the acceptance is not a number",
            where=f"window {where} of {len(rates)}",
            remedy="a logit overflowed: evaluate in float32 or bfloat16",
        )
    return Acceptance(
        mean=mean_of(means),
        standard_error=standard_error(means),
        agreement=mean_of(same),
        agreement_standard_error=standard_error(same),
        runs=runs,
        greedy_runs=greedy,
        tokens=rates.numel(),
    )


def _runs(rates: Tensor) -> tuple[float, ...]:
    """mean_t Π_{j<i} a_{t+j} for i = 1 to 7, or for the places of chains.

    A run that no window is long enough for has 0.
    """
    if rates.ndim == 3:
        return tuple(rates.cumprod(dim=0).flatten(1).mean(dim=1).tolist())
    product, found = rates, []
    for place in range(1, MOST_PROPOSED + 1):
        found.append(float(product.mean()) if product.numel() else 0.0)
        product = product[:, :-1] * rates[:, place:]  # [windows, positions − place]
    return tuple(found)


FREE = Drawing(0.0, 0.0)
"""Tokens are drawn in no time."""


def speculation(
    runs: Sequence[float],
    parent_seconds: Sequence[float],
    draft_seconds: float,
    *,
    drawing: Drawing = FREE,
    least: int = 0,
) -> Speculation:
    """The number of proposed tokens with the largest expected speed-up.

    Args:
        runs: how often the first 1, 2, … proposed tokens are all taken (`Acceptance.runs`, or
            `Acceptance.greedy_runs`).
        parent_seconds: c(1), c(2), …: seconds of one call of the parent with so many tokens.
        draft_seconds: of one token of the draft.
        drawing: seconds of drawing tokens, at the temperature of `runs`.
        least: the fewest proposed tokens; 1 says what a draft that does not pay would bring.

    Example:
        >>> from secateur.evaluation.acceptance import speculation
        >>> best = speculation([0.8, 0.64], [1.0, 1.1, 1.2], 0.2)
        >>> best.k, round(best.accepted, 2), round(best.speedup, 3)
        (2, 1.44, 1.525)
    """
    found, accepted = [Speculation(0, 0.0, 1.0)], 0.0  # k = 0: without a draft
    for k, (run, verify) in enumerate(zip(runs, parent_seconds[1:], strict=False), start=1):
        accepted += run
        alone = (1 + accepted) * (parent_seconds[0] + drawing.judged)
        drawn = k * drawing.proposed + (1 + accepted) * drawing.judged
        found.append(Speculation(k, accepted, alone / (k * draft_seconds + verify + drawn)))
    return max(found[least:], key=lambda one: one.speedup)


FAR = 0.5
"""A call with more tokens that takes less than so much of one with fewer was not measured well."""


def too_fast(seconds: Sequence[float]) -> tuple[int, int] | None:
    """Two numbers of tokens whose calls cannot take the times that were measured; None if all can.

    Args:
        seconds: of one call with 1, 2, … tokens.

    Example:
        >>> from secateur.evaluation.acceptance import too_fast
        >>> too_fast([0.015, 0.135, 0.0008]), too_fast([0.010, 0.011, 0.009])
        ((2, 3), None)
    """
    for many, own in enumerate(seconds, start=1):
        slowest = max(range(many), key=lambda few: seconds[few])
        if own < FAR * seconds[slowest]:
            return slowest + 1, many
    return None
