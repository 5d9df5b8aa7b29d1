"""What drafts gain: measured on SmolLM2, and computed for larger models.

    python -m benchmarks.speed.drafts measured --parent NAME=DIR --draft NAME=DIR --draft n-gram ...
    python -m benchmarks.speed.drafts costs [--models 1.1b 8b] [--turns 9]
    python -m benchmarks.speed.drafts show

`measured` times a parent with a draft and without, as `secateur bench --draft`: 64 tokens after
each of four prompts of four kinds, at temperature 0 and 1, without the draft and then with it.
The draft `n-gram` proposes what followed the last three tokens, or two, when they last occurred.

`costs` measures c(1) … c(8), the seconds of one call of our decode loop with so many tokens and the
logits after each, after 64 tokens, on the shapes of TinyLlama (1.1 billion parameters) and Llama
3.1 8B with random weights. Layers are timed that have 768 MiB together (8B in bfloat16: 2 of 32
layers), and the time of all layers is that of those times L / n (`evaluation/random_models.py`).
Embedding and head are bfloat16 or, beside integers, int8. Formats of a model take turns, and the
lowest times count, since other work on the machine only adds to them.

`show` computes what a pair gains, by `evaluation/acceptance.py`:

    speed-up(k) = (1 + a + … + a^k) · c(1) / (k · c_draft + c(k + 1)), with the best k up to 7

a is the acceptance, the same at every position. It is given, not measured on these sizes: that of
SmolLM2's draft of the same kind, 0.75 (T5-small for T5-XXL, greedy translation: Leviathan et al.
2023, table 2) and 0.9 (layers skipped and chosen for the text: SWIFT, Xia et al. 2024). Drawing,
tokenizer and adaptation of k cost more on top. The draft with a head over 16,384 tokens has that
part of the time outside the layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from benchmarks.hardware import add, heading, keep, markdown
from benchmarks.speed.int4_models import SHAPES
from benchmarks.stored import known_rows
from transformers import LlamaConfig

from secateur.evaluation.acceptance import MOST_PROPOSED, speculation
from secateur.evaluation.generation import KINDS, prompts_of_kinds
from secateur.evaluation.random_models import PROMPT_TOKENS, FormatTimer, WeightFormat
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.runtime.decode import Decoder, Token
from secateur.runtime.load import load
from secateur.runtime.speculative import DraftedText, Drafter, Guess, open_drafter
from secateur.steps.bench import drafted_speed
from secateur.timing import alternate, seconds_of

MEASURES = ("src/secateur/runtime/speculative.py", "src/secateur/steps/draft.py")

NAME = "drafts"
PROTOCOL = {"calls": 8, "prompt_tokens": PROMPT_TOKENS, "script": "benchmarks/speed/drafts.py"}
MOST = 8
FREQUENT = 16_384
MODELS: dict[str, dict[str, Any]] = {
    "1.1b": SHAPES["1.1b"],
    "8b": {
        **SHAPES["1.1b"],
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
FORMATS = {
    "bfloat16": WeightFormat("bf16", 0.0),
    "int8": WeightFormat("int8", 0.0),
    "int4": WeightFormat("int4", 0.0),
    "50 % zeros, int4": WeightFormat("int4", 0.5),
}
PARENTS = ("bfloat16", "int8")
DRAFTS: dict[str, tuple[str, float, bool, float]] = {
    "int4": ("int4", 1.0, False, 0.66),
    "50 % zeros, int4": ("50 % zeros, int4", 1.0, False, 0.57),
    "four fifths of the layers, int4": ("int4", 0.8, False, 0.41),
    "half the layers, int4": ("int4", 0.5, False, 0.17),
    "half the layers, int4, frequent tokens": ("int4", 0.5, True, 0.17),
}
"""Format, share of the layers, whether the head is cut, and the acceptance of SmolLM2's untrained
draft of that kind on WikiText-2 (of zeros and cuts without int4; a third of the layers cut where
half are cut here)."""
PUBLISHED = {"0.75": 0.75, "0.9": 0.9}


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
        chances = None
        if text.draws.temperature:
            chances = np.zeros(self.vocabulary, dtype=np.float32)
            chances[token] = 1.0
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
                    else open_drafter(where, decoder.slots, tokenizer)
                )
                found = drafted_speed(decoder, drafter, kind, texts, NEW_TOKENS, temperature)
                row = {"part": "measured", "parent": name, "draft": label, **asdict(found)}
                add(NAME, PROTOCOL, {**row, "speedup": found.speedup})
                print(name, label, kind, temperature, f"{found.speedup:.2f}", flush=True)


class Calls(FormatTimer):
    """Times calls of 1 to 8 tokens, with all layers that are here and with none."""

    @torch.inference_mode()
    def call(self, count: int) -> float:
        """Seconds of one call that answers all its tokens."""
        slots = self.decoder.slots
        tokens = [Token(0, PROMPT_TOKENS + place, place) for place in range(count)]
        seconds = seconds_of(lambda: slots.step(tokens), self.now)
        slots.rewind(0, PROMPT_TOKENS)
        return seconds

    def calls(self) -> list[tuple[float, float]]:
        """For each number of tokens: seconds outside the layers, and of a whole call here."""
        self.decoder.slots.rewind(0, PROMPT_TOKENS)
        found = []
        for count in range(1, MOST + 1):
            whole = min([self.call(count) for _ in range(4)][1:])
            with self.without_layers():
                bare = min([self.call(count) for _ in range(4)][1:])
            found.append((bare, whole))
        return found


def costs(models: list[str], turns: int) -> None:
    """Measure the calls of every format of the models that have no rows yet."""
    if not known_rows(NAME, PROTOCOL):
        keep(NAME, PROTOCOL, [])
    done = {row["model"] for row in known_rows(NAME, PROTOCOL) if row["part"] == "costs"}
    for model in models:
        if model in done:
            continue
        # one memory for embedding and head: their time is the same, and there is less of it
        config = LlamaConfig(**{**MODELS[model], "tie_word_embeddings": True})
        timers = [Calls(config, stored) for stored in FORMATS.values()]
        measured = alternate(timers, Calls.calls, list, turns=turns)
        for name, timer, own in zip(FORMATS, timers, measured, strict=True):
            outside, layers = [], []
            for count in range(MOST):
                bare = min(turn[count][0] for turn in own)
                whole = min(turn[count][1] for turn in own)
                outside.append(bare)
                layers.append(timer.of_all_layers(whole - bare))
            row = {"part": "costs", "model": model, "format": name, "timed_layers": timer.count}
            row |= {"layers": timer.layers, "outside_seconds": outside, "layer_seconds": layers}
            add(NAME, PROTOCOL, row)
            seconds = [f"{1e3 * (a + b):.1f}" for a, b in zip(outside, layers, strict=True)]
            print(model, name, "ms:", *seconds, flush=True)


def computed(model: str) -> list[list[str]]:
    """For each parent and draft of a model: the cost of a draft's token, and speed-ups."""
    found = {
        row["format"]: row
        for row in known_rows(NAME)
        if row["part"] == "costs" and row["model"] == model
    }
    lines = []
    for parent in PARENTS:
        calls = [a + b for a, b in parts_of(found[parent])]
        for draft, (stored, share, frequent, accepted) in DRAFTS.items():
            outside, layers = parts_of(found[stored])[0]
            cut = FREQUENT / MODELS[model]["vocab_size"] if frequent else 1.0
            seconds = cut * outside + share * layers
            gains = [gain(rate, calls, seconds) for rate in (accepted, *PUBLISHED.values())]
            relative = f"{seconds / calls[0]:.2f}"
            lines.append([model, parent, draft, relative, f"{accepted:.2f}", *gains])
    return lines


def parts_of(row: dict[str, Any]) -> list[tuple[float, float]]:
    """For calls of 1 to 8 tokens: seconds outside the layers and in them.

    Noise only adds, so no call takes longer than one with more tokens took.
    """
    outside, layers = row["outside_seconds"], row["layer_seconds"]
    return [(min(outside[n:]), min(layers[n:])) for n in range(MOST)]


def timed() -> list[list[str]]:
    """For each pair that was timed: the speed-ups by kind of text, greedy and then drawn."""
    found: dict[tuple[str, str], dict[tuple[str, float], str]] = {}
    for row in known_rows(NAME):
        if row["part"] == "measured":
            pair = found.setdefault((row["parent"], row["draft"]), {})
            pair[row["kind"], row["temperature"]] = f"{row['speedup']:.2f}"
    cells = [(kind, temperature) for temperature in (0.0, 1.0) for kind in KINDS]
    return [[*pair, *(own.get(cell, "") for cell in cells)] for pair, own in found.items()]


def gain(rate: float, calls: Sequence[float], draft_seconds: float) -> str:
    """The largest speed-up, and its k."""
    runs = [rate**count for count in range(1, MOST_PROPOSED + 1)]
    best = speculation(runs, calls, draft_seconds)
    return f"{best.speedup:.2f} ({best.k})" if best.k else "none"


def show() -> None:
    """Print the tables."""
    print(heading())
    print(markdown(["parent", "draft", *KINDS, *(f"{kind}, drawn" for kind in KINDS)], timed()))
    print()
    rows = [row for row in known_rows(NAME) if row["part"] == "costs"]
    lines = []
    for row in rows:
        calls = [a + b for a, b in parts_of(row)]
        relative = [f"{one / calls[0]:.2f}" for one in calls[1:]]
        lines.append([row["model"], row["format"], f"{1e3 * calls[0]:.1f}", *relative])
    print(markdown(["model", "format", "c(1), ms", *(f"c({n})" for n in range(2, 9))], lines))
    print()
    columns = ["model", "parent", "draft", "c_draft / c(1)", "accepted, as SmolLM2", "gain (k)"]
    lines = [
        line for model in dict.fromkeys(row["model"] for row in rows) for line in computed(model)
    ]
    print(markdown([*columns, *(f"gain at {name}" for name in PUBLISHED)], lines))


def main() -> None:
    """Measure or show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("costs", "measured", "show"))
    parser.add_argument("--parent", default="float32=smollm2-135m", help="NAME=FOLDER")
    parser.add_argument("--draft", action="append", default=[], help="NAME=FOLDER, or n-gram")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--turns", type=int, default=9)
    given = parser.parse_args()
    if given.what == "costs":
        costs(given.models, given.turns)
    elif given.what == "measured":
        measured(given.parent, given.draft)
    else:
        show()


if __name__ == "__main__":
    main()
