"""Decodes several sequences at once, without a framework between the operations.

At a hundred million to a billion parameters, launching some three hundred small operations for each
token costs more than the arithmetic. For decoders of Llama's shape (RMSNorm, rotary positions,
grouped queries, SwiGLU; biases and norms of queries and keys where the family has them), one call
(`csrc/decode.c`) computes up to eight tokens, on matrices as they are stored. Every sequence has a
slot of the caches. Long prompts go through transformers in pieces, and the slot keeps their cache.
"""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.errors import ArchitectureError, KernelError, ShapeError
from secateur.runtime.kernels.library import (
    MAX_BATCH,
    TYPES,
    CDecoder,
    CLayer,
    CToken,
    address,
    kernel_info,
    library,
)
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.linear import IntegerLinear, PackedLinear

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Types of transformers whose decoders have Llama's shape."""

ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on the length of the text."""

_PROJECTIONS = ("q", "k", "v", "o")
_FEED_FORWARD = ("gate", "up", "down")


def why_not(model: Any, capacity: int = 1) -> str | None:
    """Why a model cannot be decoded in one call for each token; None if it can.

    Args:
        model: a transformers model, its linears packed or not.
        capacity: tokens of prompt and text together.
    """
    config = model.config
    if kernel_info().tier == "none":
        return kernel_info().reason
    if config.model_type not in FAMILIES:
        return f"its type is {config.model_type}, not one of {', '.join(FAMILIES)}"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act}"
    kind = getattr(model.model.rotary_emb, "rope_type", "default")
    if kind not in ROTARY:
        return f"its rotary positions are of the kind {kind}"
    if any(p.device.type != "cpu" for p in model.parameters()):
        return "it is not on the CPU"
    if any(isinstance(module, IntegerLinear) for module in model.modules()):
        return "torch multiplies its integers (kernels=False)"
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and capacity > window:
        return f"{capacity} tokens exceed its sliding window of {window}"
    return why_not_layer(model.model.layers[0])


def why_not_layer(layer: Any) -> str | None:
    """How a decoder layer differs from Llama's shape; None if it does not."""
    attention = layer.self_attn
    if attention.head_dim % 16:
        return f"its heads are {attention.head_dim} wide, not a multiple of 16"
    if not math.isclose(attention.scaling, attention.head_dim**-0.5):
        return f"its attention is scaled by {attention.scaling}"
    for name in _FEED_FORWARD:
        if getattr(layer.mlp, f"{name}_proj").bias is not None:
            return f"its {name} projection has a bias"
    return None


def given_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The argument of a model's forward for the cache; transformers 5.24 renamed it."""
    known = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache}


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

    What is computed for a sequence does not depend on the others, bit for bit. The exception are
    matrices of bfloat16: on the tiers `avx512bf16` and `amx` their sums have another order from
    four tokens on, on `avx2` from three on.

    Args:
        model: a transformers model in eval mode, from `secateur.load` or plain.
        capacity: the number of tokens that fit in a slot.
        slots: how many sequences have a cache. Memory is used when a slot is filled.

    Attributes:
        lengths: how many tokens of each slot are in the cache.
        together: the most tokens of one `step`.

    Raises:
        ArchitectureError: the model is not of Llama's shape; `why_not` gives the reason.
    """

    together = MAX_BATCH

    def __init__(self, model: Any, capacity: int, slots: int = 1) -> None:
        reason = why_not(model, capacity)
        if reason is not None:
            raise ArchitectureError(
                f"this model cannot be decoded by one call for each token: {reason}",
                where=type(model).__name__,
                remedy="use model.generate, which works with packed linears too",
            )
        config = model.config
        self.model: Any = model
        self.capacity, self.lengths = capacity, [0] * slots
        self.dtype = model.get_input_embeddings()(torch.tensor([0])).dtype
        self._alive: list[Any] = []
        attention = model.model.layers[0].self_attn
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.cache_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        shape = (2, len(model.model.layers), slots, kv_heads, capacity, attention.head_dim)
        self.cache = torch.zeros(shape, dtype=self.cache_dtype)
        """Keys and values [2, layers, slots, kv heads, capacity, head]."""
        layers = (CLayer * len(model.model.layers))(
            *(self.layer(layer, i) for i, layer in enumerate(model.model.layers))
        )
        cosine, sine = self.angles(attention.head_dim)
        self._alive.append(layers)
        self.c = CDecoder(
            layers=len(layers),
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head=attention.head_dim,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            capacity=capacity,
            cache_type=TYPES[self.cache_dtype],
            exact=int(self.dtype != torch.bfloat16),
            epsilon=config.rms_norm_eps,
            layer=layers,
            final_norm=self.floats(model.model.norm.weight),
            head_matrix=self.matrix(model.get_output_embeddings()).c,
            cosine=address(cosine),
            sine=address(sine),
        )
        self.vocabulary = config.vocab_size

    def layer(self, layer: Any, index: int) -> CLayer:
        """The description of one decoder layer for C."""
        attention, mlp = layer.self_attn, layer.mlp
        linears = {name: getattr(attention, f"{name}_proj") for name in _PROJECTIONS}
        linears |= {name: getattr(mlp, f"{name}_proj") for name in _FEED_FORWARD}
        return CLayer(
            **{name: self.matrix(linear).c for name, linear in linears.items()},
            **{f"{name}_bias": self.floats(linears[name].bias) for name in _PROJECTIONS},
            input_norm=self.floats(layer.input_layernorm.weight),
            post_norm=self.floats(layer.post_attention_layernorm.weight),
            q_norm=self.norm_of(attention, "q_norm"),
            k_norm=self.norm_of(attention, "k_norm"),
            keys=address(self.cache[0, index]),
            values=address(self.cache[1, index]),
        )

    def norm_of(self, attention: Any, name: str) -> int | None:
        """The weight of a norm that only some families have."""
        norm = getattr(attention, name, None)
        return None if norm is None else self.floats(norm.weight)

    def matrix(self, linear: Any) -> KernelMatrix:
        """The matrix of a linear, packed or not; memory is shared where possible."""
        if isinstance(linear, PackedLinear):
            matrix = linear.matrix
        else:
            weight = linear.weight.detach()
            matrix = KernelMatrix(weight if weight.dtype in TYPES else weight.float())
        self._alive.append(matrix)
        return matrix

    def floats(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 copy that lives as long as the decoder."""
        if tensor is None:
            return None
        copy = tensor.detach().float().contiguous().clone()
        self._alive.append(copy)
        return address(copy)

    def angles(self, head_dim: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [capacity, head_dim / 2] of all positions, as the model computes them."""
        positions = torch.arange(self.capacity)[None]
        with torch.inference_mode():
            found = self.model.model.rotary_emb(torch.zeros(1, 1, 1), positions)
        half = head_dim // 2
        cosine, sine = (x[0, :, :half].float().contiguous() for x in found)
        if cosine.shape != (self.capacity, half):
            raise ArchitectureError("its rotary positions cover only a part of each head")
        self._alive += [cosine, sine]
        return cosine, sine

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

        transformers computes it, which is faster than `step` from some dozen tokens on.

        Returns:
            The logits after its last token, or with `every` after each of its tokens, float32.

        Raises:
            ShapeError: the piece is empty, does not fit in the slot, or is not in the vocabulary.
        """
        begin, end = self.lengths[slot], self.lengths[slot] + len(ids)
        if len(ids) == 0 or end > self.capacity:
            raise ShapeError(
                f"{len(ids)} tokens after {begin} of a prompt, for a cache of {self.capacity}"
            )
        self.check(ids.tolist())
        from transformers import DynamicCache

        cache: Any = DynamicCache()  # the model's own cache may drop tokens that leave its window
        mine = self.cache[:, :, slot]
        with torch.inference_mode():
            if begin:
                for index in range(mine.shape[1]):
                    keys, values = mine[:, index, None, :, :begin].to(self.dtype)
                    cache.update(keys, values, index)
            out = self.model(
                input_ids=ids[None],
                use_cache=True,
                logits_to_keep=0 if every else 1,  # 0 keeps all
                **given_cache(self.model, cache),
            )
            for index, layer in enumerate(cache.layers):
                mine[0, index, :, begin:end] = layer.keys[0, :, begin:]
                mine[1, index, :, begin:end] = layer.values[0, :, begin:]
        self.lengths[slot] = end
        logits: Tensor = out.logits[0].float()
        return logits

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
            if token.position >= self.capacity:
                raise ShapeError(f"the cache of {self.capacity} tokens is full")
            if token.position != lengths[token.slot]:
                raise ShapeError(
                    f"position {token.position} does not follow {lengths[token.slot]} tokens of "
                    f"slot {token.slot}"
                )
            lengths[token.slot] += 1
        ordered = sorted(tokens, key=lambda token: not token.answered)
        answers = sum(token.answered for token in tokens)
        with torch.inference_mode():
            ids = torch.tensor([token.id for token in ordered])
            hidden = self.model.get_input_embeddings()(ids).float().contiguous()
        places = (CToken * len(ordered))(*((token.slot, token.position) for token in ordered))
        logits = torch.empty(answers, self.vocabulary)
        loaded = library()
        assert loaded is not None
        status = loaded.sct_decode(
            ctypes.byref(self.c),
            hidden.data_ptr(),
            places,
            len(ordered),
            answers,
            logits.data_ptr(),
        )
        if status != 0:
            raise KernelError(f"{len(tokens)} tokens could not be decoded: memory ran out")
        self.lengths = lengths
        return logits

    def rewind(self, slot: int, length: int = 0) -> None:
        """Forget the tokens of a slot from a position on.

        Raises:
            ShapeError: the slot has fewer tokens.
        """
        if not 0 <= length <= self.lengths[slot]:
            raise ShapeError(f"slot {slot} has {self.lengths[slot]} tokens, not {length}")
        self.lengths[slot] = length

    def copy_out(self, slot: int, begin: int, end: int) -> Tensor:
        """A copy of keys and values of some positions [2, layers, kv heads, tokens, head]."""
        return self.cache[:, :, slot, :, begin:end].clone()

    def copy_in(self, slot: int, known: Tensor) -> None:
        """Append keys and values that `copy_out` gave at the same positions."""
        begin = self.lengths[slot]
        end = begin + known.shape[3]
        if end > self.capacity:
            raise ShapeError(f"the cache of {self.capacity} tokens is full")
        self.cache[:, :, slot, :, begin:end] = known
        self.lengths[slot] = end
