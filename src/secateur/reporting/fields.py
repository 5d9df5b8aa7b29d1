"""Records as people see them: for each record a list of label, field and format.

`fields.txt` has a view for each record, by its name:

    [Stored]
    stored in {path}
        weight files | {file_bytes:size}
        loss | {loss:.4f}< ± {standard_error:.4f}>
    layers << layers
        layer || zeros
        {number} | {sparsity:.2%}
    >dim> all in {path}

- A line with lines below it is a table with that title. They hold label and value; after `<< field`
  the names of the columns and the cells of a row for each entry of the field. `||` stands before
  the first column of numbers, `-` for no title and no name.
- `>` begins a line of text, `>dim>` one in a style of rich; `@ View` includes another view. With
  `<< field` there is one for each entry.
- A text has the fields of the record, as `str.format` takes them, and the formats of `FORMATS`.
- A row is left out if one of its fields is None, missing or empty, or if its format gives no text;
  a part in `<>` is left out alone. So is a column that no entry fills, and a table without rows.
- An entry that is a mapping may have a `style`, that of its row.
- A field that the record does not have is a property of its class, or is given by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from inspect import cleandoc
from operator import attrgetter
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar, NamedTuple

from secateur.reporting import tables
from secateur.reporting.tables import Block, Line, Table
from secateur.runs.records import Record

FORMATS = {
    "size": tables.binary_size,
    "taken": lambda nbytes: nbytes and tables.binary_size(nbytes),
    "percent": tables.percent,
    "range": lambda seconds: tables.time_range(*seconds),
    "gib": lambda nbytes: f"{nbytes / 2**30:.3g} GiB",
    "ms": lambda seconds: f"{1e3 * seconds:.2f} ms",
    "plain_ms": lambda seconds: f"{1e3 * seconds:.1f}",
    "whole_ms": lambda seconds: f"{1e3 * seconds:.0f} ms",
    "words": lambda words: ", ".join(map(str, words)),
    "rows": "\n".join,
    "lines": tables.without_blank_lines,
    "name": lambda path: Path(path).name,
    "short": tables.bare_name,
    "flags": lambda command: command.removeprefix("secateur "),
    "gpu": lambda so: "GPU" * bool(so),
    "degenerate": lambda so: "degenerate" * so,
    "healed": lambda so: "healed" * so,
}
"""The formats that `str.format` does not have."""

_NAMELESS = "-"


class _UnknownFieldError(Exception):
    """A field of a text has no value."""


class _Fields(Formatter):
    """Fills a text with the fields of one record."""

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        [record] = args
        if key in kwargs:
            return kwargs[str(key)]
        if isinstance(key, int):
            return record
        return record[key] if isinstance(record, Mapping) else getattr(record, key)

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            found, key = super().get_field(field_name, args, kwargs)
        except (LookupError, TypeError, AttributeError) as error:
            # an entry that is not there, or a part of None; a record has all of its fields
            if getattr(error, "obj", None) is not None:
                raise
            found, key = None, ""
        if found is None or (isinstance(found, str | list | tuple | dict) and not found):
            raise _UnknownFieldError
        return found, key

    def format_field(self, value: Any, format_spec: str) -> str:
        own = FORMATS.get(format_spec)
        if own is None:
            return format(value, format_spec)
        if not (text := own(value)):
            raise _UnknownFieldError
        return text


def filled(text: str, record: Any, /, **more: Any) -> str | None:
    """A text with the fields of a record; None if one of them has no value.

    Args:
        text: the text; see the head of this module.
        record: an object or a mapping.
        **more: fields that the record does not have.

    Example:
        >>> from secateur.reporting.fields import filled
        >>> filled("{a:.1f}< ± {b:.2f}>", {"a": 1, "b": 0.5}), filled("{c}", {})
        ('1.0 ± 0.50', None)
    """
    head, _, after = text.partition("<")
    part, _, rest = after.partition(">")
    try:
        found = _Fields().vformat(head, (record,), more)
    except _UnknownFieldError:
        return None
    if not part:
        return found
    tail = filled(rest, record, **more)
    return None if tail is None else found + (filled(part, record, **more) or "") + tail


class _Part(NamedTuple):
    """A part of a view: a line, a table, or another view.

    Attributes:
        text: the line, the title, or the name of the view.
        field: whose entries are shown; empty for the record itself.
        style: of a line; None for a table; `@` for another view.
        rows: the lines of a table.
    """

    text: str
    field: str
    style: str | None
    rows: list[str]

    def blocks(self, record: Any, more: Mapping[str, Any]) -> list[Block]:
        """The tables and lines about a record, or about the entries of its field."""
        entries, own = [record], more
        if self.field:
            try:
                entries, own = _Fields().get_field(self.field, (record,), more)[0], {}
            except _UnknownFieldError:
                return []
        if self.style == "@":
            return [block for entry in entries for block in blocks_of(self.text, entry, **own)]
        if self.style is not None:
            said = (filled(self.text, entry, **own) for entry in entries)
            return [Line(text, self.style) for text in said if text is not None]
        title = "" if self.text == _NAMELESS else filled(self.text, record, **more) or ""
        table = self._table(title, entries) if self.field else self._facts(title, record, more)
        return [table] if table.rows else []

    def _facts(self, title: str, record: Any, more: Mapping[str, Any]) -> Table:
        """A row for each label."""
        rows = [[filled(x, record, **more) for x in _cells(line)] for line in self.rows]
        return Table.of(title, ("", ""), rows, numbers=2)

    def _table(self, title: str, entries: Sequence[Any]) -> Table:
        """A row for each entry; a column that no entry fills is left out."""
        names, cells = self.rows
        words, bars, numbers = names.partition("||")
        left = _cells(words) if words else []
        rows = [[filled(cell, entry) for cell in _cells(cells)] for entry in entries]
        every = left + (_cells(numbers) if bars else [])
        shown = [
            place for place in range(len(every)) if any(row[place] is not None for row in rows)
        ]
        return Table.of(
            title,
            ["" if every[place] == _NAMELESS else every[place] for place in shown],
            [[row[place] or "" for place in shown] for row in rows],
            sum(place < len(left) for place in shown),
            [entry.get("style", "") if isinstance(entry, Mapping) else "" for entry in entries],
        )


def _cells(line: str) -> list[str]:
    """The texts between the bars of a line."""
    return [part.strip() for part in line.split("|")]


def _parsed(text: str) -> dict[str, list[_Part]]:
    """The views of a text, by their names; what stands before the first name has the name ''."""
    found: dict[str, list[_Part]] = {"": []}
    view = found[""]
    for line in filter(str.strip, text.splitlines()):
        said, _, field = line.replace("\\n", "\n").partition(" << ")
        if line.startswith("["):
            view = found.setdefault(line.strip("[]"), [])
        elif line.startswith(" "):
            view[-1].rows.append(said.strip())
        elif line.startswith(("> ", "@ ")):
            view.append(_Part(said[2:], field, said[0].strip(">"), []))
        elif line.startswith(">"):
            style, _, words = said[1:].partition("> ")
            view.append(_Part(words, field, style, []))
        elif not line.startswith("#"):
            view.append(_Part(said, field, None, []))
    return found


@cache
def _views() -> dict[str, list[_Part]]:
    """The views of this package."""
    return _parsed(files("secateur.reporting").joinpath("fields.txt").read_text("utf-8"))


def blocks_of(view: str, record: Any, /, **more: Any) -> list[Block]:
    """The tables and lines about a record.

    Args:
        view: its name in `fields.txt`.
        record: an object or a mapping.
        **more: fields that the record does not have.
    """
    return [block for part in _views()[view] for block in part.blocks(record, more)]


def of_record(path: str, doc: str) -> Any:
    """A property of a result: a part of its record, such as `record.model`."""
    return property(attrgetter(path), doc=doc)


class Result(Record):
    """What a verb returns: a record, and what people see of it.

    The command line prints `to_json()` with `--json` and calls `show()` without it. In Python
    `print(result)` and a result as the last line of a cell show the same tables, without colours.
    """

    view: ClassVar[str] = ""
    """The text of its view; empty if `fields.txt` has one with the name of the class."""

    joined: ClassVar[str] = ""
    """A field whose own keys stand in the JSON in its place."""

    @property
    def exit_code(self) -> int:
        """The exit code of the command: not 0 if the result says that something is wrong."""
        return 0

    def to_json(self) -> dict[str, Any]:
        """The result as one JSON object: its fields, unless a class says otherwise."""
        found = self.model_dump(mode="json", by_alias=True, exclude={self.joined})
        if not self.joined:
            return found
        entries, place = [*found.items()], [*type(self).model_fields].index(self.joined)
        own = getattr(self, self.joined).to_json().items()
        return dict([*entries[:place], *own, *entries[place:]])

    def tables(self) -> list[Block]:
        """The tables and lines about the record."""
        if not self.view:
            return blocks_of(type(self).__name__, self)
        parts = _parsed(cleandoc(self.view))[""]
        return [block for part in parts for block in part.blocks(self, {})]

    def following(self) -> list[Block]:
        """Where the files are, and which commands to try next."""
        return []

    def blocks(self) -> Sequence[Block]:
        """The tables and lines that people read."""
        return [*self.tables(), *self.following()]

    def show(self) -> None:
        """Write the tables to stdout."""
        tables.print_blocks(self.blocks())

    def __str__(self) -> str:
        """The tables as text."""
        return tables.plain_text(self.blocks())

    def __repr__(self) -> str:
        """The tables as text, for consoles: the fields hold every layer."""
        return str(self)

    def _repr_html_(self) -> str:
        """The tables as HTML, for notebooks."""
        return tables.html(self.blocks())
