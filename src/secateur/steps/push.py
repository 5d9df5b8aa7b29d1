"""Publishes a finished folder on the hub, after its zeros were counted again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.diagnostics.audit import Audit, audit_checkpoint
from secateur.diagnostics.findings import read_claims
from secateur.errors import VerificationError
from secateur.models.checkpoint import refuse_not_finite, shard_files
from secateur.progress import Progress, listener
from secateur.publishing import (
    CARD,
    check_repository,
    contents_of,
    notes_without_folders,
    refuse_secrets,
    upload,
)
from secateur.recipes.deploy import PushRecipe
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.reporting.cards import without_folders
from secateur.reporting.models import PushResult
from secateur.reporting.report.claims import missing_in, push_card
from secateur.reporting.report.records import read_run
from secateur.runs.folder import NOTES
from secateur.runs.records import Import, read_record


@takes_options_of(PushRecipe)
def push(
    model: str | Path, repo: str, *, progress: Progress | None = None, **options: Any
) -> PushResult:
    """Publish a model folder on the hub, with a card that has its results and their protocols.

    The zeros are counted first and compared with the records. A folder that lost some, that is
    incomplete, or that holds keys or tokens is refused. The repository is private unless `public`.

    Args:
        model: a folder that secateur wrote.
        repo: the repository, OWNER/NAME; created if there is none.
        progress: receives every tensor.
        **options: the other options of the recipe; `dry_run` sends nothing.

    Returns:
        The files, the card, and the address of the commit.

    Raises:
        SecateurError: what, where, and what to do.
    """
    recipe, call = recipe_of(PushRecipe, {"model": model, "repo": repo}, options)
    return push_recipe(recipe, listener(progress), **call)


def push_recipe(recipe: PushRecipe, progress: Progress) -> PushResult:
    """Carry out a recipe.

    Args:
        recipe: the recipe.
        progress: receives every tensor.
    """
    for repo in filter(None, (recipe.repo, recipe.base_model)):
        check_repository(repo)
    contents = contents_of(Path(recipe.model).expanduser())
    refuse_secrets(contents.files)
    refuse_not_finite(shard_files(contents.folder))
    audit = audit_checkpoint(
        contents.folder, trust_remote_code=recipe.trust_remote_code, progress=progress
    )
    _refuse_lost_zeros(contents.folder, audit)
    recorded = (contents.folder / NOTES / "manifest.json").is_file()
    run = read_run(contents.folder, "this model") if recorded else None
    written = contents.files[CARD].read_text(encoding="utf-8")
    card = without_folders(push_card(written, recipe.repo, run, recipe.base_model))
    notes = missing_in(card)
    texts = {**notes_without_folders(contents.files), CARD: card}
    if len(texts) > 1:
        changed = ", ".join(name for name in texts if name != CARD)
        notes.append(f"paths of this machine are cut to their last names in {changed}")
    address = None
    if not recipe.dry_run:
        address = upload(
            recipe.repo, contents.files, texts, private=not recipe.public, branch=recipe.branch
        )
    return PushResult(
        recipe.repo,
        not recipe.public,
        recipe.branch,
        contents.sizes | {name: len(text.encode()) for name, text in texts.items()},
        contents.left_out,
        audit.sparsity,
        card,
        tuple(notes),
        address,
    )


def _refuse_lost_zeros(folder: Path, audit: Audit) -> None:
    """Refuse a folder with fewer zeros than its records say."""
    claims = read_claims(folder)
    claimed = {name: claim.pruned for name, claim in claims.linears.items()}
    if (folder / NOTES / "import.json").is_file():
        record = read_record(Import, folder / NOTES / "import.json")
        claimed = {matrix.name: matrix.zeros for matrix in record.matrices}
    lost = {x.name: claimed.get(x.name, 0) - x.zeros for x in audit.linears}
    lost = {name: count for name, count in lost.items() if count > 0}
    if lost:
        worst = sorted(lost, key=lambda name: -lost[name])
        raise VerificationError(
            f"{sum(lost.values()):,} zeros in {len(lost)} matrices are lost, as the records of the "
            "folder say",
            where=", ".join(worst[:4]),
            remedy="the files were changed after they were written: `secateur diagnose` says more",
        )
