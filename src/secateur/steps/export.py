"""Exports a model for another engine."""

from __future__ import annotations

import time
from pathlib import Path

from secateur.errors import RecipeError, VerificationError
from secateur.exporting import ExportSource, targets
from secateur.exporting.gguf.writing import TYPES
from secateur.models.configuration import HEAD, read_configuration, type_of
from secateur.models.skeleton import build_skeleton, stored_names
from secateur.models.sources import resolve
from secateur.models.tokenizer import refuse_other_words, start_tokens_of
from secateur.recipes.deploy import ExportRecipe
from secateur.registry import did_you_mean
from secateur.reporting.models import ExportResult
from secateur.runtime.install import open_checkpoint
from secateur.steps.runner import RunContext, Step


class Export(Step[ExportRecipe, ExportResult]):
    """Write a model for another engine, with its zeros.

    The model is checked first: one that the engine would compute differently is refused. The zeros
    of every matrix are counted before and after, and all of them must stay unless the type has no
    exact zeros.
    """

    verb = "export"

    def __init__(self, recipe: ExportRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.type = recipe.type or targets[recipe.to].types[0]
        folder = run.source.folder
        named = Path(recipe.model.partition("@")[0]).name.removesuffix(".gguf") or folder.name
        self.source = ExportSource(open_checkpoint(folder), named)
        if type_of(folder) == HEAD:
            self.refuse_target()
        else:
            skeleton = build_skeleton(folder, opened=False)
            stored_names(skeleton, self.source.reader, split=False)  # refuses damage
        if recipe.draft_of is not None:
            self.refuse_other_vocabulary(recipe.draft_of)

    @classmethod
    def check(cls, recipe: ExportRecipe) -> None:
        """Refuse a type that the target does not have."""
        target = targets[recipe.to]
        type = recipe.type or target.types[0]
        if type not in target.types:
            raise RecipeError(
                f"{recipe.to} has no type {type!r}", remedy=did_you_mean(type, list(target.types))
            )

    @classmethod
    def reads(cls, recipe: ExportRecipe) -> tuple[str | None, ...]:
        """The parent of a draft."""
        return (recipe.draft_of,)

    def refuse_target(self) -> None:
        """Refuse what a draft head cannot become.

        Raises:
            RecipeError: another target than `gguf`, or a type that llama.cpp makes.
        """
        if self.recipe.to != "gguf" or self.type not in TYPES:
            raise RecipeError(
                f"a draft head has no form of {self.recipe.to} {self.type}",
                where=str(self.source.folder),
                remedy=f"export it --to gguf --type {', '.join(TYPES)}; vLLM reads its folder",
            )

    def refuse_other_vocabulary(self, name: str) -> None:
        """Refuse a parent that could not take the tokens of this model as its draft's.

        Raises:
            RecipeError: the tokenizers differ, or the rows of the embeddings.
        """
        parent = resolve(name, values=False).folder
        refuse_other_words(self.source.folder, parent, roles=("draft", "parent"))
        own, other = (
            (start_tokens_of(folder), (config.get("text_config") or config).get("vocab_size"))
            for folder, config in (
                (self.source.folder, self.source.config),
                (parent, read_configuration(parent)),
            )
        )
        if own != other:
            raise RecipeError(
                f"no engine takes this draft: it and its parent have {own[1]} and {other[1]} rows "
                f"of the embedding, and begin a text with the tokens {[*own[0]]} and {[*other[0]]}",
                where=name,
                remedy="make the draft from this parent, without a cut of the vocabulary",
            )

    def work(self) -> ExportResult:
        """Write the files, and refuse a loss of zeros."""
        to, type, folder = self.recipe.to, self.type, self.run.folder
        target, made = targets[to], folder.fresh_model()
        exported = target.write(self.source, type, made, self.run.progress)
        lost = exported.zeros - exported.zeros_kept
        message = f"{lost:,} of {exported.zeros:,} zeros were lost in {to} {type}"
        if lost and not exported.may_lose_zeros:
            raise VerificationError(
                message, where=str(folder.output), remedy="choose another --type"
            )
        if lost:
            exported.notes.insert(0, message)
        if self.recipe.draft_of is not None:
            exported.notes.append(
                f"it has the tokens of {self.recipe.draft_of}, so it can be its draft model"
            )
        folder.notes.rmdir()
        files = tuple(sorted(file.name for file in made.iterdir()))
        seconds = time.perf_counter() - self.run.meter.started
        return ExportResult(
            target=to, type=type, output=folder.output, files=files, exported=exported,
            seconds=seconds,
        )  # fmt: skip
