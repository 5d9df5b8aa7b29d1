"""Checks `config.json` against the weights, before transformers builds anything from it.

Its numbers decide how many modules are built and how long their buffers are. The headers of the
checkpoint show which numbers are possible, so wrong ones are refused within milliseconds. Whether
a folder holds a whole model is seen in the same way.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ArchitectureError, CheckpointError, SecateurError, first_line
from secateur.models import checkpoint

TEXT_PARTS = ("text_config", "decoder", "generator")
"""Where transformers looks for the part of a configuration that describes the decoder."""

DESCRIPTIONS = ("quantization_config", "compression_config", "sparsity_config")
"""The keys that say how weights are stored."""

OF_MODELOPT = "hf_quant_config.json"
"""Where NVIDIA's Model-Optimizer describes the weights, in early folders alone."""

PIPELINE = "modules.json"
"""The modules of an embedding model, in the order in which sentence-transformers calls them."""

LAYERS = "num_hidden_layers"
WIDTHS = ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Sizes for which some stored tensor must have a side at least as long."""

MAX_POSITIONS = 2**31

HEAD, MTP = "speculator_model", "mtp"
"""The model types of drafts that are no models: heads, and rows for MTP layers."""

MOST_LAYERS, MOST_SIDE = 1024, 2**22
"""The most that a configuration without weights may say: several times the largest known model."""


if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())  # before Python 3.12 only the path of a system has subclasses


class TrustedFolder(_Path):
    """A folder whose own Python code may run, because the user has said so.

    Whoever opens a model decides once, and all that load something from it look at the folder. A
    folder within it or beside it is trusted too; a path that is made anew of its name is not.
    """


def trusted_folder(folder: str | Path, trust_remote_code: bool) -> Path:
    """A folder whose code may run if the caller says so, or if it is trusted already."""
    if trust_remote_code:
        return TrustedFolder(folder)
    return folder if isinstance(folder, Path) else Path(folder)


def read_configuration(folder: Path) -> dict[str, Any]:
    """The JSON of `config.json`, with the form of the weights that a file beside it describes."""
    file = folder / "config.json"
    if not file.is_file():
        remedy = "name a folder written by save_pretrained"
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        inner = sorted(p.parent for p in folder.glob("*/config.json"))
        if (folder / "adapter_config.json").is_file():
            remedy = "this is an adapter: merge it into its base model, then name the merged folder"
        elif (folder / PIPELINE).is_file() and inner:
            remedy = f"name the folder of the model within it: {inner[0]}"
        elif ggufs:
            remedy = f"name the GGUF file itself: {folder / ggufs[0]}"
        raise CheckpointError("the folder has no config.json", where=str(folder), remedy=remedy)
    try:
        config = checkpoint.parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fault = "cannot be read" if isinstance(error, OSError) else "is not JSON"
        raise checkpoint.damaged(f"the configuration {fault}: {error}", file) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            "this is not the configuration of a model: it has no 'model_type'",
            where=str(file),
            remedy="name a folder written by save_pretrained",
        )
    beside = folder / OF_MODELOPT
    if is_plain(config) and beside.is_file():
        try:
            described = checkpoint.parse_json(beside.read_bytes())["quantization"]
            named = described["quant_algo"]  # None where only the cache of keys is rounded
        except (ValueError, KeyError, TypeError) as error:
            raise checkpoint.damaged(f"it does not say quant_algo: {error!r}", beside) from None
        if named:
            config["quantization_config"] = {"quant_method": "modelopt", **described}
    return config


def type_of(folder: Path) -> str:
    """The model type that the configuration of a folder names."""
    return str(read_configuration(folder)["model_type"])


def check_sizes(folder: Path, *, alone: bool = False) -> None:
    """Refuse a configuration whose sizes do not fit the stored tensors.

    This check finds only sizes that would make building the model impossible or endless. Shapes are
    compared one by one after the model has been built without weights.

    Args:
        folder: of the checkpoint.
        alone: whether the folder may have no weights; then no model known is nearly as large.
    """
    config = read_configuration(folder)
    parts = [config, *(config[name] for name in TEXT_PARTS if name in config)]
    described = [part for part in parts if isinstance(part, dict)]
    file = folder / "config.json"
    if alone:
        if not any(part.keys() & {_keys_of(part)[LAYERS], LAYERS} for part in described):
            raise checkpoint.damaged(f"the configuration does not say {LAYERS}", file)
        layers, side = MOST_LAYERS, MOST_SIDE
        deeper, wider = (f"no known model has nearly {most}" for most in (layers, side))
    else:
        layers, side = _sizes_in(checkpoint.read_headers(checkpoint.shard_files(folder)))
        deeper, wider = (
            f"the weights have {layers} layers",
            f"no stored tensor is larger than {side}",
        )
    limits = {LAYERS: (layers, deeper), **dict.fromkeys(WIDTHS, (side, wider))}
    limits["max_position_embeddings"] = (MAX_POSITIONS, "no model has as many")
    for part in described:
        _check_part(part, limits, file)


def _sizes_in(headers: list[checkpoint.Header]) -> tuple[int, int]:
    """The highest count of numbered modules in one list, and the longest side of a tensor."""
    numbered: dict[str, set[str]] = defaultdict(set)
    for header in headers:
        for name in header:
            for found in re.finditer(r"\d+", name):
                numbered[name[: found.start()]].add(found[0])
    layers = max(map(len, numbered.values()), default=0)
    sides = [side for header in headers for shape in _shapes_in(header) for side in shape]
    return layers, max([layers, *sides])


def _shapes_in(header: checkpoint.Header) -> Iterator[tuple[int, ...]]:
    """The shapes of the tensors of a file, and of the matrices packed in it."""
    yield from (entry.shape for entry in header.values())
    try:
        metadata = json.loads(header.metadata.get("secateur", "{}"))
        for table in (metadata["layouts"], metadata["archived"]):
            yield from (tuple(map(int, described["shape"])) for described in table.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return  # none, or damaged, which the reader of packed files reports


def _check_part(part: Mapping[str, Any], limits: Mapping[str, tuple[int, str]], file: Path) -> None:
    """Check the numbers of a configuration, or of the part of it that describes the decoder."""
    found = {}
    for name, key in _keys_of(part).items():
        value, (most, why) = part.get(key), limits[name]
        if value is None or isinstance(value, list):  # absent, or one for each layer
            continue
        found[name] = value
        if type(value) is not int or value < 1:
            raise checkpoint.damaged(
                f"{key} is {str(value)[:40]!r}, not a whole number from 1", file
            )
        if value > most:
            raise CheckpointError(
                f"{key} is {value}, and {why}",
                where=str(file),
                remedy="the configuration and the weights are of different models, or the weights "
                "are incomplete: copy or download both again",
            )
    if (heads := found.get("num_attention_heads")) is None:
        return
    if heads % (groups := found.get("num_key_value_heads", 1)):
        said = f"{heads} attention heads cannot share {groups} heads of keys and values evenly"
        raise checkpoint.damaged(said, file)
    hidden = found.get("hidden_size", heads)
    free = "head_dim" in part or getattr(_config_class(part), "head_dim", None) is not None
    if hidden % heads and not free:
        raise checkpoint.damaged(
            f"hidden size {hidden} does not divide into {heads} attention heads", file
        )


def _keys_of(part: Mapping[str, Any]) -> dict[str, str]:
    """The names that this type of model has for the checked sizes."""
    names = (LAYERS, *WIDTHS, "max_position_embeddings")
    called = dict(getattr(_config_class(part), "attribute_map", {}))
    if "decoder_layers" in part:  # an encoder-decoder maps the name to its encoder's
        called[LAYERS] = "decoder_layers"
    return {name: called.get(name, name) for name in names}


def _config_class(part: Mapping[str, Any]) -> Any:
    """The configuration class of transformers; None for types that it does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = part.get("base_model_type", part.get("model_type"))
    return CONFIG_MAPPING[kind] if isinstance(kind, str) and kind in CONFIG_MAPPING else None


def with_text(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """A configuration, and the one of the text model within it, if there is one."""
    text = config.get("text_config")
    return (config, text) if isinstance(text, Mapping) else (config,)


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a configuration says nothing about a form of the weights."""
    return all(part.keys().isdisjoint(DESCRIPTIONS) for part in with_text(config))


def described_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the form of the weights in a configuration; empty without one.

    Models that see and read have it beside the text model's configuration, or within it.
    """
    for part in with_text(config):
        for key in DESCRIPTIONS[:2]:
            found = part.get(key)
            if isinstance(found, Mapping) and found:
                return dict(found)
    return {}


@contextmanager
def transformers_errors(folder: Path) -> Iterator[None]:
    """Turn every error of transformers on a configuration into an `ArchitectureError`.

    Its model classes check little, and each fails in its own way.
    """
    try:
        yield
    except (SecateurError, MemoryError):
        raise
    except Exception as error:
        config = read_configuration(folder)
        parts = {"": config, **{f"{name}.": config.get(name) for name in TEXT_PARTS}}
        # a KeyError of transformers has the value that one of its tables lacks
        named = [
            f"{prefix}{key}"
            for prefix, part in parts.items()
            for key, value in (part.items() if isinstance(part, dict) else ())
            if isinstance(error, KeyError) and error.args and value == error.args[0]
        ]
        if named:
            said = f"{named[0]} is {first_line(error)[:100]}, which transformers does not know"
            raise checkpoint.damaged(said, folder / "config.json") from error
        said = f"transformers cannot build this model: {first_line(error)[:300]}"
        remedy = (
            "only decoders that AutoModelForCausalLM knows can be pruned, also inside models of "
            "AutoModelForImageTextToText"
        )
        if _config_class(config) is None and not isinstance(folder, TrustedFolder):
            said = f"this release of transformers has no class for {config['model_type']}"
            remedy = (
                "update transformers; or cut a GGUF file of the model, which needs no class: "
                "secateur structure FILE.gguf --experts 0.75 --output SMALLER.gguf"
            )
        if config["model_type"] in (HEAD, MTP):
            said = "this is a draft head, which is no model by itself"
            remedy = "name its model, and the head as its draft: secateur bench MODEL --draft HEAD"
        if "auto_map" in config:
            remedy += "; for code that comes with a checkpoint you trust, pass --trust-remote-code"
        where = str(folder / "config.json")
        raise ArchitectureError(said, where=where, remedy=remedy) from error


def check_folder(folder: Path) -> None:
    """Check that a folder contains a complete model, without reading its weights.

    The configuration must name a model type, all shards must exist, and the header of each one must
    describe every byte of its file.
    """
    read_configuration(folder)
    for shard in checkpoint.shard_files(folder):
        with shard.open("rb") as stream:
            if stream.read(32).startswith(b"version https://git-lfs"):
                raise CheckpointError(
                    "this is only a git LFS pointer; the weights were not downloaded",
                    where=str(shard),
                    remedy="run 'git lfs pull' in the folder",
                )
        checkpoint.read_header(shard)
