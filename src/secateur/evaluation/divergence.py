"""How far a pruned model is from the dense one, token by token.

    KL(dense ‖ pruned) = Σ_v p(v) · (log p(v) − log q(v)), p of the dense model, q of the pruned one

in nats, for every predicted token, over the whole vocabulary. Perplexity depends only on the
probability of the token in the text. The divergence also measures errors on all other tokens. Three
more numbers: how often both models rank the same token first, how much the loss of a token changed,
and the acceptance: the share of drawn tokens that the dense model accepts if the pruned one is its
draft,

    acceptance = Σ_v min(p(v), q(v)) = 1 − ½ Σ_v |p(v) − q(v)|

(Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding",
arXiv:2211.17192, Theorem 3.5). With greedy decoding the share is that of equal first tokens.

Both models read each batch once. If a model can be split into body and head, its logits are
computed for a few tokens at a time and take at most 64 MiB; see `perplexity`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.engine.stream.hidden_states import STATES_BYTES
from secateur.engine.stream.layerwise import LayerwiseReader
from secateur.errors import NumericalError, VerificationError, first_line
from secateur.evaluation import perplexity
from secateur.evaluation.perplexity import Reader
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.models.opening import computed_dtype, open_weights
from secateur.models.targets import CheckpointTarget
from secateur.parallel.ranks import ALONE, Ranks
from secateur.progress import Progress
from secateur.runs.measured import Divergence
from secateur.types import Windows

log = logging.getLogger(__name__)

SAME = 1e-5
"""Logits that differ by less, as a fraction of the largest, are equal."""


class DivergenceResult(Divergence):
    """A divergence, with the perplexity of both models on the same windows.

    Attributes:
        model: perplexity of the pruned model.
        reference: perplexity of the dense model.
    """

    model: perplexity.PerplexityResult
    reference: perplexity.PerplexityResult


def divergence(
    model: nn.Module | Reader,
    reference: nn.Module | Reader,
    windows: Windows,
    *,
    start_tokens: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> DivergenceResult:
    """Compare a model with its reference on windows of text.

    Args:
        model: the pruned model; it runs on the device of its weights, or reads layer by layer.
        reference: the dense model, likewise, with the same vocabulary; it runs on its own device.
        windows: token ids [windows, sequence_length].
        start_tokens: number of start tokens in each window; none of them is predicted.
        batch_size: windows in one forward; by default about 2048 tokens.
        progress: called after each forward with the number of windows done and in total.
        ranks: the processes that share the windows; all get the result.

    Raises:
        NumericalError: a loss or a divergence is not a number, or infinite.
        RecipeError: the vocabularies differ, or the windows are too long for a model.
        SourceError: a token id is not in a vocabulary.
    """
    started = time.perf_counter()
    found = perplexity.numbers_of(
        [model, reference], windows, _token_numbers, start_tokens=start_tokens,
        batch_size=batch_size, progress=progress, ranks=ranks,
    )  # fmt: skip
    (count, length), first = windows.shape, perplexity.given(start_tokens)
    gathered = ranks.gather(found.double().mean(dim=2).tolist())
    seconds = time.perf_counter() - started
    kl, agreement, acceptance, own, dense = (
        [x for part in parts for x in part] for parts in zip(*gathered, strict=True)
    )
    results = [perplexity.summary(losses, length, first, seconds) for losses in (own, dense)]
    if not all(map(math.isfinite, kl)):
        raise NumericalError(
            "the divergence is not finite",
            where=f"window {[math.isfinite(value) for value in kl].index(False)} of {count}",
            remedy="a logit overflowed: evaluate in float32 or bfloat16",
        )
    change = [a - b for a, b in zip(own, dense, strict=True)]
    means = _means(kl, agreement, acceptance, change)
    named = {"model": results[0], "reference": results[1], "tokens": results[0].tokens}
    return DivergenceResult.model_validate(means | named)


def divergence_of_texts(
    model: nn.Module | Reader, reference: nn.Module | Reader, texts: Sequence[tuple[Tensor, int]]
) -> Divergence:
    """Compare a model with its reference on texts of different lengths.

    Args:
        model: the pruned model.
        reference: the dense model, with the same vocabulary.
        texts: token ids [tokens] of each text, and how many at its start are not predicted.

    Returns:
        Means over texts, with standard errors over them; every text counts alike.

    Raises:
        SecateurError: as `divergence`.
    """
    found = [divergence(model, reference, ids[None], start_tokens=n) for ids, n in texts]
    means = _means(*([getattr(one, name) for one in found] for name in _NUMBERS))
    return Divergence.model_validate(means | {"tokens": sum(one.tokens for one in found)})


_NUMBERS = "kl", "top1_agreement", "acceptance", "loss_change"


def _means(*values: Sequence[float]) -> dict[str, Any]:
    """The means of the numbers over windows or texts, with their standard errors."""
    found = dict[str, Any]()
    for name, each in zip(_NUMBERS, values, strict=True):
        error = f"{name.removesuffix('_agreement')}_standard_error"
        found |= {name: mean_of(each), error: standard_error(each)}
    return found


def _token_numbers(logits: Tensor, dense_logits: Tensor, targets: Tensor) -> Tensor:
    """KL, agreement, acceptance and both losses for a few tokens, float32 [5, tokens].

    Example:
        >>> import torch
        >>> from secateur.evaluation.divergence import _token_numbers
        >>> dense, pruned = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> numbers = _token_numbers(pruned, dense, torch.tensor([0]))
        >>> [round(float(number), 3) for number in numbers]
        [0.12, 1.0, 0.769, 0.313, 0.693]
    """
    log_q = functional.log_softmax(logits, dim=-1)  # [tokens, vocabulary], float32
    log_p = functional.log_softmax(dense_logits, dim=-1)
    agreement = (log_q.argmax(dim=-1) == log_p.argmax(dim=-1)).float()
    index = targets[:, None]
    losses = [-log.gather(1, index)[:, 0] for log in (log_q, log_p)]
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    acceptance = torch.minimum(log_p, log_q).exp().sum(dim=-1).clamp(max=1)  # a rounded sum
    return torch.stack([kl, agreement, acceptance, *losses])


@torch.no_grad()
def among_kept(
    before: Path,
    after: Path,
    windows: Sequence[Sequence[int]],
    kept: Sequence[int],
    *,
    device: torch.device,
    progress: Progress,
) -> dict[str, float]:
    """Compare a model with fewer tokens with the uncut one, layer by layer.

    Args:
        before: folder of the uncut model.
        after: folder of the smaller one.
        windows: texts as ids of the uncut model, all of tokens that stay.
        kept: the old ids of these tokens, ascending.
        device: where layers run.
        progress: receives the layers.

    Returns:
        The loss of the uncut model, the same among the tokens that stay, and that of the smaller
        model, in nats per token; by how much the logits of these two differ at most, as a fraction
        of the largest; and the number of predicted tokens. Nothing without windows, and of a model
        that cannot read text alone.

    Raises:
        VerificationError: the logits differ by more than rounding.
    """
    index = torch.tensor(kept)
    old = [torch.tensor(ids)[None] for ids in windows]
    if not old:
        return {}

    def logits_of(folder: Path, batches: list[Tensor]) -> Tensor:
        target = CheckpointTarget(open_weights(folder), None, device)
        read = perplexity.read_by([LayerwiseReader(target, STATES_BYTES, progress)], batches)
        return torch.cat([x.head(states)[0, :-1].float().cpu() for [(states, x)] in read])

    try:
        whole = logits_of(before, old)
    except Exception as error:  # a class of transformers may not read text alone
        log.warning("logits before and after are not compared: %s", first_line(error))
        return {}
    smaller = logits_of(after, [torch.searchsorted(index, ids) for ids in old])
    among, next_old = whole[:, index], torch.cat([ids[0, 1:] for ids in old])
    next_new = torch.searchsorted(index, next_old)
    apart = float((among - smaller).abs().max() / whole.abs().max().clamp(min=1e-30))
    if not apart <= max(SAME, 4 * torch.finfo(computed_dtype(after)).eps):
        raise VerificationError(
            f"logits of tokens that stay differ by {apart:.2g} of the largest",
            where=str(after),
            remedy="this is a fault in secateur; please report it",
        )
    losses = {
        "uncut": float(functional.cross_entropy(whole, next_old)),
        "uncut_among_kept": float(functional.cross_entropy(among, next_new)),
        "trimmed": float(functional.cross_entropy(smaller, next_new)),
    }
    return {**losses, "apart": apart, "tokens": len(smaller)}
