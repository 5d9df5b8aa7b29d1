"""`secateur distill`: train a pruned or cut model to match the model it was made from."""

from __future__ import annotations

from secateur.cli.retrain import run
from secateur.cli.verb import command

__all__ = ["distill"]

distill = command("distill", run)
