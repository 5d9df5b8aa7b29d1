"""OLMo 3: OLMo 2's layout with sliding windows."""

from dataclasses import replace

from secateur.models.architecture import families
from secateur.models.families.olmo2 import OLMO2

OLMO3 = families.register("olmo3")(replace(OLMO2, model_types=("olmo3",)))
