"""Keeps the configuration right when decoder layers are removed.

A configuration says in many ways what each layer is: a list with an entry for every layer, a list
of indices, a number of layers at the start or at the end. The entries are changed here, and the
layers of the built model are compared with those they come from: a class may also compute what a
layer is from its index, and then no configuration keeps it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.models.architecture import text_config

INDICES = ("attn_layer_indices", "full_attn_idxs", "mlp_only_layers", "moe_layers", "dense_layers")
"""Entries with the indices of some layers."""

FIRST = (
    "first_k_dense_replace",
    "num_dense_layers",
    "max_window_layers",
    "moe_layer_start_index",
)
"""Entries that count layers at the start."""

LAST = ("num_kv_shared_layers",)
"""Entries that count layers at the end."""

CYCLES = ("block_types",)
"""Entries that repeat over the layers."""

PER_LAYER = ("layer", "block", "pattern", "intermediate_size", "num_key_value_heads")
"""What is in the names of entries with a value for each layer."""

OF_THE_INDEX = ("layer_idx", "layer_id", "layer_number", "training")


def kept_settings(entries: Mapping[str, Any], kept: Sequence[int], count: int) -> dict[str, Any]:
    """The entries of a configuration that change when only some layers are kept.

    Args:
        entries: of the uncut configuration.
        kept: the indices of kept layers, ascending.
        count: how many layers there were.
    """
    new_index = {old: new for new, old in enumerate(kept)}
    found: dict[str, Any] = {}
    for name, value in entries.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if name in INDICES and isinstance(value, list):
            found[name] = [new_index[i] for i in value if i in new_index]
        elif name in FIRST and whole:
            found[name] = sum(i < value for i in kept)
        elif name in LAST and whole:
            found[name] = sum(i >= count - value for i in kept)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            found[name] = {new: value[key] for key, new in renumbered(value, new_index)}
        elif name in CYCLES and isinstance(value, list | tuple) and value:
            found[name] = [value[i % len(value)] for i in kept]
        elif is_per_layer(name, value, count):
            found[name] = type(value)(value[i] for i in kept)
            if isinstance(value, str):
                found[name] = "".join(value[i] for i in kept)
    return found


def renumbered(value: Mapping[str, Any], new_index: Mapping[int, int]) -> Iterator[tuple[str, int]]:
    """The keys of a table with an entry for some layers, and the new number of each kept layer."""
    for key in value:
        if int(key) in new_index:
            yield key, new_index[int(key)]


def is_per_layer(name: str, value: Any, count: int) -> bool:
    """Whether an entry has a value, or a letter, for each layer."""
    if not isinstance(value, list | tuple | str) or len(value) != count:
        return False
    if name.startswith("mtp"):  # of layers that predict further tokens
        return False
    return any(part in name for part in PER_LAYER)


def has_attention(config: Any) -> bool:
    """Whether a configuration that names the kinds of its layers names one with attention."""
    text = text_config(config)
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None) or ()
    return any(str(kind).endswith("attention") and "linear" not in str(kind) for kind in kinds)


def differing_layer(
    before: Sequence[nn.Module], after: Sequence[nn.Module], kept: Sequence[int], *, resized: bool
) -> str | None:
    """The first setting in which a layer differs from the one it comes from; None without any.

    Args:
        before: the uncut layers.
        after: the layers of the cut model.
        kept: the index of each of them in the uncut model.
        resized: whether other units are cut too, so that numbers may differ.
    """
    shared = any(getattr(m, "is_kv_shared_layer", False) for x in before for m in x.modules())
    for new, old in enumerate(kept):
        ours = dict(settings(after[new], numbers=not resized))
        for name, value in settings(before[old], numbers=not resized):
            if name.endswith("store_full_length_kv") and not shared:
                continue
            if name in ours and ours[name] != value:
                return f"{name} of layer {old} is {value!r}, and would be {ours[name]!r}"
    return None


def settings(layer: nn.Module, *, numbers: bool) -> Iterator[tuple[str, Any]]:
    """The plain attributes of all modules of a layer."""
    kinds: Any = (bool, str, int, float) if numbers else (bool, str)
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if name in OF_THE_INDEX or name.startswith("_") or not isinstance(value, kinds):
                continue
            yield f"{path}.{name}".lstrip("."), value
