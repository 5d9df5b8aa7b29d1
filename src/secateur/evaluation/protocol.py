"""The name of a protocol: eight digits that say whether two numbers may be compared.

A protocol is a dictionary of what a number depends on. Its id is a hash of all of it but labels
and what belongs to the model: the data is there by its content (`fingerprint`), so the same text
under another file name has the same id, and so do the dense model and the pruned one.
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
"""Keys that name something which is in the protocol by its content, or belong to the model."""


def protocol_id(kind: str, protocol: Mapping[str, Any]) -> str:
    """A short name for a protocol, for example `ppl-1a2b3c4d`.

    Args:
        kind: ppl, div, task or gen.
        protocol: JSON values; see the module for the keys that do not count.
    """
    counted = {key: value for key, value in protocol.items() if key not in APART}
    return f"{kind}-{digest(json.dumps([kind, counted], sort_keys=True).encode())[:8]}"


def fingerprint(content: Tensor | Sequence[Any]) -> str:
    """Sixteen digits for token windows, or for JSON values such as the requests of a task."""
    if isinstance(content, Tensor):
        return digest(repr(tuple(content.shape)).encode() + content.cpu().numpy().tobytes())[:16]
    return digest(json.dumps(list(content), ensure_ascii=False).encode())[:16]


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
