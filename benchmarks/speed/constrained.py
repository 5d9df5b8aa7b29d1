"""Two libraries that constrain text to a JSON schema: llguidance and xgrammar.

    python -m benchmarks.speed.constrained [--libraries llguidance xgrammar]

The tokenizer is that of SmolLM2 (49,152 tokens). Every case is a process of its own with one
thread, which ends after 20 seconds. Times are processor times; that of a mask is a median of the
clock. For a usual schema: to read it, and for each token of one right text, to compute the mask.
For hostile ones: to read it or to refuse it, and the slowest of up to 40 masks. llguidance has the
bounds of `secateur.runtime.grammar`; xgrammar has none to give. Not installed by the project:
`pip install xgrammar`.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from benchmarks.hardware import keep

MEASURES = ("src/secateur/runtime/grammar.py",)

SECONDS = 20
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["name", "age", "tags", "zip"],
    "additionalProperties": False,
}
TEXT = json.dumps(
    {"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "machines"], "zip": "12345"}
)


def nested(depth: int) -> Any:
    """Objects in objects."""
    schema: Any = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


CASES: dict[str, Any] = {
    "usual": PERSON,
    "nested 400 deep": nested(400),
    "5,000 words": {"enum": [f"word {n}" for n in range(5_000)]},
    "3,000 optional properties": {
        "type": "object",
        "properties": {f"p{n}": {"type": "string"} for n in range(3_000)},
        "additionalProperties": False,
    },
    "(a?){5000}a{5000}": {"type": "string", "pattern": "^(a?){5000}a{5000}$"},
    "(((a{1,100}){1,100}){1,100}){1,100}": {
        "type": "string", "pattern": "^(((a{1,100}){1,100}){1,100}){1,100}$",
    },
}  # fmt: skip


class Guidance:
    """A schema, read by llguidance as the server reads it."""

    def __init__(self, tokenizer: Any) -> None:
        from secateur.runtime.grammar import Grammars

        self.grammars = Grammars(tokenizer, {tokenizer.eos_token_id})

    def read(self, schema: Any) -> None:
        """Begin a text."""
        from secateur.runtime.grammar import json_text

        self.matcher = self.grammars.read(json_text(schema)).matcher

    def mask(self) -> bytes:
        """A bit for each token."""
        found: bytes = self.matcher.compute_bitmask()
        if self.matcher.is_error():
            raise ValueError(self.matcher.get_error())
        return found

    def accept(self, token: int) -> None:
        """Go on."""
        self.matcher.consume_token(token)


class Xgrammar:
    """A schema, read by xgrammar."""

    def __init__(self, tokenizer: Any) -> None:
        import xgrammar

        self.library, size = xgrammar, len(tokenizer)
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1)
        self.bits = xgrammar.allocate_token_bitmask(1, size)

    def read(self, schema: Any) -> None:
        """Begin a text."""
        compiled = self.compiler.compile_json_schema(json.dumps(schema))
        self.matcher = self.library.GrammarMatcher(compiled)

    def mask(self) -> bytes:
        """A bit for each token."""
        self.matcher.fill_next_token_bitmask(self.bits)
        return self.bits.numpy().tobytes()

    def accept(self, token: int) -> None:
        """Go on."""
        self.matcher.accept_token(token)


LIBRARIES: dict[str, type[Guidance] | type[Xgrammar]] = {
    "llguidance": Guidance,
    "xgrammar": Xgrammar,
}


def measure(library: str, case: str) -> dict[str, Any]:
    """One case, in this process."""
    from secateur.models.sources import resolve
    from secateur.models.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(resolve("smollm2-135m").folder)
    before, began = _mib(), time.process_time()
    reader = LIBRARIES[library](tokenizer)
    row: dict[str, Any] = {"start_seconds": time.process_time() - began}
    began, steps, refused = time.process_time(), list[float](), ""
    slowest = 0.0
    last = int(began) + SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (last, last + 1))
    try:
        reader.read(CASES[case])
        row["read_ms"] = 1e3 * (time.process_time() - began)
        ids = [*tokenizer(TEXT)["input_ids"]] if case == "usual" else [None] * 40
        random = np.random.default_rng(0)
        for token in ids:
            at, began = time.perf_counter(), time.process_time()
            found = reader.mask()
            steps.append(1e6 * (time.perf_counter() - at))
            slowest = max(slowest, 1e3 * (time.process_time() - began))
            bits = np.unpackbits(np.frombuffer(found, np.uint8), bitorder="little")
            able = np.flatnonzero(bits)
            if not len(able):
                break
            reader.accept(int(random.choice(able)) if token is None else token)
    except Exception as error:  # of either library
        refused = str(error).splitlines()[0][:120]
        row.setdefault("read_ms", 1e3 * (time.process_time() - began))
    row |= {"refused": refused, "mib": _mib() - before, "steps": len(steps)}
    if steps:
        row |= {"mask_us": statistics.median(steps), "slowest_mask_ms": slowest}
    return row


def _mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--libraries", nargs="+", default=[*LIBRARIES])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    for library in args.libraries:
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.speed.constrained", "--one", library, case]
            row: dict[str, Any] = {"library": library, "case": case}
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == -signal.SIGXCPU:
                row["killed"] = f"not read after {SECONDS} seconds"
            else:
                row |= json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(row, flush=True)
    keep("constrained", {"protocol": __doc__}, rows)


if __name__ == "__main__":
    main()
