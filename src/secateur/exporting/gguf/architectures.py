"""The families that llama.cpp computes like transformers, and a folder as a model of one.

Families have the constants that llama.cpp reads, the order in which it wants weights, and the
reasons for which it would compute a model differently. Such a model is refused. Of a model that
sees or hears the part for text is described.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import gguf
import torch
from torch import Tensor

from secateur.errors import ExportError
from secateur.exporting import ExportSource
from secateur.exporting.gguf.model import (
    LAYER,
    OF_MTP,
    LlamaCppFamily,
    LlamaCppModel,
    rope_differences,
    unwritten,
)
from secateur.models.architecture import family_of_type
from secateur.models.configuration import transformers_errors

A = gguf.MODEL_ARCH
GELU_TANH = ("gelu_pytorch_tanh",)

LARGEST_GEMMA = {A.GEMMA2: 46, A.GEMMA3: 62}
"""The layers by which llama.cpp recognises the 27B models, whose attention scale differs."""


def _windows(model: LlamaCppModel) -> dict[str, Any]:
    """Sliding windows of Gemma 2 and 3."""
    if not model.window:
        return {}
    return {
        "sliding_window": model.window,
        "sliding_window_pattern": model.period("sliding_attention"),
        "rope_freq_base_swa": float(model.rope("sliding_attention")["rope_theta"]),
    }


def _two_heads(model: LlamaCppModel) -> dict[str, Any]:
    """Windows of Gemma 4, where heads have another size."""
    local = model.layers_of("sliding_attention")
    size = model.heads_of[local[0]] if local else model.head
    return {
        **_windows(model),
        "sliding_window_pattern": [layer in local for layer in range(model.layers)],
        **dict.fromkeys(("key_length_swa", "value_length_swa", "rope_dimension_count_swa"), size),
        "rope_dimension_count": model.head,
        **({"expert_used_count": model.config.top_k_experts} if model.experts else {}),
        "embedding_length_per_layer_input": model.config.hidden_size_per_layer_input or 0,
    }


def _gemma4_differences(model: LlamaCppModel) -> Iterator[str]:
    """What llama.cpp takes for granted of Gemma 4."""
    local, first = model.layers_of("sliding_attention"), model.layers
    if getattr(model.config, "use_bidirectional_attention", None) == "all":
        yield "its tokens see those behind them"
    [rows, *_] = model.shapes.get("model.embed_tokens_per_layer.weight", [model.vocabulary])
    if rows != model.vocabulary:
        yield f"its layers have a table of {rows} tokens, and the vocabulary {model.vocabulary}"
    if 0 in (*model.heads, *model.ffn):
        yield "a layer has no attention or no FFN"
    if shared := model.config.num_kv_shared_layers:
        first -= shared  # llama.cpp reads the keys of the last two layers before
        if first < 2 or [layer in local for layer in (first - 2, first - 1)] != [True, False]:
            yield "its last layers share the keys of others than the two before them"
    yield from _must_be_tied(model)


def _gemma_differences(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp derives the attention scale of Gemma 2 and 3 from the sizes."""
    config, arch = model.config, model.arch
    # llama.cpp takes the hidden size by heads for the 27B models, and the size of a head else
    by_heads = model.layers == LARGEST_GEMMA[arch]
    theirs = config.hidden_size // model.heads[0] if by_heads else model.head
    if config.query_pre_attn_scalar != theirs:
        yield (
            f"it divides attention scores by the root of {config.query_pre_attn_scalar}, llama.cpp "
            f"by that of {theirs}"
        )
    if model.window and model.period("sliding_attention") is None:
        yield "its layers with a sliding window follow no period"
    caps = config.attn_logit_softcapping, config.final_logit_softcapping
    if arch == A.GEMMA2 and None in caps:
        yield "it has no soft caps"
    if arch == A.GEMMA3 and caps[0] is not None:
        yield "it has a soft cap on attention scores"
    if getattr(config, "use_bidirectional_attention", None):
        yield "its tokens see those behind them"
    local = model.rope("sliding_attention").get("rope_type")
    if arch == A.GEMMA3 and model.window and local != "default":
        yield f"the rotary positions of its local layers are of the kind {local!r}"
    yield from _must_be_tied(model)


def _must_be_tied(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp takes the embedding as the head of Gemma."""
    if not model.tied:
        yield "its head is not its embedding"


def _narrow_differences(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp expects that the heads of some families are as wide as the residual stream."""
    width = model.heads[0] * model.head
    if width != model.hidden:
        yield f"its heads have {width} channels and its hidden states {model.hidden}"


def _smollm3_differences(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp rotates all layers of SmolLM3 but every fourth."""
    if [int(x) for x in model.config.no_rope_layers] != [
        int((layer + 1) % 4 != 0) for layer in range(model.layers)
    ]:
        yield "its layers without rotary positions are not every fourth"


def _delta(model: LlamaCppModel) -> dict[str, Any]:
    """Gated DeltaNet in most layers, and positions of three kinds, which are equal for text."""
    config, period = model.config, model.period("linear_attention")
    recurrent = [layer in model.layers_of("linear_attention") for layer in range(model.blocks)]
    listed = {"attention.recurrent_layers": recurrent}
    return {
        "ssm_inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "rope_dimension_sections": [*(model.rope().get("mrope_section") or (11, 11, 10)), 0][:4],
        **({"full_attention_interval": period} if period else listed),
    }


def _derived_differences(model: LlamaCppModel) -> Iterator[str]:
    """Sizes that llama.cpp takes for equal, in DeltaNet, or derives, of GLM's shared expert."""
    config = model.config
    if model.layers_of("linear_attention"):
        if config.linear_key_head_dim != config.linear_value_head_dim:
            yield "the keys and values of its recurrent layers differ in size"
        if model.head < 32:  # three kinds of positions have so many places
            yield f"its heads have {model.head} channels"
    for name, shape in model.shapes.items():
        if name.endswith("shared_experts.down_proj.weight"):
            expected = config.n_shared_experts * model.expert_ffn
            if shape[1] != expected:
                yield f"a shared expert has {shape[1]} neurons, and llama.cpp expects {expected}"


def _delta_arranged(model: LlamaCppModel, name: str, weight: Tensor) -> Tensor:
    """The value heads of DeltaNet take turns: the first of each key head, then the second."""
    config, part = model.config, name.partition(".linear_attn.")[2]
    if part == "A_log":
        weight = -weight.float().exp()
    if part == "conv1d.weight" and weight.ndim == 3:
        weight = weight.squeeze(1)
    dim, keys = int(part == "out_proj.weight"), config.linear_num_key_heads
    if not part or part == "norm.weight" or weight.shape[dim] == 1:
        return weight
    before = 0  # queries and keys, which stay
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        before = 2 * keys * config.linear_key_head_dim
    first, values = weight.split([before, weight.shape[dim] - before], dim)
    each = values.unflatten(dim, (keys, config.linear_num_value_heads // keys, -1))
    return torch.cat([first, each.transpose(dim, dim + 1).flatten(dim, dim + 2)], dim)


def _qwen_moe_differences(model: LlamaCppModel) -> Iterator[str]:
    """llama.cpp divides the weights of the chosen experts by their sum for Qwen3-MoE alone."""
    divides = model.arch == A.QWEN3MOE
    if bool(model.config.norm_topk_prob) != divides:
        verb = "does not divide" if divides else "divides"
        yield f"it {verb} the weights of the chosen experts by their sum"
    if not divides:
        yield from _narrow_differences(model)


QWEN35 = LlamaCppFamily(
    A.QWEN35, norm_shift=1.0, partial=True, predicts=True, arranged=_delta_arranged,
    constants=_delta, differences=_derived_differences,
)  # fmt: skip
GEMMA2 = LlamaCppFamily(
    A.GEMMA2, activations=GELU_TANH, norm_shift=1.0, windows=True, constants=_windows,
    differences=_gemma_differences,
)  # fmt: skip

LLAMA_CPP_FAMILIES = MappingProxyType({
    "llama": LlamaCppFamily(A.LLAMA, interleaved=True, varied=A.DECI),
    "mistral": LlamaCppFamily(A.LLAMA, interleaved=True, varied=A.DECI),
    "qwen2": LlamaCppFamily(A.QWEN2),
    "qwen3": LlamaCppFamily(A.QWEN3),
    "gemma": replace(GEMMA2, arch=A.GEMMA, windows=False, differences=_must_be_tied),
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, arch=A.GEMMA3),
    "gemma4_text": LlamaCppFamily(
        A.GEMMA4, activations=GELU_TANH, windows=True, partial=True, varied=A.GEMMA4,
        constants=_two_heads, differences=_gemma4_differences,
    ),
    "phi3": LlamaCppFamily(A.PHI3, partial=True, differences=_narrow_differences),
    "granite": LlamaCppFamily(A.GRANITE, interleaved=True),
    "smollm3": LlamaCppFamily(A.SMOLLM3, interleaved=True, differences=_smollm3_differences),
    "mixtral": LlamaCppFamily(A.LLAMA, interleaved=True),
    "qwen2_moe": LlamaCppFamily(A.QWEN2MOE, own_head=True, differences=_qwen_moe_differences),
    "qwen3_moe": LlamaCppFamily(A.QWEN3MOE, differences=_qwen_moe_differences),
    "qwen3_5_text": QWEN35,
    "qwen3_5_moe_text": replace(QWEN35, arch=A.QWEN35MOE),
    "glm4_moe": LlamaCppFamily(
        A.GLM4_MOE, partial=True, dense_first=True, predicts=True, constants=lambda model: {
            "leading_dense_block_count": model.dense,
            "expert_weights_norm": bool(model.config.norm_topk_prob),
            "expert_gating_func": gguf.ExpertGatingFuncType.SIGMOID,
        },
        differences=_derived_differences,
    ),
})  # fmt: skip
"""By the model type of transformers."""

OURS = ("model_type", "base_model_type", "architectures", "secateur_cut", "quantization_config")
"""Keys of `config.json` that the configuration of the base class does not have."""


def model_of(source: ExportSource) -> LlamaCppModel:
    """Describe the model of a folder for llama.cpp.

    Raises:
        ExportError: llama.cpp does not know it, or computes it differently.
    """
    from transformers import AutoConfig

    own = dict(source.config.get("text_config", source.config))
    kind = str(own.get("base_model_type", own.get("model_type")))
    family = LLAMA_CPP_FAMILIES.get(kind)
    if family is None:
        raise unwritten(source, f"no GGUF file is written of models of type {kind!r}")
    with transformers_errors(source.folder):
        given = {key: value for key, value in own.items() if key not in OURS}
        config = AutoConfig.for_model(kind, **given)
    model = _sizes_of(source, family, config)
    if model.varied and family.varied is None:
        raise _differs(source, f"its layers differ in size, which it does not allow of {kind}")
    names = ("hidden_activation", "hidden_act")
    activation = next(filter(None, (getattr(config, name, None) for name in names)), None)
    if activation not in family.activations:
        raise _differs(source, f"the activation is {activation}")
    if model.blocks - model.layers > int(family.predicts):
        raise _differs(source, f"{model.blocks - model.layers} layers predict further tokens")
    for why in (*rope_differences(model), *family.differences(model)):
        raise _differs(source, why)
    list(model.tensors(source))  # refuses tensors without a place
    return model


def text_names(source: ExportSource, layers: int) -> dict[str, str]:
    """What a model of text alone calls each stored tensor, but those of other parts.

    The layers for further tokens have the names of GLM-4.5, behind so many decoder layers.
    """
    found, mixed = {}, "text_config" in source.config
    for stored in source.reader.entries:
        text = re.sub(r"^(?:model\.)?(?:language|text)_model\.(?:model\.)?", "model.", stored)
        name = text.replace("model.lm_head", "lm_head")
        if mixed and stored == name and not name.startswith(("lm_head.", "mtp.")):
            continue
        apart = re.fullmatch(r"mtp\.(?:layers\.(\d+)\.(.+)|(.+)\.weight)", name)
        if apart:
            inner = apart[2] or f"{OF_MTP.get(apart[3], apart[3])}.weight"
            name = f"model.layers.{layers + int(apart[1] or 0)}.{inner}"
        found[stored] = name
    return found


def _sizes_of(source: ExportSource, family: LlamaCppFamily, config: Any) -> LlamaCppModel:
    """The sizes of a model, read off its tensors."""
    layers, declared = config.num_hidden_layers, family_of_type(config.model_type)
    experts = declared and declared.experts
    if experts:
        every = {stored: stored for stored in source.reader.entries}
        experts.split(source.reader, every | text_names(source, layers))
    names = text_names(source, layers)
    shapes = {name: tuple(source.reader.entries[stored].shape) for stored, name in names.items()}
    inside = [(int(at[1]), at[2]) for at in map(LAYER.fullmatch, shapes) if at]
    blocks = max([layers, *(block + 1 for block, _ in inside)])
    behind = ["full_attention"] * (blocks - layers)
    kinds = [*(getattr(config, "layer_types", None) or ["full_attention"] * layers), *behind]
    stacks = _stacks(names, experts)
    downs = [stacks.get(f"blk.{n}.ffn_down_exps.weight", ()) for n in range(blocks)]
    dense = next((n for n, down in enumerate(downs) if down), blocks)
    counts = {len(down) for down in downs[dense * family.dense_first :]}
    widths = {shapes[names[stored]][1] for down in downs for stored in down}
    if len(counts) > 1 or len(widths) > 1:
        raise _differs(source, f"its layers have {sorted(counts)} experts of {sorted(widths)}")

    def side(part: str, number: int, of: Sequence[int] = ()) -> list[int]:
        parts = [f"model.layers.{block}.{part}.weight" for block in range(blocks)]
        found = [shapes[name][number] if name in shapes else 0 for name in parts]
        return [size // one for size, one in zip(found, of, strict=True)] if of else found

    def filled(sizes: list[int], gaps: set[int], other: int = 0) -> tuple[int, ...]:
        """Sizes, also where blocks have none by their kind: llama.cpp reads one for all."""
        known = {kind: size for kind, size in zip(kinds, sizes, strict=True) if size}
        other = other or next(iter(known.values()), 0)
        for n in gaps:
            sizes[n] = sizes[n] or known.get(kinds[n], other)
        return tuple(sizes)

    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads_of = tuple(own or size for own in side("self_attn.q_norm", 0))
    heads = side("self_attn.o_proj", 1, heads_of)
    keys, fused = (side(f"self_attn.{x}_proj", 0, heads_of) for x in ("k", "qkv"))
    # a fused projection has the queries, then as many keys as values
    keys = [k or max(0, f - h) // 2 for k, f, h in zip(keys, fused, heads, strict=True)]
    recurrent = {block for block, name in inside if name.startswith("linear_attn.")}
    asking = {block for block, name in inside if name == "self_attn.q_proj.weight"}
    with_experts, wide = {n for n, down in enumerate(downs) if down}, max(widths, default=0)
    width = getattr(config, "intermediate_size", None) or wide
    return LlamaCppModel(
        family=family, config=config, names=names, shapes=shapes, stacks=stacks, layers=layers,
        blocks=blocks, hidden=config.hidden_size, heads_of=heads_of,
        heads=filled(heads, recurrent), kv_heads=filled(keys, recurrent | asking),
        ffn=filled(side("mlp.down_proj", 1), with_experts, width), expert_ffn=wide, dense=dense,
        vocabulary=shapes["model.embed_tokens.weight"][0], experts=max(counts, default=0),
        tied=bool(config.tie_word_embeddings) or "lm_head.weight" not in shapes,
    )  # fmt: skip


def _stacks(names: Mapping[str, str], experts: Any) -> dict[str, tuple[str, ...]]:
    """The stored tensors of experts that the file stacks, by the name of the stack."""
    found: dict[str, dict[int, str]] = {}
    for stored, name in names.items() if experts else ():
        layer, place = LAYER.fullmatch(name), experts.place_of(name)
        linear = experts.stored_linear(name)
        if layer and place and linear:
            stack = f"blk.{layer[1]}.ffn_{linear.removesuffix('_proj')}_exps.weight"
            found.setdefault(stack, {})[int(place[1])] = stored
    return {stack: tuple(of[e] for e in sorted(of)) for stack, of in found.items()}


def _differs(source: ExportSource, why: str) -> ExportError:
    """The error for a model that llama.cpp would not compute alike."""
    return unwritten(source, f"llama.cpp would not compute this model like transformers: {why}")


def refused(why: str, where: str) -> ExportError:
    """The error for a tokenizer that a GGUF file cannot describe."""
    return ExportError(
        f"llama.cpp would not tokenize like this model: {why}",
        where=where,
        remedy="export it with --to compressed-tensors, which keeps the files of the tokenizer; to "
        "try it all the same, use llama.cpp's own converter",
    )
