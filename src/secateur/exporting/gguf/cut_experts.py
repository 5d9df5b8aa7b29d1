"""Experts that leave a GGUF file: rows of every tensor that has one row for each expert.

The names of llama.cpp say which tensors these are: `blk.N.ffn_{gate,up,down,gate_up}_exps` with
their biases and scales, the router `ffn_gate_inp`, and the correction `exp_probs_b` of its choice.
Shared experts, latent projections and norms serve all experts and stay as they are. Layers that
predict several tokens (`nextn_predict_layers`) are cut as all others, because llama.cpp reads one
number of experts for the whole file.

llama.cpp chooses groups of experts first where `expert_group_count` is above 1. Expert e is in
group e // (experts / groups), so every group that stays has equally many, and two at least, because
a group is rated by its best two.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.errors import ArchitectureError, RecipeError
from secateur.exporting.gguf.edit import Edit, Kept
from secateur.models.checkpoint import damaged
from secateur.models.gguf_file import GGUFSource, count_of

IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
"""A tensor of a layer: its number, and the rest of the name."""

_OF_EXPERTS = re.compile(
    r"ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale|input_scale)"
    r"|ffn_gate_inp\.(weight|bias)|exp_probs_b(\.bias|\.weight)?"
)
"""Tensors with a row for each expert."""

_OF_CHUNKS = re.compile(r"ffn_(gate|up|down)_chexps\.\w+")
"""Tensors with a row for each `experts_per_group` neighbouring experts, which share it."""

_BESIDE = re.compile(
    r"ffn_(gate|up|down)_shexp\.\w+|ffn_gate_inp_shexp\.\w+|ffn_norm_exps\.\w+"
    r"|ffn_gate_inp\.scale|altup_router(_norm)?\.\w+"
)
"""Tensors that serve all experts."""

_ALONE = re.compile(r"ffn_(gate|up|down)\.\d+\.weight")
"""One expert of a file from before llama.cpp stacked them."""

_LIKE_EXPERTS = re.compile(r"exp|gate_inp|tid2eid|router")

_KEYS = frozenset(
    (
        "expert_count", "expert_used_count", "expert_shared_count", "expert_group_count",
        "expert_group_used_count", "expert_weights_scale", "expert_weights_norm",
        "expert_gating_func", "expert_feed_forward_length", "expert_shared_feed_forward_length",
        "expert_chunk_feed_forward_length", "expert_group_scale", "experts_per_group",
        "expert_latent_length",
    )
)  # fmt: skip
"""Keys about experts that llama.cpp reads, each with one value."""


_COUNTS = (
    "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count",
    "experts_per_group",
)  # fmt: skip
"""Of these, the numbers that a cut reads."""


@dataclass(frozen=True)
class FileExperts:
    """The experts of a file.

    Attributes:
        count: experts of each layer that has some.
        used: of them for each token.
        groups: of the router's choice; 1 if it has none.
        groups_used: of them for each token.
        chunk: neighbouring experts that share a further expert; 1 if none do.
        layers: the layers that have experts.
    """

    count: int
    used: int
    groups: int
    groups_used: int
    chunk: int
    layers: tuple[int, ...]

    @property
    def in_group(self) -> int:
        """Experts of each group."""
        return self.count // self.groups


def experts_of(source: GGUFSource) -> FileExperts | None:
    """The experts of a file; None if it has none.

    Raises:
        ArchitectureError: they cannot be cut, or something about them is not understood.
        CheckpointError: the numbers of the file contradict each other.
    """
    if source.get("expert_count") is None:
        return None
    start = f"{source.architecture}."
    for name, field in source.fields.items():
        if name.startswith(f"{start}expert") and name.removeprefix(start) not in _KEYS:
            raise refused("a key about experts is not understood", name)
        if name.startswith(f"{start}expert") and field.items is not None:
            raise refused("the key has a value for each layer, and one is read", name)
    check_numbers(source, _COUNTS)
    if source.get("expert_count") == 0:
        return None
    count, used, groups, groups_used, chunk = (int(source.get(name) or 1) for name in _COUNTS)
    for size in (groups, chunk):
        if count % size:
            raise damaged(f"{count} experts are not in groups of {size}", source.file)
    layers = set()
    for name, tensor in source.tensors.items():
        match, rows = IN_LAYER.fullmatch(name), tensor.shape[0]
        rest = match[2] if match else name
        if match and (of_experts := _OF_EXPERTS.fullmatch(rest) or _OF_CHUNKS.fullmatch(rest)):
            in_one = rest.startswith("exp_probs_b") and tensor.shape == (1, count)
            if rows != count // (chunk if of_experts.re is _OF_CHUNKS else 1) and not in_one:
                raise refused(f"it has {rows} rows, and the file says {count} experts", name)
            layers.add(int(match[1]))
        elif _LIKE_EXPERTS.search(rest) and not _BESIDE.fullmatch(rest):
            raise refused("it looks like a part of the experts, and its rows are unknown", name)
        elif _ALONE.fullmatch(rest):
            raise refused("the file has one tensor for each expert", name)
    if source.architecture == "llama4" and count == 128:
        raise refused(
            "llama.cpp takes the norm of queries and keys from the number of 128 experts",
            "llama4.expert_count",
        )
    return FileExperts(count, used, groups, groups_used, chunk, tuple(sorted(layers)))


def check_numbers(source: GGUFSource, names: Iterable[str]) -> None:
    """Refuse keys of the architecture that should be whole numbers, and are not.

    Raises:
        CheckpointError: one is not.
    """
    for name in names:
        count_of(source, f"{source.architecture}.{name}")


def cut_experts(source: GGUFSource, edit: Edit, kept: Mapping[int, Sequence[int]]) -> Edit:
    """Keep some experts of each layer.

    Args:
        source: the file.
        edit: what happens to it.
        kept: the experts that stay, for each layer that has experts, numbered as in the source. The
            layers that predict several tokens are among them.

    Raises:
        ArchitectureError: the experts of the file cannot be cut.
        RecipeError: the choice is not one that llama.cpp can run.
    """
    found = experts_of(source)
    if found is None:
        raise refused("the model has no experts", str(source.file))
    rows = {layer: tuple(sorted(of_layer)) for layer, of_layer in kept.items()}
    _check_choice(source, found, rows)
    tensors = dict(edit.tensors)
    for name, one in edit.tensors.items():
        match = IN_LAYER.fullmatch(one.source)
        if match is None or int(match[1]) not in rows:
            continue
        of_layer = rows[int(match[1])]
        if _OF_EXPERTS.fullmatch(match[2]):
            tensors[name] = _narrowed(source, one, of_layer, found.count)
        elif _OF_CHUNKS.fullmatch(match[2]):
            chunks = tuple(sorted({expert // found.chunk for expert in of_layer}))
            tensors[name] = replace(one, rows=chunks)
    start, numbers = f"{source.architecture}.", _numbers(found, next(iter(rows.values())))
    changed = {
        start + name: edit.fields[start + name].like(number)
        for name, number in numbers.items()
        if start + name in edit.fields
    }
    return replace(edit, fields={**edit.fields, **changed}, tensors=tensors)


def _numbers(found: FileExperts, kept: Sequence[int]) -> dict[str, int]:
    """The counts of a file that keeps these experts in a layer."""
    if found.groups == 1:
        return {"expert_count": len(kept), "expert_used_count": min(found.used, len(kept))}
    groups, used = len({expert // found.in_group for expert in kept}), found.groups_used
    if groups <= used:  # all groups that stay are used, so their choice has no effect
        groups = used = 1
    return {
        "expert_count": len(kept),
        "expert_used_count": min(found.used, len(kept) // groups * used),
        "expert_group_count": groups,
        "expert_group_used_count": used,
    }


def _narrowed(source: GGUFSource, one: Kept, rows: tuple[int, ...], count: int) -> Kept:
    """A tensor with a value for some experts. A correction may be stored as one row of all."""
    tensor = source.tensors[one.source]
    if tensor.shape[0] == count:
        return replace(one, rows=rows)
    return replace(
        one,
        replaced=lambda: tensor.read().reshape(count, -1)[list(rows)],
        shape=(1, len(rows)),
    )


def _check_choice(
    source: GGUFSource, found: FileExperts, kept: Mapping[int, tuple[int, ...]]
) -> None:
    """Refuse a choice that llama.cpp cannot run."""
    if wrong := set(kept) ^ set(found.layers):
        verb = "has no experts" if min(wrong) in kept else "has experts, and none is chosen"
        raise _refused_choice(f"layer {min(wrong)} {verb}", f"layers {sorted(wrong)[:8]}")
    counts = {len(of_layer) for of_layer in kept.values()}
    if len(counts) > 1:
        raise _refused_choice(
            f"layers keep {min(counts)} to {max(counts)} experts, and llama.cpp reads one number",
            f"{source.architecture}.expert_count",
        )
    # llama.cpp reads fewer than two experts of these as a model without experts
    more = source.architecture in ("hunyuan-dense", "hunyuan_vl")
    least = 2 if more or source.get("expert_group_count") else 1
    if min(counts) < least:
        raise _refused_choice(
            f"{min(counts)} experts stay, and llama.cpp needs {least}",
            f"{source.architecture}.expert_count",
        )
    groups, sizes = set[int](), set[int]()  # groups that stay, and the experts of each
    for layer, of_layer in kept.items():
        if len(set(of_layer)) < len(of_layer) or not 0 <= of_layer[0] <= of_layer[-1] < found.count:
            raise _refused_choice(
                f"the experts are {list(of_layer)[:8]}, and there are {found.count}",
                f"layer {layer}",
            )
        if found.groups > 1:
            of_groups = Counter(expert // found.in_group for expert in of_layer)
            groups, sizes = groups | {len(of_groups)}, sizes | {*of_groups.values()}
        of_chunks = Counter(expert // found.chunk for expert in of_layer)
        if set(of_chunks.values()) - {found.chunk}:
            raise _refused_choice(
                f"{found.chunk} neighbouring experts share a further one, and a part of them stays",
                f"layer {layer}",
            )
    if len(groups) > 1 or len(sizes) > 1 or 1 in sizes:
        raise _refused_choice(
            f"{sorted(groups)} of the router's {found.groups} groups stay, with {sorted(sizes)} "
            "experts each, and llama.cpp needs one number, of 2 at least",
            f"{source.architecture}.expert_group_count",
        )


def refused(what: str, where: str, units: str = "experts") -> ArchitectureError:
    """The error for units of a file that cannot be cut."""
    return ArchitectureError(
        what, where=where, remedy=f"leave the {units} of this file as they are"
    )


def _refused_choice(what: str, where: str) -> RecipeError:
    return RecipeError(what, where=where, remedy="choose equally many experts in each layer")
