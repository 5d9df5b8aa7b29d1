"""Finds dead units: heads, neurons, rows and columns that pruning has emptied.

The names of the linears show which rows and columns belong to a head or a neuron, in every family
with one of the layouts below. With grouped queries, a dead value head is dead for all query heads
that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.diagnostics.findings import Claims, listed
from secateur.diagnostics.weights import LinearHealth, Weights
from secateur.models.architecture import setting
from secateur.runs.records import Finding, Severity

MANY = 0.02
"""The share of a layer's neurons, or a linear's rows, above which zero rows are a warning."""

MANY_UNREAD = 0.5
"""The same for zero columns: methods that use inputs drop those that are nearly always zero. After
a ReLU, or at 80 % sparsity, these are many."""

ATTENTION = (
    ("self_attn.v_proj", "alone", "self_attn.o_proj"),
    ("self_attn.v_proj", "alone", "self_attn.out_proj"),
    ("self_attn.qkv_proj", "last", "self_attn.o_proj"),
    ("attn.c_attn", "last", "attn.c_proj"),
    ("attention.query_key_value", "interleaved", "attention.dense"),
)
"""The linear that produces the values, their place in it, and the linear that reads them."""

FEED_FORWARD = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.gate_up_proj",), "mlp.down_proj"),
    (("mlp.c_fc",), "mlp.c_proj"),
    (("fc1",), "fc2"),
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
)
"""The linears that produce the neurons, and the linear that reads them."""


@dataclass(frozen=True)
class DeadUnits:
    """The dead units of one decoder layer: bool, one for each unit; empty if the layout is unknown.

    Attributes:
        heads: query heads with only zero values, or that nothing reads.
        unmade: neurons that are always zero, because a row that produces them is zero.
        unread: neurons that nothing reads.
    """

    heads: Tensor
    unmade: Tensor
    unread: Tensor

    @property
    def neurons(self) -> Tensor:
        """Neurons that are dead for either reason."""
        return self.unmade | self.unread

    def beyond(self, dense: DeadUnits) -> DeadUnits:
        """The units that are dead in the pruned layer but not in the dense one."""
        return DeadUnits(
            _new(self.heads, dense.heads),
            _new(self.unmade, dense.unmade),
            _new(self.unread, dense.unread),
        )


def head_size(config: Any) -> int:
    """The size of a head."""
    config = config.get_text_config()
    size = setting(config, "head_dim")
    return int(size or config.hidden_size // setting(config, "num_attention_heads"))


def _dead_units(linears: Mapping[str, LinearHealth], size: int) -> DeadUnits:
    """Find the dead heads and neurons of a decoder layer."""
    heads = unmade = unread = torch.zeros(0, dtype=torch.bool)
    for values, place, reader in ATTENTION:
        if values in linears and reader in linears and linears[reader].shape[1] % size == 0:
            heads = _dead_heads(linears[values], place, linears[reader], size)
    for makers, reader in FEED_FORWARD:
        if reader in linears and all(maker in linears for maker in makers):
            unread = linears[reader].dead_columns
            unmade = torch.zeros_like(unread)
            for maker in makers:
                # two halves, gate and up, where both are in one matrix
                unmade |= linears[maker].dead_rows.view(-1, len(unread)).any(dim=0)
    return DeadUnits(heads, unmade, unread)


def _dead_heads(values: LinearHealth, place: str, reader: LinearHealth, size: int) -> Tensor:
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


def check_units(
    weights: Weights,
    claims: Claims,
    size: int,
    layer_name: Callable[[int], str],
    dense: Weights | None = None,
) -> list[Finding]:
    """Dead heads and neurons, dead rows and columns, that are not dead in the dense model too.

    A head is never dead by chance. A neuron can be, where nothing reads it or where weights of all
    rows compete with each other; where each row keeps its share, no row can be all zero.

    Args:
        weights: the model's.
        claims: contain the scope within which weights competed.
        size: of a head.
        layer_name: the full name of a decoder layer.
        dense: the dense model's.
    """
    found = []
    row_keeps_share = claims.pattern is not None and claims.pattern.scope in ("row", "group")
    neurons, warned = dict[str, list[int]](), False
    for index in dict.fromkeys(x.layer for x in weights.linears):
        units, name = _dead_units(weights.of_layer(index), size), layer_name(index)
        if dense is not None:
            units = units.beyond(_dead_units(dense.of_layer(index), size))
        dead = units.neurons
        if units.heads.any():
            found.append(_heads_finding(name, _numbers(units.heads), len(units.heads)))
        if dead.any():
            neurons[name] = _numbers(dead)
            unmade = int(units.unmade.sum())
            limit = 0.0 if row_keeps_share else MANY
            warned |= unmade > limit * len(dead) or int(dead.sum()) > MANY_UNREAD * len(dead)
    if neurons:
        found.append(_neurons_finding(neurons, "warning" if warned else "note"))
    return found + _dead_lines(weights, row_keeps_share, dense)


def _new(now: Tensor, before: Tensor) -> Tensor:
    """Units that are dead now and were not before; all dead ones if the shapes differ."""
    return now & ~before if now.shape == before.shape else now


def _numbers(flags: Tensor) -> list[int]:
    """The indices of True entries."""
    places: list[int] = flags.nonzero().flatten().tolist()
    return places


def _heads_finding(where: str, heads: list[int], total: int) -> Finding:
    """The finding for the dead heads of a layer."""
    return Finding(
        "dead-head",
        "warning",
        where,
        f"head {listed(heads)}: {len(heads)} of {total} dead; all their values are zero, or no "
        "weight reads them",
        f"prune less of this layer: --overrides '{where}.*=0.3'",
    )


def _neurons_finding(neurons: dict[str, list[int]], severity: Severity) -> Finding:
    """The finding for the dead neurons of all layers, the worst layer named."""
    worst = max(neurons, key=lambda name: len(neurons[name]))
    others = ""
    if len(neurons) > 1:
        per_layer = [f"{name} {len(dead)}" for name, dead in neurons.items()]
        others = f"; in all {sum(map(len, neurons.values()))}: {listed(per_layer)}"
    return Finding(
        "dead-neuron",
        severity,
        worst,
        f"neuron {listed(neurons[worst])}: {len(neurons[worst])} dead; a row producing them is "
        f"zero, or no weight reads them{others}",
        "prune less of these layers (--overrides or --allocation); dead neurons could be cut out",
    )


def _dead_lines(weights: Weights, row_keeps_share: bool, dense: Weights | None) -> list[Finding]:
    """Rows and columns of linears that are all zero; names the worst linear."""
    found = []
    before = {x.name: x for x in dense.linears} if dense else {}
    for line, limit in (("row", 0.0 if row_keeps_share else MANY), ("column", MANY_UNREAD)):
        dead = {x.name: _newly_dead(x, before.get(x.name), line) for x in weights.linears}
        shares = {x.name: dead[x.name] / len(_lines_of(x, line)) for x in weights.linears}
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
                f"any linear; {sum(dead.values())} in all, in {linears} of {len(dead)} linears",
                "prune less of it (--overrides), or let weights compete within rows (--scope row)"
                if line == "row"
                else "inputs that are nearly always zero lose all their weights; if there are "
                "many, calibrate on more text",
            )
        )
    return found


def _newly_dead(linear: LinearHealth, before: LinearHealth | None, line: str) -> int:
    """The number of rows or columns that are dead, but not in the dense model."""
    dead = _lines_of(linear, line)
    return int((dead if before is None else _new(dead, _lines_of(before, line))).sum())


def _lines_of(linear: LinearHealth, line: str) -> Tensor:
    """Which rows or columns are dead."""
    return linear.dead_rows if line == "row" else linear.dead_columns
