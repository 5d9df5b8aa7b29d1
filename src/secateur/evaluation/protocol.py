"""The id of a protocol: eight digits. Numbers with the same id can be compared.

A protocol is a dictionary of everything that a number depends on. Its id is a hash of the protocol
without labels and without entries about the model. Data enters the hash by its content
(`fingerprint`). So the same text under another file name has the same id, and so have the dense
model and the pruned one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["fingerprint", "protocol_id"]

APART = frozenset(
    {"dataset", "split", "items_in_split", "shots_from", "join", "tokenizer", "dtype"}
)
"""Keys that the id ignores: names of data hashed by its content, and entries about the model."""


def protocol_id(kind: str, protocol: Mapping[str, Any]) -> str:
    """The id of a protocol, for example `ppl-1a2b3c4d`.

    Args:
        kind: ppl, div, task or gen.
        protocol: JSON values; the module says which keys are ignored.
    """
    counted = {key: value for key, value in protocol.items() if key not in APART}
    return f"{kind}-{digest(json.dumps([kind, counted], sort_keys=True).encode())[:8]}"


def fingerprint(content: Tensor | Sequence[Any]) -> str:
    """A hash of sixteen digits for token windows, or for JSON values such as task requests."""
    if isinstance(content, Tensor):
        return digest(repr(tuple(content.shape)).encode() + content.cpu().numpy().tobytes())[:16]
    return digest(json.dumps(list(content), ensure_ascii=False).encode())[:16]


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
