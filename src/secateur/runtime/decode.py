"""Decodes one or several sequences, without a framework between the operations.

At a hundred million to a billion parameters, launching some three hundred small operations for each
token costs more than the arithmetic. For the families of `layer_forms.FORMS`, one call
(`csrc/decode.c`) computes up to eight tokens, on matrices as they are stored. Every sequence has a
slot of the caches. A prompt is one call too, of any number of tokens.

Other models go token by token through transformers' `generate`.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Collection, Generator, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, greenlet
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from secateur.errors import ArchitectureError, KernelError, ShapeError
from secateur.models.shape import TILE, held_positions
from secateur.models.skeleton import quiet_transformers
from secateur.recipes.deploy import Sampling
from secateur.runtime.grammar import Grammar
from secateur.runtime.kernels.library import MAX_BATCH, CToken
from secateur.runtime.kernels.matrix import kernels
from secateur.runtime.layer_forms import KernelModel, why_not, window_of
from secateur.runtime.sampling import Draws

GREEDY = Sampling()


UNIT = 4
"""Bytes of the values that stand together."""


CACHES = MappingProxyType({"bf16": torch.bfloat16, "int8": torch.int8})
"""The types that `--kv-cache` names."""


def cache_dtype(named: str | None, model: torch.dtype) -> torch.dtype:
    """The type of keys and values for activations of some type."""
    if named is None:
        return torch.bfloat16 if model == torch.bfloat16 else torch.float32
    return CACHES[named]


def unused_zeros(shape: Sequence[int]) -> UInt8[Tensor, "..."]:
    """Zeros that take memory, page by page, only where something is written."""
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape), **private), dtype=torch.uint8).view(
        shape
    )


class KeyValueCache:
    """Keys and values of all layers and sequences.

    Position p of a slot is in tile p // 64 modulo the tiles of the layer. A layer with a window has
    a ring of tiles: what leaves the window makes room for what comes. `models.shape.held_positions`
    says how many positions a layer has room for.

    Args:
        dtype: of the values: float32, bfloat16, or int8 with a scale for each position and head.
        windows: keys that a token of each layer sees, its own among them; 0: all.
        slots: how many sequences have a place. Memory is used when it is filled.
        groups: heads of keys and values.
        capacity: positions of a slot.
        head: columns of a head.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        windows: Sequence[int],
        slots: int,
        groups: int,
        capacity: int,
        head: int,
    ) -> None:
        self.dtype, self.windows = dtype, windows
        self.width = -(-head // 16) * 16  # lanes of a register of float32
        # a tile of int8 is followed by a float32 scale for each of its positions
        self.code_bytes = TILE * self.width * dtype.itemsize
        tile_bytes = self.code_bytes + (UNIT * TILE if dtype == torch.int8 else 0)
        self.tiles: dict[int, Tensor] = {}
        """By window: [keys and values, layers, slots, groups, tiles, bytes]."""
        for window in dict.fromkeys(windows):
            count = held_positions(capacity, window) // TILE
            # all layers of a window in one tensor; C gets the address of each layer
            shape = (2, list(windows).count(window), slots, groups, count, tile_bytes)
            self.tiles[window] = unused_zeros(shape)

    @property
    def nbytes(self) -> int:
        """The memory when all slots are full."""
        return sum(tiles.nbytes for tiles in self.tiles.values())

    def place(self, layer: int) -> tuple[int, int, int]:
        """Where keys and values of a layer are, and its tiles of a slot and group."""
        window = self.windows[layer]
        tiles = self.tiles[window][:, self.windows[:layer].count(window)]
        return tiles[0].data_ptr(), tiles[1].data_ptr(), tiles.shape[3]

    def oldest(self, window: int, reached: int) -> int:
        """The first position that layers with a window hold after so many were written."""
        # a ring of n tiles holds the n newest ones, of which the newest may be half full
        return TILE * max(0, (reached - 1) // TILE + 1 - self.tiles[window].shape[4])

    def goes_on(self, reached: int, length: int) -> bool:
        """Whether a text can go on after its first `length` tokens, when `reached` were written."""
        return all(max(0, length + 1 - w) >= self.oldest(w, reached) for w in self.tiles if w)

    def rows(
        self, slot: int, begin: int, end: int
    ) -> UInt8[Tensor, "2 layers groups positions row"]:
        """A copy of the bytes of some positions: their values, then their scale if any.

        Layers with the same window stand together.
        """
        found = []
        for window in self.tiles:
            tile, place, n = self._places(window, begin, end)
            keys, values, scales = self._views(window, slot)
            # keys stand position by position; of values, n positions share a unit
            both = keys[:, :, tile, place], values[:, :, tile, place // n, place % n]
            rows = torch.stack([x.flatten(-2) for x in both])
            found.append(torch.cat([rows, scales[:, :, :, tile, place]], -1))
        return torch.cat(found, 1)

    def put_rows(
        self, slot: int, begin: int, rows: UInt8[Tensor, "2 layers groups positions row"]
    ) -> None:
        """Write what `rows` gave at the same positions."""
        layers = [tiles.shape[1] for tiles in self.tiles.values()]
        for window, own in zip(self.tiles, rows.split(layers, 1), strict=True):
            tile, place, n = self._places(window, begin, begin + rows.shape[3])
            keys, values, scales = self._views(window, slot)
            codes = own[..., : self.width * self.dtype.itemsize]
            keys[:, :, tile, place] = codes[0].unflatten(-1, (-1, UNIT))
            values[:, :, tile, place // n, place % n] = codes[1].unflatten(-1, (self.width, -1))
            scales[:, :, :, tile, place] = own[..., codes.shape[-1] :]

    def _places(self, window: int, begin: int, end: int) -> tuple[Tensor, Tensor, int]:
        """Tile and place in it of some positions, and the values that stand together in a unit."""
        at = torch.arange(begin, end)
        return at // TILE % self.tiles[window].shape[4], at % TILE, UNIT // self.dtype.itemsize

    def _views(self, window: int, slot: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and scales of a slot by positions: see csrc/secateur.h."""
        size = self.dtype.itemsize
        codes, scales = self.tiles[window][:, :, slot].tensor_split([self.code_bytes], -1)
        keys = codes[0].unflatten(-1, (-1, TILE, UNIT)).transpose(-3, -2)
        shape = (-1, self.width, UNIT // size, size)
        values = codes[1].unflatten(-1, shape).transpose(-3, -2)
        return keys, values, scales.unflatten(-1, (TILE, -1))


class Decoder:
    """Decodes one sequence, token by token.

    Args:
        model: a transformers model in eval mode, from `secateur.load` or plain.
        capacity: the number of tokens that fit in the cache.
        continues: whether a prompt that begins like the text before, as in a conversation, is read
            only from where it differs.
        cache: the type of keys and values, as in `SlotDecoder`.

    Raises:
        ArchitectureError: one call cannot decode the model; `why_not` gives the reason.
    """

    def __init__(
        self, model: Any, capacity: int, *, continues: bool = False, cache: str | None = None
    ) -> None:
        self.slots = SlotDecoder(model, capacity, cache=cache)
        self.capacity, self.continues = capacity, continues
        self.text: list[int] = []

    @property
    def length(self) -> int:
        """How many tokens are in the cache."""
        return self.slots.lengths[0]

    def prefill(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Start anew with a prompt; returns the logits after its last token, float32.

        Raises:
            ShapeError: the prompt is empty, longer than the cache, or not in the vocabulary.
        """
        if not 1 <= len(ids) <= self.capacity:
            raise ShapeError(f"a prompt of {len(ids)} tokens, for a cache of {self.capacity}")
        text = ids.tolist()
        self.slots.rewind(0, self.known(text) if self.continues else 0)
        logits = self.slots.read(0, ids[self.length :])[0]
        self.text = text
        return logits

    def known(self, text: Sequence[int]) -> int:
        """How many tokens of a prompt need not be read again; at least its last one is read."""
        shared = min(self.length, shared_length(self.text, text), len(text) - 1)
        return self.slots.kept(0, shared)

    def step(self, token: int) -> Float[Tensor, " vocabulary"]:
        """Process one token; returns the logits of the next, float32.

        Raises:
            ShapeError: the cache is full, or the token is not in the vocabulary.
            KernelError: memory ran out.
        """
        logits = self.slots.step([Token(0, self.length, token)])[0]
        self.text.append(token)
        return logits


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from their beginning on."""
    # by halves: comparing slices of lists runs in C, a loop over tokens would not
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def continued(
    steps: Decoder | SteppedGeneration,
    ids: Int64[Tensor, " tokens"],
    max_new_tokens: int,
    *,
    sampling: Sampling = GREEDY,
    stop: Collection[int] = (),
    grammar: Grammar | None = None,
) -> Generator[int]:
    """Yield the tokens that follow a prompt, one by one.

    Args:
        steps: computes them.
        ids: the prompt.
        max_new_tokens: the limit.
        sampling: how tokens are drawn; the most likely one by default.
        stop: tokens that end the text; they are not yielded.
        grammar: what the text follows; None: anything.

    Raises:
        ShapeError: prompt and new tokens do not fit.
        GrammarError: no token can follow.
    """
    draws = Draws(sampling, ids.tolist(), grammar)
    logits = steps.prefill(ids)
    for number in range(max_new_tokens):
        token = draws.draw(logits)
        if token in stop:
            return
        yield token
        if number + 1 < max_new_tokens:
            logits = steps.step(token)


class Token(NamedTuple):
    """One token of a call.

    Args:
        slot: of its sequence.
        position: in its sequence, from 0.
        id: in the vocabulary.
        answered: whether the logits after it are wanted.
    """

    slot: int
    position: int
    id: int
    answered: bool = True


class SlotDecoder:
    """Decodes up to eight tokens of several sequences with one call.

    What is computed for a token does not depend on the others in the call, bit for bit.

    Args:
        model: a transformers model in eval mode, from `secateur.load` or plain.
        capacity: the number of tokens that fit in a slot.
        slots: how many sequences have a cache. Memory is used when a slot is filled.
        cache: the type of keys and values, `bf16` or `int8`; None is bf16 for models of bfloat16,
            float32 for others.
        head: the tokens whose logits are computed, int64; None for all.
        taps: after how many layers the residual stream is kept (`tap`).

    Attributes:
        vocabulary: ids that a token may have.
        lengths: how many tokens of each slot are in the cache.
        together: the most tokens of one `step`.

    Raises:
        ArchitectureError: one call cannot decode the model; `why_not` gives the reason.
        ShapeError: a tap is after more layers than the model has.
    """

    together = MAX_BATCH

    def __init__(
        self,
        model: Any,
        capacity: int,
        slots: int = 1,
        *,
        cache: str | None = None,
        head: Int64[Tensor, " answers"] | None = None,
        taps: Sequence[int] = (),
    ) -> None:
        reason = why_not(model, capacity)
        if reason is not None:
            raise ArchitectureError(
                f"this model cannot be decoded by one call for each token: {reason}",
                where=type(model).__name__,
                remedy="use model.generate, which works with packed linears too",
            )
        config, attention = model.config, model.model.layers[0].self_attn
        self.model: Any = model
        self.capacity, self.lengths = capacity, [0] * slots
        self._reached = [0] * slots  # what a slot had before it went back
        # what an embedding gives: packed ones have no parameter to ask
        self.dtype = model.get_input_embeddings()(torch.tensor([0])).dtype
        self.cache = KeyValueCache(
            cache_dtype(cache, self.dtype),
            windows=[window_of(config, i) for i in range(len(model.model.layers))],
            slots=slots,
            groups=config.num_key_value_heads,
            capacity=capacity,
            head=attention.head_dim,
        )
        self._kernel_model = KernelModel(model, capacity, exact=self.dtype != torch.bfloat16)
        self.c = self._kernel_model.decoder(self.cache.dtype, self.cache.place, head)
        self.tap(taps)
        self.vocabulary = model.get_output_embeddings().out_features
        self._embed = model.get_input_embeddings()
        self._embedding_factor = getattr(model.model, "embedding_multiplier", 1.0)  # of Granite
        self._rows = self._kernel_model.embedding(self._embed, self._embedding_factor)
        bias = model.get_output_embeddings().bias
        self._head_bias = None if bias is None else bias.detach()[... if head is None else head]
        factor = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        self._logit_factor: float = factor
        self._logit_cap: float | None = getattr(config, "final_logit_softcapping", None)

    def tap(self, layers: Sequence[int]) -> None:
        """Keep the residual stream of every new token, until `take_states` takes it.

        Args:
            layers: after how many layers: 3 is the input of the fourth one, all layers the input of
                the last norm.

        Raises:
            ShapeError: there are fewer layers.
        """
        if any(not 0 <= tap <= self.c.layers for tap in layers):
            raise ShapeError(f"states after {list(layers)} layers of a model of {self.c.layers}")
        self._taps = (ctypes.c_int64 * len(layers))(*layers)  # C holds the address
        self.c.taps, self.c.tap = len(layers), ctypes.addressof(self._taps)
        self._states = [list[Tensor]() for _ in self.lengths]  # of the last positions of a slot
        self._unchanged = [0] * len(self.lengths)  # so many positions, since `take_states`

    def check(self, ids: Sequence[int]) -> None:
        """Refuse tokens that are not in the vocabulary.

        Raises:
            ShapeError: names the first of them.
        """
        odd = [token for token in ids if not 0 <= token < self.vocabulary]
        if odd:
            raise ShapeError(f"token {odd[0]} is not in the vocabulary of {self.vocabulary}")

    def read(
        self, slot: int, ids: Int64[Tensor, " tokens"], *, every: bool = False
    ) -> Float[Tensor, "kept vocabulary"]:
        """Append a piece of a prompt to a slot.

        Returns:
            The logits after its last token, or with `every` after each of its tokens, float32.

        Raises:
            ShapeError: the piece is empty, does not fit in the slot, or is not in the vocabulary.
            KernelError: memory ran out.
        """
        begin, end = self.lengths[slot], self.lengths[slot] + len(ids)
        if len(ids) == 0 or end > self.capacity:
            raise ShapeError(
                f"{len(ids)} tokens after {begin} of a prompt, for a cache of {self.capacity}"
            )
        self.check(ids.tolist())
        tokens = [Token(slot, begin + n, id) for n, id in enumerate(ids.tolist())]
        hidden = self._embedded(tokens)
        logits = torch.empty(len(ids) if every else 1, self.c.vocabulary)
        given = ctypes.byref(self.c), hidden.data_ptr(), slot, begin
        states, answers = self._room(len(ids)), (len(logits), logits.data_ptr())
        if kernels().sct_read(*given, len(ids), *answers, states.data_ptr()) != 0:
            raise KernelError(f"a prompt of {len(ids)} tokens could not be read: memory ran out")
        self._keep(states, tokens)
        self.lengths[slot] = end
        return self._scaled(logits)

    def _embedded(self, tokens: Sequence[Token]) -> Tensor:
        """What the first layer reads [tokens, hidden], float32."""
        if self._rows is not None:
            matrix, *rounding = self._rows
            hidden = torch.empty(len(tokens), matrix.columns)
            ids = (ctypes.c_int64 * len(tokens))(*(token.id for token in tokens))
            given = ctypes.byref(matrix.c), ids, len(tokens), *rounding, hidden.data_ptr()
            if kernels().sct_embed(*given) != 0:
                raise KernelError(f"{len(tokens)} tokens could not be embedded: memory ran out")
            return hidden
        with torch.inference_mode():
            found: Tensor = self._embed(torch.tensor([token.id for token in tokens]))
            if self._embedding_factor != 1.0:
                found = found * self._embedding_factor
        return found.float().contiguous()

    def _room(self, tokens: int) -> Float[Tensor, "tokens taps hidden"]:
        """Memory for the states of some tokens; nothing without taps."""
        return torch.empty(tokens, self.c.taps, self.c.hidden)

    def _keep(self, states: Float[Tensor, "tokens taps hidden"], tokens: Sequence[Token]) -> None:
        """Keep the states of new tokens."""
        if self.c.taps:
            pairs = zip(tokens, states, strict=True)
            for token, row in sorted(pairs, key=lambda pair: pair[0].position):
                self._states[token.slot].append(row)

    def take_states(self, slot: int) -> tuple[int, Float[Tensor, "tokens taps hidden"]]:
        """The residual streams of the newest tokens of a slot, and forget them here.

        Returns:
            How many of the first positions are unchanged since the last call of this; and the
            states of the last positions, float32: of all that are new, or of those after what
            `copy_in` gave.
        """
        found, self._states[slot] = self._states[slot], []
        unchanged, self._unchanged[slot] = self._unchanged[slot], self.lengths[slot]
        return unchanged, torch.stack(found) if found else self._room(0)

    def _scaled(self, logits: Tensor) -> Tensor:
        """The logits as the model gives them, after what follows its head."""
        if self._head_bias is not None:
            logits += self._head_bias
        if self._logit_factor != 1.0:
            logits *= self._logit_factor
        cap = self._logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def step(self, tokens: Sequence[Token]) -> Float[Tensor, "answered vocabulary"]:
        """Append up to eight tokens, of one slot or several; returns logits, float32.

        Args:
            tokens: those of a slot follow each other, from its length on.

        Returns:
            The logits after each token that is answered, in their order.

        Raises:
            ShapeError: more than eight tokens, a slot is full, a token is not in the vocabulary or
                not the next of its slot.
            KernelError: memory ran out.
        """
        if not 1 <= len(tokens) <= MAX_BATCH:
            raise ShapeError(f"{len(tokens)} tokens in one call, which takes 1 to {MAX_BATCH}")
        self.check([token.id for token in tokens])
        lengths = [*self.lengths]
        for token in tokens:
            if token.position != lengths[token.slot] or token.position >= self.capacity:
                raise ShapeError(
                    f"position {token.position} of slot {token.slot}, which has "
                    f"{lengths[token.slot]} of {self.capacity} tokens"
                )
            lengths[token.slot] += 1
        # C answers the first tokens of a call; a stable sort keeps the order within a slot
        ordered = sorted(tokens, key=lambda token: not token.answered)
        answers, states = sum(token.answered for token in tokens), self._room(len(tokens))
        hidden = self._embedded(ordered)
        places = (CToken * len(ordered))(*((token.slot, token.position) for token in ordered))
        logits = torch.empty(answers, self.c.vocabulary)
        given = ctypes.byref(self.c), hidden.data_ptr(), places
        found = answers, logits.data_ptr(), states.data_ptr()
        if kernels().sct_decode(*given, len(ordered), *found) != 0:
            raise KernelError(f"{len(tokens)} tokens could not be decoded: memory ran out")
        self._keep(states, ordered)
        self.lengths = lengths
        return self._scaled(logits)

    def advance(
        self, ids: Int64[Tensor, " tokens"], *, answered: bool = True
    ) -> Float[Tensor, "answered vocabulary"]:
        """Append a token to each of the first slots, of which there may be hundreds.

        Matrices are multiplied by blocks, as for a prompt: from about 16 slots on that is faster
        than `step`.

        Args:
            ids: the token of each slot.
            answered: whether to compute logits; otherwise the result has no rows.

        Raises:
            ShapeError: there are fewer slots, one is full, or a token is not in the vocabulary.
            KernelError: memory ran out.
        """
        count = len(ids)
        if not 1 <= count <= len(self.lengths) or max(self.lengths[:count]) >= self.capacity:
            raise ShapeError(f"{count} tokens for {len(self.lengths)} slots of {self.capacity}")
        self.check(ids.tolist())
        # slot n is the n-th token, behind all that the slot has
        tokens = [Token(n, self.lengths[n], id) for n, id in enumerate(ids.tolist())]
        hidden = self._embedded(tokens)
        places = (CToken * count)(*((token.slot, token.position) for token in tokens))
        logits = torch.empty(count if answered else 0, self.c.vocabulary)
        given, states = (ctypes.byref(self.c), hidden.data_ptr(), places, count), self._room(count)
        found = logits.data_ptr() if answered else None, states.data_ptr()
        if kernels().sct_advance(*given, *found) != 0:
            raise KernelError(f"{count} tokens could not be decoded: memory ran out")
        self._keep(states, tokens)
        self.lengths[:count] = [length + 1 for length in self.lengths[:count]]
        return self._scaled(logits)

    def reached(self, slot: int) -> int:
        """How many positions of a slot were written since it was empty."""
        return max(self._reached[slot], self.lengths[slot])

    def kept(self, slot: int, length: int) -> int:
        """After how many of the first `length` tokens of a slot its text can go on.

        After all of them; or after none, if a layer has lost keys that the next token would see.
        None are lost within CHUNK_TOKENS of the most that the slot had (`reached`).
        """
        return length if self.cache.goes_on(self.reached(slot), length) else 0

    def rewind(self, slot: int, length: int = 0) -> None:
        """Forget the tokens of a slot from a position on.

        Raises:
            ShapeError: the slot has fewer tokens, or cannot go back so far.
        """
        if not 0 <= length <= self.lengths[slot]:
            raise ShapeError(f"slot {slot} has {self.lengths[slot]} tokens, not {length}")
        if self.kept(slot, length) < length:
            raise ShapeError(f"slot {slot} no longer has the keys that token {length} sees")
        # an empty slot is written from the beginning again, so nothing of it is lost
        self._reached[slot] = self.reached(slot) if length else 0
        kept = length - (self.lengths[slot] - len(self._states[slot]))
        del self._states[slot][max(0, kept) :]
        self._unchanged[slot] = min(self._unchanged[slot], length)
        self.lengths[slot] = length

    def copy_out(self, slot: int, begin: int, end: int) -> Tensor | None:
        """A copy of keys and values of some positions, as bytes; None if a layer has lost some."""
        if any(begin < self.cache.oldest(w, self.reached(slot)) for w in self.cache.tiles):
            return None
        return self.cache.rows(slot, begin, end)

    def copy_in(self, slot: int, known: Tensor) -> None:
        """Append keys and values that `copy_out` gave at the same positions."""
        begin = self.lengths[slot]
        end = begin + known.shape[3]
        if end > self.capacity:
            raise ShapeError(f"the cache of {self.capacity} tokens is full")
        self.cache.put_rows(slot, begin, known)
        self._states[slot] = []
        self.lengths[slot] = end


NEVER = 2**31 - 1
"""More tokens than any text has: who calls decides where it ends."""

PLAIN: dict[str, Any] = {
    **{"do_sample": False, "num_beams": 1, "eos_token_id": None, "repetition_penalty": 1.0},
    **dict.fromkeys(("no_repeat_ngram_size", "min_new_tokens", "min_length"), 0),
}
"""Options of `generate` under which it neither draws nor ends a text."""


class SteppedGeneration:
    """Decodes one sequence with `generate`, which halts at every token.

    `generate` knows what each family needs between two tokens. It runs in a greenlet. When it has
    computed logits, it hands them over and waits for the token that follows.

    Args:
        model: a transformers causal language model in eval mode, on any device.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.running: greenlet | None = None

    def prefill(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Start anew with a prompt; returns the logits after its last token, float32 on the CPU.

        Raises:
            ShapeError: the prompt is empty.
        """
        if len(ids) == 0:
            raise ShapeError("a prompt of 0 tokens")
        self.close()
        self.running = greenlet(self.generate)
        return self.resume(ids[None].to(self.model.device))

    def step(self, token: int) -> Float[Tensor, " vocabulary"]:
        """Process one token; returns the logits of the next, float32 on the CPU."""
        if self.running is None:
            raise ShapeError("there is no prompt")
        return self.resume(token)

    def close(self) -> None:
        """Forget the text."""
        if self.running is not None and not self.running.dead:
            with torch.inference_mode():
                self.running.throw(GreenletExit)
        self.running = None

    def resume(self, given: Any) -> Float[Tensor, " vocabulary"]:
        """Let `generate` go on until it has logits."""
        assert self.running is not None
        with torch.inference_mode(), quiet_transformers():  # both would leak out of a greenlet
            logits: Tensor = self.running.switch(given)
        return logits

    def generate(self, prompt: Int64[Tensor, "1 tokens"]) -> None:
        """Generate in the greenlet."""
        from transformers import LogitsProcessorList

        caller = greenlet.getcurrent().parent

        # `generate` takes the most likely token: the one that the caller has drawn gets all
        def hand_over(ids: Tensor, scores: Tensor) -> Tensor:
            token = caller.switch(scores[0].float().cpu())
            only = torch.full_like(scores, -torch.inf)
            only[0, token] = 0
            return only

        self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEVER,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([hand_over]),
            **PLAIN,
        )
