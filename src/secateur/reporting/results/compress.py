"""What `compress` and `decompress` return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.reporting.results.next_steps import after_a_packed_folder
from secateur.reporting.tables import Block, Line, Result, Table
from secateur.reporting.wording import binary_size, signed

BFLOAT16_BYTES = 2


@dataclass
class FormatTotals:
    """Totals over matrices that are stored in the same way.

    Attributes:
        matrices: number of matrices.
        weights: number of weights, including zeros.
        nonzeros: number of weights that are not zero.
        bytes: their size in the files, scales included.
    """

    matrices: int = 0
    weights: int = 0
    nonzeros: int = 0
    bytes: int = 0

    def add(self, weights: int, nonzeros: int, size_bytes: int) -> None:
        """Add one matrix."""
        self.matrices += 1
        self.weights += weights
        self.nonzeros += nonzeros
        self.bytes += size_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, counting zeros as weights, and scales as a part of them."""
        return 8 * self.bytes / self.weights if self.weights else 0.0

    @property
    def of_bfloat16(self) -> float:
        """The size as a fraction of the same matrices in dense bfloat16."""
        return self.bits_per_weight / (8 * BFLOAT16_BYTES)


@dataclass(frozen=True, repr=False)
class CompressResult(Result):
    """Sizes before and after compression.

    Attributes:
        output: the output folder.
        source_bytes: size of the source's weight files.
        parameters: number of parameters in them.
        file_bytes: size of the written weight files.
        linears: totals over the prunable matrices.
        formats: totals by format and values, for example `bitmask int8`.
        embeddings: totals over embedding and head, if they were quantized.
        archive: whether the files are also compressed with zstandard.
        negative_zeros: number of zeros that changed from −0.0 to +0.0.
        seconds: wall time.
        rounding: record of the calibrated rounding to integers, if it was used.
        value_error: ‖W − Ŵ‖ / ‖W‖ of the linears, with Ŵ the stored values; 0 if nothing was lost.
        dense_file_bytes: size of the weight files if they stored the zeros: `as here` with the same
            values, and with `int8` and `int4` linears; empty for an archive.
    """

    output: Path
    source_bytes: int
    parameters: int
    file_bytes: int
    linears: FormatTotals
    formats: dict[str, FormatTotals] = field(default_factory=dict)
    embeddings: FormatTotals = field(default_factory=FormatTotals)
    archive: bool = False
    negative_zeros: int = 0
    seconds: float = 0.0
    rounding: dict[str, Any] = field(default_factory=dict)
    value_error: float = 0.0
    dense_file_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def bfloat16_bytes(self) -> int:
        """The size of the model in dense bfloat16."""
        return BFLOAT16_BYTES * self.parameters

    @property
    def ratio(self) -> float:
        """The size of the files as a fraction of the model in dense bfloat16."""
        return self.file_bytes / self.bfloat16_bytes

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the prunable matrices."""
        return 1 - self.linears.nonzeros / self.linears.weights

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
        return {
            "output": str(self.output),
            "archive": self.archive,
            "source_bytes": self.source_bytes,
            "bfloat16_bytes": self.bfloat16_bytes,
            "file_bytes": self.file_bytes,
            "ratio": self.ratio,
            "sparsity": self.sparsity,
            "negative_zeros": self.negative_zeros,
            "linears": _stored_json(self.linears),
            "formats": {name: _stored_json(stored) for name, stored in self.formats.items()},
            "embeddings": _stored_json(self.embeddings),
            "rounding": self.rounding,
            "value_error": self.value_error,
            "dense_file_bytes": self.dense_file_bytes,
            "seconds": self.seconds,
        }

    def blocks(self) -> Sequence[Block]:
        """Sizes and formats, and where the result is."""
        sizes = [
            ("weight files before", binary_size(self.source_bytes), ""),
            ("as dense bfloat16", binary_size(self.bfloat16_bytes), "100 %"),
            ("weight files now", binary_size(self.file_bytes), f"{self.ratio:.2%}"),
            (
                "of them linear layers",
                binary_size(self.linears.bytes),
                f"{self.linears.of_bfloat16:.2%}",
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
                f"{x.of_bfloat16:.2%}",
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

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> CompressResult:
        """Rebuild a result from its `to_json`."""
        return cls(
            output=Path(record["output"]),
            source_bytes=record["source_bytes"],
            parameters=record["bfloat16_bytes"] // BFLOAT16_BYTES,
            file_bytes=record["file_bytes"],
            linears=_counts(record["linears"]),
            formats={name: _counts(stored) for name, stored in record["formats"].items()},
            embeddings=_counts(record["embeddings"]),
            archive=record["archive"],
            negative_zeros=record["negative_zeros"],
            seconds=record["seconds"],
            rounding=record["rounding"],
            value_error=record["value_error"],
            dense_file_bytes=record["dense_file_bytes"],
        )


def _judged(chosen: dict[str, Any]) -> str:
    """The rise of the loss of the packed model, and its bound."""
    error = chosen["loss_increase_standard_error"]
    beside = "" if error is None else f" ± {error:.4f}"
    return (
        f"{signed(chosen['loss_increase'], 4)}{beside} nats per token on "
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


def _counts(record: dict[str, Any]) -> FormatTotals:
    """Read the counts of a record; derived values are ignored."""
    return FormatTotals(**{name: record[name] for name in FormatTotals.__dataclass_fields__})


def _stored_json(stored: FormatTotals) -> dict[str, Any]:
    """Counts and sizes of matrices, with the values derived from them."""
    return {
        **asdict(stored),
        "bits_per_weight": stored.bits_per_weight,
        "ratio": stored.of_bfloat16,
    }


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
