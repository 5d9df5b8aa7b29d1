"""Write the tables that stand within pages and are computed: sizes of models, types of llama.cpp.

python tools/computed_tables.py          # write them
python tools/computed_tables.py --check  # fail if one is out of date

A table stands between two comments, `<!-- computed: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from secateur.advisor.facts import read_facts
from secateur.models.shape import LARGE_ENDS, PlainDecoder
from secateur.quantization.block_types import TYPES
from secateur.quantization.blocks import BlockGrid
from secateur.runtime.formats import BITS, GRID_BITS, Layout
from secateur.runtime.formats import stored_bytes as parts_bytes
from secateur.runtime.storage_plan import DEFAULT_GROUP
from written_files import table, write_or_check

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
FACTS = read_facts()

MODELS = {
    "Llama-2-7B": "llama-2-7b",
    "Llama-3.1-8B": "llama-3.1-8b",
    "Llama-2-70B": "llama-2-70b",
}
VALUES = ("bfloat16", "int8", "int4", "int3", "int2")
ZEROS = {
    "none": ("dense", 0.0, None),
    "50 %": ("bitmask", 0.5, None),
    "70 %": ("bitmask", 0.7, None),
    "2:4": ("n-of-m", 0.5, "2:4"),
}
"""Zeros of the linear layers: the format, the sparsity and the pattern."""


def main() -> None:
    """Write the pages, or check them."""
    pages = {
        "docs/format.md": {"sizes of models": sizes()},
        "docs/methods/ggml-types.md": {"types of llama.cpp": types()},
    }
    texts = {Path(page): written(ROOT / page, tables) for page, tables in pages.items()}
    write_or_check(ROOT, texts, "computed_tables.py")


def written(page: Path, tables: dict[str, Iterable[str]]) -> str:
    """The text of a page with its computed tables."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables.items():
        begin, body = f"<!-- computed: {name} -->", "\n".join(lines).rstrip()
        pattern = re.compile(f"{re.escape(begin)}\n.*?<!-- end -->", re.DOTALL)
        text, found = pattern.subn(lambda _, b=begin, t=body: f"{b}\n\n{t}\n\n<!-- end -->", text)
        assert found == 1, f"{page} has no place for {name}"
    return text


def sizes() -> Iterable[str]:
    """Bytes of all weights, by zeros and values."""
    rows = []
    seven = FACTS.shapes["llama-2-7b"]
    for values in VALUES:
        for zeros in ZEROS:
            found = [stored_bytes(FACTS.shapes[key], zeros, values) for key in MODELS.values()]
            bits = 8 * linear_bytes(seven, zeros, values) / seven.shape("").linears
            gib = (f"{size / GIB:.2f}" for size in found)
            rows.append((values, zeros, f"{bits:.2f}", *gib))
    columns = ("values", "zeros", "bits of a weight", *MODELS)
    yield from table(columns, rows)


def types() -> Iterable[str]:
    """The grids of the types of llama.cpp."""
    rows = []
    for name in TYPES:
        grid = BlockGrid(name)
        kind = grid.table
        codes = f"{len(kind.levels)} numbers, " if kind.levels else ""
        rows.append(
            (
                f"`{name}`", f"{grid.bits_per_weight:g}", codes + span(kind.ends),
                span(kind.scales), span(kind.minima) if kind.has_minima else "",
                f"{grid.sub}", "yes" if grid.exact_zero else "no",
            )
        )  # fmt: skip
    columns = ("type", "bits per weight", "q", "s", "m", "weights of a sub-block", "exact zero")
    yield from table(columns, rows)


def span(ends: tuple[int, int]) -> str:
    """The lowest and the highest of some integers."""
    return " … ".join(f"{end}".replace("-", "−") for end in dict.fromkeys(ends))


def linear_bytes(model: PlainDecoder, zeros: str, values: str) -> int:
    """Bytes of all linear layers."""
    format, sparsity, pattern = ZEROS[zeros]
    total = 0
    query, value = model.heads * model.head, model.kv_heads * model.head
    attention = [(query, model.hidden), *[(value, model.hidden)] * 2, (model.hidden, query)]
    for shape in (*attention, *[(model.ffn, model.hidden)] * 2, (model.hidden, model.ffn)):
        group_size = DEFAULT_GROUP if values in GRID_BITS else None
        layout = Layout(format, values, shape, pattern=pattern, group=group_size)
        kept = layout.weights - round(layout.weights * sparsity)
        total += parts_bytes(layout, kept)
    return total * model.layers


def stored_bytes(model: PlainDecoder, zeros: str, values: str) -> int:
    """Bytes of all weights, as `compress` stores them."""
    shape = model.shape("")
    whole = 2 * shape.parameters
    small = values in BITS and 2 * shape.outer >= LARGE_ENDS * whole
    ends = Layout("dense", "int8" if small else "bfloat16", (model.vocabulary, model.hidden))
    copies = 1 if model.tied else 2
    outer = copies * parts_bytes(ends, ends.weights)
    return linear_bytes(model, zeros, values) + outer + 2 * shape.other


if __name__ == "__main__":
    main()
