"""Removal of whole units of columns, every candidate solved for from the inputs in float64."""

from __future__ import annotations

from torch import Tensor

from oracles.refits import damped_error, least_squares


def without(weight: Tensor, gone: list[int], width: int) -> Tensor:
    """The mask that lacks some units."""
    mask = weight.new_ones(weight.shape).bool()
    for unit in gone:
        mask[:, unit * width : (unit + 1) * width] = False
    return mask


def greedy_units(weight: Tensor, inputs: Tensor, width: int, count: int, among: int = 0) -> Tensor:
    """Each time the unit goes whose loss, all others refitted, is least.

    Of each `among` consecutive units, if it is given, as many go.
    """
    gone: list[int] = []
    units = weight.shape[1] // width
    among = among or units
    for _ in range(count):
        errors = {}
        for unit in range(units):
            before = sum(other // among == unit // among for other in gone)
            if unit not in gone and before < count * among // units:
                refit = least_squares(weight, without(weight, [*gone, unit], width), inputs)
                errors[unit] = damped_error(weight, refit, inputs)
        gone.append(min(errors, key=lambda unit: errors[unit]))
    return without(weight, gone, width)
