"""Windows of the calibration text that only the distillation reads, after all others.

Statistics need few windows, and a distillation many. The windows of a run are in one file: those of
the calibration, then the extra ones, whose number is in the header of the file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secateur.calibration.windows import EXTRA, WindowPlan
from secateur.recipes.calibration import Calibration
from secateur.recipes.recovery import Distill

__all__ = ["extra_windows", "split_extra", "tell_of_short_text"]

log = logging.getLogger(__name__)


def extra_windows(plan: WindowPlan, options: Calibration, how: Distill) -> int:
    """Return how many windows a distillation reads besides those of the calibration.

    Args:
        plan: how the text is cut.
        options: the calibration.
        how: the distillation.
    """
    needed = -(-how.tokens // plan.sequence_length) - plan.windows - options.generated_windows
    return max(0, needed) if how.epochs else 0


def tell_of_short_text(asked: int, record: Mapping[str, Any]) -> None:
    """Log that a text has fewer extra windows than the distillation asked for."""
    found = record.get(EXTRA, 0)
    if found < asked:
        log.warning(
            "the distillation reads %d extra windows, %d were asked for: %s has no more",
            found,
            asked,
            record["source"],
        )


def split_extra(windows: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """Divide windows into those of the calibration and the extra ones at the end."""
    own = len(windows) - extra
    return windows[:own], windows[own:]
