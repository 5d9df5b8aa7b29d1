"""Decoding with a model's own MTP layers as its draft, and families that our loop does not decode.

The parent computes the last token of the text and the proposed ones in one call. After it the MTP
layers read the parent's hidden states of what was accepted, and go on from there in a chain.

For a family that one call of ours decodes the parent is a `SlotDecoder`. Any other is called as
transformers' module, with its cache (`ModuleSlots`). Where a text goes back, keys of full attention
are cut off. Recurrent states and sliding windows have no way back: they are as before the last
call, and the next call reads the accepted tokens of that one again, before its own.

A folder of `secateur draft MODEL --mtp` has the tokens that the layers propose, and the rows of
the head for these. The layers are read from the model's own folder.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn

from secateur.models import skeleton
from secateur.models.architecture import describe
from secateur.models.checkpoint import damaged
from secateur.models.configuration import MTP as KIND
from secateur.models.mtp import MTP, head_of, read_mtp
from secateur.runs.output import write_bytes, write_json
from secateur.runtime.decode import Decoder, SlotDecoder, Token
from secateur.runtime.install import open_checkpoint
from secateur.runtime.kernels.library import MAX_BATCH

WEIGHTS = "model.safetensors"


def rows_of(head: Any, ids: Tensor | None) -> Any:
    """A head for some tokens only; itself for None."""
    return head if ids is None else head_of(head.weight[ids].contiguous())


def write_mtp(folder: Path, head: Any, ids: Tensor | None, parent: str, proposed: int) -> None:
    """Write what the layers propose.

    Args:
        folder: an existing one.
        head: of the layers, whole.
        ids: the tokens, ascending; None for all.
        parent: name or folder of the model.
        proposed: tokens of a chain that bring most.
    """
    own = rows_of(head, ids)
    tensors = {} if ids is None else {"ids": ids, "lm_head.weight": own.weight.data}
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    config = {"model_type": KIND, "parent": parent, "num_speculative_tokens": proposed}
    write_json(folder / "config.json", {**config, "draft_vocab_size": own.out_features})


def mtp_of(parent: Any, folder: Path, draft: Path | None = None) -> tuple[MTP, Tensor | None]:
    """The MTP layers of a loaded model, and the tokens that they propose; None for all.

    Args:
        parent: the model.
        folder: that it was loaded from.
        draft: of `secateur draft --mtp`; None for the whole head.

    Raises:
        ArchitectureError: the model has none, or in another form.
        CheckpointError: the draft is damaged, or of another model.
    """
    mtp = read_mtp(parent, open_checkpoint(folder), parent.dtype)
    if draft is None:
        return mtp, None
    try:
        tensors = load_file(draft / WEIGHTS)
        if not tensors:
            return mtp, None
        ids, weight = tensors["ids"], tensors["lm_head.weight"]
        check_tokens(ids, parent.config.vocab_size)
        if weight.shape != (len(ids), parent.config.hidden_size):
            raise ValueError(f"{list(weight.shape)} weights for {len(ids)} tokens of another model")
    except Exception as error:  # safetensors raises several kinds
        raise damaged(f"the draft cannot be read: {error}", draft) from None
    mtp.head = head_of(weight.to(parent.dtype))
    return mtp, ids


def check_tokens(ids: Tensor, vocabulary: int) -> None:
    """Refuse a list of tokens of a draft that is not int64, ascending, and of the vocabulary.

    Raises:
        ValueError: says what it is.
    """
    within = ids.ndim == 1 and 0 <= int(ids[0]) <= int(ids[-1]) < vocabulary
    if ids.dtype != torch.int64 or not within or not bool((ids.diff() > 0).all()):
        raise ValueError(f"{ids.dtype} {list(ids.shape)}, not ascending below {vocabulary}")


class ModuleSlots:
    """One sequence of a transformers model, with the members of `SlotDecoder` that drafts need.

    Args:
        model: in eval mode.
        capacity: tokens that may be read.
    """

    together = MAX_BATCH

    def __init__(self, model: Any, capacity: int) -> None:
        self.model, self.capacity, self.lengths = model, capacity, [0]
        self.vocabulary = model.get_output_embeddings().out_features
        core = model.get_submodule(describe(model).layers_path.rpartition(".")[0])

        def see(module: nn.Module, given: Any, out: Any) -> None:
            self._last = out.last_hidden_state[0]

        core.register_forward_hook(see)
        self._begin()

    def _begin(self) -> None:
        """Forget the text."""
        self.text, self.cache = list[int](), skeleton.empty_cache(self.model)
        self._held = self._unchanged = 0  # tokens in the cache; positions since `take_states`
        self._states = self.model.get_input_embeddings()(torch.tensor([], dtype=torch.long))
        self._before: tuple[int, list[Any]] = 0, []

    @property
    def _layers(self) -> list[Any]:
        (cache,) = self.cache.values()
        return cache.layers

    @torch.inference_mode()
    def _call(self, ids: list[int], answers: int) -> Float[Tensor, "answers vocabulary"]:
        """Append tokens, after those that have to be read again."""
        again = self.text[self._held :]
        # only plain keys can be cut off again; transformers names these classes
        kept = (None if type(x).__name__ == "DynamicLayer" else copy.deepcopy(x)
                for x in self._layers)  # fmt: skip
        self._before = self._held, [*kept]
        whole = torch.tensor([[*again, *ids]], device=self.model.device)
        found = self.model(input_ids=whole, use_cache=True, logits_to_keep=answers, **self.cache)
        self.text += ids
        self._held = self.lengths[0] = len(self.text)
        self._states = torch.cat([self._states, self._last[len(again) :]])
        logits: Tensor = found.logits[0].float().cpu()
        return logits

    def read(self, slot: int, ids: Tensor, *, every: bool = False) -> Tensor:
        """As `SlotDecoder.read`."""
        return self._call(ids.tolist(), len(ids) if every else 1)

    def step(self, tokens: Sequence[Token]) -> Tensor:
        """As `SlotDecoder.step`."""
        return self._call([token.id for token in tokens], len(tokens))

    def kept(self, slot: int, length: int) -> int:
        """As `SlotDecoder.kept`."""
        begin, states = self._before
        return length if length >= begin or not any(states) else 0

    def rewind(self, slot: int, length: int = 0) -> None:
        """As `SlotDecoder.rewind`, to a length that is kept."""
        gone = self.lengths[slot] - length
        if length == 0:
            self._begin()
        elif length < self._held:
            begin, states = self._before
            end = begin if any(states) else length
            for number, state in enumerate(states):
                if state is None:
                    self._layers[number].crop(end - self._held)
                else:
                    self._layers[number] = state
            self._held = end
        self._states = self._states[: max(0, len(self._states) - gone)]
        self.text, self.lengths[slot] = self.text[:length], length
        self._unchanged = min(self._unchanged, length)

    def take_states(self, slot: int) -> tuple[int, Float[Tensor, "tokens hidden"]]:
        """The hidden states of the newest tokens, after the last norm; as of `SlotDecoder`."""
        found, self._states = self._states, self._states[:0]
        unchanged, self._unchanged = self._unchanged, self.lengths[slot]
        return unchanged, found


class ModuleDecoder(Decoder):
    """Decodes one sequence of a transformers model; its slots are `ModuleSlots`."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.slots: Any = ModuleSlots(model, capacity)
        self.capacity, self.continues, self.text = capacity, True, list[int]()


class MTPDecoder:
    """Decodes a parent's MTP layer in transformers' modules, with the members of `HeadDecoder`.

    Args:
        mtp: the layer.
        parent: decodes the parent, and gives its states from here on.
        head: in place of the layer's whole one.
    """

    def __init__(self, mtp: MTP, parent: Any, head: Any = None) -> None:
        self.proposer, self.embed, self.head = mtp, mtp.embed, head or mtp.head
        self.tokens = self.head.out_features
        self.norm: Any = nn.Identity()
        if isinstance(parent, SlotDecoder):  # which gives the input of the last norm
            parent.tap([parent.c.layers])
            self.norm = parent.model.model.norm
        self.lengths = [0 for _ in parent.lengths]
        self.caches = [skeleton.empty_cache(mtp.core) for _ in parent.lengths]
        self.states = [torch.empty(0) for _ in parent.lengths]

    @torch.inference_mode()
    def give(self, slot: int, states: Tensor) -> None:
        """As `HeadDecoder.give`."""
        self.states[slot] = self.norm(states.flatten(1).to(self.proposer.eh_proj.weight.dtype))

    def rewind(self, slot: int, length: int = 0) -> None:
        """As `SlotDecoder.rewind`."""
        for cache in self.caches[slot].values():
            for layer in cache.layers:
                layer.crop(length - self.lengths[slot])
        self.lengths[slot] = length

    def read(self, slot: int, ids: Tensor) -> Tensor:
        """As `SlotDecoder.read`."""
        last = len(ids) - 1
        return self.step([Token(slot, n, x, n == last) for n, x in enumerate(ids.tolist())])

    @torch.inference_mode()
    def step(self, tokens: Sequence[Token]) -> Float[Tensor, "answered drafted"]:
        """As `SlotDecoder.step`, of any number of tokens. Those of a slot stand together."""
        rows = []
        for slot, some in itertools.groupby(tokens, lambda token: token.slot):
            own = [*some]
            ids = torch.tensor([[token.id for token in own]], device=self.states[slot].device)
            given = self.states[slot][None, : len(own)], self.embed(ids), self.lengths[slot]
            z, carried = self.proposer.step(*given, self.caches[slot])
            # beyond the parent's states a chain goes on with its own
            rest = self.states[slot][len(own) :]
            self.states[slot] = rest if len(rest) else carried[0, -1:]
            self.lengths[slot] += len(own)
            rows.append(self.head(z[0, [token.answered for token in own]]).float().cpu())
        return torch.cat(rows)
