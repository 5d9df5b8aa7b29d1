"""A model without its weights, and where a checkpoint stores its parameters.

Every module is in place, and every parameter on the meta device.
Layers are filled from the checkpoint when their turn comes and emptied afterwards. So memory holds
one decoder layer at a time, whatever the number of layers.

**Stored parameters.** Most parameters are stored unchanged, under the same or an older name. Some
consist of several stored tensors (the experts of a layer, one after the other), or share one
(queries, keys and values). transformers has a table of such conversions. `StoredModel` applies it
to one parameter at a time, so that reading a model, or writing a trained one, never needs all of it
in memory.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import ArchitectureError, CheckpointError, first_line
from secateur.models.architecture import experts_of, further_counts, setting, text_config
from secateur.models.checkpoint import CheckpointReader, TensorEntry, damaged
from secateur.models.configuration import (
    PIPELINE,
    TrustedFolder,
    check_sizes,
    transformers_errors,
)
from secateur.models.experts import open_experts

LARGE = 2**24
"""Values of a tensor that is large."""


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' advice from the user, because it is about choices that secateur makes."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built here have their parameters on the meta device, and real buffers.

    Buffers such as rotary frequencies are not stored in checkpoints, so they are computed.
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    unfilled = init_empty_weights(include_buffers=False)
    with quiet_transformers(), unfilled, no_init_weights(), _LargeOnMeta():
        yield


class _LargeOnMeta(TorchFunctionMode):
    """Makes large empty tensors on the meta device at once.

    A parameter reaches that device when it is registered. Until then its memory is allocated, and
    all experts of a layer of DeepSeek-V3 together are 15 GB in bfloat16.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            size = args[0] if args and isinstance(args[0], tuple | list) else args
            if math.prod(size) > LARGE:
                options["device"] = "meta"
        return func(*args, **options)


def skeleton_of(model_class: Any, config: Any, dtype: torch.dtype) -> Any:
    """A model of a class of transformers, parameters on the meta device, buffers real."""
    with without_weights():
        return model_class._from_config(config, dtype=dtype).eval()


def build_skeleton(
    folder: Path, *, dtype: torch.dtype | None = None, opened: bool = True, alone: bool = False
) -> Any:
    """The model a checkpoint describes, parameters on the meta device, buffers real.

    Args:
        folder: the checkpoint. Its own model code runs if it is a `TrustedFolder`.
        dtype: of the computation; None for the one in `config.json`.
        opened: make each expert of declared families a module of three linears; False keeps the
            experts as transformers stores them.
        alone: whether the folder may hold a configuration alone, without weights.

    Raises:
        CheckpointError: the configuration does not fit the headers of the weights.
        ArchitectureError: transformers has no causal language model of this type, or the checkpoint
            needs code of its own and the folder is not trusted.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    check_sizes(folder, alone=alone)
    trust = isinstance(folder, TrustedFolder)
    with quiet_transformers(), transformers_errors(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
        kind = auto_class(config)
        if kind is AutoModelForCausalLM and (folder / PIPELINE).is_file():
            kind = AutoModel  # the head of an embedding model is not used, and often not stored
        with without_weights():
            model = kind.from_config(config, dtype=dtype or config.dtype, trust_remote_code=trust)
    if opened and experts_of(model):
        open_experts(model)
    return model.eval()


def gguf_skeleton(file: Path) -> Any:
    """The model whose configuration a GGUF file has, parameters on the meta device."""
    from transformers import AutoConfig

    with without_weights():
        try:
            config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
            model = auto_class(config).from_config(config)
        except Exception as error:  # the reader fails in many ways on damaged bytes
            raise damaged(f"no model can be made of it: {first_line(error)}", file) from error
    open_experts(model)
    return model.eval()


def model_names(model: Any, reader: CheckpointReader, *, split: bool = True) -> dict[str, str]:
    """The model's name for each stored tensor.

    Checkpoints may omit or add the base model's prefix, or use older names; transformers' own table
    of renamings decides.

    Args:
        model: loaded, or a skeleton.
        reader: the checkpoint.
        split: from now on the reader shows experts that are stored fused as single tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    known, prefix = dict(model.state_dict()), model.base_model_prefix
    experts = experts_of(model)
    if experts is not None:
        renamings += [WeightRenaming(*pair) for pair in experts.renamings().items()]

    def name_of(stored: str) -> str:
        name: str = rename_source_key(stored, renamings, [], prefix, known)[0]
        # a pattern may match a name that is the model's already, as in transformers' own loading
        return stored if name not in known and stored in known else name

    names = {stored: name_of(stored) for stored in reader.entries}
    if experts is not None and split:
        experts.split(reader, names)
    return {stored: names.get(stored) or name_of(stored) for stored in reader.entries}


def stored_names(model: Any, reader: CheckpointReader, *, split: bool = True) -> dict[str, str]:
    """Map each parameter and stored buffer of the model to the name it is stored under.

    Raises:
        CheckpointError: a tensor has another shape or kind of numbers than in the model, or the
            model has fewer layers than are stored.
    """
    built = {**dict(model.named_parameters()), **stored_buffers(model)}
    names = model_names(model, reader, split=split)
    _refuse_surplus(model, names.values(), reader.folder)
    mapping = {}
    # unsplit, experts that are stored one by one have no parameter of their name
    for stored, name in names.items():
        if name not in built and (split or "experts" not in name):
            continue
        mapping[name] = stored
        found, asked = reader.entries[stored], built.get(name)
        if asked is None:
            continue
        _refuse_shape(stored, found, tuple(asked.shape))
        if asked.is_floating_point() and not found.dtype.is_floating_point:
            raise CheckpointError(
                f"{stored}: {found.dtype} is stored, where the model has floating-point numbers",
                where=str(found.file),
                remedy="download it again; a quantized checkpoint says so in config.json",
            )
    return mapping


def _refuse_shape(stored: str, entry: TensorEntry, asked: tuple[int, ...]) -> None:
    """Refuse a stored tensor that has another shape than in the model."""
    if entry.shape != asked:
        raise CheckpointError(
            f"{stored}: shape {entry.shape} is stored, config.json asks for {asked}",
            where=str(entry.file),
            remedy="the configuration and the weights are of different models",
        )


def _refuse_surplus(model: Any, names: Iterable[str], folder: Path) -> None:
    """Refuse stored decoder layers, or modules in them, that the model has no place for.

    Layers that predict further tokens may stand after the last one; transformers builds none.
    """
    config = text_config(model.config)
    depth = setting(config, "num_hidden_layers")
    further = max(further_counts(config).values(), default=0)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    lists = {path: len(m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    decoder = {path for path, length in lists.items() if length == depth}
    stored: dict[str, set[int]] = {}
    for name in names:
        for found in re.finditer(r"\.(\d+)(?=\.)", name):
            path = name[: found.start()]
            inside = path in lists and any(f"{path}.".startswith(f"{x}.") for x in decoder)
            if inside and not any(re.search(pattern, name) for pattern in ignored):
                stored.setdefault(path, set()).add(int(found[1]))
    for path, numbers in stored.items():
        room = lists[path] + (further if path in decoder else 0)
        if surplus := [number for number in numbers if number >= room]:
            kind = path.rpartition(".")[2]
            raise CheckpointError(
                f"{len(surplus)} of {len(numbers)} stored {kind} are not in the configuration, "
                f"which has {lists[path]}",
                where=f"{path}.{min(surplus)} in {folder}",
                remedy="the configuration and the weights are of different models: copy or "
                "download both again",
            )


def refuse_missing(needed: Iterable[str], stored: Mapping[str, str], folder: Path) -> None:
    """Refuse a checkpoint that lacks needed parameters."""
    missing = [name for name in needed if name not in stored]
    if missing and all("experts" in name for name in missing):
        raise ArchitectureError(
            "the checkpoint stores the experts in another layout than transformers, one that is "
            "not known for this family",
            where=missing[0],
            remedy="declare its family: see CONTRIBUTING.md, 'Add a model family'",
        )
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"the checkpoint does not contain {', '.join(missing[:3])}{more}",
            where=str(folder),
            remedy="the files are incomplete, or of another model than config.json says: copy or "
            "download them again",
        )


def parameters_of(model: Any) -> dict[str, torch.Tensor]:
    """Parameters by name, tied ones once. In a skeleton tied parameters are separate."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return {n: p for n, p in model.named_parameters() if not (p.is_meta and n in tied)}


def stored_buffers(model: Any) -> dict[str, torch.Tensor]:
    """Buffers that a checkpoint stores: the balance of a router, the scale of a layer."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def fill_buffers(model: Any, reader: CheckpointReader) -> None:
    """Give the buffers of a skeleton their stored values; the others keep their computed ones."""
    buffers = stored_buffers(model)
    if not buffers:
        return
    for stored, name in model_names(model, reader).items():
        if name in buffers:
            buffers[name].copy_(reader.read(stored))


def fill(
    module: nn.Module,
    prefix: str,
    reader: CheckpointReader,
    names: dict[str, str],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Give every parameter of `module` its stored values.

    Args:
        module: a part of the skeleton.
        prefix: its name within the model.
        reader: the checkpoint.
        names: from `stored_names`.
        device: where the values go.
        dtype: of the computation; None for the dtype stored.
    """
    owned = [name for name, _ in module.named_parameters()]
    refuse_missing((f"{prefix}.{name}" for name in owned), names, reader.folder)
    for name in owned:
        value = reader.read(names[f"{prefix}.{name}"]).to(device, dtype)
        assign(module, name, value)


def empty(module: nn.Module) -> None:
    """Move every parameter of `module` back to the meta device, which frees its memory."""
    for name, parameter in list(module.named_parameters()):
        assign(module, name, parameter.to("meta"))


def assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a tensor in place of a parameter."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def auto_class(config: Any) -> Any:
    """The Auto class of a configuration: for causal language models, encoders, or models that see.

    A model that reads pictures is often no causal language model for transformers, or one without
    its tower for pictures. An encoder has a head for words or for labels, or none. So the class
    that the checkpoint was saved with decides.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForImageTextToText._model_mapping or own_code:
        return _encoder_class(config) or AutoModelForCausalLM
    seeing = str(getattr(AutoModelForImageTextToText._model_mapping[type(config)], "__name__", ""))
    saved = getattr(config, "architectures", None) or [seeing]
    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if saved[0] == seeing or not known else AutoModelForCausalLM


def _encoder_class(config: Any) -> Any:
    """The Auto class with which an encoder was saved; None for other models."""
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    if type(config) not in AutoModelForMaskedLM._model_mapping or config.is_encoder_decoder:
        return None
    saved = (getattr(config, "architectures", None) or [""])[0]
    kinds = (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModel)
    named = {str(getattr(k._model_mapping.get(type(config), ""), "__name__", "")): k for k in kinds}
    return named.get(saved)


def empty_cache(model: Any) -> dict[str, Any]:
    """The argument of a model's forward for an empty cache; transformers 5.24 renamed it."""
    from transformers import DynamicCache

    known = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    return {name: DynamicCache(config=model.config)}


def text_part(config: Any) -> str | None:
    """The name of the part of a configuration that describes the decoder; None where all of it."""
    text = text_config(config)
    if text is config:
        return None
    return next(name for name in config.sub_configs if getattr(config, name, None) is text)


@dataclass(frozen=True)
class _Group:
    """Stored tensors, and the parameters or buffers that consist of exactly these.

    Attributes:
        stored: names in the checkpoint, in the order of joining.
        patterns: the pattern of `converter` that each of them matches.
        names: in the model.
        converter: converts one into the other; None where one tensor is one parameter.
    """

    stored: tuple[str, ...]
    patterns: tuple[str, ...]
    names: tuple[str, ...]
    converter: Any = None


class StoredModel:
    """The parameters of a model, in a checkpoint.

    Args:
        model: as transformers builds it, experts not opened; parameters may be on the meta device.
        reader: the checkpoint.

    Raises:
        CheckpointError: a parameter is not stored, or has another shape than in the model.
        ArchitectureError: a conversion of transformers cannot be undone, so a trained model could
            not be written.
    """

    def __init__(self, model: Any, reader: CheckpointReader) -> None:
        self.model, self.reader = model, reader
        model.tie_weights()  # parameters built on the meta device are not tied yet
        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.groups = list(self._grouped())
        self.group_of = {name: group for group in self.groups for name in group.names}
        self.aliases: dict[str, tuple[str, ...]] = {}
        for names in aliases(model):
            self.aliases |= dict.fromkeys(names, names)
            if not any(name in self.group_of for name in names):
                refuse_missing(names[:1], {}, reader.folder)

    def read(self, name: str) -> Tensor:
        """A parameter by any of its names, whole, in the stored dtype, on the CPU."""
        names = self.aliases.get(name, (name,))
        known = next(n for n in names if n in self.group_of)
        group = self.group_of[known]
        return self._made(group, {s: self.reader.read(s) for s in group.stored})[known]

    def written(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors of new values, with one group in memory.

        Args:
            values: maps one of the names of a parameter to its new value; a parameter without one
                keeps its stored value. A mapping that reads its values on access keeps memory
                small.

        Yields:
            Stored name and tensor, of the stored shape. Its dtype is that of the value.
        """
        for group in self.groups:
            found = {n: self._one_of(n, values) for n in group.names}
            if not any(found.values()):
                continue
            whole = {n: values[key] if key else self.read(n) for n, key in found.items()}
            yield from self._undone(group, whole).items()

    def _one_of(self, name: str, values: Mapping[str, Any]) -> str | None:
        """The name under which a parameter has a new value."""
        return next((n for n in self.aliases.get(name, (name,)) if n in values), None)

    def _grouped(self) -> Iterator[_Group]:
        """All groups, each tested on the meta device in both directions."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(self.model)
        renamings = [x for x in mapping if isinstance(x, WeightRenaming)]
        converters = [x for x in mapping if isinstance(x, WeightConverter)]
        by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
        prefix, known = self.model.base_model_prefix, dict(self.model.state_dict())
        found: dict[str, list[tuple[str, str | None]]] = {}
        for stored in sorted(self.reader.entries, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
            if name not in known and stored in known:
                name, pattern = stored, None
            if name in known:
                found.setdefault(name, []).append((stored, pattern))
        # The inverse of the conversions needs to know which of them were applied.
        self.model._weight_conversions = [x for x in mapping if x.was_used()]
        for name, parts in found.items():
            names = tuple(stored for stored, _ in parts)
            patterns = tuple(pattern for _, pattern in parts if pattern is not None)
            if not patterns:
                _refuse_shape(names[-1], self.reader.entries[names[-1]], self.shapes[name])
                yield _Group(names[-1:], (), (name,))
            else:
                yield self._tried(_Group(names, patterns, (name,), by_pattern[patterns[0]]))

    def _tried(self, group: _Group) -> _Group:
        """A conversion, with the names of all its results; refused if it cannot be undone."""
        entries = {s: self.reader.entries[s] for s in group.stored}
        meta = {s: torch.empty(e.shape, dtype=e.dtype, device="meta") for s, e in entries.items()}
        try:
            made = self._made(group, meta)
            back = self._undone(group, made)
        except Exception as error:  # whatever a conversion of transformers raises
            raise self._cannot(group, f"{type(error).__name__}: {error}") from error
        if {n: tuple(t.shape) for n, t in made.items()} != {n: self.shapes.get(n) for n in made}:
            raise self._cannot(group, f"its results {', '.join(made)} have other shapes")
        if {s: tuple(t.shape) for s, t in back.items()} != {s: e.shape for s, e in entries.items()}:
            raise self._cannot(group, "the inverse gives other tensors than the stored ones")
        return _Group(group.stored, group.patterns, tuple(made), group.converter)

    def _cannot(self, group: _Group, why: str) -> ArchitectureError:
        return ArchitectureError(
            f"transformers converts {len(group.stored)} stored tensors, and this conversion "
            f"cannot be undone one parameter at a time: {why}",
            where=group.stored[0],
            remedy="save the model anew with transformers and train that: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)",
        )

    def _made(self, group: _Group, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert stored tensors to parameters."""
        if group.converter is None:
            return {group.names[0]: stored[group.stored[0]]}
        converter = deepcopy(group.converter)
        for name, pattern in zip(group.stored, group.patterns, strict=True):
            converter.add_tensor(group.names[0], name, pattern, stored[name])
        made = converter.convert(group.names[0], model=self.model, config=self.model.config)
        return {n: v[0] if isinstance(v, list) else v for n, v in made.items()}

    def _undone(self, group: _Group, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert parameters back to stored tensors."""
        if group.converter is None:
            return {group.stored[0]: values[group.names[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        return dict(revert_weight_conversion(self.model, dict(values)))


def aliases(model: torch.nn.Module) -> list[tuple[str, ...]]:
    """All names of each parameter: more than one where it is tied."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return [tuple(names) for names in found.values()]
