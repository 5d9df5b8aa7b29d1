"""Hunyuan-MoE: a shared expert in every layer; queries and keys normalised after rotation."""

from dataclasses import replace

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Family, families
from secateur.models.couplings import LLAMA_COUPLINGS, expert_axes
from secateur.models.expert_layout import Experts

EXPERTS = Experts(router="mlp.gate.wg")

HUNYUAN_V1_MOE = families.register("hunyuan_v1_moe")(
    Family(
        model_types=("hunyuan_v1_moe",),
        layers="model.layers",
        groups=(
            *SPLIT_ATTENTION_GROUPS,
            ("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"),
            ("mlp.shared_mlp.down_proj",),
        ),
        writers=("self_attn.o_proj",),
        couplings=replace(
            LLAMA_COUPLINGS,
            layer={
                **LLAMA_COUPLINGS.layer,
                **expert_axes(EXPERTS),
                "self_attn.query_layernorm": ("-",),
                "self_attn.key_layernorm": ("-",),
                "mlp.shared_mlp.gate_proj": ("-", "hidden"),
                "mlp.shared_mlp.up_proj": ("-", "hidden"),
                "mlp.shared_mlp.down_proj": ("hidden", "-"),
            },
            attributes={
                "mlp.gate": {"num_experts": "experts"},
                "mlp.experts": {"num_experts": "experts"},
            },
        ),
        experts=EXPERTS,
    )
)
