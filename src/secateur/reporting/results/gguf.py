"""What `inspect` returns for a GGUF file: its header."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.models.gguf_header import GgufArray, GgufHeader, GgufTensor
from secateur.reporting.results.layers import layer_of
from secateur.reporting.results.result import Result
from secateur.reporting.tables import Block, Line, Table
from secateur.reporting.wording import binary_size


@dataclass(frozen=True, repr=False)
class GgufInspectResult(Result):
    """The content of a GGUF file according to its header.

    Attributes:
        model: the name from the user.
        header: metadata and tensors.
        layer: the layer whose tensors are listed; None lists all layers.
    """

    model: str
    header: GgufHeader
    layer: int | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters in all tensors."""
        return sum(tensor.parameters for tensor in self.header.tensors)

    def to_json(self) -> dict[str, Any]:
        """Metadata and tensors."""
        return {
            "model": self.model,
            "format": "gguf",
            "version": self.header.version,
            "file_bytes": self.header.file_bytes,
            "parameters": self.parameters,
            "metadata": {
                key: asdict(value) if isinstance(value, GgufArray) else value
                for key, value in self.header.metadata.items()
            },
            "tensors": [asdict(tensor) for tensor in self.header.tensors],
        }

    def blocks(self) -> Sequence[Block]:
        """The whole file, its metadata, and its layers or the tensors of one layer."""
        data, tensors = self.header.metadata, self.header.tensors
        architecture = data.get("general.architecture", "not named")
        rows = [
            ("architecture", str(architecture)),
            ("layers", str(data.get(f"{architecture}.block_count", "not named"))),
            ("parameters", f"{self.parameters:,}"),
            ("file", binary_size(self.header.file_bytes)),
            ("stored as", types_of(tensors)),
        ]
        metadata = [(key, in_a_line(value)) for key, value in data.items()]
        found: list[Block] = [Table.facts(self.model, rows)]
        if self.layer is None:
            found += [Table.facts("metadata", metadata), self.layers()]
        else:
            own = [tensor for tensor in tensors if layer_of(tensor.name) == self.layer]
            found.append(tensor_table(f"tensors of layer {self.layer}", own))
        return [*found, Line("zeros were not counted: --zeros reads the weights", style="dim")]

    def layers(self) -> Table:
        """A line for each run of equal layers, and one for each tensor outside them."""
        by_layer: dict[int, list[GgufTensor]] = {}
        for tensor in self.header.tensors:
            by_layer.setdefault(layer_of(tensor.name), []).append(tensor)
        outside = by_layer.pop(-1, [])
        runs: list[tuple[list[int], tuple[str, ...]]] = []
        for index, own in sorted(by_layer.items()):
            row = cells_of(own)
            if runs and runs[-1][1] == row:
                runs[-1][0].append(index)
            else:
                runs.append(([index], row))
        rows = [(str(i[0]) if len(i) == 1 else f"{i[0]} to {i[-1]}, each", *row) for i, row in runs]
        rows += [(x.name, *cells_of([x])) for x in outside]
        columns = ("layer", "tensors", "parameters", "size", "stored as")
        return Table.of("layers (--layer N lists the tensors of one)", columns, rows)


def cells_of(tensors: Sequence[GgufTensor]) -> tuple[str, ...]:
    """Count, parameters, size and types of some tensors."""
    return (
        str(len(tensors)),
        f"{sum(x.parameters for x in tensors):,}",
        f"{sum(x.size_bytes for x in tensors):,} bytes",
        ", ".join(dict.fromkeys(x.type for x in tensors)),
    )


def tensor_table(title: str, tensors: Iterable[GgufTensor]) -> Table:
    """A line for each tensor."""
    rows = [
        (x.name, " x ".join(map(str, x.shape)), x.type, f"{x.size_bytes:,} bytes") for x in tensors
    ]
    return Table.of(title, ("name", "shape", "type", "size"), rows)


def types_of(tensors: Iterable[GgufTensor]) -> str:
    """The types of tensors with their sizes, the largest first."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.size_bytes
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} ({binary_size(size)})" for kind, size in ordered)


def in_a_line(value: Any) -> str:
    """A metadata value, shortened to one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 72 else f"{text[:69]}..."
