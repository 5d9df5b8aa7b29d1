"""Decodes without a framework between the operations: one call into C for each token.

At a hundred million to a billion parameters, launching some three hundred small operations for each
token costs more than the arithmetic. For decoders of Llama's shape (RMSNorm, rotary positions,
grouped queries, SwiGLU; biases and norms of queries and keys where the family has them), one call
(`csrc/decode.c`) computes the whole token, on matrices as they are stored. The prompt goes through
transformers, and the decoder then uses its cache.
"""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.errors import ArchitectureError, KernelError, ShapeError
from secateur.runtime.kernels.library import (
    TYPES,
    CDecoder,
    CLayer,
    address,
    kernel_info,
    library,
)
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.linear import PackedLinear
from secateur.runtime.sampling import Sampling

__all__ = ["FAMILIES", "Decoder", "given_cache", "why_not"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Types of transformers whose decoders have Llama's shape."""

ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on the length of the text."""

GREEDY = Sampling()
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


class Decoder:
    """Decodes one sequence, token by token.

    Args:
        model: a transformers model in eval mode, from `secateur.load` or plain.
        capacity: the number of tokens that fit in the cache.

    Raises:
        ArchitectureError: the model is not of Llama's shape; `why_not` gives the reason.
    """

    def __init__(self, model: Any, capacity: int) -> None:
        reason = why_not(model, capacity)
        if reason is not None:
            raise ArchitectureError(
                f"this model cannot be decoded by one call for each token: {reason}",
                where=type(model).__name__,
                remedy="use model.generate, which works with packed linears too",
            )
        config = model.config
        self.model: Any = model
        self.capacity, self.length = capacity, 0
        self.dtype = model.get_input_embeddings()(torch.tensor([0])).dtype
        self._alive: list[Any] = []
        attention = model.model.layers[0].self_attn
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.cache_dtype = torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32
        shape = (len(model.model.layers), kv_heads, capacity, attention.head_dim)
        self.keys = torch.zeros(shape, dtype=self.cache_dtype)
        self.values = torch.zeros(shape, dtype=self.cache_dtype)
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
            keys=address(self.keys[index]),
            values=address(self.values[index]),
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

    def prefill(self, ids: Int64[Tensor, " tokens"]) -> Float[Tensor, " vocabulary"]:
        """Start anew with a prompt; returns the logits after its last token, float32.

        Raises:
            ShapeError: the prompt is empty, longer than the cache, or not in the vocabulary.
        """
        if not 1 <= len(ids) <= self.capacity:
            raise ShapeError(f"a prompt of {len(ids)} tokens, for a cache of {self.capacity}")
        odd = [int(token) for token in ids if not 0 <= token < self.vocabulary]
        if odd:
            raise ShapeError(f"token {odd[0]} is not in the vocabulary of {self.vocabulary}")
        from transformers import DynamicCache

        cache: Any = DynamicCache()  # the model's own cache may drop tokens that leave its window
        with torch.inference_mode():
            out = self.model(
                input_ids=ids[None],
                use_cache=True,
                logits_to_keep=1,
                **given_cache(self.model, cache),
            )
        for index, layer in enumerate(cache.layers):
            self.keys[index, :, : len(ids)] = layer.keys[0]
            self.values[index, :, : len(ids)] = layer.values[0]
        self.length = len(ids)
        logits: Tensor = out.logits[0, -1].float()
        return logits

    def step(self, token: int) -> Float[Tensor, " vocabulary"]:
        """Process one token; returns the logits of the next, float32.

        Raises:
            ShapeError: the cache is full, or the token is not in the vocabulary.
            KernelError: memory ran out.
        """
        if self.length >= self.capacity:
            raise ShapeError(f"the cache of {self.capacity} tokens is full")
        if not 0 <= token < self.vocabulary:
            raise ShapeError(f"token {token} is not in the vocabulary of {self.vocabulary}")
        with torch.inference_mode():
            hidden = self.model.get_input_embeddings()(torch.tensor([token]))[0].float()
        logits = torch.empty(self.vocabulary)
        loaded = library()
        assert loaded is not None
        status = loaded.sct_decode(
            ctypes.byref(self.c), hidden.data_ptr(), self.length, logits.data_ptr()
        )
        if status != 0:
            raise KernelError(f"token {self.length} could not be decoded: memory ran out")
        self.length += 1
        return logits

    def continued(
        self,
        ids: Int64[Tensor, " tokens"],
        max_new_tokens: int,
        *,
        sampling: Sampling = GREEDY,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        """Yield the tokens that follow a prompt, one by one.

        Args:
            ids: the prompt.
            max_new_tokens: the limit; prompt and new tokens must fit in the cache.
            sampling: how tokens are drawn; the most likely one by default.
            stop: tokens that end the text; they are not yielded.

        Raises:
            ShapeError: the cache is too small.
        """
        if len(ids) + max_new_tokens > self.capacity:
            raise ShapeError(
                f"{len(ids)} + {max_new_tokens} tokens, for a cache of {self.capacity}",
                remedy="make the decoder with a larger capacity",
            )
        generator = sampling.generator()
        logits = self.prefill(ids)
        for number in range(max_new_tokens):
            token = sampling.draw(logits, generator)
            if token in stop:
                return
            yield token
            if number + 1 < max_new_tokens:
                logits = self.step(token)
