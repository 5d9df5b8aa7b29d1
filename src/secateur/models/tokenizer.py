"""The tokenizer that lies beside a model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # checked by mypy only: importing transformers takes seconds

__all__ = ["Tokenizer", "load_tokenizer", "token_ids"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder.

    Args:
        folder: the checkpoint.
        trust_remote_code: run a tokenizer class that comes as Python code with the model.

    Raises:
        CheckpointError: the folder has no tokenizer, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            "the folder has no tokenizer",
            where=str(folder),
            remedy=f"copy the tokenizer's files ({', '.join(TOKENIZER_FILES[:3])}) of the original "
            "model beside the weights",
        )
    from transformers import AutoTokenizer

    from secateur.models.skeleton import quiet_transformers

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # each tokenizer class fails in its own way on bad files
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(
                f"the tokenizer cannot be loaded: {said[0]}",
                where=str(folder),
                remedy="copy the tokenizer's files of the original model again"
                + ("" if trust_remote_code else "; if it needs its own code, trust_remote_code"),
            ) from error


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, with the tokenizer's default special tokens.

    Texts are never truncated, however long, and a text longer than the model's context is no
    reason for a warning: it is cut into windows afterwards.
    """
    if not texts:
        return []
    return [list(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
