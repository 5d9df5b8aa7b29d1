"""What a model is in llama.cpp: its description, its fields and its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gguf
import torch
from torch import Tensor

from secateur.errors import ArchitectureError
from secateur.exporting import ExportSource
from secateur.exporting.gguf.decoder import LlamaCppDecoder
from secateur.exporting.gguf.families import LLAMA_CPP_FAMILIES, LlamaCppFamily
from secateur.exporting.gguf.refusals import differs
from secateur.exporting.gguf.rope import (
    long_rope_start,
    rope_constants,
    rope_differences,
    rope_tensors,
)
from secateur.models.architecture import families
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import transformers_errors
from secateur.models.layout import PROJECTIONS, Experts
from secateur.models.stored_parameters import split_stored

LEAST_FFN = 32
"""llama.cpp skips a layer whose FFN is 0 wide, so a missing FFN becomes this many zeros."""

OURS = ("model_type", "base_model_type", "architectures", "secateur_cut", "quantization_config")
"""Keys of `config.json` that the configuration of the base class does not have."""


@dataclass(frozen=True)
class Planned:
    """A tensor of the file.

    Attributes:
        name: in GGUF.
        sources: its name in the source; one for each expert where the file stacks experts; none for
            a tensor that the source does not store.
        shape: its shape.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LlamaCppModel:
    """A model in the terms of llama.cpp.

    Attributes:
        family: how llama.cpp computes it.
        decoder: its sizes.
    """

    family: LlamaCppFamily
    decoder: LlamaCppDecoder

    @property
    def ignored_window(self) -> int | None:
        """The sliding window, where llama.cpp does not apply it."""
        return None if self.family.windows else self.decoder.window

    @property
    def context(self) -> int:
        """The positions for which llama.cpp computes like transformers."""
        positions = int(self.decoder.config.max_position_embeddings)
        return min(positions, self.ignored_window or positions, self.stretched_from or positions)

    @property
    def stretched_from(self) -> int | None:
        """The original context of a model with LongRoPE; None without it."""
        return long_rope_start(self.decoder)

    def add_fields(self, writer: gguf.GGUFWriter) -> None:
        """Write the sizes and constants that llama.cpp reads."""
        decoder = self.decoder
        per_layer = decoder.arch == self.family.varied
        fields = {
            "block_count": decoder.layers,
            "context_length": self.context,
            "embedding_length": decoder.config.hidden_size,
            "vocab_size": decoder.vocabulary,
            "key_length": decoder.head,
            "value_length": decoder.head,
            "layer_norm_rms_eps": decoder.config.rms_norm_eps,
            **rope_constants(decoder),
            **self.family.constants(decoder),
        }
        sizes = {
            "head_count": decoder.heads,
            "head_count_kv": decoder.kv_heads,
            "feed_forward_length": [width or LEAST_FFN for width in decoder.ffn],
        }
        fields |= {name: list(of) if per_layer else of[0] for name, of in sizes.items()}
        for name, value in fields.items():
            getattr(writer, f"add_{name}")(value)

    def tensors(self, source: ExportSource) -> Iterator[Planned]:
        """Every tensor of the file that the source stores.

        Raises:
            ArchitectureError: llama.cpp has no place for a tensor.
        """
        names = gguf.get_tensor_name_map(self.decoder.arch, self.decoder.layers)
        entries = source.reader.entries
        stacked = stacked_experts(source)
        of_experts = {name for group in stacked.values() for name in group}
        plain = {name: (name,) for name in entries if name not in of_experts}
        if self.decoder.tied:
            plain.pop("lm_head.weight", None)
            if self.family.own_head:
                plain["lm_head.weight"] = ("model.embed_tokens.weight",)
        for name, group in {**plain, **stacked}.items():
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise ArchitectureError(
                    f"llama.cpp has no place for the tensor {name!r}",
                    where=str(source.folder),
                    remedy="export to another target",
                )
            shape = entries[group[0]].shape
            yield Planned(known, group, (len(group), *shape) if name in stacked else shape)

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that the source does not store."""
        hidden = self.decoder.config.hidden_size
        for layer, width in enumerate(self.decoder.ffn):
            if width == 0:
                yield f"blk.{layer}.ffn_norm.weight", torch.ones(hidden)
                for name in ("gate", "up"):
                    yield f"blk.{layer}.ffn_{name}.weight", torch.zeros(LEAST_FFN, hidden)
                yield f"blk.{layer}.ffn_down.weight", torch.zeros(hidden, LEAST_FFN)
        yield from rope_tensors(self.decoder)

    def read(self, reader: CheckpointReader, one: Planned) -> Tensor:
        """A tensor of the source as llama.cpp expects it, float32."""
        parts = [self.arranged(name, reader.read(name)).float() for name in one.sources]
        return torch.stack(parts) if len(one.shape) == 3 else parts[0]

    def arranged(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the source with its channels in llama.cpp's order, norms with their shift.

        Args:
            name: in the source.
            weight: [out, in], or [out] for a bias or a norm.
        """
        owner = name.rpartition(".")[0]
        if self.family.norm_shift and owner.endswith("norm"):
            return weight.float() + self.family.norm_shift
        if not self.family.interleaved or not owner.endswith(("q_proj", "k_proj")):
            return weight
        halves = weight.reshape(-1, 2, self.decoder.head // 2, *weight.shape[1:])
        return halves.swapaxes(1, 2).reshape(weight.shape)


def model_of(source: ExportSource) -> LlamaCppModel:
    """Describe the model of a folder for llama.cpp.

    Raises:
        ArchitectureError: llama.cpp does not know it, or computes it differently.
    """
    kind = model_type(source)
    family = LLAMA_CPP_FAMILIES.get(kind)
    if family is None:
        raise differs(source.folder, f"models of type {kind!r} are not described for it here")
    experts = experts_of(source)
    if experts is not None:
        split_stored(source.reader, experts, {name: name for name in source.reader.entries})
    decoder = decoder_of(source, family, configuration(source, kind))
    if decoder.varied:
        if family.varied is None:
            raise differs(
                source.folder, f"its layers differ in size, which it does not allow of {kind}"
            )
        decoder = replace(decoder, arch=family.varied)
    model = LlamaCppModel(family, decoder)
    check(model, source)
    list(model.tensors(source))  # refuses tensors without a place
    return model


def model_type(source: ExportSource) -> str:
    """The type of the base class."""
    return str(source.config.get("base_model_type", source.config.get("model_type")))


def configuration(source: ExportSource, kind: str) -> Any:
    """The configuration of the base class, with the defaults of transformers."""
    from transformers import AutoConfig

    own = {key: value for key, value in source.config.items() if key not in OURS}
    with transformers_errors(source.folder):
        return AutoConfig.for_model(kind, **own)


def decoder_of(source: ExportSource, family: LlamaCppFamily, config: Any) -> LlamaCppDecoder:
    """The sizes of a model, read off its tensors."""
    entries, layers = source.reader.entries, range(config.num_hidden_layers)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stacked = stacked_experts(source)

    def side(part: str, number: int) -> tuple[int, ...]:
        names = [f"model.layers.{layer}.{part}.weight" for layer in layers]
        return tuple(entries[name].shape[number] if name in entries else 0 for name in names)

    heads = tuple(width // head for width in side("self_attn.o_proj", 1))
    fused = tuple(rows // head for rows in side("self_attn.qkv_proj", 0))
    separate = tuple(rows // head for rows in side("self_attn.k_proj", 0))
    kv_heads = tuple((f - h) // 2 for f, h in zip(fused, heads, strict=True))
    ffn, count = side("mlp.down_proj", 1), 0
    if stacked:
        downs = [stacked.get(f"model.layers.{n}.mlp.experts.down_proj.weight", ()) for n in layers]
        ffn = tuple(entries[down[0]].shape[1] if down else 0 for down in downs)
        counts = {len(down) for down in downs}
        if len(counts) > 1:
            raise differs(source.folder, f"its layers have {sorted(counts)} experts")
        (count,) = counts
    return LlamaCppDecoder(
        family.arch,
        config,
        head,
        heads,
        kv_heads if any(fused) else separate,
        ffn,
        vocabulary=entries["model.embed_tokens.weight"].shape[0],
        tied=bool(config.tie_word_embeddings) or "lm_head.weight" not in entries,
        experts=count,
    )


def check(model: LlamaCppModel, source: ExportSource) -> None:
    """Refuse what llama.cpp would compute differently."""
    family, decoder = model.family, model.decoder
    config = decoder.config
    names = ("hidden_activation", "hidden_act")
    activation = next(filter(None, (getattr(config, name, None) for name in names)), None)
    if activation not in family.activations:
        raise differs(source.folder, f"the activation is {activation}")
    for why in (*rope_differences(decoder), *family.differences(decoder)):
        raise differs(source.folder, why)


def experts_of(source: ExportSource) -> Experts | None:
    """Where the experts of a model are; None for a dense model."""
    kind = model_type(source)
    found = (families[name] for name in families)
    return next((family.experts for family in found if kind in family.model_types), None)


def stacked_experts(source: ExportSource) -> dict[str, tuple[str, ...]]:
    """The experts' matrices that the file stacks: {name of the stack: names in the source}."""
    experts = experts_of(source)
    if experts is None:
        return {}
    called = dict(zip(experts.stored, PROJECTIONS, strict=True))
    pattern = rf"(model\.layers\.\d+)\..+\.experts\.(\d+)\.({'|'.join(called)})\.weight"
    found: dict[str, dict[int, str]] = {}
    for name in source.reader.entries:
        part = re.fullmatch(pattern, name)
        if part:
            stack = f"{part[1]}.mlp.experts.{called[part[3]]}.weight"
            found.setdefault(stack, {})[int(part[2])] = name
    return {stack: tuple(of[e] for e in sorted(of)) for stack, of in found.items()}
