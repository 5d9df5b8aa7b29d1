"""What `compress` and `decompress` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.reporting.results.next_steps import after_a_packed_folder
from secateur.reporting.tables import Block, Line, Result, Table, binary_size, signed
from secateur.runs.records import Compression
from secateur.runs.records.run import BFLOAT16_BYTES


class CompressResult(Result, Compression):
    """The record of a compression: sizes before and after."""

    @property
    def parameters(self) -> int:
        """Number of parameters in the source's weight files."""
        return self.bfloat16_bytes // BFLOAT16_BYTES

    @property
    def broken(self) -> list[str]:
        """Bounds that the packed model does not keep."""
        chosen = self.rounding.get("chosen")
        if chosen is None or chosen["loss_increase"] <= chosen["max_loss_increase"]:
            return []
        measured, given = chosen["loss_increase"], chosen["max_loss_increase"]
        return [
            f"--max-loss-increase is broken: {measured:.4f} was measured on text that did not "
            f"choose, {given:g} was given; a lower bound or more --windows keeps it"
        ]

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {key: x for key, x in Compression.to_json(self).items() if key != "source"}

    def blocks(self) -> Sequence[Block]:
        """Sizes and formats, and where the result is."""
        sizes = [
            ("weight files before", binary_size(self.source_bytes), ""),
            ("as dense bfloat16", binary_size(self.bfloat16_bytes), "100 %"),
            ("weight files now", binary_size(self.file_bytes), f"{self.ratio:.2%}"),
            (
                "of them linear layers",
                binary_size(self.linears.bytes),
                f"{self.linears.ratio:.2%}",
            ),
        ]
        stored = [*self.formats.items()]
        if self.embeddings.matrices:
            stored.append(("embeddings int8", self.embeddings))
        formats = [
            (
                kind,
                str(x.matrices),
                binary_size(x.bytes),
                f"{x.bits_per_weight:.3f}",
                f"{x.ratio:.2%}",
            )
            for kind, x in stored
        ]
        closing = [("time", f"{self.seconds:.1f} s"), ("output", str(self.output))]
        if self.value_error:
            closing.insert(0, ("loss of rounding", f"{self.value_error:.2%} of the weights' norm"))
        if self.rounding:
            error = f"{self.rounding['mean_error']:.2g} of the linear layers' outputs, squared"
            closing.insert(0, ("error of rounding", error))
        if chosen := self.rounding.get("chosen"):
            closing.insert(0, ("in the search", _in_the_search(chosen)))
            closing.insert(0, ("change of the loss", _judged(chosen)))
        return [
            Table.of("compressed", ("", "size", "of bfloat16"), sizes),
            Table.of(
                f"stored as ({self.sparsity:.2%} zeros in the linear layers)",
                ("format", "matrices", "size", "bits per weight", "of bfloat16"),
                formats,
            ),
            Table.facts("", closing),
            *(Line(fault, "bold red") for fault in self.broken),
            *after_a_packed_folder(self.output),
        ]


def _judged(chosen: dict[str, Any]) -> str:
    """The rise of the loss of the packed model, and its bound."""
    error = chosen["loss_increase_standard_error"]
    error_text = "" if error is None else f" ± {error:.4f}"
    return (
        f"{signed(chosen['loss_increase'], 4)}{error_text} nats per token on "
        f"{chosen['judged_tokens']:,} tokens that did not choose "
        f"(at most {chosen['max_loss_increase']:g} allowed)"
    )


def _in_the_search(chosen: dict[str, Any]) -> str:
    """What the search estimated, of the choice and of all matrices in one type."""
    uniform = chosen["uniform_loss_increase"].items()
    others = "".join(f", all {values} {signed(rise, 4)}" for values, rise in uniform)
    return f"{signed(chosen['searched_loss_increase'], 4)}{others}"


def stored_as(layout: Mapping[str, Any]) -> str:
    """How a layout stores a matrix, in a few words: `2:4 int4 g64` has groups of 64."""
    kind = f"{layout.get('pattern', layout['format'])} {layout['values']}"
    return f"{kind} g{layout['group']}" if "group" in layout else kind


@dataclass(frozen=True, repr=False)
class DecompressResult(Result):
    """Sizes before and after decompression.

    Attributes:
        output: the output folder.
        source_bytes: size of the compressed weight files.
        file_bytes: size of the written dense files.
        matrices: number of unpacked matrices.
        seconds: wall time.
    """

    output: Path
    source_bytes: int
    file_bytes: int
    matrices: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {**asdict(self), "output": str(self.output)}

    def blocks(self) -> Sequence[Block]:
        """One table."""
        rows = [
            ("weight files before", binary_size(self.source_bytes)),
            ("weight files now", binary_size(self.file_bytes)),
            ("matrices unpacked", str(self.matrices)),
            ("time", f"{self.seconds:.1f} s"),
            ("output", str(self.output)),
        ]
        return [Table.facts("decompressed", rows)]
