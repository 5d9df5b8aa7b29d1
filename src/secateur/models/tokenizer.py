"""The tokenizer in a model's folder."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from secateur.errors import CheckpointError, RecipeError, first_line
from secateur.models.configuration import TrustedFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any  # checked by mypy only: importing transformers takes seconds

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)

PROBES = ("a", "A", "1", ".")
"""Texts that show the start tokens; several, because a vocabulary may lack letters."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer of a checkpoint folder. Its own code runs if the folder is trusted."""
    if not _has_tokenizer(folder):
        raise CheckpointError(
            "the folder has no tokenizer",
            where=str(folder),
            remedy=f"copy the tokenizer's files ({', '.join(TOKENIZER_FILES[:3])}) of the original "
            "model to the folder",
        )
    from transformers import AutoTokenizer

    from secateur.models.skeleton import quiet_transformers

    trust = isinstance(folder, TrustedFolder)
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust, local_files_only=True
            )
        except Exception as error:  # each tokenizer class fails in its own way on bad files
            raise CheckpointError(
                f"the tokenizer cannot be loaded: {first_line(error)}",
                where=str(folder),
                remedy="copy the tokenizer's files of the original model again"
                + ("" if trust else "; if it needs its own code, trust_remote_code"),
            ) from error


def refuse_other_words(
    student: Path | Tokenizer, teacher: Path, *, roles: tuple[str, str] = ("student", "teacher")
) -> None:
    """Refuse a teacher whose token ids mean other words than the student's.

    Args:
        student: folder of the model that learns, or its tokenizer.
        teacher: folder of the model that it learns from.
        roles: what the message calls the two.

    Raises:
        RecipeError: the vocabularies differ.
    """
    if isinstance(student, Path):
        student = load_tokenizer(student)
    own = student.get_vocab()
    other = load_tokenizer(teacher).get_vocab()
    if own != other:
        differing = sum(own.get(token) != number for token, number in other.items())
        raise RecipeError(
            f"{roles[0]} and {roles[1]} have different vocabularies: {len(own)} and {len(other)} "
            f"tokens, {differing} of the {roles[1]}'s have another number or none",
            where=str(teacher),
            remedy=f"a {roles[1]} needs the tokenizer of the {roles[0]}: name two models of which "
            "one was made from the other",
        )


def tokenizer_for(model: Any, given: Any = None) -> Tokenizer:
    """The tokenizer of a loaded model: the given one, or that at the place the model came from.

    Raises:
        RecipeError: what is given is no tokenizer, or none can be had.
    """
    if given is not None:
        if not callable(given) or not hasattr(given, "name_or_path"):
            raise RecipeError(
                f"tokenizer is {reprlib.repr(given)}, not a tokenizer of transformers",
                remedy="pass tokenizer=AutoTokenizer.from_pretrained(...)",
            )
        return cast(Tokenizer, given)
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not name:
        why = "its configuration does not say where it came from"
    elif Path(name).is_dir():
        if _has_tokenizer(Path(name)):
            return load_tokenizer(Path(name))
        why = f"{name}, where it came from, has none"
    else:
        from transformers import AutoTokenizer

        from secateur.models.skeleton import quiet_transformers

        with quiet_transformers():
            try:
                return AutoTokenizer.from_pretrained(name)
            except Exception as error:  # of the hub, of the network, of each tokenizer class
                why = f"none could be had from {name!r}: {type(error).__name__}"
    raise RecipeError(
        f"a loaded model needs its tokenizer to read text, and {why}",
        remedy="pass tokenizer=AutoTokenizer.from_pretrained(...)",
    )


def _has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has files of a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def start_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that a tokenizer puts in front of a text, found by encoding one.

    A short text is encoded with and without special tokens; the tokens before the text in the first
    result are the start. Names such as `bos_token` are ignored, because many tokenizers have one
    and do not use it.

    Returns:
        Token ids; none for most tokenizers, one for Gemma or Llama, two for GLM.
    """
    for probe in PROBES:
        bare = encoded(tokenizer, [probe], add_special_tokens=False)[0]
        if bare:
            whole = encoded(tokenizer, [probe])[0]
            # where the tokens of the text begin among all
            for place in range(len(whole) - len(bare) + 1):
                if whole[place : place + len(bare)] == bare:
                    return tuple(whole[:place])
            break
    raise CheckpointError(
        "the tokenizer does not show where its special tokens end and the text begins: "
        + "; ".join(f"{probe!r} becomes {encoded(tokenizer, [probe])[0]}" for probe in PROBES),
        remedy="give windows of token ids in a .safetensors file instead of a text",
    )


def start_tokens_of(folder: Path) -> tuple[int, ...]:
    """The start tokens of a checkpoint folder's tokenizer; none where it has no tokenizer."""
    if not _has_tokenizer(folder):
        return ()
    return start_tokens(load_tokenizer(folder))


class Written(Protocol):
    """A document that makes its own token ids, such as a conversation."""

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Its token ids."""
        ...


KEEPING = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")
"""Steps before the model of a tokenizer that drop nothing, unless their behaviour is `Removed`."""

BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""The tokens of single bytes in tokenizers that begin with characters."""

NFC_SHRINKS = 4
"""NFC makes a text at most 3.5 times shorter: 7 bytes can become U+0390, which has 2."""


class TextBound(NamedTuple):
    """How few tokens a text can have, found without reading it.

    Args:
        longest: bytes of a text that become one token, at most.
        dropped: bytes that become none.
    """

    longest: int
    dropped: bytes

    def fewest_tokens(self, text: str) -> int:
        """A text has at least so many tokens."""
        return -(-len(text.encode().translate(None, self.dropped)) // self.longest)


def text_bound(tokenizer: Tokenizer) -> TextBound | None:
    """The bound of a tokenizer.

    Returns:
        None where a token may stand for any number of bytes: the tokenizer drops some, such as
        spaces, or has one token for all that it does not know.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if inner is None:
        return None
    stored, vocabulary = json.loads(inner.to_str()), tokenizer.get_vocab()
    shrinks, model, dropped = 1, stored["model"], b""
    for step in _steps(stored["normalizer"]):
        pattern, content = step.get("pattern", {}).get("String"), step.get("content", "")
        grows = pattern is not None and len(content.encode()) >= len(pattern.encode())
        if step["type"] == "NFC":
            shrinks *= NFC_SHRINKS
        elif step["type"] != "Prepend" and not (step["type"] == "Replace" and grows):
            return None
    before = [*_steps(stored["pre_tokenizer"])]
    if any(step["type"] == "ByteLevel" for step in before) and model["type"] == "BPE":
        known = enumerate(byte_letters())
        # a byte without a token is left out, and BPE has no token for the unknown
        dropped = bytes(byte for byte, letter in known if letter not in vocabulary)
    elif not model.get("byte_fallback") or not vocabulary.keys() >= BYTE_TOKENS:
        return None
    # a step that removes text, or a token that swallows spaces, stands for any number of bytes
    kept = all(x["type"] in KEEPING and x.get("behavior") != "Removed" for x in before)
    if not kept or any(token["lstrip"] or token["rstrip"] for token in stored["added_tokens"]):
        return None
    return TextBound(shrinks * max(len(token.encode()) for token in vocabulary), dropped)


def byte_letters() -> list[str]:
    """The letter of each byte in a byte-level vocabulary, as in GPT-2's `bytes_to_unicode`.

    Printable characters stand for themselves, the other bytes are letters from 256 on.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = count(256)
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _steps(described: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as tokenizer.json describes them."""
    if described is not None and described["type"] == "Sequence":
        for part in described.get("normalizers") or described.get("pretokenizers") or ():
            yield from _steps(part)
    elif described is not None:
        yield described


def text_tokens(
    tokenizer: Tokenizer, texts: Sequence[str | Written], start: tuple[int, ...]
) -> list[list[int]]:
    """The token ids of each text, without the start tokens; an end token stays.

    Texts are never truncated. A text longer than the model's context gives no warning, because it
    is cut into windows afterwards.
    """
    count = len(start)
    plain = iter(encoded(tokenizer, [text for text in texts if isinstance(text, str)]))
    found = [next(plain) if isinstance(text, str) else text.ids(tokenizer) for text in texts]
    return [ids[count:] if tuple(ids[:count]) == start else ids for ids in found]


def encoded(tokenizer: Tokenizer, texts: list[str], **options: bool) -> list[list[int]]:
    """The token ids of each text, whole and without a warning."""
    if not texts:
        return []
    try:
        found = tokenizer(texts, truncation=False, verbose=False, **options)["input_ids"]
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise CheckpointError(
            f"the tokenizer cannot encode a text: {first_line(error)}",
            where=str(tokenizer.name_or_path),
            remedy="copy the tokenizer's files of the original model to the folder",
        ) from error
    return [list(ids) for ids in found]
