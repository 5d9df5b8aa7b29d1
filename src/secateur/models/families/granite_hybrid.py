"""Granite 4: Mamba-2 in most layers, attention in the others; some sizes have experts."""

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import (
    EMBEDDING_AND_HEAD,
    SPLIT_ATTENTION,
    TWO_NORMS,
    Couplings,
    expert_axes,
    sizes_of_experts,
)
from secateur.models.families.bamba import MAMBA_AXES, MAMBA_GROUPS, TIED_STATES
from secateur.models.families.granitemoe import EXPERTS

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
                **expert_axes(EXPERTS),
            },
            outside=EMBEDDING_AND_HEAD,
            ffn=("shared_mlp", "block_sparse_moe"),
            ffn_norms=("post_attention_layernorm",),
            neurons_key="shared_intermediate_size",
            attributes=sizes_of_experts(EXPERTS),
            fixed=TIED_STATES,
        ),
        experts=EXPERTS,
    )
)
