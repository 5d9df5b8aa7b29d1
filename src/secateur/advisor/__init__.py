"""Advice without running anything: what would fit, how fast, at what cost, with which loss.

`facts.py` reads hardware, prices and published results. `options.py` lists the ways to make a model
smaller. `advice.py` has the formulas, compares the ways, decides, and is the verb.
The core works without this package.
"""

from __future__ import annotations

VERB = {
    "name": "advise",
    "stage": "Measure a model",
    "summary": "Say whether to prune, quantize, distil or leave a model: size, speed and cost. "
    "Reads no weights.",
    "recipe": "secateur.recipes.measure:AdviseRecipe",
    "step": "secateur.advisor.advice:advise_recipe",
    "more": "Every number says whether it was measured here, published, or estimated. The "
    "exit code is 3 if no way is certain to keep the bounds.",
    "after": "diagnose",
}
