"""Blocks, tables and lines of text, and the three outputs that show them.

The same blocks are written on a terminal (`print_blocks`) or as text (`plain_text`), as HTML for
notebooks and pages (`html`), and in Markdown for model cards (`markdown`). `fields.py` makes them
from records.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 100
"""Width of a result as text, in characters."""


NARROWEST_COLUMN = 7
"""Characters of a column with its frame. A narrower terminal wraps a table, which hides no cell."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: text above the table; may be empty.
        columns: names of the columns; empty names leave the head out.
        rows: the cells, as text.
        numbers: the first column with numbers; it and all later columns align right.
        styles: a rich style for each row, such as `bold red`; empty for none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: int = 1
    styles: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str | None]],
        numbers: int = 1,
        styles: Iterable[str] = (),
    ) -> Table:
        """Make a table from any sequences of rows and columns; a row with a None is left out."""
        known = tuple(tuple(map(str, row)) for row in rows if None not in row)
        return cls(title, tuple(columns), known, numbers, tuple(styles))

    def renderable(self) -> Any:
        """The table as an object of rich."""
        from rich.table import Table as RichTable
        from rich.text import Text

        drawn = RichTable(
            title=Text(self.title) if self.title else None,
            title_justify="left",
            title_style="bold",
            show_header=any(self.columns),
        )
        for index, column in enumerate(self.columns):
            justify: Any = "left" if index < self.numbers else "right"
            drawn.add_column(Text(column), justify=justify, overflow="fold")
        styles = self.styles or ("",) * len(self.rows)
        for row, style in zip(self.rows, styles, strict=True):
            drawn.add_row(*(Text(cell) for cell in row), style=style or None)
        return drawn

    def html(self) -> str:
        """The table as HTML, without styles of its own."""

        def cells(tag: str, row: Sequence[str]) -> str:
            sides = ["left"] * self.numbers + ["right"] * (len(row) - self.numbers)
            return "".join(
                f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
                for side, cell in zip(sides, row, strict=False)
            )

        caption = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        head = f"<thead><tr>{cells('th', self.columns)}</tr></thead>" if any(self.columns) else ""
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self.rows)
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"

    def markdown(self) -> str:
        """The table in Markdown, below its title. Bars are escaped."""

        def line(cells: Iterable[str]) -> str:
            shown = (x.replace("|", "\\|").replace("\n", "<br>") for x in cells)
            return "|" + "|".join(f" {x} " if x else " " for x in shown) + "|"

        sides = ["---" if n < self.numbers else "---:" for n in range(len(self.columns))]
        lines = [line(self.columns), f"|{'|'.join(sides)}|", *map(line, self.rows)]
        return "\n".join([f"**{self.title}**\n"] * bool(self.title) + lines)


COMMAND = "cyan"
"""The style of a command."""

_CSS = {
    "dim": "opacity: 0.75",
    "bold": "font-weight: 600",
    "red": "color: #c0392b",
    "bold red": "font-weight: 600; color: #c0392b",
    COMMAND: "font-family: ui-monospace, monospace; font-size: 0.92em",
}
"""The styles of lines on a page and in a notebook."""


@dataclass(frozen=True)
class Line:
    """A line of text. Only the terminal wraps it.

    Attributes:
        text: the text, without markup.
        style: a rich style, such as `dim`; empty for none.
    """

    text: str
    style: str = ""

    def renderable(self) -> Any:
        """The line as an object of rich."""
        from rich.text import Text

        return Text(self.text, style=self.style)

    def html(self) -> str:
        """The line as HTML."""
        text = escape(self.text)
        return f'<span style="{_CSS.get(self.style, "")}">{text}</span>' if self.style else text


Block = Table | Line


def print_blocks(blocks: Iterable[Block], console: Console | None = None) -> None:
    """Write blocks to a console; to stdout if none is given."""
    from rich.console import Console

    console = console or Console(force_jupyter=False)
    usual = console.width
    with console:  # writes once: a notebook shows every write as an output of its own
        for block in blocks:
            columns = 0 if isinstance(block, Line) else len(block.columns)
            # a frame of one line between columns, and one at the end
            console.width = max(usual, NARROWEST_COLUMN * columns + 1)
            console.print(block.renderable(), soft_wrap=not columns, highlight=False)


def plain_text(blocks: Iterable[Block]) -> str:
    """Blocks as text without colours, `PLAIN_WIDTH` columns wide."""
    from rich.console import Console

    stream = io.StringIO()
    plain: Any = {"no_color": True, "force_terminal": False, "force_jupyter": False}
    print_blocks(blocks, Console(file=stream, width=PLAIN_WIDTH, **plain))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def html(blocks: Iterable[Block]) -> str:
    """Blocks as HTML: tables, and lines between them as paragraphs that keep their breaks."""
    parts: list[str] = []
    lines: list[str] = []
    for block in [*blocks, None]:  # None writes the lines that stand at the end
        if isinstance(block, Line):
            lines.append(block.html())
            continue
        if text := "\n".join(lines).strip("\n"):
            parts.append(f'<p style="white-space: pre-wrap">{text}</p>')
        lines = []
        if block is not None:
            parts.append(block.html())
    return "\n".join(parts)


def markdown(blocks: Iterable[Block]) -> str:
    """Blocks in Markdown, with an empty line between them."""
    return "\n\n".join(x.text if isinstance(x, Line) else x.markdown() for x in blocks)


def next_steps(places: Mapping[str, object], commands: Mapping[str, str]) -> list[Block]:
    """Lines that say where results are, and which commands to try next.

    Args:
        places: names and paths of the results.
        commands: what each command does, and the command.
    """
    lines: list[Block] = [Line("")]
    lines += [Line(f"{what}: {place}") for what, place in places.items()]
    lines += [Line("next:", "bold")] if commands else []
    for what, command in commands.items():
        lines += [Line(f"  {command}", COMMAND), Line(f"      {what}", "dim")]
    return lines


def layer_of(name: str) -> int:
    """The layer number in a tensor's name: its first number (experts have a second); -1 if none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def plus_minus(error: float | None, form: str = ".4f") -> str:
    """A standard error after its value; empty if there is none."""
    return "" if error is None else f" ± {error:{form}}"


def bare_name(name: str) -> str:
    """The name of a model or text without its folder. Hub ids stay whole."""
    return Path(name).name if name.startswith(("/", ".", "~")) or Path(name).exists() else name


def percent(fraction: float, digits: int = 0) -> str:
    """A fraction in percent."""
    return f"{100 * fraction:.{digits}f}\u00a0%"  # a no-break space keeps the sign with its number


def binary_size(nbytes: float) -> str:
    """A size in KiB, MiB or GiB; small ones with decimals.

    Example:
        >>> from secateur.reporting.tables import binary_size
        >>> binary_size(257 * 2**20), binary_size(6.5e6), binary_size(90_000), binary_size(3e9)
        ('257 MiB', '6.2 MiB', '88 KiB', '2.79 GiB')
    """
    if nbytes >= 2**30:
        return f"{nbytes / 2**30:,.2f} GiB"
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.0f} KiB"
    mebibytes = nbytes / 2**20
    return f"{mebibytes:.{0 if mebibytes >= 10 else 1}f} MiB"


def signed(value: float, digits: int) -> str:
    """A difference with its sign; no sign if it rounds to 0."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def duration(seconds: float) -> str:
    """A duration as text: `8 s`, `2 min 05 s`, `1 h 12 min`.

    Example:
        >>> from secateur.reporting.tables import duration
        >>> duration(8.4), duration(125), duration(4321)
        ('8 s', '2 min 05 s', '1 h 12 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def time_range(least: float, most: float) -> str:
    """The two ends of an estimated time, in one unit: `20 to 60 s`, `2 to 5 min`, `3 to 8 h`.

    Example:
        >>> from secateur.reporting.tables import time_range
        >>> time_range(21, 64), time_range(70, 290), time_range(8000, 25000)
        ('20 to 60 s', '1 to 5 min', '2 to 7 h')
    """
    size, unit = (1, "s") if most < 100 else (60, "min") if most < 6000 else (3600, "h")
    low, high = least / size, most / size
    if unit == "s" and low >= 10:  # an estimate is not accurate to single seconds
        low, high = 10 * round(low / 10), 10 * round(high / 10)
    return f"{low:.0f} to {max(high, 1):.0f} {unit}"


def without_blank_lines(text: str) -> str:
    """A model's text for a terminal: pruned models write many empty lines.

    Example:
        >>> from secateur.reporting.tables import without_blank_lines
        >>> without_blank_lines("Paris.\\n\\n \\nIt is")
        'Paris.\\nIt is'
    """
    return "\n".join(line for line in text.splitlines() if line.strip())
