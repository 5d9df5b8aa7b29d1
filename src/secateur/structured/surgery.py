"""Cuts a model in memory, or a checkpoint one tensor at a time.

The tensors that a checkpoint stores need not be the parameters of the model: it may omit the base
model's prefix, and most checkpoints store every expert's linears one by one, where transformers has
all experts of a layer in one parameter. Stored names are those of the source, with layers and
experts numbered anew.

A checkpoint in a form at rest is cut without touching the bytes of what stays, where only layers or
experts go: these are whole matrices. The parts of the others are copied, under names with the new
numbers, and the configuration still says how they are stored. Its lists of modules (those that are
not converted) get the new numbers too.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, RecipeError
from secateur.models import at_rest, checkpoint, inventory, opening, skeleton
from secateur.models.architecture import Linear, describe, further_counts, text_config
from secateur.models.configuration import DESCRIPTIONS, OF_MODELOPT
from secateur.progress import Progress, Silent, each_step
from secateur.runs.output import write_json, writing
from secateur.structured.cut import NEURONS, Cut, couplings_of, sizes_of, unit_width
from secateur.structured.design import Accounting, Design, account, design
from secateur.structured.edits import TensorEdit

_PATTERN = "re:"
"""How compressed-tensors marks a name as a regular expression."""

VARIED = (
    "no class of transformers has these sizes (layers that differ, or heads that do not divide the "
    "hidden size): the result loads once secateur is imported, or with trust_remote_code=True; "
    "other engines do not load it"
)

log = logging.getLogger(__name__)


class VariedSizesWarning(UserWarning):
    """The result needs its own code to load."""


def cut_model(model: Any, cut: Cut) -> Any:
    """The cut model. The given model does not change; both share all uncut tensors.

    Args:
        model: a loaded causal language model of transformers.
        cut: what is kept.

    Raises:
        RecipeError: the cut is impossible.
        ArchitectureError: the family does not declare what the cut needs.
    """
    made = design(model, cut)
    if made.varied:
        warnings.warn(VARIED, VariedSizesWarning, stacklevel=2)
    result = made.skeleton
    there, buffers = dict(model.named_parameters()), skeleton.stored_buffers(model)
    with torch.no_grad():
        for name, edit in made.edits.items():
            if edit.source in buffers:
                owner, _, leaf = name.rpartition(".")
                setattr(result.get_submodule(owner), leaf, edit(buffers[edit.source]).clone())
                continue
            # What is not cut is the same memory in both models.
            source = there[edit.source]
            skeleton.assign(result, name, edit(source.detach()))
            result.get_parameter(name).requires_grad_(source.requires_grad)
    result.tie_weights()
    # Buffers that are not stored (rotary frequencies) were computed on the CPU.
    for module in result.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(model.device))
    result.generation_config = copy.deepcopy(model.generation_config)
    return result.train(model.training)


def cut_checkpoint(
    folder: Path, cut: Cut, output_folder: Path, *, progress: Progress | None = None
) -> Accounting:
    """Write the cut model of a checkpoint, with one tensor in memory.

    Tensors keep their dtypes, and remaining tensors their files. Tokenizer and licence are copied.
    The folder is created; if the cut is impossible, nothing is written.

    Args:
        folder: the checkpoint.
        cut: what is kept.
        output_folder: of the new checkpoint.
        progress: advances with every tensor.

    Raises:
        RecipeError: the cut is impossible, or the output is the source.
        CheckpointError: a parameter is not stored.
        MemoryBudgetError: the disk is full.
    """
    if output_folder.exists() and output_folder.resolve() == folder.resolve():
        raise RecipeError(
            "the output is the source itself",
            where=str(output_folder),
            remedy="choose another --output",
        )
    reader = opening.open_weights(folder)
    model = skeleton.build_skeleton(folder)
    made = design(model, cut)
    stored = skeleton.stored_names(model, reader, split=False)
    edits = _stored_edits(made, stored, reader)
    if made.varied:
        warnings.warn(VARIED, VariedSizesWarning, stacklevel=2)
    sources = {edit.source for edit in edits.values()}
    known = {name for name in stored.values() if not made.further.holds(name)}
    edits |= _further_edits(made, edits, reader, sorted(reader.entries.keys() - sources - known))
    result = account(made)
    kept = _part_edits(made, edits, reader) if isinstance(reader, at_rest.AssembledReader) else None
    output_folder.mkdir(parents=True, exist_ok=True)
    _write_other_files(folder, output_folder, made)
    if isinstance(reader, at_rest.AssembledReader):
        _write_descriptions(made, reader, output_folder, dense=kept is None)
        if kept is not None:
            reader, edits = reader.stored, kept
    write_tensors(reader, edits, output_folder, progress or Silent())
    return result


def _further_edits(
    made: Design,
    edits: Mapping[str, TensorEdit],
    reader: checkpoint.CheckpointReader,
    unbuilt: Sequence[str],
) -> dict[str, TensorEdit]:
    """The edits of what the class does not build: layers that predict further tokens.

    They stay whole, but for experts that leave. Where their tensors no longer have the shapes that
    those of a decoder layer have, engines cannot load them. Then the result lacks them, and its
    configuration says so. All other tensors that the class does not build are left out.

    Args:
        made: the cut.
        edits: of all other tensors, by the stored names of the results.
        reader: the checkpoint.
        unbuilt: the names of these tensors.
    """
    found, further = dict[str, TensorEdit](), [x for x in unbuilt if made.further.holds(x)]
    names = skeleton.model_names(made.uncut, reader, split=False) if further else {}
    for name in further:
        target = _renumbered(made, name)
        if target is not None:  # its expert stays
            found[target] = made.further_edit(name, names[name], reader.entries[name].shape)
    left, why = [name for name in unbuilt if name not in set(further)], ""
    if misfit := made.misfit(edits, found):
        found, left, why = {}, list(unbuilt), f"; {misfit}"
        config = text_config(made.skeleton.config)
        for key in further_counts(config):
            setattr(config, key, 0)
    if left:
        said = "%d stored tensors are no part of the causal language model (%s, …): the cut model "
        log.warning(said + "is written without them%s", len(left), left[0], why)
    return found


def _write_other_files(folder: Path, output: Path, made: Design) -> None:
    """Write the configuration and copy the model's other files."""
    from secateur.models import varied

    with writing(output):
        written = ("config.json", checkpoint.INDEX_NAME, varied.FILE_NAME)
        checkpoint.copy_others(folder, output, written)
        if made.varied:
            shutil.copyfile(varied.__file__, output / varied.FILE_NAME)
        with skeleton.quiet_transformers():
            made.skeleton.config.save_pretrained(output)


def write_tensors(
    reader: checkpoint.CheckpointReader,
    edits: Mapping[str, TensorEdit],
    output: Path,
    progress: Progress,
) -> None:
    """Write every remaining tensor, and an index unless there is one file."""
    shards: dict[str, dict[str, Any]] = {file.name: {} for file in reader.files}
    for name, edit in edits.items():
        entry = reader.entries[edit.source]
        shards[entry.file.name][name] = (entry.dtype, edit.shape)
    shards = {file: known for file, known in shards.items() if known}
    names = each_step(progress, "cutting", [name for known in shards.values() for name in known])
    tensors = ((name, edits[name](reader.read(edits[name].source)).contiguous()) for name in names)
    checkpoint.write_shards(output, shards, tensors)


def _stored_edits(
    made: Design, stored: Mapping[str, str], reader: checkpoint.CheckpointReader
) -> dict[str, TensorEdit]:
    """Edits of stored tensors, by the stored names of the results.

    A tower for pictures may be stored in another form, such as queries, keys and values in one
    matrix. Its tensors are copied.
    """
    found: dict[str, TensorEdit] = {}
    copied = _copied_parts(made, stored, reader)
    for name, edit in made.edits.items():
        whole = edit.source in stored  # experts may be stored fused, as transformers holds them
        if not whole and _part_of(made, edit.source) in copied:
            continue
        for expert, part in [(None, edit)] if whole else _stored_parts(made, edit, stored):
            if part.source not in stored:
                raise CheckpointError(
                    f"the checkpoint does not contain {part.source}",
                    where=str(reader.folder),
                    remedy="the file is incomplete, or of another model than config.json says",
                )
            source = stored[part.source]
            target = _renumbered_name(made, source, edit.source, name, expert)
            found[target] = replace(part, source=source)
    for names in copied.values():
        for name in names:
            found[name] = TensorEdit.copy(name, reader.entries[name].shape)
    return found


def _copied_parts(
    made: Design, stored: Mapping[str, str], reader: checkpoint.CheckpointReader
) -> dict[str, list[str]]:
    """Tensors outside the decoder that are stored in another form, by part of the model."""
    there, found = set(stored.values()), dict[str, list[str]]()
    if reader.entries.keys() <= there:
        return found
    for name, own in skeleton.model_names(made.uncut, reader, split=False).items():
        part = _part_of(made, own)
        if name not in there and part:
            found.setdefault(part, []).append(name)
    built = {_part_of(made, edit.source) for edit in made.edits.values()}
    return {part: names for part, names in found.items() if part in built}


def _part_of(made: Design, name: str) -> str:
    """The part of a model outside its decoder that a parameter belongs to; empty within it."""
    decoder = made.architecture.layers_path.rpartition(".")[0]
    return "" if name.startswith(f"{decoder}.") else inventory.part_outside(name, decoder)


def _stored_parts(
    made: Design, edit: TensorEdit, stored: Mapping[str, str]
) -> Iterator[tuple[tuple[int, int] | None, TensorEdit]]:
    """The edits of the tensors that hold a parameter, with the expert's old and new number.

    A checkpoint may store the experts of a layer otherwise than the model holds them; other
    parameters are whole.
    """
    experts, kept = made.architecture.experts, edit.kept[0]
    numbers = None if kept is None else kept.tolist()
    parts = list(experts.parts(edit.source, edit.shape, numbers, stored)) if experts else []
    for name, axes, shape, expert in parts:
        kept_of_axes = tuple(edit.kept[axis] for axis in axes)
        if expert is not None:  # of the neurons of all experts its own
            kept_of_axes = tuple(
                x if x is None or x.ndim == 1 else x[expert[1]] for x in kept_of_axes
            )
        yield expert, replace(edit, source=name, kept=kept_of_axes, shape=shape)
    if not parts:
        yield None, edit


def _renumbered_name(
    made: Design, stored: str, source: str, target: str, expert: tuple[int, int] | None
) -> str:
    """A stored name with the new number of its layer, and of its expert."""
    prefix = made.architecture.layers_path + "."
    if not source.startswith(prefix):
        return stored
    old, new = (name.removeprefix(prefix).partition(".")[0] for name in (source, target))
    # The first number is the layer's; that of an expert comes after it.
    stored = re.sub(rf"(^|\.){old}\.", rf"\g<1>{new}.", stored, count=1)
    experts = made.architecture.experts
    place = experts.place_of(stored) if experts else None
    if place and expert:
        return f"{stored[: place.start(1)]}{expert[1]}{stored[place.end(1) :]}"
    return stored


def _part_edits(
    made: Design, edits: Mapping[str, TensorEdit], reader: at_rest.AssembledReader
) -> dict[str, TensorEdit] | None:
    """Edits of the stored parts, by their names in the cut checkpoint.

    None if the cut changes a matrix that is made of parts, so that it has to be expanded. Whole
    experts can be taken from parts that hold all of a layer.
    """
    found: dict[str, TensorEdit] = {}
    entries = reader.stored.entries
    for target, edit in edits.items():
        assembly = reader.made.get(edit.source)
        if assembly is None:
            found[target] = edit
            continue
        first, *others = edit.kept
        # Scaled values, or part of a matrix: then its integers and scales no longer fit.
        whole = others if assembly.stacked else edit.kept
        if edit.scale != 1 or any(kept is not None for kept in whole):
            return None
        for part in assembly.parts.values():
            name, shape = _renumbered(made, part), entries[part].shape
            assert name is not None
            found[name] = TensorEdit.copy(part, shape)
            # A part that holds all experts has them along its first axis, scales too.
            if first is not None and shape[:1] == assembly.shape[:1]:
                found[name] = found[name].keeping(0, first)
    further = any(made.further.holds(edit.source) for edit in edits.values())
    for name in reader.dropped:  # scales of activations: another program may use them
        new = _renumbered(made, name)
        if new is not None and (further or not made.further.holds(name)):
            found[new] = TensorEdit.copy(name, entries[name].shape)
    return found


def _write_descriptions(
    made: Design, reader: at_rest.AssembledReader, output: Path, *, dense: bool
) -> None:
    """Make the files that describe the form of the weights fit the cut model, or drop them."""
    for name in opening.OF_A_FORM if dense else ():
        (output / name).unlink(missing_ok=True)
    for file in (output / "config.json", output / OF_MODELOPT):
        if file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
            plain = at_rest.without_description(config)
            write_json(file, plain if dense else _renumbered_description(made, config, reader))


def _renumbered_description(
    made: Design, config: Mapping[str, Any], reader: at_rest.AssembledReader
) -> dict[str, Any]:
    """A configuration whose description of the form names the modules of the cut model.

    Every list of module names is renumbered, and every table by module. A regular expression with
    numbers in it is replaced by the names of the modules that it stands for.
    """
    modules = sorted({name.rpartition(".")[0] for name in reader.entries})

    def anew(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                name: anew(inner)
                for key, inner in value.items()
                for name in _names_of(made, key, modules)
            }
        if isinstance(value, list) and all(isinstance(x, str) for x in value):
            return list(dict.fromkeys(new for x in value for new in _names_of(made, x, modules)))
        return value

    def described(part: Mapping[str, Any]) -> dict[str, Any]:
        keys = (*DESCRIPTIONS, "quantization")
        return {**part, **{key: anew(part[key]) for key in keys if key in part}}

    result, text = described(config), config.get("text_config")
    return result | {"text_config": described(text)} if isinstance(text, Mapping) else result


def _names_of(made: Design, name: str, modules: list[str]) -> list[str]:
    """The names in the cut model of what one entry of a list names."""
    found = [name]
    if name.startswith(_PATTERN):
        if not re.search(r"\d", name):
            return found
        pattern = re.compile(name.removeprefix(_PATTERN))
        found = [module for module in modules if pattern.match(module)]
    return [new for old in found if (new := _renumbered(made, old)) is not None]


def _renumbered(made: Design, name: str) -> str | None:
    """The name of a module or tensor with the new numbers of its layer and its expert.

    It may lack the base model's prefix. None if its layer or its expert is removed. Layers of
    another part of the model, such as a vision tower, keep their numbers.
    """
    experts, order = made.architecture.experts, [layer.index for layer in made.layers]
    new: str | None
    if place := made.further.place(name):
        number = place.layer + len(order) * place.listed
        new = f"{name[: place.span[0]]}{number}{name[place.span[1] :]}"
        kept = made.predicting.get(place.layer)
    else:
        found = made.further.listed(name)
        new = _with_new_number(name, found, order)
        kept = (
            made.layers[order.index(int(found[1]))].kept.get("experts") if found and new else None
        )
    if new is None or experts is None or kept is None:
        return new
    return _with_new_number(new, experts.place_of(new), kept.tolist())


def _with_new_number(name: str, found: re.Match[str] | None, kept: list[int]) -> str | None:
    """A name in which a number is the place among those that are kept; None if it is not."""
    if found is None:
        return name
    if int(found[1]) not in kept:
        return None
    return f"{name[: found.start(1)]}{kept.index(int(found[1]))}{name[found.end(1) :]}"


def cut_from_zeros(pruned: Any, *, kinds: Sequence[str] = ("groups", "neurons")) -> Cut:
    """The cut that keeps the units of a pruned model whose consumer columns are not all zero.

    A sub-block without such units is removed. But if the bias of its consumer is not zero, its
    first unit stays to carry the bias.

    Args:
        pruned: a `CheckpointReader`, or a loaded model.
        kinds: of units: `groups` or `queries`, `neurons`, `shared_neurons`.

    Raises:
        ArchitectureError: the family declares no couplings.
    """
    model, reader = pruned, None
    if isinstance(pruned, checkpoint.CheckpointReader):
        reader = pruned
        model = skeleton.build_skeleton(reader.folder)
    architecture, sizes = describe(model), sizes_of(model)
    couplings = couplings_of(architecture)
    stored = {} if reader is None else skeleton.stored_names(model, reader)
    found: dict[str, Any] = {kind: {} for kind in kinds}
    for kind in kinds:
        name = couplings.consumer(kind if kind in NEURONS else "queries")
        for i, layer in enumerate(architecture.layers(model)):
            count = getattr(sizes, kind)[i]
            if not count or name is None:
                continue
            linear = Linear(f"{architecture.layer_name(i)}.{name}", layer.get_submodule(name))
            weight, bias = _values_of(linear, reader, stored)
            # [out, units, width]: a unit is used if any row reads any of its columns.
            used = weight.reshape(len(weight), count, unit_width(sizes, kind)).ne(0).any((0, 2))
            kept = tuple(used.nonzero().flatten().tolist())
            if not kept and bias is not None and bool(bias.any()):
                kept = (0,)
            if len(kept) < count:
                found[kind][i] = kept
    return Cut(**found)


def _values_of(
    linear: Linear, reader: checkpoint.CheckpointReader | None, stored: Mapping[str, str]
) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear, read from the file if it is of a checkpoint."""
    bias: nn.Parameter | None = getattr(linear.module, "bias", None)
    if reader is None:
        return linear.weight, bias
    weight = reader.read(stored[f"{linear.name}.weight"])
    weight = weight.t() if linear.transposed else weight
    return weight, None if bias is None else reader.read(stored[f"{linear.name}.bias"])
