"""Vocabulary trimming: tokens that a text never needs leave tokenizer, embedding and head.

    text ─► counts ─► tokens that stay, with all that makes them ─► tokenizer files, tables

`token_pieces` knows how the tokenizers of one kind make tokens, and chooses those that stay. Here
the tokenizer and the configuration are written with new ids, and rows leave the weights: of the
embedding, the head and its bias. Ids are given anew in the order of the old ones. So tokens that
were added after the vocabulary stay behind it, as the tokenizers library needs it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from secateur.calibration.chats import Document
from secateur.calibration.documents import read_documents
from secateur.errors import ArchitectureError, CheckpointError, RecipeError, VerificationError
from secateur.models import at_rest, checkpoint, configuration, opening, sources
from secateur.models.skeleton import build_skeleton, model_names, refuse_missing
from secateur.models.tokenizer import Tokenizer, load_tokenizer, text_tokens
from secateur.progress import Progress
from secateur.recipes.shared import texts_of
from secateur.recipes.structure import StructureRecipe
from secateur.runs.output import whole_folder, write_json, writing
from secateur.structured.cut import Cut
from secateur.structured.cut_steps import STEP, read_notes
from secateur.structured.design import Accounting, accounting
from secateur.structured.edits import TensorEdit
from secateur.structured.surgery import write_tensors
from secateur.structured.token_pieces import Pieces, kept_tokens, pieces_of

_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


_LEFT_OUT = (
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "added_tokens.json",
)  # fmt: skip
"""The same vocabulary in older forms, which would contradict the trimmed one."""


_OF_IDS = re.compile(r"_token_(id|ids|index|idx)$")


_LISTS = (
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "force_words_ids",
)  # fmt: skip
"""Keys of configurations whose values are token ids, besides those that `_OF_IDS` finds."""


_GENERATION = "generation_config.json"

_TOKEN_WORDS = ("token", "vocab", "wte", "word")
"""In the names of embeddings of tokens."""

BATCH = 256
"""Documents that are encoded at once."""


class _TokenTables(NamedTuple):
    """The names of the parameters with a row for each token, and how many rows they have."""

    names: tuple[str, ...]
    rows: int


def _token_tables(model: Any) -> _TokenTables:
    """The parameters of a model that have a row for each token.

    Args:
        model: loaded or a skeleton.

    Raises:
        ArchitectureError: a table has other rows, or another module has rows for tokens too.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise ArchitectureError(
            f"the embedding of {type(model).__name__} is no plain table",
            remedy="leave the vocabulary as it is",
        )
    rows, found = embedding.num_embeddings, []
    for path, module in model.named_modules():
        if module is embedding or (head is not None and module is head):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.shape[0] != rows:
                    raise ArchitectureError(
                        f"it has {parameter.shape[0]} rows, the embedding has {rows}",
                        where=f"{path}.{name}",
                        remedy="leave the vocabulary as it is",
                    )
                found.append(f"{path}.{name}")
        elif (
            isinstance(module, nn.Embedding)
            and "position" not in path
            and any(word in path.rpartition(".")[2] for word in _TOKEN_WORDS)
        ):
            raise ArchitectureError(
                "another table has a row for each token",
                where=path,
                remedy="leave the vocabulary of this family as it is",
            )
    return _TokenTables(tuple(found), rows)


def _trim_vocabulary(
    folder: Path,
    output: Path,
    documents: Sequence[Document],
    size: int | None,
    *,
    where: str,
    progress: Progress,
) -> dict[str, Any]:
    """Write a checkpoint without the tokens that a text does not need.

    At most `size` tokens stay, or all that the text has. `where` names the text in messages.

    Returns:
        Numbers of tokens, of documents that keep their tokens, and of parameters.
    """
    tokenizer = load_tokenizer(folder)
    pieces = pieces_of(read_tokenizer(folder), str(folder))
    skeleton = build_skeleton(folder, opened=False)
    tables = _token_tables(skeleton)
    rows = tables.rows
    counts = token_counts(tokenizer, documents, progress)
    total = sum(counts.values())
    kept = kept_tokens(pieces, counts, _staying(folder, pieces, counts, rows), size)
    if len(kept) == rows:
        raise RecipeError(
            f"the text needs all {rows} tokens",
            where=where,
            remedy="give --vocabulary-size, or a text that needs fewer",
        )
    opened = opening.open_weights(folder)
    # in whatever form they are stored, all other tensors keep their bytes
    reader = opened.stored if isinstance(opened, at_rest.AssembledReader) else opened
    edits = _row_edits(skeleton, tables, reader, torch.tensor(kept))
    if isinstance(opened, at_rest.AssembledReader):
        _refuse_packed_tables(opened, edits, tables.names)
    with writing(output):
        _write_files(folder, output, pieces, kept, tables)
    write_tensors(reader, edits, output, progress)
    same = check_tokens(tokenizer, load_tokenizer(output), documents, kept, progress)
    before = accounting(skeleton, Cut()).before
    made = build_skeleton(output)
    varied = hasattr(skeleton.config, "secateur_cut")
    return {
        "tokens_before": rows,
        "tokens_after": len(kept),
        "documents": len(documents),
        "same_documents": same,
        "covered": sum(counts[token] for token in kept) / total if total else 1.0,
        **Accounting(before, accounting(made, Cut()).before, varied).to_json(),
    }


def _staying(folder: Path, pieces: Pieces, counts: Counter[int], rows: int) -> frozenset[int]:
    """Ids that stay whatever the text has.

    These are special tokens, added tokens that a chat template or the tokenizer's configuration
    mentions, and the ids in configurations.
    """
    texts = _texts_that_name_tokens(folder)
    found = {
        token["id"]
        for token in read_tokenizer(folder).get("added_tokens") or ()
        if token.get("special") or token["content"] in texts or counts[token["id"]]
    }
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            named: list[int] = []
            _each_id(checkpoint.parse_json((folder / name).read_bytes()), named.append)
            found |= {number for number in named if number < rows}
    highest = max([*pieces.ids.values(), *found])
    if highest >= rows:
        raise CheckpointError(
            f"the tokenizer has the id {highest}, the embedding has {rows} rows",
            where=str(folder),
            remedy="resize the model's embedding to its tokenizer first",
        )
    return frozenset(found)


def token_counts(
    tokenizer: Tokenizer, documents: Sequence[Document], progress: Progress
) -> Counter[int]:
    """How often the documents have each token."""
    progress.start("counting tokens", -(-len(documents) // BATCH))
    counts: Counter[int] = Counter()
    for ids in _encoded(tokenizer, documents, progress):
        counts.update(ids)
    progress.finish()
    return counts


def _encoded(
    tokenizer: Tokenizer, documents: Sequence[Document], progress: Progress
) -> Iterator[list[int]]:
    """The ids of each document, with the special tokens around it."""
    for start in range(0, len(documents), BATCH):
        texts = [documents[n] for n in range(start, min(start + BATCH, len(documents)))]
        yield from text_tokens(tokenizer, texts, ())
        progress.step()


def check_tokens(
    old: Tokenizer,
    new: Tokenizer,
    documents: Sequence[Document],
    kept: tuple[int, ...],
    progress: Progress,
) -> int:
    """Encode every document with both tokenizers. Return how many keep all their tokens.

    Raises:
        VerificationError: a document whose tokens all stay is cut into others.
    """
    number = {before: after for after, before in enumerate(kept)}  # new ids by old ones
    progress.start("checking tokens", 2 * -(-len(documents) // BATCH))
    same = 0
    both = (_encoded(tokenizer, documents, progress) for tokenizer in (old, new))
    for place, (before, after) in enumerate(zip(*both, strict=True)):
        if all(token in number for token in before):
            same += 1
            if [number[token] for token in before] != after:
                raise VerificationError(
                    f"document {place} of the text becomes {len(after)} tokens, and not the same "
                    f"{len(before)} as before",
                    where=str(old.name_or_path),
                    remedy="this tokenizer cannot be trimmed: leave the vocabulary as it is, and "
                    "please report it",
                )
    progress.finish()
    return same


def _row_edits(
    model: Any, tables: _TokenTables, reader: checkpoint.CheckpointReader, index: torch.Tensor
) -> dict[str, TensorEdit]:
    """The edit of every stored tensor.

    Copies of the tables that the model does not know, such as those of layers that predict several
    tokens, are recognised by their names and rows.
    """
    names, known = model_names(model, reader, split=False), set(model.state_dict())
    # The last name of each table's module, such as `embed_tokens`, and `head` of DeepSeek's copies.
    leaves = {name.rpartition(".")[0].rpartition(".")[2] for name in tables.names} | {"head"}
    edits, found = {}, 0
    for stored, entry in reader.entries.items():
        owner, edit = (
            stored.rpartition(".")[0].rpartition(".")[2],
            TensorEdit.copy(stored, entry.shape),
        )
        copy = names[stored] not in known and owner in leaves and entry.shape[:1] == (tables.rows,)
        own = names[stored] in tables.names
        found += own
        if own or copy:
            edit = TensorEdit(stored, (index, *edit.kept[1:]), (len(index), *entry.shape[1:]))
        edits[stored] = edit
    if not found:
        refuse_missing(tables.names[:1], {}, reader.folder)
    return edits


def _refuse_packed_tables(
    opened: at_rest.AssembledReader, edits: Mapping[str, TensorEdit], tables: tuple[str, ...]
) -> None:
    """Refuse an embedding or a head that is stored in fewer bits."""
    cut = {name for name, edit in edits.items() if any(kept is not None for kept in edit.kept)}
    for name, assembly in opened.made.items():
        if cut & {name, *assembly.parts.values()} or name in tables:
            raise ArchitectureError(
                f"the table is stored as {assembly.stored_as}, of which rows cannot be removed yet",
                where=name,
                remedy="expand the model first: secateur import DIR --output DENSE",
            )


def _write_files(
    folder: Path, output: Path, pieces: Pieces, kept: tuple[int, ...], tables: _TokenTables
) -> None:
    """Write the tokenizer and the configurations with new ids, and copy all other files."""
    new = {old: number for number, old in enumerate(kept)}
    config = _renumbered_config(
        configuration.read_configuration(folder), new, tables.rows, len(kept)
    )
    # A varied model lists the shapes that differ from its base class; they have the rows too.
    shapes = config.get("secateur_cut", {}).get("shapes", {})  # of `models/varied.py`
    for owner in {name.rpartition(".")[0] for name in tables.names} & shapes.keys():
        shapes[owner] = [len(kept), *shapes[owner][1:]]
    tokenizer = _renumbered_tokenizer(read_tokenizer(folder), pieces, new)
    written = {_TOKENIZER: tokenizer, "config.json": config}
    for name in (_TOKENIZER_CONFIG, _GENERATION):
        if (folder / name).is_file():
            written[name] = json.loads((folder / name).read_text(encoding="utf-8"))
    if _GENERATION in written:
        written[_GENERATION] = _renumbered_config(written[_GENERATION], new, tables.rows, len(kept))
    tokens = written.get(_TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
    if isinstance(tokens, Mapping):
        written[_TOKENIZER_CONFIG]["added_tokens_decoder"] = {
            str(new[int(number)]): token for number, token in tokens.items() if int(number) in new
        }
    checkpoint.copy_others(folder, output, (*written, *_LEFT_OUT, checkpoint.INDEX_NAME))
    for name, content in written.items():
        write_json(output / name, content)


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
    for name in (_TOKENIZER_CONFIG, "chat_template.json"):
        if (folder / name).is_file():
            content = checkpoint.parse_json((folder / name).read_bytes())
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
    result["post_processor"] = _renumbered_processor(tokenizer.get("post_processor"), new)
    padding = tokenizer.get("padding")
    if isinstance(padding, Mapping) and padding.get("pad_id") in new:
        result["padding"] = {**padding, "pad_id": new[padding["pad_id"]]}
    return result


def _renumbered_processor(processor: Any, new: Mapping[int, int]) -> Any:
    """What adds special tokens to a text, with their new ids."""
    if isinstance(processor, list):
        return [_renumbered_processor(inner, new) for inner in processor]
    if not isinstance(processor, Mapping):
        return processor
    result = {key: _renumbered_processor(inner, new) for key, inner in processor.items()}
    for key in ("sep", "cls"):  # of BERT and RoBERTa: the token and its id
        if isinstance(processor.get(key), list):
            token, number = processor[key]
            result[key] = [token, new[number]]
    if isinstance(processor.get("ids"), list):
        result["ids"] = [new[number] for number in processor["ids"]]
    return result


def _renumbered_config(
    config: Mapping[str, Any], new: Mapping[int, int], rows: int, count: int
) -> dict[str, Any]:
    """A configuration for the smaller vocabulary."""

    def sized(value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {
            key: count if key == "vocab_size" and inner == rows else sized(inner)
            for key, inner in value.items()
        }

    result: dict[str, Any] = sized(_each_id(config, new.__getitem__))
    return result


def _each_id(value: Any, change: Any) -> Any:
    """A configuration in which every token id from 0 is replaced by what `change` makes of it."""

    def changed(inner: Any) -> Any:
        if isinstance(inner, bool) or inner is None:
            return inner
        if isinstance(inner, int):
            return change(inner) if inner >= 0 else inner
        return [changed(x) for x in inner] if isinstance(inner, list) else inner

    if isinstance(value, Mapping):
        return {
            key: changed(inner)
            if isinstance(inner, int | list) and (_OF_IDS.search(key) or key in _LISTS)
            else _each_id(inner, change)
            for key, inner in value.items()
        }
    return value


def counted_text(recipe: StructureRecipe) -> str:
    """The text in which tokens are counted.

    Raises:
        RecipeError: it is a file of windows.
    """
    text = recipe.vocabulary or recipe.calibration.source
    if any(each.endswith(".safetensors") for each in texts_of(text)):
        raise RecipeError(
            "tokens are counted in a text, and this is a file of windows",
            where=text,
            remedy="name a text with --vocabulary",
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
    rows = _token_tables(skeleton).rows
    counted_text(recipe)
    if any(text.endswith(".safetensors") for text in texts_of(recipe.calibration.source)):
        raise RecipeError(
            "windows of token ids would have other ids after the vocabulary is trimmed",
            where=recipe.calibration.source,
            remedy="calibrate on a text, or trim the vocabulary in a run of its own",
        )
    if recipe.vocabulary_size is not None and recipe.vocabulary_size >= rows:
        raise RecipeError(
            f"the vocabulary has {rows} tokens, the recipe keeps {recipe.vocabulary_size}",
            where="--vocabulary-size",
            remedy="give a smaller number",
        )


def trimmed_source(
    recipe: StructureRecipe, source: sources.LocalCheckpoint, work: Path, progress: Progress
) -> tuple[sources.LocalCheckpoint, dict[str, Any]]:
    """The model with the smaller vocabulary, and the notes of the step.

    It is the first step, so that all later ones see the smaller model. The folder is whole or does
    not exist, so a killed run resumes after it.

    Raises:
        RecipeError: fewer tokens than have to stay, or none is removed.
        VerificationError: a text is cut into other tokens than before.
    """
    made, calibration = work / "vocabulary", recipe.calibration
    text, field = recipe.vocabulary or calibration.source, calibration.field
    if not made.exists():
        with whole_folder(made) as partial:
            documents = [d for x in texts_of(text) for d in read_documents(x, field=field)]
            found = _trim_vocabulary(
                source.folder,
                partial,
                documents,
                recipe.vocabulary_size,
                where=text,
                progress=progress,
            )
            by = "use in a text" if recipe.vocabulary_size is None else "frequency in a text"
            write_json(partial / STEP, {"step": "vocabulary", "by": by, "text": text, **found})
    return replace(source, folder=made), read_notes(made)
