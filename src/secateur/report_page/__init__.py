"""The report: one page about runs, sweeps and fits, for people.

`records.py` reads the folders, and `report.py` makes the charts and writes the page. The
core works without this package.
"""

from __future__ import annotations

VERB = {
    "name": "report",
    "stage": "Measure a model",
    "summary": "Put what was measured of pruned models on one self-contained page, side by side.",
    "recipe": "secateur.recipes.measure:ReportRecipe",
    "function": "secateur.report_page.report:report",
    "step": "secateur.report_page.report:report_recipe",
    "after": "sweep",
}
