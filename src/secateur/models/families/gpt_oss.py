"""gpt-oss: attention sinks; transposed experts with biases, gate and up interleaved and clamped."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import LLAMA_COUPLINGS, expert_axes, sizes_of_experts
from secateur.models.expert_layout import ExpertLayout, Experts

EXPERTS = Experts(
    router="mlp.router",
    count="num_local_experts",
    layout=ExpertLayout(transposed=True, interleaved=True, biased=True),
)

GPT_OSS = families.register("gpt_oss")(
    Family(
        model_types=("gpt_oss",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GROUPS,
        writers=("self_attn.o_proj",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={**LLAMA_COUPLINGS.layer, **expert_axes(EXPERTS), "self_attn.sinks": ("heads",)},
            attributes=sizes_of_experts(EXPERTS, "hidden_dim"),
        ),
        experts=EXPERTS,
    )
)
