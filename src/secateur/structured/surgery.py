"""Cuts a model in memory, or a checkpoint one tensor at a time."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError
from secateur.models.architecture import Linear, describe
from secateur.models.at_rest import AssembledReader, without_description
from secateur.models.checkpoint import (
    INDEX_NAME,
    PLAIN,
    CheckpointReader,
    ShardWriter,
    copied_files,
    note_links,
)
from secateur.models.opening import open_weights
from secateur.models.skeleton import (
    assign,
    build_skeleton,
    quiet_transformers,
    stored_buffers,
    stored_names,
)
from secateur.progress import Progress, Silent
from secateur.runs.output import cannot_write
from secateur.structured.accounting import Accounting, account
from secateur.structured.cut import Cut, couplings_of, sizes_of, unit_width
from secateur.structured.design import Design, design
from secateur.structured.edits import Edit
from secateur.structured.stored import stored_edits
from secateur.structured.stored_bytes import part_edits, renumbered_description

MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
"""How configurations call the number of layers that predict further tokens."""

log = logging.getLogger(__name__)


class VariedSizesWarning(UserWarning):
    """The result needs its own code to load."""


def cut_model(model: Any, cut: Cut, *, pad: bool = False) -> Any:
    """The cut model. The given model does not change; both share all uncut tensors.

    Args:
        model: a loaded causal language model of transformers.
        cut: what is kept.
        pad: fill up smaller layers with units of zeros, so that all have the same size.

    Raises:
        RecipeError: the cut is impossible.
        ArchitectureError: the family does not declare what the cut needs.
    """
    made = design(model, cut, pad=pad)
    warn_if_varied(made)
    result = made.skeleton
    there, buffers = dict(model.named_parameters()), stored_buffers(model)
    with torch.no_grad():
        for name, edit in made.edits.items():
            if edit.source in buffers:
                owner, _, leaf = name.rpartition(".")
                setattr(result.get_submodule(owner), leaf, edit(buffers[edit.source]).clone())
                continue
            source = there[edit.source]
            assign(result, name, edit(source.detach()))
            result.get_parameter(name).requires_grad_(source.requires_grad)
    result.tie_weights()
    for module in result.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(model.device))
    result.generation_config = copy.deepcopy(model.generation_config)
    return result.train(model.training)


def cut_checkpoint(
    folder: Path,
    cut: Cut,
    output_folder: Path,
    *,
    pad: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Accounting:
    """Write the cut model of a checkpoint, with one tensor in memory.

    Tensors keep their dtypes, and remaining tensors their files. Tokenizer and licence are copied.
    The folder is created; if the cut is impossible, nothing is written.

    Args:
        folder: the checkpoint.
        cut: what is kept.
        output_folder: of the new checkpoint.
        pad: fill up smaller layers with units of zeros, so that all have the same size.
        trust_remote_code: whether code that comes with the checkpoint may run.
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
    reader = open_weights(folder)
    model = build_skeleton(folder, trust_remote_code=trust_remote_code)
    made = design(model, cut, pad=pad)
    stored = stored_names(model, reader, split=False)
    edits = stored_edits(made, stored, reader)
    warn_if_varied(made)
    used = {*stored.values(), *(edit.source for edit in edits.values())}
    leave_out_unbuilt(made, sorted(reader.entries.keys() - used))
    result = account(made)
    kept = part_edits(made, edits, reader) if isinstance(reader, AssembledReader) else None
    output_folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder, output_folder, made)
    if isinstance(reader, AssembledReader):
        describe_form(made, reader, output_folder / "config.json", kept is not None)
        reader, edits = (reader, edits) if kept is None else (reader.stored, kept)
    write_tensors(reader, edits, output_folder, progress or Silent())
    return result


def describe_form(made: Design, reader: AssembledReader, file: Path, kept: bool) -> None:
    """Let the configuration of a cut model say how its weights are stored.

    Args:
        made: the design.
        reader: the source.
        file: the configuration of the cut model.
        kept: whether the weights are stored as in the source; otherwise they are plain numbers.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    told = renumbered_description(made, config, reader) if kept else without_description(config)
    file.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def leave_out_unbuilt(made: Design, names: Sequence[str]) -> None:
    """Name stored tensors that the class does not build, such as layers for further tokens.

    The cut cannot follow them, and engines that use them need the uncut sizes. So the result lacks
    them, and its configuration says so.
    """
    if not names:
        return
    log.warning(
        "%d stored tensors are no part of the causal language model (%s, …): the cut model is "
        "written without them",
        len(names),
        names[0],
    )
    config = made.skeleton.config
    for key in MTP_LAYERS:
        if getattr(config, key, None):
            setattr(config, key, 0)


def warn_if_varied(made: Design) -> None:
    """Warn about what loading a varied model needs."""
    if made.varied:
        warnings.warn(
            "no plain class of transformers has these sizes: transformers loads the result with "
            "trust_remote_code=True (its code is stored with the weights) or once secateur is "
            "imported; other engines do not. Padding may give sizes that a plain class has",
            VariedSizesWarning,
            stacklevel=3,
        )


def write_beside(folder: Path, output: Path, made: Design) -> None:
    """Write the configuration and copy the model's other files.

    Raises:
        MemoryBudgetError: the disk is full.
    """
    from secateur.models import varied

    try:
        note_links(copied_files(folder))
        for file in copied_files(folder):
            if file.name not in ("config.json", INDEX_NAME, varied.FILE_NAME):
                shutil.copyfile(file, output / file.name)
        if made.varied:
            shutil.copyfile(varied.__file__, output / varied.FILE_NAME)
        with quiet_transformers():
            made.skeleton.config.save_pretrained(output)
    except OSError as error:
        raise cannot_write(error, output) from error


def write_tensors(
    reader: CheckpointReader, edits: Mapping[str, Edit], output: Path, progress: Progress
) -> None:
    """Write every remaining tensor, and an index unless there is one file."""
    progress.start("cutting", len(edits))
    weight_map: dict[str, str] = {}
    total = 0
    for file in reader.files:
        mine = {n: e for n, e in edits.items() if reader.entries[e.source].file == file}
        if not mine:
            continue
        known = {n: (reader.entries[e.source].dtype, e.shape) for n, e in mine.items()}
        with ShardWriter(output / file.name, known, [], PLAIN) as writer:
            for name, edit in mine.items():
                tensor = edit(reader.read(edit.source)).contiguous()
                writer.write(name, tensor)
                total += tensor.nbytes
                progress.step(note=name)
            writer.close(PLAIN)
        weight_map |= dict.fromkeys(mine, file.name)
    if len(reader.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (output / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
    progress.finish()


def cut_from_zeros(
    pruned: Any, *, kinds: Sequence[str] = ("groups", "neurons"), trust_remote_code: bool = False
) -> Cut:
    """The cut that keeps the units of a pruned model whose consumer columns are not all zero.

    A sub-block without such units is removed. But if the bias of its consumer is not zero, its
    first unit stays to carry the bias.

    Args:
        pruned: a `CheckpointReader`, or a loaded model.
        kinds: of units: `groups` or `queries`, and `neurons`.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        ArchitectureError: the family declares no couplings.
    """
    reader = pruned if isinstance(pruned, CheckpointReader) else None
    model = pruned
    if reader is not None:
        model = build_skeleton(reader.folder, trust_remote_code=trust_remote_code)
    architecture, sizes = describe(model), sizes_of(model)
    couplings = couplings_of(architecture)
    stored = {} if reader is None else stored_names(model, reader)
    found: dict[str, Any] = {kind: {} for kind in kinds}
    for kind in kinds:
        name = couplings.consumer("neurons" if kind == "neurons" else "queries")
        for i, layer in enumerate(architecture.layers(model)):
            count = getattr(sizes, kind)[i]
            if not count or name is None:
                continue
            prefix = f"{architecture.layer_name(i)}.{name}"
            linear = Linear(prefix, layer.get_submodule(name))
            weight, bias = values_of(linear, reader, stored)
            used = weight.reshape(len(weight), count, unit_width(sizes, kind)).ne(0).any((0, 2))
            kept = tuple(used.nonzero().flatten().tolist())
            if not kept and bias is not None and bool(bias.any()):
                kept = (0,)
            if len(kept) < count:
                found[kind][i] = kept
    return Cut(**found)


def values_of(
    linear: Linear, reader: CheckpointReader | None, stored: Mapping[str, str]
) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a linear, read from the file if it is of a checkpoint."""
    bias: nn.Parameter | None = getattr(linear.module, "bias", None)
    if reader is None:
        return linear.weight, bias
    weight = reader.read(stored[f"{linear.name}.weight"])
    weight = weight.t() if linear.transposed else weight
    return weight, None if bias is None else reader.read(stored[f"{linear.name}.bias"])
