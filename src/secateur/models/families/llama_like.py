"""Decoders of Llama's layout: separate projections, a feed-forward, norms beside each sub-block.

The axes that most other tables are made of are declared here too.
"""

from secateur.models import architecture
from secateur.models.families import ends, ffn, grouped, over

QUERIES_KEYS_VALUES = {
    **over("queries hidden", "self_attn.q_proj"),
    **over("keys hidden", "self_attn.k_proj self_attn.v_proj"),
}
SPLIT_ATTENTION: architecture.Axes = {
    **QUERIES_KEYS_VALUES,
    **over("hidden queries", "self_attn.o_proj"),
}
HEAD_NORMS = over("-", "self_attn.q_norm self_attn.k_norm")
"""Norms over the channels of a head, which all heads share."""
WIDE_NORMS: architecture.Axes = {"self_attn.q_norm": ("queries",), "self_attn.k_norm": ("keys",)}
"""Norms over the channels of all heads."""
HUNYUAN_NORMS = over("-", "self_attn.query_layernorm self_attn.key_layernorm")
SINKS = over("heads", "self_attn.sinks")

GATED_FFN: architecture.Axes = ffn("mlp.gate_proj mlp.up_proj", "mlp.down_proj")
PLAIN_FFN: architecture.Axes = ffn("mlp.up_proj", "mlp.down_proj")
FUSED_GATED_FFN: architecture.Axes = {
    **over("neurons+neurons hidden", "mlp.gate_up_proj"),
    **over("hidden neurons", "mlp.down_proj"),
}
PLAIN_FFN_GROUPS = grouped("mlp.up_proj", "mlp.down_proj")
FUSED_FFN_GROUPS = grouped("mlp.gate_up_proj", "mlp.down_proj")

TWO_NORMS = over("hidden", "input_layernorm post_attention_layernorm")
"""One norm before each sub-block."""
NORMS_AFTER = over("hidden", "post_attention_layernorm post_feedforward_layernorm")
"""One norm after each sub-block."""
EMBEDDING_AND_HEAD = ends("model.embed_tokens", "model.norm")

PRE_NORM = architecture.Couplings(
    layer=TWO_NORMS,
    outside=EMBEDDING_AND_HEAD,
    attention_norms=("input_layernorm",),
    ffn_norms=("post_attention_layernorm",),
)
POST_NORM = architecture.Couplings(
    layer={**SPLIT_ATTENTION, **GATED_FFN, **NORMS_AFTER},
    outside=EMBEDDING_AND_HEAD,
    attention_norms=("post_attention_layernorm",),
    ffn_norms=("post_feedforward_layernorm",),
)
SPLIT = PRE_NORM.plus(SPLIT_ATTENTION)
LLAMA_COUPLINGS = SPLIT.plus(GATED_FFN)
ONE_NORM = architecture.Couplings(
    layer={**SPLIT_ATTENTION, **GATED_FFN, "input_layernorm": ("hidden",)},
    outside=EMBEDDING_AND_HEAD,
)
"""One norm, then attention and feed-forward side by side."""
FOUR_NORMS = LLAMA_COUPLINGS.plus(
    over("hidden", "pre_feedforward_layernorm post_feedforward_layernorm"),
    attention_norms=("input_layernorm", "post_attention_layernorm"),
    ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0,
    scaled_embedding=True,
)
"""Norms before and after each sub-block, within the residual branch."""

NORMED_WRITERS = (
    ("self_attn.o_proj", "post_attention_layernorm"),
    ("mlp.down_proj", "post_feedforward_layernorm"),
)
"""The linears that write through a norm, where one follows each sub-block."""

LLAMA = architecture.Family(
    model_types=("llama", "cwm", "exaone", "internlm3", "iquestcoder"),
    groups=architecture.SPLIT_ATTENTION_GATED_FFN,
    writers=architecture.PRE_NORM_WRITERS,
    couplings=LLAMA_COUPLINGS,
)
SANDWICH = LLAMA.like(writers=(), normed_writers=NORMED_WRITERS)
ARCEE = LLAMA.like(
    "arcee",
    groups=(*architecture.SPLIT_ATTENTION_GROUPS, *PLAIN_FFN_GROUPS),
    couplings=SPLIT.plus(PLAIN_FFN),
)
GLM = LLAMA.like(
    "glm",
    groups=(*architecture.SPLIT_ATTENTION_GROUPS, *FUSED_FFN_GROUPS),
    couplings=SPLIT.plus(FUSED_GATED_FFN),
)

TABLE = {
    # Llama 1 to 3, SmolLM2, TinyLlama, Yi, EXAONE 3, InternLM 3, …
    "llama": LLAMA,
    "ernie4_5": LLAMA.like("ernie4_5"),
    # Heads are as many as the hidden size has room for.
    "helium": LLAMA.like("helium"),
    # Sliding windows; Ministral too.
    "mistral": LLAMA.like("mistral", "ministral", "ministral3"),
    # Biases on q, k and v; also inside Qwen2.5-VL.
    "qwen2": LLAMA.like("qwen2", "qwen2_vl_text", "qwen2_5_vl_text"),
    "seed_oss": LLAMA.like("seed_oss"),
    # Every fourth layer has no positions.
    "smollm3": LLAMA.like("smollm3"),
    # Normalised queries and keys; also inside Qwen3-VL.
    "qwen3": LLAMA.like("qwen3", "qwen3_vl_text", couplings=LLAMA_COUPLINGS.plus(HEAD_NORMS)),
    "hunyuan": LLAMA.like("hunyuan_v1_dense", couplings=LLAMA_COUPLINGS.plus(HUNYUAN_NORMS)),
    # Factors for embeddings, attention and residuals: one comes between a writer and the stream.
    "granite": LLAMA.like("granite", writers=()),
    # The same with sliding windows and attention sinks, one for each query head.
    "granite_swa": LLAMA.like("granite_swa", writers=(), couplings=LLAMA_COUPLINGS.plus(SINKS)),
    # StableLM 2 and 3B: LayerNorms, partly rotated heads. In the parallel form the norm of
    # attention serves the feed-forward too.
    "stablelm": LLAMA.like(
        "stablelm",
        couplings=LLAMA_COUPLINGS.plus(
            {},
            attention_norms=(),
            attributes={"self_attn": {"num_heads": "heads", "num_key_value_heads": "groups"}},
        ),
    ),
    # Command R and R7B.
    "cohere": LLAMA.like("cohere", "cohere2", couplings=ONE_NORM),
    # Gemma 1: norms add one to their weights, embeddings are scaled.
    "gemma": LLAMA.like(
        "gemma", couplings=LLAMA_COUPLINGS.plus({}, norm_offset=1.0, scaled_embedding=True)
    ),
    # Soft-capped attention, alternating windows.
    "gemma2": SANDWICH.like("gemma2", couplings=FOUR_NORMS),
    # The text model: five local layers to one global, with rotary tables of their own.
    "gemma3": SANDWICH.like("gemma3_text", couplings=FOUR_NORMS.plus(HEAD_NORMS)),
    # Gemma 2 without the norms after each sub-block.
    "vaultgemma": LLAMA.like(
        "vaultgemma",
        couplings=ONE_NORM.plus(
            {"pre_feedforward_layernorm": ("hidden",)},
            attention_norms=("input_layernorm",),
            ffn_norms=("pre_feedforward_layernorm",),
            norm_offset=1.0,
            scaled_embedding=True,
        ),
    ),
    "olmo2": SANDWICH.like("olmo2", couplings=POST_NORM.plus(WIDE_NORMS)),
    # OLMo 2 with sliding windows.
    "olmo3": SANDWICH.like("olmo3", couplings=POST_NORM.plus(WIDE_NORMS)),
    # Local and global layers.
    "exaone4": SANDWICH.like("exaone4", couplings=POST_NORM.plus(HEAD_NORMS)),
    # AFM: a feed-forward without a gate.
    "arcee": ARCEE,
    # Minitron and Jais 2: LayerNorms, no gate.
    "nemotron": ARCEE.like("nemotron", "jais2"),
    # No gate, norms of queries and keys, and norms of other names.
    "apertus": ARCEE.like(
        "apertus",
        couplings=architecture.Couplings(
            layer={
                **SPLIT_ATTENTION,
                **HEAD_NORMS,
                **PLAIN_FFN,
                "mlp.act_fn": ("-",),
                **over("hidden", "attention_layernorm feedforward_layernorm"),
            },
            outside=EMBEDDING_AND_HEAD,
            attention_norms=("attention_layernorm",),
            ffn_norms=("feedforward_layernorm",),
        ),
    ),
    # Biases everywhere, LayerNorms, no gate.
    "starcoder2": LLAMA.like(
        "starcoder2",
        groups=architecture.SPLIT_ATTENTION_GROUPS + grouped("mlp.c_fc", "mlp.c_proj"),
        writers=("self_attn.o_proj", "mlp.c_proj"),
        couplings=SPLIT.plus(ffn("mlp.c_fc", "mlp.c_proj")),
    ),
    # GLM-4 (2024): gate and up in one matrix.
    "glm": GLM,
    # GLM-4-0414: a norm after each sub-block too.
    "glm4": GLM.like(
        "glm4",
        writers=(),
        normed_writers=(
            ("self_attn.o_proj", "post_self_attn_layernorm"),
            ("mlp.down_proj", "post_mlp_layernorm"),
        ),
        couplings=SPLIT.plus(
            {**FUSED_GATED_FFN, **over("hidden", "post_self_attn_layernorm post_mlp_layernorm")},
            attention_norms=("input_layernorm", "post_self_attn_layernorm"),
            ffn_norms=("post_attention_layernorm", "post_mlp_layernorm"),
        ),
    ),
}

for name, family in TABLE.items():
    architecture.families.register(name)(family)
