"""Dead units: heads, neurons, rows and columns of which pruning has left nothing.

Which rows and columns belong to a head or a neuron is told by the names of the linears, in any
family that uses one of the layouts below. With grouped queries a dead head of values is dead for
all query heads that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.diagnostics.claims import Claims
from secateur.diagnostics.findings import Finding, Severity, listed
from secateur.diagnostics.weights import LinearHealth, Weights

__all__ = ["DeadUnits", "check_units", "dead_units", "head_size"]

MANY = 0.02
"""The share of a layer's neurons, or a linear's rows, above which dead ones are a warning."""

MANY_COLUMNS = 0.5
"""The same for columns: methods that look at inputs drop those that are nearly always zero."""

ATTENTION = (
    ("self_attn.v_proj", "alone", "self_attn.o_proj"),
    ("self_attn.v_proj", "alone", "self_attn.out_proj"),
    ("self_attn.qkv_proj", "last", "self_attn.o_proj"),
    ("attn.c_attn", "last", "attn.c_proj"),
    ("attention.query_key_value", "interleaved", "attention.dense"),
)
"""Linear that makes the values, where they lie in it, and linear that reads the heads."""

FEED_FORWARD = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.gate_up_proj",), "mlp.down_proj"),
    (("mlp.c_fc",), "mlp.c_proj"),
    (("fc1",), "fc2"),
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
)
"""Linears that make the neurons, and the linear that reads them."""


@dataclass(frozen=True)
class DeadUnits:
    """The dead units of one decoder layer.

    Attributes:
        heads: query heads whose values are all zero, or that nothing reads.
        neurons: neurons that are always zero, or that nothing reads.
        head_count: of all query heads; 0 where the layout is not known.
        neuron_count: of all neurons; 0 where the layout is not known.
    """

    heads: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()
    head_count: int = 0
    neuron_count: int = 0


def head_size(config: Any) -> int:
    """The size of a head."""
    config = config.get_text_config()
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def dead_units(linears: Mapping[str, LinearHealth], size: int) -> DeadUnits:
    """Find the dead heads and neurons of a decoder layer.

    Args:
        linears: its matrices, by their name within it.
        size: of a head.
    """
    heads = neurons = torch.zeros(0, dtype=torch.bool)
    for values, place, reader in ATTENTION:
        if values in linears and reader in linears and linears[reader].shape[1] % size == 0:
            heads = dead_heads(linears[values], place, linears[reader], size)
    for makers, reader in FEED_FORWARD:
        if reader in linears and all(maker in linears for maker in makers):
            neurons = linears[reader].dead_columns.clone()
            for maker in makers:
                rows = linears[maker].dead_rows
                # two halves, gate and up, where both are in one matrix
                neurons |= rows.view(-1, len(neurons)).any(dim=0)
    return DeadUnits(numbers(heads), numbers(neurons), len(heads), len(neurons))


def dead_heads(values: LinearHealth, place: str, reader: LinearHealth, size: int) -> Tensor:
    """Which query heads are dead: bool [heads]."""
    rows = values.dead_rows
    width = reader.shape[1]
    if place == "last":
        rows = rows[width + (len(rows) - width) // 2 :]
    elif place == "interleaved":
        rows = rows.view(-1, 3, size)[:, 2].flatten()
    unread = reader.dead_columns.view(-1, size).all(dim=1)
    valueless = rows.view(-1, size).all(dim=1)
    return unread | valueless.repeat_interleave(len(unread) // len(valueless))


def numbers(flags: Tensor) -> tuple[int, ...]:
    """The places of what is True."""
    return tuple(flags.nonzero().flatten().tolist())


def check_units(
    weights: Weights,
    claims: Claims,
    size: int,
    layer_name: Callable[[int], str],
    dense: Weights | None = None,
) -> list[Finding]:
    """Dead heads and neurons of each layer, dead rows and columns of each linear.

    A head is never dead by chance. A neuron, or a row, can be where weights of all rows compete
    with each other; where each row keeps its share it cannot.

    Args:
        weights: the model's.
        claims: give the scope within which weights competed.
        size: of a head.
        layer_name: the full name of a decoder layer.
        dense: the dense model's; what is dead there too is no fault of pruning.
    """
    found = []
    impossible = claims.pattern is not None and claims.pattern.scope in ("row", "group")
    for index in dict.fromkeys(x.layer for x in weights.linears):
        units = dead_units(weights.of_layer(index), size)
        before = dead_units(dense.of_layer(index), size) if dense else DeadUnits()
        heads = [head for head in units.heads if head not in before.heads]
        neurons = [neuron for neuron in units.neurons if neuron not in before.neurons]
        many = len(neurons) > MANY * units.neuron_count
        name = layer_name(index)
        found += told_units("head", name, heads, units.head_count, "warning")
        severity: Severity = "warning" if many or (neurons and impossible) else "note"
        found += told_units("neuron", name, neurons, units.neuron_count, severity)
        in_dense = len(before.heads) + len(before.neurons)
        if in_dense:
            found.append(
                Finding(
                    "dead-in-dense",
                    "note",
                    name,
                    f"{len(before.heads)} heads and {len(before.neurons)} neurons are dead in the "
                    "dense model too",
                    "nothing to do; a structured cut could take them out at no loss",
                )
            )
    return found + dead_lines(weights, impossible, dense)


def told_units(
    unit: str, where: str, dead: list[int], total: int, severity: Severity
) -> list[Finding]:
    """The finding for the dead heads or neurons of a layer, if there are any."""
    if not dead:
        return []
    lost = {
        "head": "their values are all zero, or no weight reads them",
        "neuron": "they pass nothing on: what makes them is zero, or no weight reads them",
    }[unit]
    return [
        Finding(
            f"dead-{unit}",
            severity,
            where,
            f"{unit} {listed(dead)}: {len(dead)} of {total} dead; {lost}",
            "prune less of this layer (--override), or let weights compete within rows "
            "(--scope row); what is dead could be cut out for good",
        )
    ]


def dead_lines(weights: Weights, impossible: bool, dense: Weights | None) -> list[Finding]:
    """Rows and columns of linears that are all zero, the worst linear named."""
    found = []
    before = {x.name: x for x in dense.linears} if dense else {}
    for line, limit in (("row", 0.0 if impossible else MANY), ("column", MANY_COLUMNS)):
        dead = {x.name: newly_dead(x, before.get(x.name), line) for x in weights.linears}
        shares = {x.name: dead[x.name] / len(lines_of(x, line)) for x in weights.linears}
        worst = max(shares, key=lambda name: shares[name])
        if not dead[worst]:
            continue
        linears = sum(count > 0 for count in dead.values())
        found.append(
            Finding(
                f"dead-{line}",
                "warning" if shares[worst] > limit else "note",
                worst,
                f"{dead[worst]} {line}s are all zero, {shares[worst]:.1%} of them, the most of "
                f"any linear; {sum(dead.values())} in {linears} linears",
                "prune less of it (--override), or let weights compete within rows (--scope row)"
                if line == "row"
                else "inputs that are nearly always zero lose all their weights; if there are "
                "many, calibrate on more text",
            )
        )
    return found


def newly_dead(linear: LinearHealth, before: LinearHealth | None, line: str) -> int:
    """How many rows or columns are dead that are not in the dense model."""
    dead = lines_of(linear, line)
    if before is not None and before.shape == linear.shape:
        dead = dead & ~lines_of(before, line)
    return int(dead.sum())


def lines_of(linear: LinearHealth, line: str) -> Tensor:
    """Which rows or columns are dead."""
    return linear.dead_rows if line == "row" else linear.dead_columns
