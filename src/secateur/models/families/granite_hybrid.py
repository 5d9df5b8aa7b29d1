"""Granite 4 without experts: Mamba-2 in most layers, attention in the others."""

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import EMBEDDING_AND_HEAD, SPLIT_ATTENTION, TWO_NORMS, Couplings
from secateur.models.families.bamba import MAMBA_AXES, MAMBA_GROUPS, TIED_STATES

GRANITE_HYBRID = families.register("granite_hybrid")(
    Family(
        model_types=("granitemoehybrid",),
        layers="model.layers",
        groups=(
            *MAMBA_GROUPS,
            *SPLIT_ATTENTION_GROUPS,
            ("shared_mlp.input_linear",),
            ("shared_mlp.output_linear",),
        ),
        couplings=Couplings(
            layer={
                **MAMBA_AXES,
                **SPLIT_ATTENTION,
                **TWO_NORMS,
                "shared_mlp.input_linear": ("neurons+neurons", "hidden"),
                "shared_mlp.output_linear": ("hidden", "neurons"),
            },
            outside=EMBEDDING_AND_HEAD,
            ffn=("shared_mlp",),
            ffn_norms=("post_attention_layernorm",),
            neurons_key="shared_intermediate_size",
            fixed=TIED_STATES,
        ),
    )
)
