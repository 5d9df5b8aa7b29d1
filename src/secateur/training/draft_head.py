"""How a draft head learns: on text that its parent writes, and on the parent's hidden states.

The parent reads every window once. Its three states that the head reads, and what its own output
head reads, are kept in files in bfloat16, so that more epochs cost the head alone:

    bytes = tokens · 2 · 4 · hidden            4.6 kB for a token of a parent of width 576

The loss is a divergence between the parent's probabilities p and the head's q, both over the tokens
that the head proposes, at every place of a chain:

    loss = Σ_i w^i · mean_t KL(p_{t+1+i} ‖ q_i,t) / Σ_i w^i          i = 0 … `PLACES` − 1

A later place reads the head's own state instead of the parent's, as in use. So it is trained as it
is used: EAGLE-3's training-time test (arXiv 2503.01840). Its steps take more than twice as long, so
most steps train the first place alone, and the last ones all. The tokens are those of the text. p
comes from the kept states and the rows of the parent's output head, so the parent is not in memory.

The head begins with the parent's state of the last tap as h, the rows of its output head and its
last norm. Everything else begins small and at random: a layer that begins as the parent's last one
learns more slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from secateur.models.architecture import family_of, setting
from secateur.models.draft_head import DraftHead, head_config
from secateur.training.batches import Batch
from secateur.training.divergences import divergence_rows, loss_of_hidden
from secateur.training.saved import write_whole
from secateur.types import Windows

PLACES, WEIGHT = 3, 0.8
"""Places of a chain in training, and w: what a place counts, over the one before."""

SPREAD = 0.02
"""Standard deviation of what begins at random."""

STATES = 4
"""Residual streams that are stored of each token: those that the head reads, and the last one."""

STORED, AT_ONCE = 64, 8
"""Windows whose states are in one file, and that are computed together."""


def _readers(parent: Any) -> list[Any]:
    """What reads the residual stream after 0, 1, … layers: the next layer, or the last norm."""
    inner = parent.model
    return [*inner.layers, getattr(inner, "norm", None) or inner.final_layernorm]


@contextmanager
def tapped(parent: Any, taps: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """A context that keeps the parent's residual streams after so many of its decoder layers."""
    seen = dict[int, Tensor]()

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], *, tap: int) -> None:
        seen[tap] = inputs[0]

    with ExitStack() as hooks:
        for tap in taps:
            reading = partial(keep, tap=tap)
            hooks.enter_context(_readers(parent)[tap].register_forward_pre_hook(reading))
        yield seen


@torch.inference_mode()
def store_states(
    parent: Any,
    windows: Windows,
    taps: Sequence[int],
    folder: Path,
    on_windows: Callable[[int], None] = lambda _: None,
) -> None:
    """Compute the states of windows in files, `STORED` windows in each; files that exist stay.

    Args:
        parent: a loaded model.
        windows: token ids [windows, length].
        taps: after how many layers.
        folder: of the files.
        on_windows: called with the number of windows of each file.
    """
    for number, part in enumerate(windows.split(STORED)):
        file = folder / f"states-{number:04d}.safetensors"
        if not file.exists():
            found = []
            for ids in part.split(AT_ONCE):
                with tapped(parent, taps) as seen:
                    last = parent.model(input_ids=ids, use_cache=False).last_hidden_state
                found.append((torch.cat([seen[tap] for tap in taps], -1), last))
            read, last = (torch.cat(x).bfloat16() for x in zip(*found, strict=True))
            write_whole(file, {"read": read, "last": last})
        on_windows(len(part))


class StoredStates:
    """The states in the files of `store_states`."""

    def __init__(self, folder: Path) -> None:
        files = sorted(folder.glob("states-*.safetensors"))
        self.files = [safe_open(file, framework="pt") for file in files]

    def read(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Those of some windows, in bfloat16: of the taps, side by side; of the parent's head."""
        both = [
            [self.files[n // STORED].get_slice(part)[n % STORED] for n in numbers]
            for part in ("read", "last")
        ]
        return torch.stack(both[0]), torch.stack(both[1])


class HeadLearner(nn.Module):
    """A head, and what its training knows of the parent. Only the head has parameters.

    Args:
        head: that learns.
        parent: a loaded model of a family that our loop decodes, not packed.
    """

    def __init__(self, head: DraftHead, parent: Any) -> None:
        super().__init__()
        output, config = parent.get_output_embeddings(), parent.config
        self.head, ids = head, head.ids
        # in a tuple, so that it is no module of this one
        self._embedding = (parent.get_input_embeddings(),)
        self._weight = output.weight.detach()[ids]
        self._bias = None if output.bias is None else output.bias.detach()[ids]
        self._factor = setting(config, "logit_scale", 1.0) / setting(config, "logits_scaling", 1.0)
        self._cap = setting(config, "final_logit_softcapping")

    def get_input_embeddings(self) -> nn.Module:
        """Those of the parent."""
        return self._embedding[0]

    def parent_logits(self, last: Tensor) -> Tensor:
        """The parent's logits of the head's tokens, float32, by what its own head reads."""
        last = last.to(self._weight.dtype)
        found = functional.linear(last, self._weight, self._bias).float() * self._factor
        return found if self._cap is None else self._cap * torch.tanh(found / self._cap)


@dataclass(frozen=True)
class ChainLoss:
    """The loss of a batch of windows: see the head of this module.

    Args:
        states: of the same windows.
        places: of a chain.
    """

    states: StoredStates
    places: int = PLACES

    def __call__(self, learner: HeadLearner, batch: Batch) -> Tensor:
        """See `training.objectives.Objective`."""
        head = learner.head
        read, last = self.states.read(batch.numbers)
        tokens = batch.ids.shape[1] - self.places
        with torch.no_grad():
            embedded = learner.get_input_embeddings()(batch.ids[:, 1:])
            log_p = learner.parent_logits(last).log_softmax(-1).bfloat16()
        total, sums = torch.zeros(()), 0.0
        for place, hidden in enumerate(head.chain(read[:, :tokens], embedded, self.places)):
            own = log_p[:, place + 1 : place + 1 + tokens].flatten(0, 1)
            rows = divergence_rows("forward", 1.0, len(own), lambda at, _, own=own: own[at].float())
            weight = WEIGHT**place
            total = total + weight * loss_of_hidden(hidden, head.lm_head, rows)
            sums += weight
        return total / sums


def begin_head(
    parent: Any, taps: Sequence[int], ids: Int64[Tensor, " drafted"], seed: int
) -> DraftHead:
    """A head before training, in float32: see the head of this module.

    Args:
        parent: a loaded model.
        taps: after how many of its layers the head reads states.
        ids: the tokens that it proposes, ascending.
        seed: of what begins at random.
    """
    config = head_config(parent.config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        head = DraftHead(config, taps, ids)
        for parameter in head.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, SPREAD)
        hidden = config.hidden_size
        head.fc.weight[:, -hidden:] += torch.eye(hidden)
        head.lm_head.weight.copy_(parent.get_output_embeddings().weight[ids])
        family = family_of(parent)
        offset = family.couplings.norm_offset if family and family.couplings else 0.0
        head.norm.weight.copy_(_readers(parent)[-1].weight + offset)
    return head.eval()
