"""The id of a protocol, for example `ppl-1a2b3c4d-bfloat16-int8g256`.

A protocol is a dictionary of everything that a number depends on besides the weights. Its id has
two parts:

| part                | what it says                                                           |
|---------------------|------------------------------------------------------------------------|
| `ppl-1a2b3c4d`      | what was judged, and how: a hash of the protocol without labels        |
| `bfloat16-int8g256` | how the model computed: its dtype, and how activations were rounded    |

Data enters the hash by its content (`fingerprint`), so the same text under another file name has
the same id. Numbers with the same first part are comparable. If the whole id is the same, the
models also computed alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.runtime.linear import activations_of

COMPUTED = ("dtype", "activations")
"""Keys of a protocol that say how a model computed."""

APART = frozenset({"dataset", "split", "items_in_split", "shots_from", "join", *COMPUTED})
"""Keys that the hash ignores: names of data hashed by its content, and those of the second part."""


def computed_by(model: nn.Module) -> dict[str, str]:
    """How a model computes: the dtype of its parameters, and how it rounds activations."""
    dtype = next(model.parameters()).dtype
    return {"dtype": str(dtype).removeprefix("torch."), "activations": activations_of(model)}


def protocol_id(kind: str, protocol: Mapping[str, Any]) -> str:
    """The id of a protocol.

    Args:
        kind: ppl, div, task or gen.
        protocol: JSON values; the module says which keys are ignored.
    """
    counted = {key: value for key, value in protocol.items() if key not in APART}
    hashed = digest(json.dumps([kind, counted], sort_keys=True).encode())[:8]
    computed = [str(protocol[key]) for key in COMPUTED if protocol.get(key, "none") != "none"]
    return "-".join([kind, hashed, *computed]).replace(" ", "")


def judged_part(protocol_id: str) -> str:
    """The first part of an id; numbers of all models that share it are comparable."""
    return "-".join(protocol_id.split("-")[:2])


def fingerprint(content: Tensor | Sequence[Any]) -> str:
    """A hash of sixteen digits for token windows, or for JSON values such as task requests."""
    if isinstance(content, Tensor):
        return digest(repr(tuple(content.shape)).encode() + content.cpu().numpy().tobytes())[:16]
    return digest(json.dumps(list(content), ensure_ascii=False).encode())[:16]


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
