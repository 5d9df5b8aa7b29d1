"""What llama.cpp computes of a GGUF file while some of its experts or layers are switched off.

The oracle of every cut: the file is whole, and numbers of its graph are replaced while it runs. An
expert is off when its logit is −∞ before the choice; a layer is off when it returns its input.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.exporting.gguf.llama_cpp import LlamaCpp, Node

ROUTER = re.compile(r"ffn_moe_(?:logits|logits_biased|probs_biased)-(\d+)")
OUTPUT = re.compile(r"l_out-(\d+)")
EMBEDDED = ("inp_embd", "inp_scaled", "embd", "inpL")


def put(node: Node, values: Tensor) -> None:
    """Replace the numbers of a node, which are in one piece."""
    found = values.contiguous().numpy()
    place = int(re.findall(r"0x\w+", str(node.tensor.data))[0], 16)
    ctypes.memmove(place, found.ctypes.data, found.nbytes)


def logits_of(
    file: Path,
    windows: Tensor,
    experts: Mapping[int, Collection[int]] | None = None,
    layers: Collection[int] = (),
) -> Tensor:
    """The logits of each window, float32 [windows, length, vocabulary].

    Args:
        file: a whole file.
        windows: token ids.
        experts: those that are off, by layer.
        layers: those that are off.
    """
    off, last = experts or {}, dict[str, Tensor]()

    def wanted(node: Node) -> bool:
        router = ROUTER.fullmatch(node.name)
        stream = OUTPUT.fullmatch(node.name) or node.name in EMBEDDED
        return bool(router and int(router[1]) in off) or bool(layers and stream)

    def seen(node: Node) -> None:
        values: Any = node.value()
        if router := ROUTER.fullmatch(node.name):
            values[..., sorted(off[int(router[1])])] = -torch.inf
            put(node, values)
        elif (output := OUTPUT.fullmatch(node.name)) and int(output[1]) in layers:
            put(node, last["stream"])
        else:
            last["stream"] = values

    with LlamaCpp(file) as engine:
        return torch.stack(
            [x for x in engine.run(windows, wanted, seen, logits=True) if x is not None]
        )
