"""Mixtral: Mistral's attention, and experts of which each token is sent to two."""

from secateur.models.architecture import SPLIT_ATTENTION_GROUPS, Experts, Family, families

MIXTRAL = families.register("mixtral")(
    Family(
        model_types=("mixtral",),
        layers="model.layers",
        groups=SPLIT_ATTENTION_GROUPS,
        writers=("self_attn.o_proj",),
        experts=Experts(stored=("w1", "w3", "w2"), count="num_local_experts"),
    )
)
