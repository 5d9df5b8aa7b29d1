"""Falcon-H1: Mamba-2 and attention side by side in every layer, with factors for each."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.families.bamba import BAMBA, BAMBA_COUPLINGS

FALCON_H1 = families.register("falcon_h1")(
    replace(
        BAMBA,
        model_types=("falcon_h1",),
        writers=(),  # factors come between
        couplings=replace(
            BAMBA_COUPLINGS,
            alike="transformers does not compute its factors for a class that is not its own",
        ),
    )
)
