"""Step 3.7: a gate for each query head. Its experts are stored in a form that is not known."""

from dataclasses import replace

from secateur.models.architecture import Family, families
from secateur.models.couplings import HEAD_NORMS, LLAMA_COUPLINGS

STEP3P7 = families.register("step3p7")(
    Family(
        model_types=("step3p5",),
        layers="model.layers",
        groups=(),  # found by running a layer of each kind
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **LLAMA_COUPLINGS.layer,
                **HEAD_NORMS,
                "self_attn.g_proj": ("heads", "hidden"),
            },
            attributes={"self_attn": {"num_heads": "heads"}},
        ),
    )
)
