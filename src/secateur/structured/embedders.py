"""Embedding models, of which only tokens are cut: the modules around the model, and the check.

A folder of sentence-transformers has the model in it, and further modules in folders within it:
they pool, project or scale the last hidden states of a text. So a text whose tokens all stay keeps
its embedding if its last hidden states stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import RecipeError, VerificationError
from secateur.models import checkpoint
from secateur.models.architecture import positions_of
from secateur.models.configuration import PIPELINE
from secateur.models.opening import load_body
from secateur.models.tokenizer import Tokenizer, encoded
from secateur.recipes.structure import CUTS, StructureRecipe
from secateur.structured.token_pieces import Pieces, untrimmed

_SETTINGS, _BODY = "config_sentence_transformers.json", "Transformer"
_MODULES = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout", "WeightedLayerPooling")
"""Modules that know nothing of tokens."""

_TOLERANCE = 1e-5

TEXTS, TOKENS = 8, 256
"""Documents whose embeddings are compared, and tokens of each, at most."""


def check_embedder(recipe: StructureRecipe, model: Any) -> None:
    """Refuse every cut of an embedding model but that of tokens.

    Raises:
        RecipeError: the recipe has another cut, a distillation, or a bound of `--must-keep`.
    """
    given = [n for n in CUTS if getattr(recipe, n) is not None and not n.startswith("vocabulary")]
    given += ["distill_epochs"] * bool(recipe.distillation.epochs)
    given += ["must_keep"] * bool(recipe.gate.must_keep)
    if given:
        raise RecipeError(
            f"{type(model).__name__} makes embeddings, and only its tokens can be cut",
            where=f"--{given[0].replace('_', '-')}",
            remedy="leave it out (--effort may bring it), and name a text with --vocabulary",
        )


def further_modules(folder: Path) -> list[str]:
    """The names of the folders of an embedding model's further modules; none without such ones.

    Raises:
        CheckpointError: the list of modules is damaged, or leads out of the folder.
        ArchitectureError: the model is not in the folder itself, or a module may depend on tokens.
    """
    file, found = folder / PIPELINE, list[str]()
    if not file.is_file():
        return found
    try:
        named = [(str(x["path"]), str(x["type"])) for x in checkpoint.parse_json(file.read_bytes())]
    except (ValueError, KeyError, TypeError) as error:
        raise checkpoint.damaged(f"it is no list of modules: {error!r}", file) from None
    for place, (path, kind) in enumerate(named):
        name = kind.rpartition(".")[2]
        if name not in (_MODULES if place else (_BODY,)) or bool(path) != bool(place):
            known = f"{_BODY} in the folder itself as the first, then {', '.join(_MODULES)}"
            what = f"module {place} is {kind} in {path or 'the folder itself'}; known are {known}"
            raise untrimmed(what, str(file))
        if path and (Path(path).name != path or path == ".."):
            raise checkpoint.damaged(f"{path} is no folder within it", file)
        found += [path] * bool(path)
    return found


def copy_modules(source: Path, output: Path) -> None:
    """Copy the further modules of an embedding model; files of the same names are replaced."""
    for name in further_modules(source):
        if (source / name).is_dir():
            checkpoint.note_links(sorted((source / name).rglob("*")))
            shutil.copytree(source / name, output / name, dirs_exist_ok=True)


def before_positions(model: Any) -> range:
    """The ids up to that of padding, if positions are counted from it on (RoBERTa, MPNet)."""
    tables = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Embedding))
    padding = [m.padding_idx for n, m in tables if "position" in n and m.padding_idx is not None]
    return range(max(padding, default=-1) + 1)


def prompt_pieces(folder: Path, tokenizer: Tokenizer, pieces: Pieces) -> set[int]:
    """The tokens of the prompts that an embedding model puts before texts, and what makes them.

    Raises:
        CheckpointError: the file of prompts is damaged.
    """
    file = folder / _SETTINGS
    try:
        found = checkpoint.parse_json(file.read_bytes()) if file.is_file() else {}
        texts = [x for x in (found.get("prompts") or {}).values() if isinstance(x, str)]
    except (ValueError, AttributeError) as error:
        raise checkpoint.damaged(f"prompts cannot be read: {error!r}", file) from None
    tokens = {n for ids in encoded(tokenizer, texts) for n in ids}
    parts = (pieces.parts_of(token) for token, n in pieces.ids.items() if n in tokens)
    return {pieces.ids[part] for own in parts for part in own}


def least_similarity(
    before: Path, after: Path, texts: Sequence[Sequence[int]], kept: Mapping[int, int]
) -> float:
    """The lowest cosine similarity of embeddings by the uncut and the cut model.

    Compared are the last hidden states of each token, and their mean over each text. So it holds
    for every pooling. One model is in memory at a time.

    Args:
        before: folder of the uncut model.
        after: folder of the cut one.
        texts: old ids of tokens; those that left are left out.
        kept: new ids by old ones.

    Raises:
        VerificationError: it is below 1 − 1e-5.
    """
    old = [ids for text in texts if (ids := [token for token in text if token in kept])]
    new = [[kept[token] for token in ids] for ids in old]
    pairs = zip(_states(before, old), _states(after, new), strict=True)
    found = [torch.cosine_similarity(*pair) for pair in pairs]
    lowest = float(torch.cat([torch.ones(1), *found]).min())  # NaN is the lowest
    if not lowest >= 1 - _TOLERANCE:
        raise VerificationError(
            f"an embedding of a text whose tokens all stay changed: cosine similarity {lowest:.6f}",
            where=str(before),
            remedy="this model cannot be trimmed: leave the vocabulary as it is, and please report "
            "it",
        )
    return lowest


@torch.no_grad()
def _states(folder: Path, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The last hidden states of each text and their mean: float64 [tokens + 1, hidden]."""
    model = load_body(folder)
    places = positions_of(model.config) or TOKENS + len(before_positions(model))
    cut = [ids[: min(TOKENS, places - len(before_positions(model)))] for ids in texts]
    found = [model(input_ids=torch.tensor([ids])).last_hidden_state[0].double() for ids in cut]
    return [torch.cat([states, states.mean(0, keepdim=True)]) for states in found]
