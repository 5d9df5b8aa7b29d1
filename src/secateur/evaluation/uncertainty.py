"""The uncertainty of a mean, and whether the scores of two models differ.

standard error   s / √n, s the sample's standard deviation (divisor n − 1)
difference       mean of (modelᵢ − referenceᵢ) over the same items. Items that are easy or hard for
                 both models cancel, so the error of the pairs is smaller than that of two scores
significant      Student's t of the pairs is outside the central 95 % of its distribution with
                 n − 1 degrees of freedom; |difference| > 2.26 standard errors for 10 items, 1.98
                 for 100, 1.96 for very many
retention        (value − chance) / (reference − chance); None if the reference is at most two
                 standard errors above chance, because then it has no lead that could be kept
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtr

from secateur.errors import RecipeError
from secateur.runs.measured import Comparison

CENTRAL = 0.95
FROM_CHANCE = 2.0


def mean_of(values: Sequence[float]) -> float:
    """The mean, with an exact sum."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean; None for a single value.

    Example:
        >>> from secateur.evaluation.uncertainty import standard_error
        >>> standard_error([1.0, 2.0, 3.0, 4.0])
        0.6454972243679028
    """
    count = len(values)
    if count < 2:
        return None
    mean = mean_of(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return math.sqrt(variance / count)


def compare(values: Sequence[float], reference: Sequence[float], chance: float) -> Comparison:
    """Compare a model with a reference, item by item.

    Args:
        values: the model's result for each item.
        reference: the reference's results for the same items in the same order.
        chance: the score of guessing.

    Raises:
        RecipeError: the two have different numbers of items.

    Example:
        >>> from secateur.evaluation.uncertainty import compare
        >>> found = compare([1, 0, 1, 1], [1, 1, 1, 1], chance=0.5)
        >>> found.difference, found.difference_standard_error, found.significant, found.retention
        (-0.25, 0.25, False, 0.5)
    """
    if len(values) != len(reference):
        raise RecipeError(
            f"{len(values)} items of the model, {len(reference)} of the reference",
            remedy="judge both on the same items",
        )
    differences = [a - b for a, b in zip(values, reference, strict=True)]
    difference, error = mean_of(differences), standard_error(differences)
    significant = None if error is None else difference != 0
    if error:  # without an error, any difference is significant
        # the share of Student's t distribution below −|t| and above |t|
        outside = 2 * stdtr(len(differences) - 1, -abs(difference) / error)
        significant = bool(outside < 1 - CENTRAL)
    return Comparison(
        reference_value=mean_of(reference),
        difference=difference,
        difference_standard_error=error,
        significant=significant,
        retention=retention(mean_of(values), mean_of(reference), standard_error(reference), chance),
    )


def retention(
    value: float, reference: float, reference_error: float | None, chance: float
) -> float | None:
    """The share of a reference's lead over chance that is kept; None if that lead may be luck.

    Example:
        >>> from secateur.evaluation.uncertainty import retention
        >>> round(retention(value=0.6, reference=0.7, reference_error=0.02, chance=0.5), 3)
        0.5
    """
    if reference_error is None or reference - chance <= FROM_CHANCE * reference_error:
        return None
    return (value - chance) / (reference - chance)
