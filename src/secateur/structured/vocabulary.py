"""Vocabulary trimming: tokens that a text never needs leave tokenizer, embedding and head.

    text ─► counts ─► tokens that stay, with all that makes them ─► tokenizer files, tables

`token_texts` counts the tokens of texts. `token_pieces` knows how the tokenizers of one kind make
tokens, and chooses those that stay. Here the tokenizer and the configuration are written with new
ids, and rows leave the weights: of the embedding, the head and its bias. Ids are given anew in the
order of the old ones. So tokens that were added after the vocabulary stay behind it, as the
tokenizers library needs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import ArchitectureError, CheckpointError, RecipeError
from secateur.models import at_rest, checkpoint, opening, sources
from secateur.models.architecture import only_embeds, text_config
from secateur.models.skeleton import build_skeleton, model_names, refuse_missing, stored_buffers
from secateur.models.tokenizer import load_tokenizer, text_tokens
from secateur.progress import Progress, Silent
from secateur.recipes.shared import texts_of
from secateur.recipes.structure import StructureRecipe
from secateur.runs.output import whole_folder, write_json, writing
from secateur.structured.cut import Cut
from secateur.structured.cut_steps import STEP, read_notes
from secateur.structured.design import Accounting, accounting
from secateur.structured.edits import TensorEdit
from secateur.structured.embedders import (
    TEXTS,
    before_positions,
    further_modules,
    least_similarity,
    prompt_pieces,
)
from secateur.structured.surgery import write_tensors
from secateur.structured.token_pieces import Pieces, kept_tokens, pieces_of, untrimmed
from secateur.structured.token_texts import (
    BATCH,
    CountedText,
    checked_texts,
    counted_texts,
    needs_all,
    read_texts,
    tokens_within,
    weighted_shares,
)

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


_LEFT_OUT = (
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "added_tokens.json",
)  # fmt: skip
"""The same vocabulary in older forms, which would contradict the trimmed one."""


_OF_IDS = re.compile(r"_token_(id|ids|index|idx)$|^vocab_offset$")


_LISTS = (
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "force_words_ids", "ids",
)  # fmt: skip
"""Keys of configurations whose values are token ids, besides those that `_OF_IDS` finds; the last
is one of what adds special tokens to a text."""

_PAIRS = ("sep", "cls")
"""Keys of a token and its id, where BERT and RoBERTa add special tokens."""


_CONFIGS = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
"""Files that may hold ids of tokens."""

_RESERVED = re.compile("unused|reserved", re.IGNORECASE)
"""In the names of added tokens that no program uses."""

_PER_LAYER = "embed_tokens_per_layer"
"""The table of Gemma 3n and Gemma 4 E with a row of each layer's inputs for each token."""

_ROUTES = ".tid2eid"
"""The table of DeepSeek V4 with the experts of each token."""

_SHAPE = "weight_shape"
_BY_ROW = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "scale", "blocks", "scales",
)  # fmt: skip
"""Parts of a matrix in fewer bits, which may have a row for each of its rows."""

_METADATA = 64
"""Bytes by which the header of a written file may be longer than that of its source."""

_TOKEN_WORDS = ("token", "vocab", "wte", "word")
"""In the names of embeddings of tokens."""

_SILENT = Silent()

WINDOWS, WINDOW = 4, 64
"""How many windows of how many tokens at most the uncut and the smaller model are compared on."""

Comparison = Callable[[Path, Path, Sequence[Sequence[int]], Sequence[int]], dict[str, float]]
"""Compares the uncut model with the smaller one: both folders, windows of old ids, and the ids that
stay; as `evaluation.divergence.among_kept`."""


def _token_tables(model: Any) -> dict[str, int]:
    """The parameters of a model that have a row for each token, and how many rows each has.

    The embedding has the most; a table for the first tokens only may have fewer.

    Args:
        model: loaded or a skeleton.

    Raises:
        ArchitectureError: a table has other rows, or another module has rows for tokens too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise untrimmed(f"the embedding of {type(model).__name__} is no plain table")
    rows, found = embedding.num_embeddings, dict[str, int]()
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        if module is embedding or (head is not None and module is head):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.shape[0] != rows:
                    what = f"it has {parameter.shape[0]} rows, the embedding has {rows}"
                    raise untrimmed(what, f"{path}.{name}")
                found[f"{path}.{name}"] = rows
        elif isinstance(module, nn.Embedding) and leaf == _PER_LAYER:
            found[f"{path}.weight"] = module.num_embeddings
        elif (
            isinstance(module, nn.Embedding)
            and "position" not in path
            and "token_type" not in leaf  # first and second sentence of BERT
            and any(word in leaf for word in _TOKEN_WORDS)
        ):
            raise untrimmed("another table has a row for each token", path)
    # the bias of a head may be stored under the name of the module around it
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found |= {tied[name]: rows for name in [*found] if name in tied}
    routes = (name for name in stored_buffers(model) if name.endswith(_ROUTES))
    return found | dict.fromkeys(routes, rows)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a checkpoint, what texts need of them, and what stores them.

    Attributes:
        folder: of the checkpoint.
        texts: in which tokens were counted.
        pieces: of the tokenizer.
        tables: the parameters with a row for each token, and how many rows each has.
        stored: the stored tensors with a row for each token, and how many rows they have.
        always: ids that stay whatever the texts have.
        reader: of the tensors as they are stored.
        config: of the model, with its defaults.

    Example:
        Which tokens a smaller vocabulary has, and what it saves::

            vocabulary = Vocabulary.counted(folder, "de.jsonl=2,code.jsonl=1")
            kept = vocabulary.kept(16384)
            vocabulary.saved_bytes(kept)
    """

    folder: Path
    texts: tuple[CountedText, ...]
    pieces: Pieces
    tables: Mapping[str, int]
    stored: Mapping[str, int]
    always: frozenset[int]
    reader: checkpoint.CheckpointReader
    config: Any

    @classmethod
    def counted(
        cls, folder: Path, texts: str, field: str = "text", progress: Progress = _SILENT
    ) -> Vocabulary:
        """Count the tokens of texts, each perhaps with a weight: `de.jsonl=2,code.jsonl=1`.

        Raises:
            SecateurError: the vocabulary cannot be trimmed, or a text cannot be read.
        """
        tokenizer = load_tokenizer(folder)
        pieces = pieces_of(read_tokenizer(folder), str(folder))
        skeleton = build_skeleton(folder, opened=False)
        tables = _token_tables(skeleton)
        opened = opening.open_weights(folder)
        # in whatever form they are stored, all other tensors keep their bytes
        reader = opened.stored if isinstance(opened, at_rest.AssembledReader) else opened
        stored = _stored_tables(skeleton, tables, opened)
        found = counted_texts(tokenizer, read_texts(texts, field), progress)
        counts = {token for text in found for token in text.counts}
        always = _staying(folder, pieces, counts, tables, skeleton.config)
        always |= {*before_positions(skeleton)} | prompt_pieces(folder, tokenizer, pieces)
        return cls(folder, found, pieces, tables, stored, always, reader, skeleton.config)

    @property
    def rows(self) -> int:
        """Of the embedding."""
        return max(self.tables.values())

    @cached_property
    def shares(self) -> dict[int, float]:
        """How much of the texts each token is, by id, the texts by their weights."""
        return weighted_shares(self.texts)

    def kept(self, size: int | float | str | None = None, multiple: int = 1) -> tuple[int, ...]:
        """The ids that stay, ascending.

        Args:
            size: as `VocabularySize`; None for all tokens that the texts have.
            multiple: the number of tokens is a multiple of this.

        Raises:
            RecipeError: fewer tokens than have to stay, or no vocabulary has so few bytes.
        """
        if isinstance(size, str):
            # headers change in the numbers of shapes and places alone
            whole = sum(file.stat().st_size + _METADATA for file in self.reader.files)
            # ids beyond a smaller table have fewer bytes; those that need not stay leave first
            late = range(min(self.tables.values()), self.rows)
            first = [*range(late.start), *(token for token in late if token in self.always)]
            gone = self.saved_bytes(first)
            each = self.saved_bytes(first[1:]) - gone
            size = tokens_within(size, len(first), whole - gone, each)
        return kept_tokens(self.pieces, self.shares, self.always, size, multiple)

    def windows(self, kept: Sequence[int]) -> list[list[int]]:
        """A few beginnings of documents, as ids of tokens that all stay."""
        tokenizer, there = load_tokenizer(self.folder), {*kept}
        firsts = [x.documents[n] for x in self.texts for n in range(min(BATCH, len(x.documents)))]
        whole = (
            [*takewhile(there.__contains__, ids[:WINDOW])]
            for ids in text_tokens(tokenizer, firsts, ())
        )
        # the longest ones, in their order
        return sorted((ids for ids in whole if len(ids) > 1), key=len, reverse=True)[:WINDOWS]

    def saved_bytes(self, kept: Sequence[int]) -> int:
        """By how many bytes the weight files shrink, but for their headers."""
        edits = self.edits(torch.tensor(kept))
        return sum(
            entry.size_bytes - entry.dtype.itemsize * prod(edits[name].shape)
            for name, entry in self.reader.entries.items()
        )

    def edits(self, index: torch.Tensor) -> dict[str, TensorEdit]:
        """The edit of every stored tensor, where tokens of these ids stay."""
        edits = {
            name: TensorEdit.copy(name, entry.shape) for name, entry in self.reader.entries.items()
        }
        for name, rows in self.stored.items():
            kept = index[index < rows]
            if name.endswith(_SHAPE):  # the numbers of rows and columns of a matrix
                shape = self.reader.read(name)
                shape.view(-1)[0] = len(kept)
                edits[name] = replace(edits[name], value=shape)
            else:
                edits[name] = edits[name].keeping(0, kept)
        return edits


def _trim_vocabulary(
    vocabulary: Vocabulary, output: Path, kept: tuple[int, ...], progress: Progress
) -> dict[str, Any]:
    """Write a checkpoint with some of the tokens only.

    Returns:
        Numbers of tokens, of documents that keep their tokens, and of parameters.
    """
    folder = vocabulary.folder
    with writing(output):
        _write_files(vocabulary, output, kept)
    write_tensors(vocabulary.reader, vocabulary.edits(torch.tensor(kept)), output, progress)
    tokenizers = load_tokenizer(folder), load_tokenizer(output)
    notes = checked_texts(*tokenizers, vocabulary.texts, kept, progress)
    skeleton, made = build_skeleton(folder, opened=False), build_skeleton(output)
    if only_embeds(skeleton):
        documents = [document for text in vocabulary.texts for document in text.documents[:TEXTS]]
        ids = text_tokens(tokenizers[0], documents[:TEXTS], ())
        new = {old: number for number, old in enumerate(kept)}
        notes["similarity"] = least_similarity(folder, output, ids, new)
    before, after = (accounting(model, Cut()).before for model in (skeleton, made))
    counts = Accounting(before, after, hasattr(skeleton.config, "secateur_cut")).to_json()
    return {"tokens_before": vocabulary.rows, "tokens_after": len(kept), **notes, **counts}


def _staying(
    folder: Path, pieces: Pieces, counted: Set[int], tables: Mapping[str, int], config: Any
) -> frozenset[int]:
    """Ids that stay whatever the texts have.

    These are special tokens, added tokens that a chat template or the tokenizer's configuration
    mentions, and the ids in configurations. Processors of pictures and sounds write tokens that
    nothing mentions: with them all added tokens stay, but for those that are reserved. Tokens
    beyond a smaller table read its first row, which stays then.
    """
    rows, texts = max(tables.values()), _texts_that_name_tokens(folder)
    seeing = text_config(config) is not config
    found = {
        token["id"]
        for token in read_tokenizer(folder).get("added_tokens") or ()
        if token.get("special")
        or token["content"] in texts
        or token["id"] in counted
        or (seeing and not _RESERVED.search(token["content"]))
    }
    named, whole = list[int](), config.to_dict()
    for content in (whole, *_read_files(folder, _CONFIGS).values()):
        _each_id(content, named.append)
    found |= {number for number in named if number < rows}
    for part in (whole, *(x for x in whole.values() if isinstance(x, Mapping))):
        if "vocab_offset" in part:  # tokens of pictures or sounds, from this number on
            first = part["vocab_offset"]
            found |= {*range(first, min(first + part["vocab_size"], rows))}
    if min(tables.values()) < rows:
        found.add(0)
    highest = max([*pieces.ids.values(), *found])
    if highest >= rows:
        raise CheckpointError(
            f"the tokenizer has the id {highest}, the embedding has {rows} rows",
            where=str(folder),
            remedy="resize the model's embedding to its tokenizer first",
        )
    return frozenset(found)


def _stored_tables(
    model: Any, tables: Mapping[str, int], opened: checkpoint.CheckpointReader
) -> dict[str, int]:
    """The stored tensors with a row for each token, or the shape of such a one; and their rows.

    Copies of the tables that the model does not know, such as those of layers that predict several
    tokens, are recognised by their names and rows.

    Raises:
        ArchitectureError: rows of a table share what stores them.
    """
    names, known = model_names(model, opened, split=False), set(model.state_dict())
    # The last name of each table's module, such as `embed_tokens`, and `head` of DeepSeek's copies.
    leaves = {name.rpartition(".")[0].rpartition(".")[2] for name in tables} | {"head"}
    made = opened.made if isinstance(opened, at_rest.AssembledReader) else {}
    found, most = dict[str, int](), max(tables.values())
    for stored, entry in opened.entries.items():
        owner, name = stored.rpartition(".")[0].rpartition(".")[2], names[stored]
        copy = name not in known and entry.shape[:1] == (most,)
        copy = copy and (owner in leaves or only_embeds(model))  # a head that it is built without
        if name in tables or copy:
            rows, parts = tables.get(name, most), [stored]
            if stored in made:
                parts = _parts_with_rows(stored, made[stored], opened, rows)
            found |= dict.fromkeys(parts, rows)
    if tables.keys().isdisjoint(names[stored] for stored in opened.entries):
        refuse_missing([*tables][:1], {}, opened.folder)
    return found


def _parts_with_rows(name: str, assembly: at_rest.Assembly, opened: Any, rows: int) -> list[str]:
    """The parts of a table in fewer bits that have a row for each token, and its shape.

    Raises:
        ArchitectureError: rows share a scale, a zero point or a word.
    """
    found = []
    for role, part in assembly.parts.items():
        shape = opened.stored.entries[part].shape
        if role == _SHAPE or (role in _BY_ROW and shape[:1] == (rows,)):
            found.append(part)
        # one number, or a row of them, serves all rows
        elif prod(shape) != 1 and role != "weight_g_idx" and shape[:-1] != (1,):
            raise ArchitectureError(
                f"the table is stored as {assembly.stored_as}, and rows of tokens share entries of "
                f"{role} {list(shape)}",
                where=name,
                remedy="expand the model first: secateur import DIR --output DENSE",
            )
    return found


def _write_files(vocabulary: Vocabulary, output: Path, kept: tuple[int, ...]) -> None:
    """Write the tokenizer and the configurations with new ids, and copy all other files."""
    folder, tables, rows = vocabulary.folder, vocabulary.tables, vocabulary.rows
    new = {old: number for number, old in enumerate(kept)}
    sizes = {("vocab_size", rows): len(kept)}
    for each in tables.values():
        sizes["vocab_size_per_layer_input", each] = sum(token < each for token in kept)

    def renumbered(config: Any) -> dict[str, Any]:
        # an id beyond the table stays as far beyond it
        return dict(_each_id(config, lambda old: new.get(old, old - rows + len(kept)), sizes))

    written = {name: renumbered(x) for name, x in _read_files(folder, _CONFIGS).items()}
    whole = vocabulary.config.to_dict()  # names what a file leaves to the defaults of its class
    config = written["config.json"] = _completed(written["config.json"], whole, renumbered(whole))
    # A varied model lists the shapes that differ from its base class; they have the rows too.
    shapes = config.get("secateur_cut", {}).get("shapes", {})  # of `models/varied.py`
    for owner in {name.rpartition(".")[0] for name in tables} & shapes.keys():
        shapes[owner] = [len(kept), *shapes[owner][1:]]
    written[_TOKENIZER] = _renumbered_tokenizer(read_tokenizer(folder), vocabulary.pieces, new)
    written |= _read_files(folder, [_TOKENIZER_CONFIG])
    tokens = written.get(_TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
    if isinstance(tokens, Mapping):
        written[_TOKENIZER_CONFIG]["added_tokens_decoder"] = {
            str(new[int(number)]): token for number, token in tokens.items() if int(number) in new
        }
    checkpoint.copy_others(folder, output, (*written, *_LEFT_OUT, checkpoint.INDEX_NAME))
    for name, content in written.items():
        write_json(output / name, content)


def _read_files(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The JSON files of a folder that are there, by their names."""
    there = (name for name in names if (folder / name).is_file())
    return {name: checkpoint.parse_json((folder / name).read_bytes()) for name in there}


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer.json`.

    Raises:
        ArchitectureError: the folder has a tokenizer in another form only.
        CheckpointError: the file is no JSON object.
    """
    file = folder / _TOKENIZER
    if not file.is_file():
        raise ArchitectureError(
            f"tokens can only be removed from a {_TOKENIZER}, and the folder has none",
            where=str(folder),
            remedy="write one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    try:
        found = checkpoint.parse_json(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"it is not JSON: {error}", where=str(file)) from None
    if not isinstance(found, dict):
        raise CheckpointError("it is no JSON object", where=str(file))
    return found


def _texts_that_name_tokens(folder: Path) -> str:
    """All texts in chat templates and in the tokenizer's configuration, which may hold tokens.

    The list of all added tokens does not count.
    """

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list):
            for inner in value.values() if isinstance(value, Mapping) else value:
                yield from texts(inner)

    found = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))]
    names = (_TOKENIZER_CONFIG, "chat_template.json", "processor_config.json")
    for content in _read_files(folder, names).values():
        found += texts({k: v for k, v in content.items() if k != "added_tokens_decoder"})
    return "\0".join(found)


def _renumbered_tokenizer(
    tokenizer: Mapping[str, Any], pieces: Pieces, new: Mapping[int, int]
) -> dict[str, Any]:
    """The content of `tokenizer.json` with the tokens that stay."""
    kept = {token: new[number] for token, number in pieces.ids.items() if number in new}
    added = [
        {**token, "id": new[token["id"]]}
        for token in tokenizer.get("added_tokens") or ()
        if token["id"] in new
    ]
    result = {**tokenizer, "model": pieces.trimmed(kept), "added_tokens": added}
    result["post_processor"] = _each_id(tokenizer.get("post_processor"), new.__getitem__)
    padding = tokenizer.get("padding")
    if isinstance(padding, Mapping) and padding.get("pad_id") in new:
        result["padding"] = {**padding, "pad_id": new[padding["pad_id"]]}
    return result


def _completed(
    written: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """A written configuration with the changes of a whole one."""
    changed = {key: value for key, value in after.items() if value != before[key]}
    for key, value in changed.items():
        if isinstance(value, Mapping):
            changed[key] = _completed(written.get(key) or {}, before[key], value)
    return {**written, **changed}


def _each_id(value: Any, change: Any, sizes: Mapping[Any, int] | None = None) -> Any:
    """A configuration, or what adds special tokens to a text, in which every token id from 0 is
    replaced by what `change` makes of it.

    Sizes of tables are replaced by `sizes`, by their keys and old sizes, but for those of tables of
    pictures and sounds.
    """

    def changed(key: str, inner: Any) -> Any:
        if isinstance(inner, int) and (key, inner) in own:
            return own[key, inner]
        if key in _PAIRS and isinstance(inner, list):
            return [inner[0], change(inner[1])]
        if not isinstance(inner, int | list) or not (_OF_IDS.search(key) or key in _LISTS):
            return _each_id(inner, change, sizes)
        if isinstance(inner, list):
            return [changed(key, x) for x in inner]
        return change(inner) if inner >= 0 and not isinstance(inner, bool) else inner

    if isinstance(value, list):
        return [_each_id(inner, change, sizes) for inner in value]
    if not isinstance(value, Mapping):
        return value
    own: Mapping[Any, int] = {} if "vocab_offset" in value else sizes or {}
    return {key: changed(key, inner) for key, inner in value.items()}


def counted_text(recipe: StructureRecipe) -> str:
    """The text in which tokens are counted.

    Raises:
        RecipeError: it is a file of windows.
    """
    return _no_windows(recipe.vocabulary or recipe.calibration.source)


def _no_windows(text: str) -> str:
    """A text, or an error if it is a file of windows."""
    if any(each.endswith(".safetensors") for each in texts_of(text)):
        raise RecipeError(
            "windows have the ids of all tokens, and a text is needed to remove some",
            where=text,
            remedy="name texts with --vocabulary and --calibration",
        )
    return text


def check_vocabulary(
    recipe: StructureRecipe, source: sources.LocalCheckpoint, skeleton: Any
) -> None:
    """Refuse what cannot be trimmed, before any work.

    Raises:
        RecipeError: the text is a file of windows, or the size is not smaller.
        ArchitectureError: the tokenizer or the model is of a kind that cannot be trimmed.
    """
    pieces_of(read_tokenizer(source.folder), str(source.folder))  # refuses other tokenizers
    tables, size = _token_tables(skeleton), recipe.vocabulary_size
    rows = max(tables.values())
    _stored_tables(skeleton, tables, opening.open_weights(source.folder))
    counted_text(recipe)
    _no_windows(recipe.calibration.source)
    further_modules(source.folder)  # refuses those that depend on tokens
    if isinstance(size, int) and size >= rows:
        raise RecipeError(
            f"the vocabulary has {rows} tokens, the recipe keeps {size}",
            where="--vocabulary-size",
            remedy="give a smaller number",
        )


def trimmed_source(
    recipe: StructureRecipe,
    source: sources.LocalCheckpoint,
    work: Path,
    progress: Progress,
    compare: Comparison,
) -> tuple[sources.LocalCheckpoint, dict[str, Any]]:
    """The model with the smaller vocabulary, and the notes of the step.

    It is the first step, so that all later ones see the smaller model. The folder is whole or does
    not exist, so a killed run resumes after it.

    Raises:
        RecipeError: fewer tokens than have to stay, or none is removed.
        VerificationError: a text is cut into other tokens than before, or a token that stays has
            other logits.
    """
    made, calibration, size = work / "vocabulary", recipe.calibration, recipe.vocabulary_size
    text = recipe.vocabulary or calibration.source
    if not made.exists():
        with whole_folder(made) as folder:
            vocabulary = Vocabulary.counted(source.folder, text, calibration.field, progress)
            kept = vocabulary.kept(size, recipe.multiple)
            if len(kept) == vocabulary.rows:
                raise needs_all(len(kept), text)
            found = _trim_vocabulary(vocabulary, folder, kept, progress)
            if "similarity" not in found:  # of embedding models, which have no logits
                found["among_kept"] = compare(source.folder, folder, vocabulary.windows(kept), kept)
            by = "use in a text" if size is None else "frequency in a text"
            write_json(folder / STEP, {"step": "vocabulary", "by": by, "text": text, **found})
    return replace(source, folder=made), read_notes(made)
