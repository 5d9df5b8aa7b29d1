"""Changes a file as an accident or an enemy would."""

from __future__ import annotations

import json
import random
from pathlib import Path

from runtime.mutations import anywhere

HEAD = 4096
EXTREME = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


def damage(file: Path, draw: random.Random) -> None:
    """Change a file in one way or, sometimes, in two."""
    raw = file.read_bytes()
    for _ in range(draw.choice([1, 1, 2])):
        changed = in_json(file, raw, draw) if draw.random() < 0.5 else None
        raw = in_bytes(raw, draw) if changed is None else changed
    file.write_bytes(raw)


def in_json(file: Path, raw: bytes, draw: random.Random) -> bytes | None:
    """One thing of its JSON changed: of the whole file, of a line, or of a safetensors header."""
    try:
        if file.suffix == ".json":
            return json.dumps(anywhere(draw, json.loads(raw))).encode()
        if file.suffix == ".jsonl":
            lines = raw.splitlines()
            at = draw.randrange(len(lines))
            lines[at] = json.dumps(anywhere(draw, json.loads(lines[at]))).encode()
            return b"\n".join(lines)
        if file.suffix == ".safetensors":
            length = int.from_bytes(raw[:8], "little")
            text = json.dumps(anywhere(draw, json.loads(raw[8 : 8 + length]))).encode()
            return len(text).to_bytes(8, "little") + text + raw[8 + length :]
    except (ValueError, IndexError, RecursionError):
        pass
    return None


def in_bytes(raw: bytes, draw: random.Random) -> bytes:
    """Bits, bytes, an integer, a block or the length changed; more often near the beginning."""
    if not raw:
        return bytes(draw.randrange(256) for _ in range(draw.randrange(64)))
    end = len(raw) if draw.random() < 0.3 else min(HEAD, len(raw))
    at, kind = draw.randrange(end), draw.randrange(8)
    size = draw.choice([1, 2, 4, 8, 64, 1024])
    block = raw[at : at + size]
    if kind == 0:
        return raw[:at] + bytes([raw[at] ^ (1 << draw.randrange(8))]) + raw[at + 1 :]
    if kind == 1:
        return raw[:at] + draw.randbytes(len(block)) + raw[at + len(block) :]
    if kind == 2:
        width = draw.choice([4, 8])
        number = (draw.choice(EXTREME) % 2 ** (8 * width)).to_bytes(width, "little")
        return raw[:at] + number + raw[at + width :]
    if kind == 3:
        return raw[: draw.randrange(len(raw))]
    if kind == 4:
        return raw + draw.randbytes(size)
    if kind == 5:
        return raw[:at] + block + raw[at:]
    if kind == 6:
        return raw[:at] + raw[at + size :]
    return raw[:at] + bytes(len(block)) + raw[at + len(block) :]
