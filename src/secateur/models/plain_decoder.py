"""The sizes of a plain decoder, read from its `config.json` without transformers and torch.

A plain layer is Llama's: queries, keys, values and an output; a gate, up and down, or a router and
experts that have these three. A family differs from it in norms, biases and windows (`PLAIN`).
transformers builds every other model, which takes seconds: `secateur.models.counting`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from secateur.models.shape import DecoderSizes, LayerCache, LayerKind, ModelShape

if TYPE_CHECKING:  # it needs torch
    from secateur.models.header import GgufHeader

MOST_LAYERS, MOST_SIDE = 1024, 2**22
"""The most that a configuration without weights may say: several times the largest known model."""


@dataclass(frozen=True)
class PlainFamily:
    """What a configuration does not say.

    Attributes:
        named: what it has to say, because transformers would fill in a constant.
        ffn: where the neurons of a feed-forward, or of an expert, stand.
        norms: of a layer, as wide as the residual stream.
        head_norms: whether queries and keys have norms: `head` over a head, `all` over all heads.
        biases: whether queries, keys and values have biases in any case.
        tied: whether the head is the embedding where nothing is said.
        windowed: whether all layers have the window that it names.
    """

    named: tuple[str, ...] = ()
    ffn: str = "intermediate_size"
    norms: int = 2
    head_norms: str = ""
    biases: bool = False
    tied: bool = False
    windowed: bool = False


GROUPS = ("num_key_value_heads",)
HEADS = (*GROUPS, "head_dim")
WINDOWED = PlainFamily((*GROUPS, "sliding_window"), windowed=True)

PLAIN = {
    "llama": PlainFamily(),
    "mistral": WINDOWED,
    "mixtral": replace(WINDOWED, named=(*WINDOWED.named, "num_experts_per_tok")),
    "phi3": WINDOWED,
    "qwen2": PlainFamily(GROUPS, biases=True),
    "qwen3": PlainFamily(HEADS, head_norms="head"),
    "qwen3_moe": PlainFamily(
        (*GROUPS, "num_experts_per_tok"), "moe_intermediate_size", head_norms="head"
    ),
    "gemma": PlainFamily(HEADS, tied=True),
    "gemma2": PlainFamily((*HEADS, "layer_types"), norms=4, tied=True),
    "gemma3_text": PlainFamily((*HEADS, "layer_types"), norms=4, head_norms="head", tied=True),
    "olmo2": PlainFamily(GROUPS, head_norms="all"),
}
"""By model type. Tests compare each with the counts of the modules that transformers builds."""

UNUSUAL = ("auto_map", "secateur_cut", "mlp_only_layers", "attention_bias", "mlp_bias")
"""What no plain decoder has: code of its own, layers that differ, biases that are chosen."""


@dataclass(frozen=True, kw_only=True)
class PlainDecoder(DecoderSizes):
    """The sizes of a plain decoder.

    Attributes:
        ffn: neurons of the feed-forward, or of each expert.
        heads: query heads.
        kv_heads: KV heads.
        head: channels of a head.
        experts_per_token: experts that compute for a token.
        windows: the window of each layer that has one.
        vectors: weights of the norms and biases of a layer; None for those of two norms.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # facts.yaml has such sizes too

    ffn: int
    heads: int
    kv_heads: int
    head: int
    experts_per_token: int = 0
    windows: tuple[int, ...] = ()
    vectors: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PlainDecoder | None:
        """The sizes that a configuration says; None where transformers has to say them."""
        family = PLAIN.get(str(config.get("model_type")))
        if family is None or any(config.get(name) for name in UNUSUAL):
            return None
        if config.get("decoder_sparse_step", 1) != 1 or not set(family.named) <= config.keys():
            return None
        said: Any = config.get
        hidden, heads = said("hidden_size"), said("num_attention_heads")
        layers, vocabulary = said("num_hidden_layers"), said("vocab_size")
        ffn, kv_heads = said(family.ffn), said("num_key_value_heads") or heads
        mixture = "num_experts_per_tok" in family.named
        experts = said("num_experts", said("num_local_experts")) if mixture else 1
        taken = config["num_experts_per_tok"] if mixture else 1
        if not _possible(hidden, heads, layers, vocabulary, ffn, kv_heads, experts, taken):
            return None
        head, rest = said("head_dim") or hidden // heads, heads % kv_heads
        rest += 0 if said("head_dim") else hidden % heads
        windows, both = _windows(config, family, layers), (heads + kv_heads) * head
        if not _possible(head) or rest or taken > experts or layers > MOST_LAYERS:
            return None
        if windows is None:
            return None
        return cls(
            layers=layers,
            hidden=hidden,
            vocabulary=vocabulary,
            tied=bool(config.get("tie_word_embeddings", family.tied)),
            experts=experts if mixture else 0,
            ffn=ffn,
            heads=heads,
            kv_heads=kv_heads,
            head=head,
            experts_per_token=taken if mixture else 0,
            windows=windows,
            vectors=family.norms * hidden
            + {"": 0, "head": 2 * head, "all": both}[family.head_norms]
            + (both + kv_heads * head if family.biases else 0),
        )

    def shape(self, name: str) -> ModelShape:
        """The counts.

        attention = hidden · (2 · heads + 2 · kv_heads) · head; FFN = 3 · hidden · ffn, times
        experts. A router, hidden · experts, is no linear of its layer.
        """
        attention = self.hidden * self.head * 2 * (self.heads + self.kv_heads)
        ffn = 3 * self.hidden * self.ffn
        router = self.hidden * self.experts
        many = self.layers * ffn * self.experts
        once = self.layers * (attention + (0 if self.experts else ffn))
        embedding = self.vocabulary * self.hidden
        kept, width = 2 * self.kv_heads * self.head, 2 * self.heads * self.head
        windows = Counter([*self.windows, *[None] * (self.layers - len(self.windows))])
        vectors = 2 * self.hidden if self.vectors is None else self.vectors
        return ModelShape(
            name=name,
            layers=self.layers,
            hidden=self.hidden,
            linears=once + many,
            active=once + self.layers * ffn * self.experts_per_token,
            embedding=embedding,
            head=embedding,
            tied=self.tied,
            other=self.layers * (vectors + router) + self.hidden,
            kinds=tuple(
                LayerKind(count, LayerCache(kept, kept, window, width=width, step_width=width))
                for window, count in windows.items()
            ),
            vocabulary=self.vocabulary,
            experts=self.experts,
            expert_weights=many,
        )


GGUF_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe",
              "gemma": "gemma", "phi3": "phi3", "olmo2": "olmo2"}  # fmt: skip
"""The model type of each architecture of a GGUF file. Llama with experts is Mixtral."""


def gguf_configuration(header: GgufHeader) -> dict[str, Any]:
    """What a configuration would say, read off the header of a GGUF file."""
    arch = str(header.metadata.get("general.architecture"))
    said = {key.removeprefix(f"{arch}."): value for key, value in header.metadata.items()}
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    experts = said.get("expert_count") or None
    return {
        "model_type": "mixtral" if experts and arch == "llama" else GGUF_TYPES.get(arch),
        "num_hidden_layers": said.get("block_count"),
        "hidden_size": said.get("embedding_length"),
        "intermediate_size": said.get("feed_forward_length"),
        "moe_intermediate_size": said.get("expert_feed_forward_length"),
        "num_attention_heads": said.get("attention.head_count"),
        "num_key_value_heads": said.get("attention.head_count_kv"),
        "head_dim": said.get("attention.key_length"),
        "sliding_window": said.get("attention.sliding_window") or None,
        "num_experts": experts,
        "num_experts_per_tok": said.get("expert_used_count"),
        "vocab_size": shapes.get("token_embd.weight", (None,))[0],
        "tie_word_embeddings": "output.weight" not in shapes,
    }


def _possible(*sizes: Any) -> bool:
    """Whether all are sizes that a model may have."""
    return all(type(size) is int and 1 <= size <= MOST_SIDE for size in sizes)


def _windows(config: Mapping[str, Any], family: PlainFamily, layers: int) -> tuple[int, ...] | None:
    """The windows of the layers that have one; None where it is not said plainly."""
    said: Any = config.get
    window, kinds = said("sliding_window"), said("layer_types")
    used = said("use_sliding_window", window is not None and not family.windowed)
    if kinds is None and not used:
        kinds = ["sliding_attention" if family.windowed and window else "full_attention"] * layers
    if not isinstance(kinds, list) or len(kinds) != layers:
        return None
    sliding = kinds.count("sliding_attention")
    if sliding + kinds.count("full_attention") != layers or (sliding and not _possible(window)):
        return None
    return (window,) * sliding
