"""Publishes a finished folder on the hub with the hub's own client; its zeros are counted first.

Texts that hold keys or tokens are refused; paths of this machine are cut to their last names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from secateur.diagnostics.audit import Audit, audit_checkpoint
from secateur.diagnostics.findings import read_claims
from secateur.errors import CheckpointError, RecipeError, SourceError, VerificationError
from secateur.models.checkpoint import INDEX_NAMES, copied_files, refuse_not_finite, shard_files
from secateur.models.configuration import check_folder, trusted_folder
from secateur.models.hub import why_unreachable
from secateur.progress import Progress
from secateur.recipes.deploy import PushRecipe
from secateur.report_page.records import ReportedRun, read_run
from secateur.reporting.cards import OURS, split_card, with_measurements, without_folders
from secateur.reporting.models import PushResult
from secateur.runs.folder import NOTES, STATE
from secateur.runs.measured import EvaluationRecord
from secateur.runs.records import Import, read_record


def _upload(
    repo: str,
    files: Mapping[str, Path],
    texts: Mapping[str, str],
    *,
    private: bool,
    branch: str | None,
) -> str:
    """Create the repository if there is none, and upload the files.

    The client skips what is there already, so a second call continues an interrupted one.

    Args:
        repo: OWNER/NAME.
        files: by their names in the repository.
        texts: of the files that are published with another text than the folder has.
        private: whether the repository must be private.
        branch: created if it does not exist; None for the main one.

    Returns:
        The address of the commit.

    Raises:
        SourceError: the hub cannot be reached, nobody is logged in, or the hub refuses.
        RecipeError: the repository must be private and is public.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if (reason := why_unreachable()) is not None:
        raise SourceError(
            f"the hub cannot be reached ({reason})",
            where=f"hub: {repo}",
            remedy="check the network; --dry-run shows offline what would be published",
        )
    if get_token() is None:
        raise SourceError(
            "nobody is logged in to the hub",
            where=f"hub: {repo}",
            remedy="run `hf auth login`, or set HF_TOKEN",
        )
    api = HfApi()
    try:
        api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        if private and not api.repo_info(repo, repo_type="model").private:
            raise RecipeError(
                "the repository is public",
                where=f"hub: {repo}",
                remedy="add --public if the model may be public, or choose another repository",
            )
        if branch is not None:
            api.create_branch(repo, branch=branch, repo_type="model", exist_ok=True)
        commit = api.create_commit(
            repo,
            [
                CommitOperationAdd(name, texts[name].encode() if name in texts else file.resolve())
                for name, file in files.items()
            ],
            repo_type="model",
            revision=branch,
            commit_message="Upload by secateur push",
        )
    except HfHubHTTPError as error:
        said = (error.server_message or str(error)).strip().splitlines()[0]
        raise SourceError(
            f"the hub refuses: {said[:300]}",
            where=f"hub: {repo}",
            remedy="check the name and the rights of your token (`hf auth whoami`); the same "
            "command continues an interrupted upload",
        ) from error
    return str(commit.commit_url)


CARD = "README.md"
PRIVATE = ("windows.safetensors", STATE)
"""Notes that are not published: tokens of the calibration text, whose licence is not the model's,
and the record that only `--resume` reads."""
PARTIAL = ".partial"


def _contents_of(folder: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """List the files of a finished model folder: model, tokenizer, licence, card and notes.

    Args:
        folder: a folder that secateur wrote.

    Returns:
        What is published, by its name in the repository, and the names of the other files.

    Raises:
        RecipeError: it is no folder, or a run still works in it.
        CheckpointError: it is incomplete, has no card, or a file is a link out of the folder.
    """
    if not folder.is_dir():
        raise RecipeError(
            "there is no such folder", where=str(folder), remedy="name a folder of a model"
        )
    for place in (folder.absolute(), folder.absolute().parent):
        if place.name.endswith(PARTIAL) or (place / STATE).is_file():
            raise RecipeError(
                "this is the work folder of a run that has not finished",
                where=str(place),
                remedy="finish the run with --resume, then name its output",
            )
    check_folder(folder)
    if not (folder / CARD).is_file():
        raise CheckpointError(
            "the folder has no card (README.md)",
            where=str(folder),
            remedy="`secateur import DIR --output OUT` writes one for a model of another tool",
        )
    notes = [file for file in sorted((folder / NOTES).rglob("*")) if file.is_file()]
    listed = [*copied_files(folder), *shard_files(folder), folder / CARD]
    listed += [folder / name for name in INDEX_NAMES if (folder / name).is_file()]
    listed += [file for file in notes if file.name not in PRIVATE]
    files = {file.relative_to(folder).as_posix(): file for file in sorted(set(listed))}
    for name, file in files.items():
        # such a link could publish any file of this machine
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(
                f"{name} is a link out of the folder, to {file.resolve()}",
                where=str(file),
                remedy="replace it by the file, if that may be published",
            )
    every = (file for file in sorted(folder.rglob("*")) if file.is_file())
    names = (file.relative_to(folder).as_posix() for file in every)
    return files, tuple(name for name in names if name not in files)


PATTERNS = {
    "token of the hub": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "token of GitHub": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}|\bgithub_pat_[A-Za-z0-9_]{40,}"),
    "key of an API": re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"),
    "key of AWS": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "token of Slack": re.compile(r"\bxox[abprs]-[0-9A-Za-z-]{10,}"),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "password in an address": re.compile(r"\bhttps?://[^/\s:@\"']+:[^/\s:@\"']+@"),
}
TEXTS = {".json", ".jsonl", ".yaml", ".yml", ".md", ".txt", ".jinja", ".py", ""}


class Secret(NamedTuple):
    """Where a secret was found; the secret itself is not kept."""

    file: str
    line: int
    kind: str


def secrets_in(name: str, text: str) -> Iterator[Secret]:
    """Yield the secrets of a text.

    Example:
        >>> from secateur.publishing.push import secrets_in
        >>> [*secrets_in("a.yaml", "x: 1\\ntoken: hf_" + "a" * 34)]
        [Secret(file='a.yaml', line=2, kind='token of the hub')]
    """
    for kind, pattern in PATTERNS.items():
        for found in pattern.finditer(text):
            yield Secret(name, text.count("\n", 0, found.start()) + 1, kind)


def _texts_of(files: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield the files that hold text."""
    for name, file in files.items():
        if file.suffix in TEXTS:
            yield name, file.read_text(encoding="utf-8", errors="replace")


def _refuse_secrets(files: Mapping[str, Path]) -> None:
    """Refuse files that hold keys or tokens.

    Raises:
        VerificationError: names the file, the line and the kind of each, not the secret.
    """
    found = [secret for name, text in _texts_of(files) for secret in secrets_in(name, text)]
    if found:
        raise VerificationError(
            f"{len(found)} secrets would be published: "
            + ", ".join(f"a {secret.kind}" for secret in found[:4]),
            where=", ".join(f"{secret.file}:{secret.line}" for secret in found[:4]),
            remedy="remove them from the files, and revoke them if they were shared before",
        )


def _push_card(
    card: str, repo: str, run: ReportedRun, base_model: str | None
) -> tuple[str, list[str]]:
    """The text of README.md for the hub, and what its head lacks.

    Licence, language and base model are those of the folder's card. Results are added as sections,
    and in the form that the hub reads (`model-index`); each names its protocol.

    Args:
        card: the card of the folder.
        repo: the repository.
        run: the records of the folder.
        base_model: the base model on the hub; None for the one that the card names.
    """
    front, body = split_card(card)
    data: dict[str, Any] = (yaml.safe_load(front.strip("-\n")) or {}) if front else {}
    tags = data.get("tags") or []
    data["tags"] = list(dict.fromkeys([*tags, OURS]))
    data.setdefault("library_name", "transformers")
    data.setdefault("pipeline_tag", "text-generation")
    data |= {"base_model": base_model} if base_model else {}
    results = _hub_results(run.evaluation) if run.evaluation else []
    if results:
        data["model-index"] = [{"name": Path(repo).name, "results": results}]
    header = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    notes = {
        "license": "the card names no licence: add it to README.md",
        "base_model": "the card names no base model: add --base-model OWNER/NAME",
    }
    missing = [note for key, note in notes.items() if not data.get(key)]
    return f"---\n{header}---\n{with_measurements(body, run.measured())}", missing


def _hub_results(found: EvaluationRecord) -> list[dict[str, Any]]:
    """Perplexities and scores in the form that the hub reads."""
    numbers = [
        *((x.text, "perplexity", x.perplexity, "perplexity", x) for x in found.perplexity),
        *((x.task, x.metric, x.value, f"{x.metric}, {x.shots} shots", x) for x in found.tasks),
    ]
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": data, "name": data},
            "metrics": [
                {"type": kind, "value": value, "name": f"{name}, protocol {one.protocol_id}"}
            ],
        }
        for data, kind, value, name, one in numbers
    ]


def push_recipe(recipe: PushRecipe, progress: Progress) -> PushResult:
    """Publish a model folder on the hub, with a card that has its results and their protocols.

    The zeros are counted first and compared with the records. A folder that lost some, that is
    incomplete, or that holds keys or tokens is refused. The repository is private unless `public`.

    Args:
        recipe: the recipe.
        progress: receives every tensor.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for repo in filter(None, (recipe.repo, recipe.base_model)):
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise RecipeError(
                f"{repo!r} is not the name of a repository: {error}", remedy="write OWNER/NAME"
            ) from None
    folder = trusted_folder(Path(recipe.model).expanduser(), recipe.trust_remote_code)
    files, left = _contents_of(folder)
    _refuse_secrets(files)
    refuse_not_finite(shard_files(folder))
    audit = audit_checkpoint(folder, progress=progress)
    _refuse_lost_zeros(folder, audit)
    run = read_run(folder, folder.name)
    written = files[CARD].read_text(encoding="utf-8")
    card, notes = _push_card(written, recipe.repo, run, recipe.base_model)
    card = without_folders(card)
    notes_files = {n: file for n, file in files.items() if n.startswith(f"{NOTES}/")}
    bare = {n: (text, without_folders(text)) for n, text in _texts_of(notes_files)}
    texts = {**{n: short for n, (text, short) in bare.items() if text != short}, CARD: card}
    if len(texts) > 1:
        changed = ", ".join(name for name in texts if name != CARD)
        notes.append(f"paths of this machine are cut to their last names in {changed}")
    repo, private, branch = recipe.repo, not recipe.public, recipe.branch
    address = None
    if not recipe.dry_run:
        address = _upload(repo, files, texts, private=private, branch=branch)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    sizes |= {name: len(text.encode()) for name, text in texts.items()}
    return PushResult(
        repo=repo, private=private, branch=branch, files=sizes, left_out=left,
        zeros=audit.sparsity, card=card, notes=tuple(notes), address=address,
    )  # fmt: skip


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
