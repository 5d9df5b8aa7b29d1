"""Windows of the calibration text that only the distillation reads, after all others.

Statistics need few windows, and a distillation many. And its learning rate must be judged on
windows that the statistics have not read: pruned weights are fitted to those, so every step away
from them looks like a loss. The windows of a run are in one file: those of the calibration, then
the extra ones, whose number is in the header of the file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from secateur.calibration.windows import EXTRA, WindowPlan
from secateur.recipes.calibration import Calibration
from secateur.recipes.recovery import Distill
from secateur.training.distillation import MOST_HELD_OUT

log = logging.getLogger(__name__)


def extra_windows(plan: WindowPlan, options: Calibration, how: Distill) -> int:
    """Return how many windows a distillation reads besides those of the calibration.

    Args:
        plan: how the text is cut.
        options: the calibration.
        how: the distillation.
    """
    if not how.epochs:
        return 0
    judging = MOST_HELD_OUT if how.peak_learning_rate is None else 0
    needed = -(-how.tokens // plan.sequence_length) - plan.windows - options.generated_windows
    return max(judging, needed)


def tell_of_short_text(asked: int, record: Mapping[str, Any]) -> None:
    """Log that a text or a file has fewer extra windows than the distillation wants."""
    found = record.get(EXTRA, 0)
    if found >= asked:
        return
    source = record["source"]
    if source.endswith(".safetensors"):
        log.warning(
            "the distillation wants %d extra windows, and a file of windows has %d: %s. Give the "
            "text instead, and it reads more of it",
            asked,
            found,
            source,
        )
    else:
        log.warning("the distillation wants %d extra windows, and %s has %d", asked, source, found)


def split_extra(windows: Tensor, extra: int) -> tuple[Tensor, Tensor]:
    """Divide windows into those of the calibration and the extra ones at the end."""
    own = len(windows) - extra
    return windows[:own], windows[own:]
