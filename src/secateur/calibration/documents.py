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

A row without the field `text` may hold a conversation instead, which is one document:

| fields                                             | read as                              |
|----------------------------------------------------|--------------------------------------|
| `messages`: [{"role", "content"}, …]               | a conversation, in the chat template |
| `conversations`: [{"from", "value"}, …] (ShareGPT) | the same                             |
| `prompt` and `completion`, lists of messages       | the same, all messages together      |
| `prompt` and `completion`, texts                   | one text, without a template         |

Answers are what the assistant writes, or the completion. A source has either texts or
conversations.

Several texts with weights stand in one line: `code.jsonl=2,math.jsonl=1,c4`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar, cast, overload

from secateur.errors import SourceError, first_line
from secateur.models.hub import TEXTS, hub_or_cache, sample_text
from secateur.models.tokenizer import Tokenizer, encoded
from secateur.registry import did_you_mean

TEXT_SUFFIXES = (".txt", ".md", ".raw")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE = ".parquet"
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, TABLE)

HUB_DATASET = re.compile(
    r"hub:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.:%+\[\]-]+))?"
)
FIELD = "text"
CHATS = ("messages", "conversations")
PAIR = ("prompt", "completion")
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function")},
    **{"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"},
}
"""The roles of messages; those of ShareGPT become the usual ones."""

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marks answers in a chat template."""
PICTURES = ("image", "images", "image_path")
BLANK_LINE = "\n\n"


@dataclass(frozen=True)
class HubDataset:
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


KNOWN_DATASETS: dict[str, HubDataset] = {
    "c4": HubDataset(
        "allenai/c4",
        calibrate=("train", "en/c4-train.00000-of-01024.json.gz"),
        judge=("validation", "en/c4-validation.00000-of-00008.json.gz"),
    ),
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", one_document=True),
}
"""Data sets that can be named without their hub id."""


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt and its completion, both plain texts.

    Attributes:
        prompt: the first part of the text.
        completion: the second part, which is the answer.
    """

    prompt: str
    completion: str
    ends_itself: ClassVar[bool] = False

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids, without special tokens around them."""
        return self.marked(tokenizer)[0]

    def marked(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """Its token ids, and which of them are the answer."""
        text = self.prompt + self.completion
        return _marked(tokenizer, text, [(len(self.prompt), len(text))])


@dataclass(frozen=True)
class Chat:
    """A conversation, to be written with the chat template of a tokenizer.

    Attributes:
        messages: role and content of each, and whatever else the template reads.
        where: file and line, or data set and row, for errors.
        tools: descriptions of tools, for the template.
    """

    messages: tuple[dict[str, Any], ...]
    where: str
    tools: list[Any] | None = None
    ends_itself: ClassVar[bool] = True

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids: those of `apply_chat_template`.

        Raises:
            SourceError: the tokenizer has no chat template, or the template refuses the messages.
        """
        return encoded(tokenizer, [self._whole(tokenizer)], add_special_tokens=False)[0]

    def marked(self, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
        """Its token ids, and which of them are answers.

        A template with `{% generation %}` marks them itself. Otherwise an answer is what the
        template adds for it, between the conversation before it with the generation prompt and the
        conversation with it; white space at its end does not belong to it.

        Raises:
            SourceError: as `ids`; or the answers cannot be found.
        """
        whole = self._whole(tokenizer)
        if GENERATION.search(tokenizer.get_chat_template(tools=self.tools)):
            found = self._call(
                tokenizer,
                self.messages,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False},
            )
            return list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]]
        answers = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        return _marked(tokenizer, whole, [self._answer(tokenizer, whole, i) for i in answers])

    def _answer(self, tokenizer: Tokenizer, whole: str, number: int) -> tuple[int, int]:
        """The first character of an answer in the whole conversation, and the one after it."""
        prompt = self._text(tokenizer, number, add_generation_prompt=True) if number else ""
        after, content = self._text(tokenizer, number + 1), _words(self.messages[number]).strip()
        known, through = prompt and whole.startswith(prompt), whole.startswith(after)
        start, end = len(prompt), len(after.rstrip())
        if not known:  # an earlier answer may be written otherwise than the generation prompt
            asked = self._text(tokenizer, number) if number else ""
            start = after.rfind(content) if through else len(asked)
            start = whole.find(content, start) if content and whole.startswith(asked) else -1
        if not through:  # or shorter than it was as the last one
            place = whole.find(content, start) if content and start >= 0 else -1
            end = place + len(content) if place >= 0 else -1
            behind = whole[end:].lstrip()
            stops = [token for token in tokenizer.get_added_vocab() if behind.startswith(token)]
            stop = max(stops, key=len, default="")
            end = len(whole) - len(behind) + len(stop) if end >= 0 and stop else end
        if start < 0 or end < start:
            raise SourceError(
                f"message {number + 1} is an answer that cannot be found in what the chat template "
                "writes",
                where=self.where,
                remedy="mark the answers in the template with {% generation %}, or train on whole "
                "conversations (--whole-conversations)",
            )
        return start, end

    def _whole(self, tokenizer: Tokenizer) -> str:
        """The conversation as the template writes it."""
        text = self._text(tokenizer, len(self.messages))
        for number, message in enumerate(self.messages, start=1):
            if message["role"] == "user" and _words(message).strip() not in text:
                raise SourceError(
                    f"the chat template does not write the text of message {number}",
                    where=self.where,
                    remedy='write its content as this template reads it: a text, or [{"type": '
                    '"text", "text": "..."}]',
                )
        return text

    def _text(self, tokenizer: Tokenizer, count: int, **options: bool) -> str:
        """The first messages as the template writes them."""
        return str(self._call(tokenizer, self.messages[:count], tokenize=False, **options))

    def _call(self, tokenizer: Tokenizer, messages: Sequence[Any], **options: Any) -> Any:
        """What `apply_chat_template` returns."""
        _need_template(tokenizer, self.where)
        options |= {"tools": self.tools} if self.tools else {}
        try:
            return tokenizer.apply_chat_template(list(messages), **options)
        except Exception as error:  # templates can raise any exception
            raise SourceError(
                f"the chat template refuses the conversation: {first_line(error)}",
                where=self.where,
                remedy="change or remove this conversation; many templates need user and assistant "
                "to alternate, and some refuse a system message",
            ) from error


Document = str | Chat | PromptCompletion
"""A text, or a conversation that needs a tokenizer to become one."""


def _words(message: Mapping[str, Any]) -> str:
    """The text of a message; its content may be in parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _need_template(tokenizer: Tokenizer, where: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise SourceError(
            "this is a conversation, and the tokenizer has no chat template",
            where=where,
            remedy="copy chat_template.jinja or tokenizer_config.json of the instruct model to the "
            "model's folder, or write the conversation as one text, in the field 'text'",
        )


def template_digest(documents: Sequence[Document], tokenizer: Tokenizer) -> str | None:
    """The SHA-256 of the chat template that writes documents, in sixteen digits; None for texts."""
    if not (len(documents) and isinstance(documents[0], Chat)):
        return None
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()[:16]


def _marked(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]]
) -> tuple[list[int], list[bool]]:
    """The token ids of a text, and which of them have characters in one of the spans."""
    if not tokenizer.is_fast:
        raise SourceError(
            "answers cannot be found in tokens: the tokenizer is not a fast one",
            remedy="save it as tokenizer.json, or train on whole conversations "
            "(--whole-conversations)",
        )
    found = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
    )
    marks = [
        any(first < end and last > start for start, end in spans)
        for first, last in found["offset_mapping"]
    ]
    return list(found["input_ids"]), marks


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


def read_documents(
    source: str, *, field: str = FIELD, split: str | None = None, config: str | None = None
) -> Sequence[Document]:
    """The documents of a source, for calibration.

    Args:
        source: see the table above.
        field: the field or column with the text, or with messages, in JSON lines and data sets.
        split: the split of a data set on the hub; by default `train`.
        config: the configuration of a data set on the hub.

    Returns:
        The documents. Those of a data set on the hub stay on disk until they are read.

    Raises:
        SourceError: there is no such source, it cannot be reached, it has no text, or a line of
            it is malformed or has no such field.
    """
    dataset = _hub_dataset(source, config)
    if dataset is not None:
        return _hub_documents(dataset, split or dataset.calibrate[0], field)
    return _local_documents(source, field)


def read_text(
    source: str, *, field: str = FIELD, split: str | None = None, config: str | None = None
) -> JoinedText:
    """A source as one text, for evaluation; the arguments are those of `read_documents`.

    A single text file is not changed. Documents are joined by two newlines.

    Raises:
        SourceError: as `read_documents`.
    """
    dataset = _hub_dataset(source, config)
    documents: Sequence[Document]
    if dataset is None:
        documents = _local_documents(source, field)
        name, unit = source, "documents"
    else:
        split = split or dataset.judge[0]
        documents = _hub_documents(dataset, split, field)
        name = f"{dataset.repo} {dataset.config or ''} {split}".replace("  ", " ")
        unit = "rows"
    if holds_chats(documents):
        return JoinedText(documents, name, "conversations, one after the other")
    whole = len(documents) == 1 and not (dataset and dataset.one_document)
    join = "one text, as it is" if whole else f"{unit} joined by two newlines"
    return JoinedText(BLANK_LINE.join(cast("Sequence[str]", documents)), name, join)


def holds_chats(documents: Sequence[Document]) -> bool:
    """Whether the documents are conversations and not texts; a source has one of the two."""
    return len(documents) > 0 and not isinstance(documents[0], str)


def check_text(source: str) -> None:
    """Refuse a text that is no file, folder, sample or data set; reads nothing.

    Raises:
        SourceError: there is no such text.
    """
    known = source in TEXTS or Path(source).expanduser().exists()
    if not known and _hub_dataset(source, None) is None:
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
    fields = _conversation_fields(row, field)
    if fields:
        return _conversation(row, fields, where)
    if not isinstance(row.get(field), str):
        fault = f"is a {type(row[field]).__name__}, not text" if field in row else "is not there"
        raise SourceError(
            f"the field {field!r} {fault}; the line has: {', '.join(row) or 'no field'}",
            where=where,
            remedy="name the field with the text, or write conversations in the field 'messages'",
        )
    return _whole_characters(cast(str, row[field]), where)


def _whole_characters(text: str, where: str) -> str:
    """The text. JSON can write half of a surrogate pair, and no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"the text has half of a surrogate pair (\\u{ord(text[error.start]):04x}) at character "
            f"{error.start}",
            where=where,
            remedy="write the whole character, or remove it",
        ) from None
    return text


def _conversation_fields(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """The fields of a row with a conversation, or a prompt and its completion; () for a text."""
    if isinstance(row.get(field), list):
        return (field,)
    if field != FIELD or row.get(field) is not None:
        return ()
    if all(row.get(name) is not None for name in PAIR) and not row.get(CHATS[0]):
        return PAIR
    return next(((name,) for name in CHATS if name in row), ())


def _conversation(
    row: Mapping[str, Any], fields: tuple[str, ...], where: str
) -> Chat | PromptCompletion:
    """The conversation of a row."""
    values = [row[name] for name in fields]
    if all(isinstance(value, str) for value in values) and len(values) == len(PAIR):
        prompt, completion = (_whole_characters(value, where) for value in values)
        return PromptCompletion(prompt, completion)
    wrong = [name for name, x in zip(fields, values, strict=True) if not isinstance(x, list)]
    if wrong:
        raise SourceError(
            f"the field {wrong[0]!r} is a {type(row[wrong[0]]).__name__}, not a list of messages",
            where=where,
            remedy='write [{"role": "user", "content": "..."}, ...]',
        )
    messages = tuple(_message(x, where) for value in values for x in value)
    if not any(m["content"] or len(m) > 2 for m in messages):
        raise SourceError(
            "the conversation is empty", where=where, remedy="remove it, or write its messages"
        )
    tools = row.get("tools") or None
    if not isinstance(tools, list | None):
        raise SourceError(
            f"the field 'tools' is a {type(tools).__name__}, not a list of tools",
            where=where,
            remedy='write [{"type": "function", "function": {...}}, ...]',
        )
    return Chat(messages, where, tools)


def _message(given: Any, where: str) -> dict[str, Any]:
    """A message with role and content, whichever names they have."""
    found = given if isinstance(given, dict) else {}
    role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
    others = {
        name: value
        for name, value in found.items()
        if name not in ("role", "from", "content", "value") and value is not None
    }
    if content is None and others:  # of a message that calls a tool
        content = ""
    if role is None or content is None:
        raise SourceError(
            "a message has no role or no content; it has: " + (", ".join(found) or "no field"),
            where=where,
            remedy='write {"role": "user", "content": "..."}',
        )
    if not isinstance(role, str) or role not in ROLES:
        raise SourceError(
            f"unknown role {role!r}", where=where, remedy=did_you_mean(str(role), [*ROLES])
        )
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise SourceError(
                f"the content of a message has a part that is no text ({kind})",
                where=where,
                remedy="remove it",
            )
        _whole_characters(part["text"], where)
    return {"role": ROLES[role], "content": content, **others}


def _hub_dataset(source: str, config: str | None) -> HubDataset | None:
    """The hub data set that a source names, or None if it is a file, a folder or a sample."""
    if Path(source).expanduser().exists():
        return None
    if source in KNOWN_DATASETS:
        return KNOWN_DATASETS[source]
    named = HUB_DATASET.fullmatch(source)
    if named is None:
        return None
    found = HubDataset(named["repo"], config, named["revision"])
    split = (named["split"], None)
    return replace(found, calibrate=split, judge=split) if named["split"] else found


def _hub_documents(dataset: HubDataset, split: str, field: str) -> Sequence[Document]:
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
    first = rows[0] if len(rows) else {}
    fields = _conversation_fields(first, field)
    if fields:
        return _Chats(rows, fields, where)
    if field not in rows.column_names:
        raise SourceError(
            f"the data set has no column {field!r}; it has: {', '.join(rows.column_names)}",
            where=where,
            remedy="name the column with the text or the messages",
        )
    texts: Sequence[str] = rows[field]
    return texts


@dataclass(frozen=True)
class _Chats(Sequence[Chat | PromptCompletion]):
    """The conversations of a data set's rows."""

    rows: Any
    fields: tuple[str, ...]
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Chat | PromptCompletion: ...

    @overload
    def __getitem__(self, place: slice) -> list[Chat | PromptCompletion]: ...

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not 0 <= place < len(self):
            raise IndexError(place)
        return _conversation(self.rows[place], self.fields, f"{self.where} row {place}")
