"""MiniMax-M2: a router with a correction; queries and keys normalised over all heads."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import LLAMA_COUPLINGS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import Experts

EXPERTS = Experts(stored=("w1", "w3", "w2"), count="num_local_experts")

MINIMAX_M2 = families.register("minimax_m2")(
    Family(
        model_types=("minimax_m2",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GROUPS,
        writers=("self_attn.o_proj",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **LLAMA_COUPLINGS.layer,
                **expert_axes(EXPERTS),
                "self_attn.q_norm": ("queries",),
                "self_attn.k_norm": ("keys",),
                "mlp.e_score_correction_bias": ("experts",),
            },
            attributes=sizes_of_experts(EXPERTS, "hidden_dim"),
        ),
        experts=EXPERTS,
    )
)
