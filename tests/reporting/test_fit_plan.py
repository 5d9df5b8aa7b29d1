"""What a dry run of a fit shows."""

from __future__ import annotations

from secateur.reporting.plan import FitPlanResult
from secateur.steps.fitting.storage_formats import FORMATS


def test_formats_are_values_and_zeros_apart() -> None:
    names = tuple(stored.name for stored in FORMATS)
    plan = FitPlanResult(2, 2**20, {"max_size": ("1MiB", "0.5MiB")}, names, 0, None)
    assert plan.shown_formats == (
        "bfloat16, int8, int4, int3, int2; each with 30%, 40%, 50%, 60%, 70% of zeros or none"
    )
    bare = FitPlanResult(2, 2**20, {}, names[:3], 0, None)
    assert bare.shown_formats == "bfloat16, int8, int4"
