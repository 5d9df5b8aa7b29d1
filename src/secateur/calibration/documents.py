"""Reads texts and conversations for calibration, training or evaluation.

| source                           | documents                                                   |
|----------------------------------|-------------------------------------------------------------|
| `FILE.txt`, `.md`, `.raw`        | the whole file is one document                              |
| `FILE.jsonl`, `FILE.parquet`     | one document per row, its field `text` (or another)         |
| a folder                         | the documents of all such files in it, in order of paths    |
| `boolq-calibration`, `-held-out` | a sample: one passage each                                  |
| `c4`                             | web pages of the first shard of C4's English part           |
| `wikitext2`                      | WikiText-2 raw: one document, rows joined by two newlines   |
| `hub:org/name[@revision][:split]`| one document per row of that data set                       |

Files may also be compressed (`.gz`). Unless a split is named, calibration reads the `train` split
of a data set, and evaluation its `test` or `validation` split.

A row without the field `text` may hold a conversation instead (`chats.py`), which is one document.
A source has either texts or conversations.

Several texts with weights stand in one line: `code.jsonl=2,math.jsonl=1,c4`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from secateur.calibration import chats
from secateur.calibration.chats import FIELD, Document
from secateur.errors import SourceError, first_line
from secateur.models.hub import hub_or_cache
from secateur.models.samples import TEXTS, sample_text
from secateur.registry import did_you_mean

TEXT_SUFFIXES = (".txt", ".md", ".raw")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE = ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, TABLE)

HUB_DATASET = re.compile(
    r"hub:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.:%+\[\]-]+))?"
)
PICTURES = ("image", "images", "image_path")
BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class _HubDataset:
    """A data set on the hub, and how its rows make a text.

    Args:
        repo: its id.
        config: which of its configurations.
        calibrate: the split, and its file, for calibration; None for all files.
        judge: the same, for evaluation.
        one_document: the rows are lines of one long text rather than documents.
    """

    repo: str
    config: str | None = None
    revision: str | None = None
    calibrate: tuple[str, str | None] = ("train", None)
    judge: tuple[str, str | None] = ("test", None)
    one_document: bool = False


KNOWN_DATASETS: dict[str, _HubDataset] = {
    "c4": _HubDataset(
        "allenai/c4",
        calibrate=("train", "en/c4-train.00000-of-01024.json.gz"),
        judge=("validation", "en/c4-validation.00000-of-00008.json.gz"),
    ),
    "wikitext2": _HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", one_document=True),
}
"""Data sets that can be named without their hub id."""


@dataclass(frozen=True)
class JoinedText:
    """One text for evaluation, and what a perplexity must report about it.

    Args:
        text: the whole text, or conversations.
        dataset: the source and, for a data set, its split.
        join: how documents were joined.
    """

    text: str | Sequence[Document]
    dataset: str
    join: str


def read_documents(source: str, *, field: str = FIELD) -> Sequence[Document]:
    """The documents of a source, for calibration.

    Args:
        source: see the table above.
        field: the field or column with the text, or with messages, in JSON lines and data sets.

    Returns:
        The documents. Those of a data set on the hub stay on disk until they are read.

    Raises:
        SourceError: there is no such source, it cannot be reached, it has no text, or a line of
            it is malformed or has no such field.
    """
    dataset = _hub_dataset(source)
    if dataset is None:
        return _local_documents(source, field)
    return _hub_documents(dataset, dataset.calibrate[0], field)


def read_text(source: str) -> JoinedText:
    """A source as one text, for evaluation; see `read_documents`.

    A single text file is not changed. Documents are joined by two newlines.

    Raises:
        SourceError: as `read_documents`.
    """
    dataset = _hub_dataset(source)
    documents: Sequence[Document]
    if dataset is None:
        documents = _local_documents(source, FIELD)
        name, unit = source, "documents"
    else:
        split = dataset.judge[0]
        documents = _hub_documents(dataset, split, FIELD)
        name = f"{dataset.repo} {dataset.config or ''} {split}".replace("  ", " ")
        unit = "rows"
    if chats.holds_chats(documents):
        return JoinedText(documents, name, "conversations, one after the other")
    whole = len(documents) == 1 and not (dataset and dataset.one_document)
    join = "one text, as it is" if whole else f"{unit} joined by two newlines"
    return JoinedText(BLANK_LINE.join(cast("Sequence[str]", documents)), name, join)


def check_text(source: str) -> None:
    """Refuse a text that is no file, folder, sample or data set; reads nothing.

    Raises:
        SourceError: there is no such text.
    """
    known = source in TEXTS or Path(source).expanduser().exists()
    if not known and _hub_dataset(source) is None:
        raise _no_text(source)


def _no_text(source: str) -> SourceError:
    """The error that there is no such text."""
    return SourceError(
        f"no text is named {source!r}",
        where=str(Path(source).expanduser().absolute()),
        remedy=f"name a file ({', '.join(SUFFIXES)}), a folder, a data "
        f"set as hub:org/name, or {did_you_mean(source, [*TEXTS, *KNOWN_DATASETS])}",
    )


def _local_documents(source: str, field: str) -> Sequence[Document]:
    """The documents of a file, a folder or a sample."""
    path = Path(source).expanduser()
    documents: list[Document]
    if path.is_file():
        documents = list(_file_documents(path, field))
    elif path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and _bare_suffix(p)]
        documents = [text for p in files for text in _file_documents(p, field)]
    elif source in TEXTS:
        documents = [*sample_text(source)]
    else:
        raise _no_text(source)
    texts = [x for x in documents if isinstance(x, str)]
    if texts and len(texts) < len(documents):
        raise SourceError(
            f"{source} has {len(texts)} texts and {len(documents) - len(texts)} conversations",
            where=str(path.absolute()),
            remedy="write them to two files, and name both: texts.jsonl,chats.jsonl",
        )
    if len(texts) == len(documents) and not any(text.strip() for text in texts):
        raise SourceError(
            f"{source} contains no text",
            where=str(path.absolute()),
            remedy=f"name a file with text, of kind {', '.join(SUFFIXES)}",
        )
    return documents


def _bare_suffix(path: Path) -> str | None:
    """The suffix of a text file without `.gz`, or None if secateur does not read this kind."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in SUFFIXES else None


def _file_documents(path: Path, field: str) -> Iterator[Document]:
    suffix = _bare_suffix(path)
    if suffix is None:
        raise SourceError(
            f"{path.name} is not a kind of text that secateur reads",
            where=str(path),
            remedy=f"name a file ending in {', '.join(SUFFIXES)} "
            "(or one of these and .gz), or a .safetensors file of windows to calibrate on",
        )
    if suffix == TABLE:
        import datasets

        try:
            rows = datasets.Dataset.from_parquet(str(path))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise SourceError(
                f"{path.name} cannot be read: {first_line(error)}",
                where=str(path),
                remedy="copy it again, or name a text of another kind",
            ) from None
        yield from _row_documents(rows, field, str(path))
        return
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with cast("IO[str]", opener(path, "rt", encoding="utf-8-sig")) as lines:
            if suffix in TEXT_SUFFIXES:
                text = lines.read()
                # ASCII in UTF-16 is valid UTF-8, half of it NUL
                if 100 * (nul := text.count("\0")) > len(text):
                    raise SourceError(
                        f"{path.name} is no UTF-8 text: {nul} of {len(text)} characters are NUL",
                        where=str(path),
                        remedy="convert it to UTF-8 if it is UTF-16; a binary file has no text",
                    )
                yield text
            else:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _line_document(line, f"{path}:{number}", field)
    except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
        raise SourceError(
            f"{path.name} cannot be read as UTF-8 text: {error}",
            where=str(path),
            remedy="convert it to UTF-8, or copy it again",
        ) from None


def _line_document(line: str, where: str, field: str) -> Document:
    """The document of one JSON line."""
    row: Any = None
    try:
        row = json.loads(line)
        fault = type(row).__name__
    except (ValueError, RecursionError) as error:
        fault = first_line(error)
    if not isinstance(row, dict):
        raise SourceError(
            f"the line is no JSON object: {fault}",
            where=where,
            remedy=f'write one for each line, such as {{"{field}": "..."}}, or name the file .txt',
        )
    pictures = [name for name in PICTURES if row.get(name)]
    if pictures:
        raise SourceError(
            f"the line has a picture ({pictures[0]}), and lines are read as text alone",
            where=where,
            remedy=f"remove the field {pictures[0]!r}",
        )
    if fields := chats.conversation_fields(row, field):
        return chats.conversation(row, fields, where)
    if not isinstance(row.get(field), str):
        fault = f"is a {type(row[field]).__name__}, not text" if field in row else "is not there"
        raise SourceError(
            f"the field {field!r} {fault}; the line has: {', '.join(row) or 'no field'}",
            where=where,
            remedy="name the field with the text, or write conversations in the field 'messages'",
        )
    return chats.whole_characters(cast(str, row[field]), where)


def _hub_dataset(source: str) -> _HubDataset | None:
    """The hub data set that a source names, or None if it is a file, a folder or a sample."""
    if Path(source).expanduser().exists():
        return None
    if source in KNOWN_DATASETS:
        return KNOWN_DATASETS[source]
    named = HUB_DATASET.fullmatch(source)
    if named is None:
        return None
    found = _HubDataset(named["repo"], revision=named["revision"])
    split = (named["split"], None)
    return replace(found, calibrate=split, judge=split) if named["split"] else found


def _hub_documents(dataset: _HubDataset, split: str, field: str) -> Sequence[Document]:
    """The documents of one split of a data set on the hub."""
    import datasets

    shards = dict([dataset.calibrate, dataset.judge])
    options = {"data_files": {split: shards[split]}} if shards.get(split) else {}
    where = f"hub: {dataset.repo} {dataset.config or ''} split {split}"
    reason = None
    try:
        with hub_or_cache() as reason:
            rows = datasets.load_dataset(
                dataset.repo, dataset.config, split=split, revision=dataset.revision, **options
            )
    except (OSError, datasets.exceptions.DatasetsError) as error:
        why = reason or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"the data set {dataset.repo} is not on this machine, and it cannot be downloaded "
            f"({why})",
            where=where,
            remedy="check the network and the spelling; or name a local .jsonl or .txt file, or a "
            f"sample text ({', '.join(TEXTS)})",
        ) from error
    except ValueError as error:  # an unknown split or configuration
        raise SourceError(
            str(error), where=where, remedy="name a split or configuration of the data set"
        ) from error
    documents = _row_documents(rows, field, where)
    if dataset.one_document:
        return [BLANK_LINE.join(cast("Sequence[str]", documents))]
    return documents


def _row_documents(rows: Any, field: str, where: str) -> Sequence[Document]:
    """The documents of a data set's rows. They stay on disk until they are read."""
    if fields := chats.conversation_fields(rows[0] if len(rows) else {}, field):
        return _Chats(rows, fields, where)
    if field not in rows.column_names:
        raise SourceError(
            f"the data set has no column {field!r}; it has: {', '.join(rows.column_names)}",
            where=where,
            remedy="name the column with the text or the messages",
        )
    return cast("Sequence[str]", rows[field])


class _Chats(Sequence[Document]):
    """The conversations of a data set's rows, each made when it is read."""

    def __init__(self, rows: Any, fields: tuple[str, ...], where: str) -> None:
        self.rows, self.fields, self.where = rows, fields, where

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return chats.conversation(self.rows[place], self.fields, f"{self.where} row {place}")
