"""The ways to run a checkpoint on a CPU, for comparison with each other.

| contender                | weights                            | loop                         |
|--------------------------|------------------------------------|------------------------------|
| `packed`                 | as they are stored                 | one call into C per token    |
| `packed in transformers` | as they are stored                 | transformers                 |
| `dense bf16`             | expanded, bfloat16                 | one call into C per token    |
| `dense int8`             | expanded, int8, one scale per row  | one call into C per token    |
| `torch bf16`             | expanded, bfloat16                 | transformers                 |
| `torch int8`             | expanded, int8 weight-only, torch's | transformers                 |
| a GGUF file              | as llama.cpp has quantized them    | llama.cpp                    |

The third and fourth are our own kernels without sparsity. So a gain over them comes from the zeros
alone.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import KernelError
from secateur.quantization.int8 import quantize_rows
from secateur.runtime.decode import Decoder
from secateur.runtime.kernels.matrix import KernelMatrix
from secateur.runtime.linear import PackedLinear
from secateur.runtime.load import load
from secateur.runtime.slots import given_cache, why_not

CONTENDERS = (
    "packed",
    "packed in transformers",
    "dense bf16",
    "dense int8",
    "torch bf16",
    "torch int8",
)
USUAL = ("packed", "dense bf16", "dense int8", "torch bf16")
"""The most useful contenders. The others take long and are never the fastest."""
Round = dict[str, float]
"""Seconds to the first token, and seconds per token after it."""


class Contender(Protocol):
    """A loaded model that can be timed."""

    def round(self, prompt: Tensor, new_tokens: int) -> Round:
        """Read a prompt and generate `new_tokens` tokens, always the most likely one."""
        ...


class Transformers:
    """A transformers model, called token by token with its own cache, without `generate`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def round(self, prompt: Tensor, new_tokens: int) -> Round:
        """As the contract says."""
        from transformers import DynamicCache

        started = time.perf_counter()
        cache = given_cache(self.model, DynamicCache(config=self.model.config))
        out = self.model(input_ids=prompt[None], use_cache=True, logits_to_keep=1, **cache)
        token = out.logits[0, -1].argmax()
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            out = self.model(input_ids=token.view(1, 1), use_cache=True, **cache)
            token = out.logits[0, -1].argmax()
        each = (time.perf_counter() - first) / max(1, new_tokens - 1)
        return {"first_token": first - started, "each_token": each}


class OneCall:
    """Our decode loop."""

    def __init__(self, model: Any, capacity: int) -> None:
        self.decoder = Decoder(model, capacity)

    def round(self, prompt: Tensor, new_tokens: int) -> Round:
        """As the contract says."""
        started = time.perf_counter()
        token = int(self.decoder.prefill(prompt).argmax())
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = int(self.decoder.step(token).argmax())
        each = (time.perf_counter() - first) / max(1, new_tokens - 1)
        return {"first_token": first - started, "each_token": each}


class LlamaCpp:
    """A GGUF file in llama.cpp, through the package xllamacpp."""

    def __init__(self, file: Path, capacity: int, threads: int) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise KernelError(
                "llama.cpp is not installed", remedy="pip install xllamacpp, or leave it out"
            ) from error
        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx, options.n_parallel = capacity, 1
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.n_predict, options.warmup = -1, False
        self.server = xllamacpp.Server(options)

    def round(self, prompt: Tensor, new_tokens: int) -> Round:
        """As the contract says; the times are llama.cpp's own."""
        told = self.server.handle_completions(
            {
                "prompt": prompt.tolist(),
                "n_predict": new_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = told["timings"]
        return {
            "first_token": timings["prompt_ms"] / 1e3,
            "each_token": timings["predicted_per_token_ms"] / 1e3,
        }


class TorchInt8(nn.Module):
    """torch's weight-only int8 product: its fastest one for few tokens on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.integers, scale = quantize_rows(weight)
        self.scale, self.bias = scale.to(torch.bfloat16), bias

    def forward(self, x: Tensor) -> Tensor:
        """The product for [..., in]."""
        flat = x.reshape(-1, x.shape[-1])
        y = torch._weight_int8pack_mm(flat, self.integers, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def contender(name: str, folder: Path, capacity: int, threads: int) -> Contender:
    """Load a contender. Any other name is the path of a GGUF file.

    Raises:
        KernelError: the contender cannot run on this machine.
    """
    if name not in CONTENDERS:
        return LlamaCpp(Path(name), capacity, threads)
    packed = name.startswith("packed")
    model = load(folder, dtype=None if packed else torch.bfloat16, expand=not packed)
    if name.endswith("int8"):
        quantize(model, ours=name.startswith("dense"))
    if name in ("packed in transformers", "torch bf16", "torch int8"):
        return Transformers(model)
    reason = why_not(model, capacity)
    if reason is not None:
        raise KernelError(reason, remedy="contenders in transformers run it")
    return OneCall(model, capacity)


def quantize(model: Any, *, ours: bool) -> None:
    """Replace all linears, including the output head, by int8 linears."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach().float()
        if ours:
            integers, scale = quantize_rows(weight)
            new: nn.Module = PackedLinear(KernelMatrix(integers, scale=scale), module.bias)
        else:
            new = TorchInt8(weight, module.bias)
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner) if owner else model, leaf, new)
