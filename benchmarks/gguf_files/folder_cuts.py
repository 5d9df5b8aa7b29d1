"""Cuts of a model folder by plain slices, written without our library: what a converter reads then.

Names are those that transformers stores. Experts are modules with a number or rows of one tensor.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYER = re.compile(r"(.*?layers\.)(\d+)(\..*)")
EXPERT = re.compile(r"(.*\.(?:chunk_)?experts\.)(\d+)(\..*)")
OF_EXPERTS = re.compile(
    r"experts|router|\.gate\.|block_sparse_moe|e_score_correction_bias|expert_bias"
)
COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "moe_num_primary_experts",
)
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
BY_TOKEN = ("embed_tokens_per_layer.weight", "per_layer_model_projection.weight")


def copied(folder: Path, output: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write a folder with other weights and another configuration."""
    shutil.copytree(folder, output, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    (output / "config.json").write_text(json.dumps(config, indent=2))


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and configuration of a folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config


def cut_experts(
    folder: Path,
    output: Path,
    kept: Mapping[int, Sequence[int]],
    count: int,
    more: Mapping[str, int],
) -> None:
    """Keep some experts of each layer; the last of `kept` are those of `mtp.layers`. `more`
    goes into the configuration."""
    state, config = read(folder)
    found = {}
    for name, tensor in state.items():
        layer = LAYER.fullmatch(name)
        if layer is None:
            found[name] = tensor
            continue
        number = max(kept) if name.startswith("mtp.") else int(layer[2])
        own, expert = kept.get(number, ()), EXPERT.fullmatch(name)
        if expert:
            shared = 2 if ".chunk_experts." in name else 1  # by so many neighbours
            stay = list(dict.fromkeys(one // shared for one in own))
            if int(expert[2]) in stay:
                found[f"{expert[1]}{stay.index(int(expert[2]))}{expert[3]}"] = tensor
        elif OF_EXPERTS.search(name) and "shared" not in name and own:
            if tensor.shape[0] == count:
                tensor = tensor[list(own)]
            elif tensor.shape[-1] == count:  # a correction of one row
                tensor = tensor[..., list(own)]
            found[name] = tensor
        else:
            found[name] = tensor
    new = {name: len(own) for name in COUNTS if name in config}
    copied(folder, output, found, config | new | dict(more))


def cut_layers(folder: Path, output: Path, kept: Sequence[int]) -> None:
    """Keep some decoder layers; layers that predict several tokens stay behind them."""
    state, config = read(folder)
    count = config.get("num_hidden_layers") or len(config["layers_block_type"])
    new = {old: number for number, old in enumerate(kept)}
    found = {}
    for name, tensor in state.items():
        layer = LAYER.fullmatch(name)
        if layer and not name.startswith("mtp."):
            number = int(layer[2])
            place = len(kept) + number - count if number >= count else new.get(number)
            if place is not None:
                found[f"{layer[1]}{place}{layer[3]}"] = tensor
        elif name.endswith(BY_TOKEN):
            size = config["hidden_size_per_layer_input"]
            dim = 1 if name.endswith(BY_TOKEN[0]) else 0
            parts = tensor.split(size, dim)
            found[name] = torch.cat([parts[old] for old in kept], dim)
        else:
            found[name] = tensor
    copied(folder, output, found, config_with(config, kept, count))


def config_with(config: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """A configuration for some of `count` layers: lists by layer, and counts of layers."""
    found = {}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and name != "architectures":
            value = [value[old] for old in kept]
        elif name in DENSE_FIRST:
            value = sum(old < value for old in kept)
        elif name == "num_kv_shared_layers" and value:
            value = sum(old >= count - value for old in kept)
        elif name == "num_hidden_layers":
            value = len(kept)
        found[name] = value
    return found
