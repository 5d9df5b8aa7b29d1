"""The upload of files to a repository of the hub, by the hub's own client."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import RecipeError, SourceError
from secateur.models.hub import why_unreachable


def check_repository(repo: str) -> None:
    """Refuse a name that no repository can have.

    Raises:
        RecipeError: says what the hub allows.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RecipeError(
            f"{repo!r} is not the name of a repository: {error}", remedy="write OWNER/NAME"
        ) from None


def upload(
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
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    reason = why_unreachable()
    if reason is not None:
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
        with staged(files, texts) as folder:
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
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


@contextmanager
def staged(files: Mapping[str, Path], texts: Mapping[str, str]) -> Iterator[Path]:
    """A folder with the texts and links to the other files, and nothing else."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, file in files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name in texts:
                place.write_text(texts[name], encoding="utf-8")
            else:
                place.symlink_to(file.resolve())
        yield folder
