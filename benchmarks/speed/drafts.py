"""What drafts gain, measured on SmolLM2.

    python -m benchmarks.speed.drafts --parent NAME=DIR --draft NAME=DIR --draft n-gram ...

Times a parent with a draft and without, as `secateur bench --draft`: 64 tokens after each of four
prompts of four kinds, at temperature 0 and 1, without the draft and then with it. The draft
`n-gram` proposes what followed the last three tokens, or two, when they last occurred.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
from benchmarks.hardware import add, heading, keep
from benchmarks.stored import known_rows

from secateur.evaluation.generation import KINDS, prompts_of_kinds
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.runtime.decode import Decoder
from secateur.runtime.load import load
from secateur.runtime.sampling import Chances
from secateur.runtime.speculative import DraftedText, Drafter, Guess, open_drafter
from secateur.steps.bench import drafted_speed

MEASURES = ("src/secateur/runtime/speculative.py", "src/secateur/steps/draft.py")
MINUTES = 40

NAME = "drafts"
PROTOCOL = {"calls": 8, "prompt_tokens": 64, "script": "benchmarks/speed/drafts.py"}
NGRAM, LONGEST, NEW_TOKENS = "n-gram", 3, 64


class NGrams(Drafter):
    """A draft without a model: what followed the last tokens when they last occurred."""

    def __init__(self, vocabulary: int) -> None:
        no_model: Any = SimpleNamespace(lengths=[0])
        super().__init__(no_model, vocabulary)

    def propose(self, texts: Sequence[DraftedText], room: int) -> list[list[Guess]]:
        """The tokens after an earlier occurrence; at most four."""
        [text] = texts
        self.drafting = 0.0
        if not self.pace.awake():
            return [[]]
        began = self.clock()
        found = [self.certain(token, text) for token in continuation(text.ids)[: min(room, 4)]]
        self.drafting = self.clock() - began
        return [found]

    def certain(self, token: int, text: DraftedText) -> Guess:
        """A proposal that is drawn with probability 1."""
        certain = np.zeros(1, np.float32), np.array([token])
        chances = Chances(text.draws, *certain) if text.draws.temperature else None
        return Guess(token, chances, 0.5)


def continuation(ids: Sequence[int]) -> list[int]:
    """What followed the last three tokens of a text, or two, when they last occurred in it."""
    text = list(ids)
    for length in range(LONGEST, 1, -1):
        last = text[-length:]
        for begin in range(len(text) - length - 1, -1, -1):
            if text[begin : begin + length] == last:
                return text[begin + length :]
    return []


def measured(parent: str, drafts: list[str]) -> None:
    """Time a parent with each draft and without."""
    if not known_rows(NAME, PROTOCOL):
        keep(NAME, PROTOCOL, [])
    name, _, place = parent.partition("=")
    folder = resolve(place).folder
    tokenizer: Any = load_tokenizer(folder)
    prompts = prompts_of_kinds(tokenizer)
    room = NEW_TOKENS + max(len(ids) for own in prompts.values() for ids in own)
    decoder = Decoder(load(folder), room)
    for draft in drafts:
        label, _, where = draft.partition("=")
        vocabulary = decoder.slots.vocabulary
        for temperature in (0.0, 1.0):
            for kind, texts in prompts.items():
                drafter = (
                    NGrams(vocabulary)
                    if label == NGRAM
                    else open_drafter(resolve(where).folder, decoder.slots, tokenizer)
                )
                found = drafted_speed(decoder, drafter, kind, texts, NEW_TOKENS, temperature)
                row = {"part": "measured", "parent": name, "draft": label, **asdict(found)}
                add(NAME, PROTOCOL, {**row, "speedup": found.speedup})
                print(name, label, kind, temperature, f"{found.speedup:.2f}", flush=True)


def bfloat16(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Each draft beside the parent in bfloat16: the speed-ups by kind of text."""
    found: dict[tuple[str, float], dict[str, str]] = {}
    for row in rows:
        if row["parent"] == "SmolLM2 bfloat16":
            own = found.setdefault((row["draft"], row["temperature"]), {})
            own[row["kind"]] = f"{row['speedup']:.2f}"
    lines = [
        [draft, f"{temperature:g}", *(own.get(kind, "") for kind in KINDS)]
        for (draft, temperature), own in sorted(found.items(), key=lambda x: x[0][0] != BEST)
    ]
    return ["draft", "temperature", *KINDS], lines


def readme(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The speed-ups of our own draft."""
    columns, lines = bfloat16(rows)
    return columns[1:], [line[1:] for line in lines if line[0] == BEST]


BEST = "secateur draft"
TABLES = {"readme": readme, "bfloat16": bfloat16}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parent", default="float32=smollm2-135m", help="NAME=FOLDER")
    parser.add_argument("--draft", action="append", default=[], help="NAME=FOLDER, or n-gram")
    given = parser.parse_args()
    print(heading())
    measured(given.parent, given.draft)


if __name__ == "__main__":
    main()
