"""Llama 4 (text): transposed experts whose inputs are scaled, a shared expert, dense layers."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import (
    LLAMA_COUPLINGS,
    SPLIT_ATTENTION,
    TWO_NORMS,
    expert_axes,
    sizes_of_experts,
)
from secateur.models.expert_layout import ExpertLayout, Experts

EXPERTS = Experts(
    module="feed_forward.experts",
    router="feed_forward.router",
    count="num_local_experts",
    layout=ExpertLayout(transposed=True),
    scaled_inputs=True,
)

LLAMA4 = families.register("llama4")(
    Family(
        model_types=("llama4_text",),
        layers="model.layers",
        groups=(
            *SPLIT_ATTENTION_GROUPS,
            ("feed_forward.gate_proj", "feed_forward.up_proj"),  # layers may be dense
            ("feed_forward.down_proj",),
            ("feed_forward.shared_expert.gate_proj", "feed_forward.shared_expert.up_proj"),
            ("feed_forward.shared_expert.down_proj",),
        ),
        writers=("self_attn.o_proj", "feed_forward.down_proj"),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **SPLIT_ATTENTION,
                **TWO_NORMS,
                **expert_axes(EXPERTS),
                "feed_forward.gate_proj": ("neurons", "hidden"),
                "feed_forward.up_proj": ("neurons", "hidden"),
                "feed_forward.down_proj": ("hidden", "neurons"),
                "feed_forward.shared_expert.gate_proj": ("-", "hidden"),
                "feed_forward.shared_expert.up_proj": ("-", "hidden"),
                "feed_forward.shared_expert.down_proj": ("hidden", "-"),
            },
            ffn=("feed_forward",),
            neurons_key="intermediate_size_mlp",
            attributes=sizes_of_experts(EXPERTS),
        ),
        experts=EXPERTS,
    )
)
