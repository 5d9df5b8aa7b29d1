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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import load_file, save
from torch import Tensor, nn

from secateur.errors import ArchitectureError
from secateur.models import skeleton
from secateur.models.architecture import describe
from secateur.models.checkpoint import CheckpointReader, damaged, parse_json
from secateur.models.mtp import MTP, head_of, read_mtp
from secateur.models.opening import open_weights
from secateur.runs.output import write_bytes, write_json
from secateur.runtime.decode import Decoder, SlotDecoder, Token, shared_length
from secateur.runtime.install import DenseView
from secateur.runtime.kernels.library import MAX_BATCH
from secateur.runtime.packed import PackedCheckpoint, is_packed
from secateur.runtime.speculative import DraftedText, Drafter, open_drafter

CONFIG, WEIGHTS, KIND = "config.json", "model.safetensors", '"model_type": "mtp"'


def is_mtp(folder: Path) -> bool:
    """Whether a folder is one of `secateur draft --mtp`."""
    file = folder / CONFIG
    return file.is_file() and KIND in file.read_text(encoding="utf-8")


def rows_of(head: Any, ids: Tensor) -> nn.Linear:
    """A head for some tokens only."""
    return head_of(head.weight[ids].contiguous())


def write_mtp(folder: Path, head: Any, ids: Tensor | None, parent: str, proposed: int) -> None:
    """Write what the layers propose.

    Args:
        folder: an existing one.
        head: of the layers, whole.
        ids: the tokens, ascending; None for all.
        parent: name or folder of the model.
        proposed: tokens of a chain that bring most.
    """
    count, tensors = head.out_features, dict[str, Tensor]()
    if ids is not None:
        count, tensors = len(ids), {"ids": ids, "lm_head.weight": rows_of(head, ids).weight.data}
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    config = {"model_type": "mtp", "parent": parent, "num_speculative_tokens": proposed}
    write_json(folder / CONFIG, {**config, "draft_vocab_size": count})


def reader_of(folder: Path) -> CheckpointReader:
    """Shows the dense tensors of a folder, compressed or not."""
    return DenseView(PackedCheckpoint(folder)) if is_packed(folder) else open_weights(folder)


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
    mtp = read_mtp(parent, reader_of(folder), parent.dtype)
    if draft is None:
        return mtp, None
    try:
        count = parse_json((draft / CONFIG).read_bytes())["draft_vocab_size"]
        tensors = load_file(draft / WEIGHTS)
        if not tensors:
            return mtp, None
        ids, weight = tensors["ids"], tensors["lm_head.weight"]
        known = 0 <= int(ids.min()) <= int(ids.max()) < parent.config.vocab_size
        if not known or weight.shape != (count, parent.config.hidden_size) or len(ids) != count:
            raise ValueError(f"{list(weight.shape)} weights for {len(ids)} tokens of another model")
    except Exception as error:  # safetensors raises several kinds
        raise damaged(f"the draft cannot be read: {error}", draft) from None
    mtp.head = head_of(weight.to(parent.dtype))
    return mtp, ids


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


class MTPDrafter(Drafter):
    """Proposes tokens with the parent's own MTP layer.

    Args:
        slots: decode the parent.
        mtp: one layer.
        ids: as of `Drafter`.
        clock: seconds.
    """

    def __init__(
        self,
        slots: Any,
        mtp: MTP,
        ids: Int64[Tensor, " drafted"] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(slots, slots.vocabulary, ids, clock)
        if len(mtp.layers) > 1:
            raise ArchitectureError(
                f"our loop decodes with one MTP layer, and this model has {len(mtp.layers)}",
                remedy="leave --draft out, or use an engine that chains them: llama.cpp, vLLM",
            )
        self.mtp: Any = mtp
        self.layer: Any = mtp.layers[0]
        self.norm: Any = None
        if isinstance(slots, SlotDecoder):  # which gives the input of the last norm
            slots.tap([slots.c.layers])
            self.norm = slots.model.model.norm
        empty = skeleton.empty_cache
        self.caches = [empty(self.layer.core) for _ in slots.lengths]
        # where a cache begins, how many positions of it the parent has confirmed, and where it ends
        self.spans = [[0, 0, 0] for _ in slots.lengths]
        self.states = [torch.empty(0) for _ in slots.lengths]

    def unread(self, text: DraftedText) -> list[int]:
        """The tokens that follow the states which the layer has not read."""
        slot, ids = text.slot, [*text.ids]
        _, states = self.decoder.take_states(slot)
        if self.norm is not None:
            states = self.norm(states.flatten(1).to(self.layer.eh_proj.weight.dtype))
        start, confirmed, end = self.spans[slot]
        begin = min(confirmed, max(0, shared_length(self.texts[slot], ids) - 1))
        first = len(ids) - 1 - len(states)
        if not start <= first <= begin:  # another text, or keys that were copied in
            self.caches[slot] = skeleton.empty_cache(self.layer.core)
            start = begin = end = first
        for cache in self.caches[slot].values():
            for layer in cache.layers:
                layer.crop(begin - end)
        self.texts[slot], self.states[slot] = ids, states[begin - first :]
        self.spans[slot] = [start, len(ids) - 1, begin]
        return ids[begin + 1 :]

    @torch.inference_mode()
    def step(self, texts: Sequence[tuple[int, list[int]]]) -> Float[Tensor, "texts drafted"]:
        """Read a few states of each text, and the tokens after them; logits after the last one."""
        rows = []
        for slot, ids in texts:
            end = self.spans[slot][2]
            embedded = self.mtp.embed(torch.tensor([ids], device=self.states[slot].device))
            positions = torch.arange(end, end + len(ids), device=embedded.device)[None]
            given = self.states[slot][None], embedded, positions, self.caches[slot]
            z, carried = self.layer(*given)
            self.states[slot], self.spans[slot][2] = carried[0, -1:], end + len(ids)
            rows.append(self.mtp.head(z[0, -1:]).float().cpu())
        return torch.cat(rows)


def open_draft(draft: Path, folder: Path, slots: Any, tokenizer: Any) -> Drafter:
    """Load what proposes tokens to a model: a smaller one, a head, or its own MTP layer.

    Args:
        draft: its folder.
        folder: of the model.
        slots: decode the model.
        tokenizer: of the model.

    Raises:
        SecateurError: as `open_drafter` and `mtp_of`.
    """
    if is_mtp(draft):
        return MTPDrafter(slots, *mtp_of(slots.model, folder, draft))
    return open_drafter(draft, slots, tokenizer)
