"""Tiny checkpoints and tokenizers, written to disk in milliseconds and without a network."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from zoo import class_of, config_of, with_routes

from secateur.models.skeleton import quiet_transformers

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHARACTERS = [*string.ascii_letters, *string.digits, " ", "\n", *string.punctuation[:28]]


def tiny_tokenizer(
    vocab: Sequence[str] | None = None, *, add_bos: bool = False, model_max_length: int = 64
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 96 tokens, one a character; or of the words in `vocab`, split at spaces.

    Ids 0 to 3 are <pad>, <bos>, <eos> and <unk>, as in the models of `zoo`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = [*SPECIAL, *(CHARACTERS if vocab is None else vocab)]
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    if vocab is None:
        inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
    else:
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=model_max_length,
    )


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of 256 tokens, one a byte, as byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


def save_tiny(
    folder: Path,
    family: str = "llama",
    shards: int = 1,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a random model of a family of `zoo` with its tokenizer, in exactly `shards` files."""
    config = config_of(family)
    for name, value in overrides.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    saved(with_routes(class_of(config).from_config(config, dtype=dtype)), folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    if shards > 1:
        split_shards(folder, shards)
    return folder


def saved(model: Any, folder: Path) -> Path:
    """Write a model, without the notes of transformers."""
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def tiny_llama(folder: Path, **overrides: Any) -> Path:
    """`save_tiny` of the family llama."""
    return save_tiny(folder, "llama", **overrides)


def split_shards(folder: Path, shards: int) -> None:
    """Replace the one safetensors file of a folder by so many of them and an index."""
    single = folder / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({n: tensors[n] for n in mine}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
