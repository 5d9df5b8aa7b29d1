"""A folder to export: linear layers of decoder layers, all other matrices, and other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from secateur.errors import ExportError
from secateur.exporting import ExportSource
from secateur.models.architecture import describe
from secateur.models.checkpoint import INDEX_NAMES, copy_others
from secateur.models.inventory import inventory, stored_shapes
from secateur.models.skeleton import build_skeleton, model_names
from secateur.runs.output import check_free, write_json, writing


def copy_the_rest(
    source: ExportSource, changes: Mapping[str, Any], output: Path, weight_bytes: int
) -> None:
    """Copy tokenizer, generation settings and licence, and write the configuration.

    Args:
        source: the model.
        changes: entries of `config.json` that differ from those of the source. A note that its
            weights are compressed is not copied.
        output: the folder.
        weight_bytes: what will be written besides.

    Raises:
        MemoryBudgetError: the disk is too small, or full.
    """
    check_free(weight_bytes, output)
    kept = {k: v for k, v in source.config.items() if k != "quantization_config"}
    with writing(output):
        copy_others(source.folder, output, ("config.json", *INDEX_NAMES))
        write_json(output / "config.json", {**kept, **changes})


@dataclass(frozen=True)
class DecoderLinears:
    """What can be stored in another way, and what stays as it is.

    Attributes:
        shapes: (out, in) of the weight of every linear, by stored name, in the order of layers.
        others: names of the modules with other matrices: embedding, head, routers.
        names: the model's name for every stored tensor.
    """

    shapes: Mapping[str, tuple[int, int]]
    others: tuple[str, ...]
    names: Mapping[str, str]


def decoder_linears(source: ExportSource) -> DecoderLinears:
    """Find the linears of the decoder layers.

    After this call, the reader shows every expert of a mixture as tensors of its own.

    Raises:
        ExportError: matrices are stored transposed, or in an unknown layout.
    """
    model = build_skeleton(source.folder)
    names = model_names(model, source.reader)
    found = inventory(model, describe(model), names, stored_shapes(source.reader.entries))
    transposed = [m.name for m in found if m.linear is not None and m.linear.transposed]
    unknown = [m.name for m in found if m.linear is None and m.is_decoder_matrix]
    if transposed or unknown:
        why = "are stored transposed" if transposed else "have a layout that is not known here"
        raise ExportError(
            f"{len(transposed or unknown)} matrices {why}; this target stores those of nn.Linear",
            where=first_of(transposed or unknown),
            remedy=HERE,
        )
    others = {
        name.removesuffix(".weight")
        for matrix in found
        if matrix.linear is None
        for name in (matrix.name, names[matrix.name])
    }
    # a tied head has no tensor of its own, and its module must still be left as it is
    head = model.get_output_embeddings()
    others |= {path for path, module in model.named_modules() if module is head}
    shapes = {m.name: (m.shape[0], m.shape[1]) for m in found if m.linear is not None}
    return DecoderLinears(MappingProxyType(shapes), tuple(sorted(others)), MappingProxyType(names))


HERE = "run the model here: `secateur compress` makes it smaller, `secateur serve` serves it"
ELSEWHERE = f"try --to 'compressed-tensors' (vLLM, SGLang, transformers), or {HERE}"


def first_of(names: Sequence[str]) -> str:
    """The first three of many names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removesuffix(".weight") for name in names[:3]) + more
