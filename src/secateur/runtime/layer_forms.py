"""How the decoder layers of each family compute, for one call of C for a token or a prompt.

`csrc/decode.h` has the formula of a layer. A `LayerForm` says which norms a family has and where it
differs from Llama; everything else (sizes, biases, windows, scales, experts) is read from the
modules of the model. A family that `FORMS` does not name is decoded by transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from secateur.errors import ArchitectureError, RecipeError
from secateur.models.architecture import family_of
from secateur.models.experts import OpenExperts, opened_form
from secateur.runtime.kernels import library
from secateur.runtime.kernels.library import TYPES, CFeedForward, CNorm, address
from secateur.runtime.kernels.linear import (
    InferenceLinear,
    IntegerLinear,
    PackedEmbedding,
    PackedLinear,
)
from secateur.runtime.kernels.matrix import WORD, KernelMatrix

PRE = ("input", "", "post_attention", "")
POST = ("", "post_attention", "", "post_feedforward")
BOTH = ("input", "post_attention", "pre_feedforward", "post_feedforward")


@dataclass(frozen=True)
class LayerForm:
    """How the decoder layers of a family compute.

    Attributes:
        norms: the norms before attention, of its output, before the feed-forward, of its output;
            empty where there is none. `_layernorm` follows each name.
        parallel: attention and feed-forward read the same hidden states.
        interleaved: rotary positions rotate columns 2i and 2i + 1, not i and i + half.
        half_angles: the model's angles are those of half a head.
        rotated: whether a layer rotates, given its attention. SmolLM3 has layers without positions.
        softcap: scores of attention are capped by `attn_logit_softcapping`.
        qk_norms: the norms of queries and keys.
        norm_rotated: they come after the rotation.
        ffn: the feed-forward, or the module that holds router and experts.
        shared: the expert of all tokens, in `ffn`.
        sigmoid: the router's scores are sigmoids, not a softmax.
        clamped: gate and up are clamped, and multiplied as gpt-oss does.
    """

    norms: tuple[str, str, str, str] = PRE
    parallel: bool = False
    interleaved: bool = False
    half_angles: bool = False
    rotated: Callable[[Any], bool] = lambda attention: getattr(attention, "use_rope", True)
    softcap: bool = False
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    norm_rotated: bool = False
    ffn: str = "mlp"
    shared: str = ""
    sigmoid: bool = False
    clamped: bool = False


LLAMA = LayerForm()
PARALLEL = LayerForm(norms=("input", "", "", ""), parallel=True)
COHERE = replace(PARALLEL, interleaved=True)
HUNYUAN = LayerForm(qk_norms=("query_layernorm", "key_layernorm"), norm_rotated=True)
INTERLEAVED = LayerForm(interleaved=True)
SIGMOID = LayerForm(sigmoid=True, shared="shared_experts")

_LIKE_LLAMA = (
    "llama mistral qwen2 qwen3 seed_oss smollm3 granite granite_swa jais2 cwm exaone gemma "
    "internlm3 arcee nemotron phi3 starcoder2 mixtral qwen3_moe olmoe"
)
FORMS: Mapping[str, LayerForm] = {
    **dict.fromkeys(_LIKE_LLAMA.split(), LLAMA),
    **dict.fromkeys(("glm", "helium", "ernie4_5"), INTERLEAVED),
    "glm4": replace(INTERLEAVED, norms=("input", "post_self_attn", "post_attention", "post_mlp")),
    "stablelm": LayerForm(qk_norms=("q_layernorm", "k_layernorm")),
    "phi": PARALLEL,
    "cohere": COHERE,
    # Full layers have no positions.
    "cohere2": replace(COHERE, rotated=lambda attention: attention.sliding_window is not None),
    "gemma2": LayerForm(norms=BOTH, softcap=True),
    "gemma3_text": LayerForm(norms=BOTH),
    "vaultgemma": LayerForm(norms=("input", "", "pre_feedforward", ""), softcap=True),
    "olmo2": LayerForm(norms=POST),
    "olmo3": LayerForm(norms=POST),
    "exaone4": LayerForm(
        norms=POST,
        rotated=lambda attention: attention.sliding_window is None or attention.is_sliding,
    ),
    "hunyuan_v1_dense": HUNYUAN,
    "hunyuan_v1_moe": replace(HUNYUAN, shared="shared_mlp"),
    "qwen2_moe": LayerForm(shared="shared_expert"),
    "gpt_oss": LayerForm(half_angles=True, clamped=True),
    "granitemoe": LayerForm(ffn="block_sparse_moe"),
    "glm4_moe": SIGMOID,
    "dots1": SIGMOID,
    "minimax_m2": LayerForm(sigmoid=True),
    "ernie4_5_moe": LayerForm(interleaved=True, shared="shared_experts"),
}
"""The families by the `model_type` of transformers."""

ROTARY = ("default", "linear", "llama3", "yarn", "longrope")
"""Kinds of rotary positions whose angles do not depend on the length of the text; those of
`longrope` change at one length (`longest`)."""

ACTIVATIONS: Mapping[str, int] = {
    "silu": 0,
    "gelu_pytorch_tanh": 1,
    "gelu_new": 1,
    "gelu_fast": 1,
    "relu2": 2,
}
CLAMPED = 3

_FEED_FORWARDS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    ("", "up_proj", "down_proj"),
    ("", "c_fc", "c_proj"),
    ("", "fc1", "fc2"),
)
"""Names of the linears of a feed-forward."""


def why_not(model: Any, capacity: int = 1) -> str | None:
    """Why a model cannot be decoded in one call for each token; None if it can.

    Args:
        model: a transformers model or its skeleton, its linears packed or not.
        capacity: tokens of prompt and text together.
    """
    config = model.config
    if library.kernel_info().tier == "none":
        return library.kernel_info().reason
    if config.model_type not in FORMS:
        return f"its type is {config.model_type} (docs/families.md says which are decoded)"
    form = FORMS[config.model_type]
    for parameter in model.parameters():
        if parameter.device.type not in ("cpu", "meta"):
            return f"it is on {parameter.device}"
    if any(isinstance(module, IntegerLinear) for module in model.modules()):
        return "torch multiplies its integers (kernels=False)"
    linears = (x for x in model.modules() if isinstance(x, InferenceLinear))
    if other := next((x for x in linears if not isinstance(x, PackedLinear)), None):
        return f"{type(other).__name__} multiplies some of its matrices"
    kinds = getattr(model.model.rotary_emb, "rope_type", "default")
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        if kind not in ROTARY:
            return f"its rotary positions are of the kind {kind}"
    most = longest(config)
    if most is not None and capacity > most:
        return f"its rotary positions change at {most} tokens, and {capacity} have to fit"
    odd = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if odd:
        return f"it has layers of the kind {min(odd)}"
    if _activation_of(config) not in ACTIVATIONS and not form.clamped:
        return f"its activation is {_activation_of(config)}"
    if (getattr(config, "n_group", None) or 1) > 1:
        return "its experts are chosen by groups"
    if config.model_type == "phi" and config.qk_layernorm:
        return "its norms of queries and keys have biases"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention looks ahead"
    fused = [getattr(getattr(x, form.ffn), "gate_up_proj", None) for x in model.model.layers]
    paired = [x for x in fused if isinstance(x, PackedLinear) and x.matrix.group is not None]
    if any(x.out_features % 4 for x in paired):
        return "gate and up lie in one matrix of 4 bits, with an odd number of rows each"
    return None


def refuse_options(reason: str | None, **options: object) -> None:
    """Refuse options of our own decoding for a model that it does not decode.

    Args:
        reason: from `why_not`; None if it decodes the model.
        options: their values by name; None where not given.

    Raises:
        RecipeError: there are both.
    """
    for name, value in options.items():
        if reason is not None and value is not None:
            flag = "--" + name.replace("_", "-")
            raise RecipeError(
                f"{flag} needs our own decoding, which does not take this model: {reason}",
                where=flag,
                remedy="leave it out",
            )


def longest(config: Any) -> int | None:
    """How many tokens have the same rotary positions however long the text is; None: any."""
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("rope_type") != "longrope":
        return None
    return int(rotary["original_max_position_embeddings"])


def _activation_of(config: Any) -> str:
    """The name of the activation of the feed-forwards."""
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), "silu")


def window_of(config: Any, index: int) -> int:
    """How many keys a token of a layer sees, its own among them; 0: all."""
    window = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return window if kinds[index] == "sliding_attention" else 0
    return window if getattr(config, "use_sliding_window", True) else 0


class KernelModel:
    """A model for C: `csrc/secateur.h` declares the parts.

    Args:
        model: a transformers model that `why_not` has nothing against.
        capacity: tokens that fit in a slot of the caches.
        exact: activations meet bfloat16 values in float32.

    Attributes:
        alive: what the description points to.
    """

    def __init__(self, model: Any, capacity: int, *, exact: bool) -> None:
        self.model, self.capacity, self.exact = model, capacity, exact
        self.form, family = FORMS[model.config.model_type], family_of(model)
        assert family is not None
        self.experts, couplings = family.experts, family.couplings
        self.norm_offset = couplings.norm_offset if couplings else 0.0
        self.alive: list[Any] = []

    def decoder(
        self,
        cache_dtype: torch.dtype,
        caches: Callable[[int], tuple[int, int, int]],
        answers: Int64[Tensor, " answers"] | None = None,
    ) -> library.CDecoder:
        """The whole model.

        Args:
            cache_dtype: of keys and values.
            caches: `KeyValueCache.place`, by the number of a layer.
            answers: the tokens whose logits are computed; None for all.
        """
        config, layers = self.model.config, self.model.model.layers
        attention = layers[0].self_attn
        final = getattr(self.model.model, "norm", None) or self.model.model.final_layernorm
        angles = self.angles(attention)
        # C holds addresses only: `alive` keeps what they point to
        described = (library.CLayer * len(layers))(
            *(self.layer(layer, i, angles, caches(i)) for i, layer in enumerate(layers))
        )
        head = self.matrix(self.model.get_output_embeddings())
        head = head if answers is None else head.of_rows(answers)
        self.alive += [described, head]
        return library.CDecoder(
            layers=len(layers),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head=attention.head_dim,
            vocabulary=head.rows,
            cache_type=TYPES[cache_dtype],
            exact=int(self.exact),
            epsilon=float(getattr(final, "variance_epsilon", None) or final.eps),
            layer=described,
            final_norm=self.norm(final),
            head_matrix=head.c,
            centered=int(_is_layer_norm(final)),
            parallel=int(self.form.parallel or getattr(layers[0], "use_parallel_residual", False)),
            residual=getattr(config, "residual_multiplier", 1.0),
            activation=CLAMPED if self.form.clamped else ACTIVATIONS[_activation_of(config)],
            alpha=getattr(config, "swiglu_alpha", 0.0),
            limit=getattr(config, "swiglu_limit", 0.0),
            **self.routing(layers),
            rotary=2 * next(iter(angles.values()))[0].shape[1],
            interleaved=int(self.form.interleaved),
            qk_norm=self.kind_of_qk_norm(attention),
            norm_rotated=int(self.form.norm_rotated),
            attention_scale=attention.scaling,
            softcap=(config.attn_logit_softcapping or 0.0) if self.form.softcap else 0.0,
            clip=getattr(config, "clip_qkv", None) or 0.0,
        )

    def layer(
        self, layer: Any, index: int, angles: Mapping[str, Any], caches: tuple[int, int, int]
    ) -> library.CLayer:
        """One decoder layer."""
        attention, config = layer.self_attn, self.model.config
        names = self.form.norms
        if getattr(layer, "use_parallel_residual", False):
            names = (names[0], "", "", "")
        norms = ("attention_in", "attention_out", "ffn_in", "ffn_out")
        kinds = getattr(config, "layer_types", None)
        here = angles.get(kinds[index] if kinds else "", angles.get(""))
        cosine, sine = here if here and self.form.rotated(attention) else (None, None)
        return library.CLayer(
            **self.projections(attention),
            **{
                to: self.norm(getattr(layer, f"{name}_layernorm") if name else None)
                for to, name in zip(norms, names, strict=True)
            },
            **{
                to: self.qk_norm(getattr(attention, name, None))
                for to, name in zip(("q_norm", "k_norm"), self.form.qk_norms, strict=True)
            },
            cosine=address(cosine),
            sine=address(sine),
            window=window_of(config, index),
            sinks=self.floats(getattr(attention, "sinks", None)),
            keys=caches[0],
            values=caches[1],
            tiles=caches[2],
            **self.feed_forwards(layer),
        )

    def projections(self, attention: Any) -> dict[str, Any]:
        """Matrices and biases of attention; queries, keys and values may lie in one matrix."""
        head, config = attention.head_dim, self.model.config
        sizes = [config.num_attention_heads * head, *[config.num_key_value_heads * head] * 2]
        out = getattr(attention, "o_proj", None) or attention.dense
        found = {"o": self.matrix(out).c, "o_bias": self.floats(out.bias)}
        fused, first = getattr(attention, "qkv_proj", None), 0
        whole = self.matrix(fused) if fused else None
        for name, size in zip("qkv", sizes, strict=True):
            linear = fused or getattr(attention, f"{name}_proj")
            found[name] = (whole or self.matrix(linear)).rows_between(first, first + size)
            found[f"{name}_bias"] = self.bias(linear, first, first + size)
            first += size if fused else 0
        return found

    def feed_forwards(self, layer: Any) -> dict[str, Any]:
        """The feed-forward of a layer, or router, experts and the expert of all tokens."""
        ffn = getattr(layer, self.form.ffn)
        declared = self.experts
        if declared is None:
            return {"ffn": self.feed_forward(ffn)}
        fused = getattr(ffn, declared.module.rpartition(".")[2], None)
        if fused is None:
            return {"ffn": self.feed_forward(ffn)}
        opened = fused if isinstance(fused, OpenExperts) else opened_form(fused, declared)
        experts = (CFeedForward * len(opened))(*(self.feed_forward(x) for x in opened))
        self.alive.append(experts)
        router = layer.get_submodule(declared.router)
        shared = getattr(ffn, self.form.shared, None) if self.form.shared else None
        gate = getattr(ffn, "shared_expert_gate", None)
        correction = _correction(ffn, router)
        found = {
            "experts": len(opened),
            "expert": experts,
            "router": self.matrix(router).c,
            "router_bias": self.floats(getattr(router, "bias", None)),
            "correction": self.floats(None if correction is None else correction.flatten()),
            "shared_gate": self.floats(None if gate is None else gate.weight[0]),
        }
        return found if shared is None else {**found, "ffn": self.feed_forward(shared)}

    def feed_forward(self, ffn: Any) -> CFeedForward:
        """One feed-forward, with a gate or without."""
        gate_name, up_name, down_name = next(
            names for names in _FEED_FORWARDS if all(hasattr(ffn, x) for x in names if x)
        )
        up, down = getattr(ffn, up_name), getattr(ffn, down_name)
        # gate and up may be the halves of one matrix; `first` is the first row of up
        whole, rows, first = self.matrix(up), up.out_features, 0
        found: dict[str, Any] = {"down": self.matrix(down).c, "down_bias": self.floats(down.bias)}
        if gate_name == up_name:
            found["gate"], first = whole.rows_between(0, rows // 2), rows // 2
            found["gate_bias"] = self.bias(up, 0, first)
        elif gate_name:
            gate = getattr(ffn, gate_name)
            found["gate"], found["gate_bias"] = self.matrix(gate).c, self.floats(gate.bias)
        found["up"], found["up_bias"] = whole.rows_between(first, rows), self.bias(up, first, rows)
        return CFeedForward(**found)

    def routing(self, layers: Any) -> dict[str, Any]:
        """How the routers of a mixture choose."""
        declared, config = self.experts, self.model.config
        if declared is None:
            return {"routed_scale": 1.0}
        found = (x for layer in layers for n, x in layer.named_modules() if n == declared.router)
        router = next(found)
        return {
            "chosen": getattr(router, "top_k", None) or declared.per_token(config),
            "router_sigmoid": int(self.form.sigmoid),
            "normalise": int(getattr(router, "norm_topk_prob", True)),
            "routed_scale": getattr(config, "routed_scaling_factor", None) or 1.0,
        }

    def kind_of_qk_norm(self, attention: Any) -> int:
        """`sct_qk_norm`."""
        norm = getattr(attention, self.form.qk_norms[0], None)
        if norm is None:
            return 0
        if hasattr(norm, "norms") or _is_layer_norm(norm):
            return 2
        return int(norm.weight.numel() != attention.head_dim)

    def qk_norm(self, norm: Any) -> int | None:
        """The weights of a norm of queries or keys."""
        if norm is None:
            return None
        if hasattr(norm, "norms"):  # one for each head: [heads, head]
            return self.floats(torch.stack([x.weight for x in norm.norms]))
        return self.floats(norm.weight.detach().float() + self.offset(norm))

    def norm(self, norm: Any) -> CNorm:
        """A norm over hidden; empty for None."""
        if norm is None:
            return CNorm()
        weight = norm.weight.detach().float() + self.offset(norm)
        return CNorm(self.floats(weight), self.floats(getattr(norm, "bias", None)))

    def offset(self, norm: Any) -> float:
        """What a norm adds to its stored weight."""
        # Nemotron's LayerNorm1P; Gemma's norms are the family's `norm_offset`
        return 1.0 if type(norm).__name__.endswith("1P") else self.norm_offset

    def angles(self, attention: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Cosine and sine [capacity, rotary / 2] of all positions, as the model computes them.

        By the kind of layer, where kinds have angles of their own.
        """
        rotary, positions = self.model.model.rotary_emb, torch.arange(self.capacity)[None]
        by_kind = "layer_type" in inspect.signature(rotary.forward).parameters
        kinds = set(self.model.config.layer_types) if by_kind else {""}
        found = {}
        for kind in kinds:
            given = (torch.zeros(1, 1, 1), positions, *([kind] if by_kind else []))
            with torch.inference_mode():
                angles = [x[0].float() for x in rotary(*given)]
            # transformers gives the angles of a half twice: side by side, or each next to itself
            half = angles[0].shape[-1] // (1 if self.form.half_angles else 2)
            twice = torch.equal(angles[0][:, ::2], angles[0][:, 1::2])
            pair = [(x[:, ::2] if twice and x.shape[-1] > half else x[:, :half]) for x in angles]
            found[kind] = (pair[0].contiguous().clone(), pair[1].contiguous().clone())
            if 2 * half > attention.head_dim or len(pair[0]) != self.capacity:
                raise ArchitectureError(f"its angles {list(pair[0].shape)} do not fit its heads")
        self.alive.append(found)
        return found

    def matrix(self, linear: Any) -> KernelMatrix:
        """The matrix of a linear, packed or not; memory is shared where possible."""
        if isinstance(linear, PackedLinear):
            matrix = linear.matrix
        else:
            weight = linear.weight.detach()
            matrix = KernelMatrix(weight if weight.dtype in TYPES else weight.float())
        self.alive.append(matrix)
        return matrix

    def embedding(self, module: Any, factor: float) -> tuple[KernelMatrix, float, bool] | None:
        """What `sct_embed` reads; None where the module has to be called.

        Returns:
            The matrix, what its rows are multiplied with, and whether they are bfloat16.
        """
        if isinstance(module, PackedEmbedding):
            matrix, dtype = module.matrix, module.dtype
            own = 1.0 if module.factor is None else float(module.factor)
        elif type(module) is torch.nn.Embedding and module.embedding_dim % WORD == 0:
            matrix, dtype, own = KernelMatrix(module.weight.detach()), module.weight.dtype, 1.0
        else:
            return None
        if torch.float16 in (matrix.dtype, dtype) or (own != 1.0 and factor != 1.0):
            return None
        self.alive.append(matrix)
        return matrix, own * factor, dtype == torch.bfloat16

    def bias(self, linear: Any, begin: int, end: int) -> int | None:
        """Some entries of the bias of a linear."""
        return self.floats(None if linear.bias is None else linear.bias[begin:end])

    def floats(self, tensor: Tensor | None) -> int | None:
        """The address of a float32 copy that lives as long as the description."""
        if tensor is None:
            return None
        copy = tensor.detach().float().contiguous().clone()
        self.alive.append(copy)
        return address(copy)


def _correction(ffn: Any, router: Any) -> Tensor | None:
    """What is added to the scores of experts for the choice alone."""
    owners = (router, ffn, getattr(router, "moe_statics", None))
    found = (getattr(owner, "e_score_correction_bias", None) for owner in owners)
    return next((x for x in found if x is not None), None)


def _is_layer_norm(norm: Any) -> bool:
    """Whether a norm subtracts the mean."""
    name = type(norm).__name__
    return isinstance(norm, nn.LayerNorm) or ("LayerNorm" in name and "RMS" not in name)
