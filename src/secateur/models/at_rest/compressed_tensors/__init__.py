"""Folders of compressed-tensors, as llm-compressor and SparseML write and wrote them.

The reader is our own: the library dropped the sparse formats, and never read marlin-24. The names
of the parts say how a matrix is stored, so mixtures of formats need no case of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from secateur.errors import ArchitectureError, CheckpointError
from secateur.models.at_rest import (
    AssembledReader,
    Assembly,
    SourceFolder,
    damaged,
    described_by,
    stored_forms,
    without_description,
)
from secateur.models.at_rest.compressed_tensors import bitmask, marlin, quantized

__all__ = ["CompressedTensorsFolder"]

METHODS = ("compressed-tensors", "sparseml")
OF_ACTIVATIONS = (
    "input_scale", "input_zero_point", "input_g_idx", "output_scale", "output_zero_point",
    "k_scale", "v_scale", "k_zero_point", "v_zero_point", "q_scale", "q_zero_point",
)  # fmt: skip
NOT_READ = {
    "weight_global_scale": "4-bit floating point (nvfp4, mxfp4)",
    "input_global_scale": "4-bit floating point (nvfp4, mxfp4)",
}


@dataclass(frozen=True)
class CompressedTensorsFolder:
    """Every format of compressed-tensors except 4-bit floating point."""

    name: ClassVar[str] = "compressed-tensors"

    def recognises(self, source: SourceFolder) -> bool:
        """Whether the configuration names compressed-tensors."""
        return described_by(source.config).get("quant_method") in METHODS or (
            "compression_config" in source.config or "sparsity_config" in source.config
        )

    def open(self, source: SourceFolder) -> AssembledReader:
        """Return a reader that decompresses each matrix when it is read.

        Raises:
            CheckpointError: parts are missing, or contradict each other.
            ArchitectureError: the weights are rotated, or in 4-bit floating point.
        """
        told, stored = described_by(source.config), source.reader.entries
        _refuse_unknown(told, stored)
        widths = frozenset(_widths_of(told))
        made: dict[str, Assembly] = {}
        for name, parts in _grouped(stored).items():
            try:
                made[name] = _assembled(source, parts, widths)
            except CheckpointError as error:
                raise CheckpointError(error.what, where=name, remedy=error.remedy) from None
        dropped = tuple(n for n in stored if n.rpartition(".")[2] in OF_ACTIVATIONS)
        said = "the source also rounds activations; the result does not"
        notes = (said,) if _rounds_activations(told) else ()
        config = without_description(source.config)
        return AssembledReader(source.reader, made, config, dropped=dropped, notes=notes)


def _refuse_unknown(told: Mapping[str, Any], stored: Iterable[str]) -> None:
    """Refuse what a plain model cannot express, and formats that are not read."""
    remedy = "name the model before this step, or decompress it with the tool that made it"
    if told.get("transform_config"):
        raise ArchitectureError(
            "the model rotates its activations while it runs (transform_config)", remedy=remedy
        )
    for name in stored:
        why = NOT_READ.get(name.rpartition(".")[2])
        if why is not None:
            raise ArchitectureError(f"{why} is not read", where=name, remedy=remedy)


def _groups_of(told: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The groups of matrices that a configuration describes."""
    groups = told.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        if isinstance(group, Mapping):
            yield group


def _widths_of(told: Mapping[str, Any]) -> Iterator[int]:
    """The bits of the integers that a configuration names."""
    for group in _groups_of(told):
        weights = group.get("weights")
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        if type(bits) is int and 1 <= bits <= 8:
            yield bits


def _rounds_activations(told: Mapping[str, Any]) -> bool:
    """Whether the model was meant to round activations too, or its cache of keys and values."""
    return bool(told.get("kv_cache_scheme")) or any(
        group.get("input_activations") or group.get("output_activations")
        for group in _groups_of(told)
    )


def _grouped(stored: Iterable[str]) -> dict[str, dict[str, str]]:
    """The stored names of the parts of each dense tensor.

    Parts stand beside each other: `layer.weight_scale`, `layer.bitmask`. Early files have them
    below the name of the tensor: `layer.weight.bitmask`, also for vectors.
    """
    roles = {*bitmask.PARTS, *marlin.PARTS, *quantized.PARTS} - {"weight"}
    found: dict[str, dict[str, str]] = {}
    for name in stored:
        owner, _, role = name.rpartition(".")
        if role in roles:
            dense = owner if owner.endswith((".weight", ".bias")) else f"{owner}.weight"
            found.setdefault(dense, {})[role] = name
    for dense in found.keys() & set(stored):
        found[dense]["weight"] = dense
    return found


def _assembled(source: SourceFolder, parts: Mapping[str, str], widths: frozenset[int]) -> Assembly:
    """The dense tensor of some parts."""

    def among(names: Iterable[str]) -> dict[str, str]:
        return {role: parts[role] for role in names if role in parts}

    sparse = among(bitmask.PARTS)
    scaled = among(quantized.PARTS)
    if among(("scale_packed", "meta")):
        extra = parts.keys() - set(marlin.PARTS)
        if extra:
            raise damaged(f"{min(extra)} does not belong to marlin-24", parts[min(extra)])
        return marlin.marlin_assembly(source.reader, parts, source.dtype)
    if sparse and "weight" in parts:
        raise damaged("the weight is stored, and so is its bitmask", parts["weight"])
    if scaled:
        return quantized.quantized_assembly(source.reader, scaled, sparse, source.dtype, widths)
    return bitmask.sparse_assembly(source.reader, sparse)


stored_forms.register(CompressedTensorsFolder.name)(CompressedTensorsFolder())
