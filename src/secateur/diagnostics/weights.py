"""Reads every tensor of a checkpoint once: is it finite, which weights and lines are zero?

One tensor is in memory at a time. For each matrix it keeps counts, and for each row and column
whether it is all zero; dead heads and neurons follow from these.

Impossible values are findings: NaN, Inf, and matrices that have shrunk to almost zero.

Finds dead units: heads, neurons, rows and columns that pruning has emptied.

The names of the linears show which rows and columns belong to a head or a neuron, in every family
with one of the layouts below. With grouped queries, a dead value head is dead for all query heads
that share it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from secateur.diagnostics.audit import LinearCount, count, zero_share
from secateur.diagnostics.findings import Claims, finding, listed
from secateur.models.architecture import setting
from secateur.models.checkpoint import not_finite
from secateur.models.targets import CheckpointTarget
from secateur.runs.measured import Finding, Severity


@dataclass(frozen=True)
class LinearHealth(LinearCount):
    """One stored matrix of a decoder layer: its count, and what it is good for.

    Attributes:
        layer: the number of its decoder layer.
        kind: its name within the layer.
        size: root mean square of the weights that are not zero.
        known: False for experts in an unknown layout, which were not pruned.
        dead_rows: bool [out], outputs whose weights are all zero.
        dead_columns: bool [in], inputs that no weight reads.
    """

    layer: int = field(kw_only=True)
    kind: str = field(kw_only=True)
    size: float = field(kw_only=True)
    known: bool = field(kw_only=True)
    dead_rows: Tensor = field(kw_only=True)
    dead_columns: Tensor = field(kw_only=True)

    def dead_lines(self, line: str) -> Tensor:
        """Which lines are dead: those of every `row`, or of every `column`."""
        return self.dead_rows if line == "row" else self.dead_columns


@dataclass(frozen=True)
class Weights:
    """All tensors of a checkpoint.

    Attributes:
        linears: the matrices of the decoder layers.
        not_finite: the number of NaN or infinite values, by tensor, if there are any.
        tensors: the number of tensors read.
    """

    linears: list[LinearHealth]
    not_finite: dict[str, tuple[int, int]]
    tensors: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the matrices of the decoder layers."""
        return zero_share(self.linears)

    def of_layer(self, index: int) -> dict[str, LinearHealth]:
        """The matrices of one decoder layer, by their name within it."""
        return {x.kind: x for x in self.linears if x.layer == index}


def layer_sparsity(weights: Weights) -> dict[int, float]:
    """The fraction of zeros in the matrices of each decoder layer."""
    layers = dict.fromkeys(x.layer for x in weights.linears)
    return {index: zero_share(weights.of_layer(index).values()) for index in layers}


def look_at_weights(
    target: CheckpointTarget, claims: Claims, on_tensor: Callable[[str], None]
) -> Weights:
    """Read every tensor of a checkpoint.

    Args:
        target: the checkpoint.
        claims: contains the pattern and sparsity that each matrix should have.
        on_tensor: called after every tensor with its name.
    """
    reader = target.reader
    matrices = {matrix.name: matrix for matrix in target.matrices()}
    linears, damaged = [], {}
    for stored in [*matrices, *(reader.entries.keys() - matrices.keys())]:
        tensor = reader.read(stored)
        if bad := not_finite(tensor):
            damaged[stored] = bad, tensor.numel()
        on_tensor(stored)
        matrix = matrices.get(stored)
        if matrix is None or matrix.layer is None or not matrix.is_decoder_matrix:
            continue
        name, weight = matrix.full_name, matrix.seen(tensor)
        claim, nonzero = claims.linears.get(name), weight != 0
        counted = count(name, weight, claims.pattern, claim.asked if claim else 0.0)
        # of the weights that are left, so that pruning does not shrink it
        kept = max(1, counted.weights - counted.zeros)
        size = (weight.float().square().sum(dtype=torch.float64) / kept).sqrt()
        linears.append(
            LinearHealth(
                **vars(counted),
                layer=matrix.layer,
                kind=matrix.kind,
                size=float(size),
                known=matrix.linear is not None,
                dead_rows=~nonzero.any(dim=1),
                dead_columns=~nonzero.any(dim=0),
            )
        )
    return Weights(linears, damaged, len(target.reader.entries))


VANISHED = 1e-3
"""Relative to the median size of the same matrix in all layers; in SmolLM2 the least is 0.3."""


def check_values(weights: Weights) -> list[Finding]:
    """Tensors that are not finite, and linears far smaller than the same in other layers."""
    found = [
        finding("not-finite", name, f"{bad} of {total} values are NaN or infinite")
        for name, (bad, total) in weights.not_finite.items()
    ]
    for kind in dict.fromkeys(x.kind for x in weights.linears):
        same = [x for x in weights.linears if x.kind == kind]
        usual = statistics.median(x.size for x in same)
        for x in (x for x in same if x.size < VANISHED * usual):
            evidence = (
                f"its weights are {x.size:.2g} large (root mean square of those that are not "
                f"zero), the same matrix is {usual:.2g} in the median layer"
            )
            found.append(finding("weights-vanished", x.name, evidence))
    return found


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
        pairs = zip(vars(self).values(), vars(dense).values(), strict=True)
        return DeadUnits(*(_new(now, before) for now, before in pairs))


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
            rows, width = linears[values].dead_rows, linears[reader].shape[1]
            # which rows make the values: query, key and value lie one after the other,
            # or in turns, one head at a time
            if place == "last":
                rows = rows[width + (len(rows) - width) // 2 :]
            elif place == "interleaved":
                rows = rows.view(-1, 3, size)[:, 2].flatten()
            # with grouped queries, several query heads share a value head
            not_read = linears[reader].dead_columns.view(-1, size).all(dim=1)
            valueless = rows.view(-1, size).all(dim=1)
            heads = not_read | valueless.repeat_interleave(len(not_read) // len(valueless))
    for makers, reader in FEED_FORWARD:
        if reader in linears and all(maker in linears for maker in makers):
            unread = linears[reader].dead_columns
            unmade = torch.zeros_like(unread)
            for maker in makers:
                # two halves, gate and up, where both are in one matrix
                unmade |= linears[maker].dead_rows.view(-1, len(unread)).any(dim=0)
    return DeadUnits(heads, unmade, unread)


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
    # where weights compete within a row or a group, every row keeps its share
    row_keeps_share = claims.pattern is not None and claims.pattern.scope in ("row", "group")
    neurons = dict[str, list[int]]()
    severity: Severity = "note"
    for index in dict.fromkeys(x.layer for x in weights.linears):
        units, name = _dead_units(weights.of_layer(index), size), layer_name(index)
        if dense is not None:
            units = units.beyond(_dead_units(dense.of_layer(index), size))
        dead = units.neurons
        if units.heads.any():
            heads = _numbers(units.heads)
            evidence = (
                f"head {listed(heads)}: {len(heads)} of {len(units.heads)} dead; all their values "
                "are zero, or no weight reads them"
            )
            found.append(finding("dead-head", name, evidence))
        if dead.any():
            neurons[name] = _numbers(dead)
            unmade = int(units.unmade.sum())
            limit = 0.0 if row_keeps_share else MANY
            if unmade > limit * len(dead) or int(dead.sum()) > MANY_UNREAD * len(dead):
                severity = "warning"
    if neurons:
        worst, others = max(neurons, key=lambda name: len(neurons[name])), ""
        if len(neurons) > 1:
            per_layer = [f"{name} {len(dead)}" for name, dead in neurons.items()]
            others = f"; in all {sum(map(len, neurons.values()))}: {listed(per_layer)}"
        evidence = (
            f"neuron {listed(neurons[worst])}: {len(neurons[worst])} dead; a row producing them is "
            f"zero, or no weight reads them{others}"
        )
        found.append(finding("dead-neuron", worst, evidence, severity=severity))
    return found + _dead_lines(weights, row_keeps_share, dense)


def _new(now: Tensor, before: Tensor) -> Tensor:
    """Units that are dead now and were not before; all dead ones if the shapes differ."""
    return now & ~before if now.shape == before.shape else now


def _numbers(flags: Tensor) -> list[int]:
    return [number for number, flag in enumerate(flags.tolist()) if flag]


def _dead_lines(weights: Weights, row_keeps_share: bool, dense: Weights | None) -> list[Finding]:
    """Rows and columns of linears that are all zero; names the worst linear."""
    found = []
    before = {x.name: x for x in dense.linears} if dense else {}
    for line, limit in (("row", 0.0 if row_keeps_share else MANY), ("column", MANY_UNREAD)):
        dead, shares = dict[str, int](), dict[str, float]()
        for x in weights.linears:
            lines = x.dead_lines(line)
            if x.name in before:
                lines = _new(lines, before[x.name].dead_lines(line))
            dead[x.name], shares[x.name] = int(lines.sum()), int(lines.sum()) / len(lines)
        # by share: a large matrix has more dead lines than a small one that is worse
        worst = max(shares, key=lambda name: shares[name])
        if not dead[worst]:
            continue
        linears = sum(count > 0 for count in dead.values())
        evidence = (
            f"{dead[worst]} {line}s are all zero, {shares[worst]:.1%} of them, the most of "
            f"any linear; {sum(dead.values())} in all, in {linears} of {len(dead)} linears"
        )
        severity: Severity = "warning" if shares[worst] > limit else "note"
        found.append(finding(f"dead-{line}", worst, evidence, severity=severity))
    return found
