"""The step that removes tokens: the first one, so that all later ones see the smaller model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from secateur.calibration.documents import read_documents, texts_of
from secateur.errors import CheckpointError, RecipeError, VerificationError
from secateur.models.header import parse_json
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint
from secateur.models.tokenizer import Tokenizer, load_tokenizer, text_tokens
from secateur.progress import Progress
from secateur.recipes.structure import StructureRecipe
from secateur.runs.atomic import whole_folder
from secateur.structured.accounting import Accounting, accounting
from secateur.structured.cut import Cut
from secateur.structured.token_pieces import Pieces, TokenUse, kept_tokens, pieces_of
from secateur.structured.vocabulary import (
    added_tokens,
    ids_in,
    read_tokenizer,
    spoken,
    token_tables,
    trim_checkpoint,
)
from secateur.workflows.structure.steps import NOTES

STEP = "vocabulary"
BATCH = 256
"""Documents that are encoded at once."""


def trims(recipe: StructureRecipe) -> bool:
    """Whether a recipe removes tokens."""
    return recipe.vocabulary is not None or recipe.vocabulary_size is not None


def check_vocabulary(recipe: StructureRecipe, source: LocalCheckpoint, skeleton: Any) -> None:
    """Refuse what cannot be trimmed, before any work.

    Raises:
        RecipeError: the text is a file of windows, or the size is not smaller.
        ArchitectureError: the tokenizer or the model is of a kind that cannot be trimmed.
    """
    if not trims(recipe):
        return
    read_pieces(source.folder)
    rows = token_tables(skeleton).rows
    if any(text.endswith(".safetensors") for text in texts_of(text_of(recipe))):
        raise RecipeError(
            "tokens are counted in a text, and this is a file of windows",
            where=text_of(recipe),
            remedy="name a text with --vocabulary",
        )
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


def text_of(recipe: StructureRecipe) -> str:
    """The text in which tokens are counted."""
    return recipe.vocabulary or recipe.calibration.source


def read_pieces(folder: Path) -> Pieces:
    """The pieces of a folder's tokenizer.

    Raises:
        ArchitectureError: they cannot be removed.
        CheckpointError: the tokenizer is damaged.
    """
    return pieces_of(read_tokenizer(folder), str(folder))


def trimmed_source(
    recipe: StructureRecipe, source: LocalCheckpoint, work: Path, progress: Progress
) -> tuple[LocalCheckpoint, list[dict[str, Any]]]:
    """The model with the smaller vocabulary, and the notes of the step.

    A recipe that removes no token gives the source itself, and no notes. The folder is whole or
    does not exist, so a killed run resumes after it.

    Raises:
        RecipeError: fewer tokens than have to stay, or none is removed.
        VerificationError: a text is cut into other tokens than before.
    """
    if not trims(recipe):
        return source, []
    made = work / STEP
    if not made.exists():
        with whole_folder(made) as partial:
            notes = trimmed(recipe, source.folder, partial, progress)
            (partial / NOTES).write_text(json.dumps(notes), encoding="utf-8")
    notes = json.loads((made / NOTES).read_text(encoding="utf-8"))
    return replace(source, folder=made), [notes]


def trimmed(
    recipe: StructureRecipe, folder: Path, partial: Path, progress: Progress
) -> dict[str, Any]:
    """Write the model with the smaller vocabulary, and return the notes of the step."""
    trust = recipe.trust_remote_code
    field = recipe.calibration.field
    documents = [d for text in texts_of(text_of(recipe)) for d in read_documents(text, field=field)]
    tokenizer, pieces = load_tokenizer(folder, trust_remote_code=trust), read_pieces(folder)
    skeleton = build_skeleton(folder, trust_remote_code=trust)
    rows = token_tables(skeleton).rows
    progress.start("counting tokens", -(-len(documents) // BATCH))
    counts: Counter[int] = Counter()
    for ids in encoded(tokenizer, documents, progress):
        counts.update(ids)
    progress.finish()
    use = TokenUse(counts, staying(folder, pieces, counts, rows))
    kept = kept_tokens(pieces, use, recipe.vocabulary_size)
    if len(kept) == rows:
        raise RecipeError(
            f"the text needs all {rows} tokens",
            where=text_of(recipe),
            remedy="give --vocabulary-size, or a text that needs fewer",
        )
    trim_checkpoint(folder, partial, pieces, kept, trust_remote_code=trust, progress=progress)
    same = check_tokens(folder, partial, documents, kept, trust, progress)
    before = accounting(skeleton, Cut()).before
    after = accounting(build_skeleton(partial, trust_remote_code=trust), Cut()).before
    return {
        "step": STEP,
        "by": "use in a text" if recipe.vocabulary_size is None else "frequency in a text",
        "text": text_of(recipe),
        "tokens_before": rows,
        "tokens_after": len(kept),
        "documents": len(documents),
        "same_documents": same,
        "covered": use.share(kept),
        **asdict(Accounting(before, after, hasattr(skeleton.config, "secateur_cut"))),
    }


def staying(folder: Path, pieces: Pieces, counts: Counter[int], rows: int) -> frozenset[int]:
    """Ids that stay whatever the text has.

    These are special tokens, added tokens that a chat template or the tokenizer's configuration
    mentions, and the ids in configurations.

    Raises:
        CheckpointError: a token has no row in the embedding.
    """
    tokenizer, texts = read_tokenizer(folder), spoken(folder)
    found = {
        number
        for number, text, special in added_tokens(tokenizer)
        if special or text in texts or counts[number]
    }
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            config = parse_json((folder / name).read_bytes())
            found |= {number for number in ids_in(config) if number < rows}
    highest = max([*pieces.ids.values(), *found])
    if highest >= rows:
        raise CheckpointError(
            f"the tokenizer has the id {highest}, the embedding has {rows} rows",
            where=str(folder),
            remedy="resize the model's embedding to its tokenizer first",
        )
    return frozenset(found)


def encoded(
    tokenizer: Tokenizer, documents: Sequence[str], progress: Progress
) -> Iterator[list[int]]:
    """The ids of each document, with the special tokens around it."""
    for start in range(0, len(documents), BATCH):
        texts = [documents[n] for n in range(start, min(start + BATCH, len(documents)))]
        yield from text_tokens(tokenizer, texts, ())
        progress.step()


def check_tokens(
    folder: Path,
    partial: Path,
    documents: Sequence[str],
    kept: tuple[int, ...],
    trust: bool,
    progress: Progress,
) -> int:
    """Encode every document with both tokenizers. Return how many keep all their tokens.

    Raises:
        VerificationError: a document whose tokens all stay is cut into other ones.
    """
    old, new = (load_tokenizer(x, trust_remote_code=trust) for x in (folder, partial))
    number = {before: after for after, before in enumerate(kept)}
    progress.start("checking tokens", 2 * -(-len(documents) // BATCH))
    same = 0
    pairs = zip(encoded(old, documents, progress), encoded(new, documents, progress), strict=True)
    for place, (before, after) in enumerate(pairs):
        if all(token in number for token in before):
            same += 1
            if [number[token] for token in before] != after:
                raise VerificationError(
                    f"document {place} of the text becomes {len(after)} tokens, and not the same "
                    f"{len(before)} as before",
                    where=str(folder),
                    remedy="this tokenizer cannot be trimmed: leave the vocabulary as it is, and "
                    "please report it",
                )
    progress.finish()
    return same
