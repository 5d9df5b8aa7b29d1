"""Slow at the beginning, fast at the end."""

from secateur.sparsity.schedules import schedule


@schedule
def quince_late(done: float, *, first: float, last: float) -> float:
    """s(p) = s_first + (s_last − s_first) · p²."""
    return first + (last - first) * done**2 if done < 1 else last
