"""Measures drafts beside their parent, and makes what only drafts need.

The time of a call depends on the machine's other work more than two drafts differ. So the calls of
the parent, with 1 to 8 tokens, and those of the draft take turns, and each has the lowest time of
its turns: other work only lengthens a call. Times that cannot be are measured again. Both are the
calls that speculative decoding makes (`SlotDecoder.step`), after a prompt.

A head over frequent tokens multiplies only the rows of some tokens. The folder of the draft stays a
model with the whole vocabulary; the ids of these tokens are in a file beside it. The time of such a
head is that of the draft, less that of the whole head, and more that of so many rows, both timed
alone.

What was measured is kept in files, so a resumed run decides the same.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.windows import load_windows
from secateur.evaluation.acceptance import acceptance, speculation, too_fast
from secateur.evaluation.generation import end_tokens
from secateur.evaluation.perplexity import window_progress
from secateur.evaluation.token_times import time_head
from secateur.models.tokenizer import load_tokenizer
from secateur.reporting.draft import DraftCandidate, DraftHead
from secateur.runs.output import write_json
from secateur.runs.records.measured import Acceptance
from secateur.runtime.decode import SlotDecoder, Token
from secateur.runtime.load import load
from secateur.steps.fitting.candidates import BuiltCandidate
from secateur.steps.fitting.costs import weight_format
from secateur.steps.fitting.models import FitContext
from secateur.steps.fitting.storage_formats import EMBEDDINGS, StorageFormat, embedded
from secateur.timing import alternate, seconds_of
from secateur.types import Windows

HEADS = (32768, 16384, 8192, 4096)
"""Numbers of tokens that a head over frequent tokens may have."""

TURNS, PROMPT_TOKENS, DRAFT_CALLS = 25, 64, 4
"""Turns of every call, tokens before it, and calls of the draft in one turn: in a round they follow
each other too."""

TRIALS = 4
"""How often all turns are measured, at most, while a call with more tokens seems far too fast."""


@dataclass(frozen=True)
class TurnTimes:
    """Seconds of calls that took turns.

    Attributes:
        parent: of the parent with 1, 2, … tokens.
        draft: of the draft with one token.
    """

    parent: tuple[float, ...]
    draft: float


@torch.inference_mode()
def time_calls(parent: Any, draft: Any, prompt: Tensor) -> TurnTimes:
    """Time the calls of a parent and of its draft in turns.

    Args:
        parent: a model that our loop decodes.
        draft: another one.
        prompt: token ids that both have read before [tokens].
    """
    ids, before = prompt.tolist(), len(prompt)
    decoders = [SlotDecoder(model, before + SlotDecoder.together) for model in (parent, draft)]
    for decoder in decoders:
        decoder.read(0, prompt)
    verifying, proposing = decoders

    def verify(count: int) -> float:
        some = [Token(0, before + n, ids[n % before]) for n in range(count)]
        seconds = seconds_of(lambda: verifying.step(some))
        verifying.rewind(0, before)
        return seconds

    def propose() -> float:
        seconds = [
            seconds_of(partial(proposing.step, [Token(0, before + n, ids[n % before])]))
            for n in range(DRAFT_CALLS)
        ]
        proposing.rewind(0, before)
        return statistics.mean(seconds)

    calls: list[Callable[[], float]] = [
        *(partial(verify, n + 1) for n in range(SlotDecoder.together)),
        propose,
    ]
    for call in calls:
        call()
    found = [math.inf] * len(calls)
    for _ in range(TRIALS):
        again = alternate(calls, lambda call: call(), min, turns=TURNS)
        found = [min(pair) for pair in zip(found, again, strict=True)]
        if too_fast(found[:-1]) is None:
            break
    *parents, own = found
    return TurnTimes(tuple(parents), own)


@dataclass(frozen=True)
class DraftBench:
    """A parent, and what measures drafts beside it.

    Attributes:
        context: of the fit that makes them.
        folder: of the parent, as it runs.
    """

    context: FitContext
    folder: Path

    @cached_property
    def parent(self) -> Any:
        """The parent, whole in memory."""
        return load(self.folder, trust_remote_code=self.context.recipe.trust_remote_code)

    @cached_property
    def heads(self) -> tuple[Tensor | None, ...]:
        """The token ids of every head, largest first; None for the whole vocabulary."""
        recipe, folder = self.context.recipe, self.context.source.folder
        tokenizer = load_tokenizer(folder, trust_remote_code=recipe.trust_remote_code)
        always = {*tokenizer.all_special_ids, *end_tokens(self.parent)}
        read, most = load_windows(self.context.calibration_file), self.vocabulary
        sizes = [n for n in HEADS if n < most]
        return (None, *(frequent_tokens(read, always, most, n) for n in sizes))

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the parent."""
        return int(self.parent.config.vocab_size)

    def acceptances(
        self, folder: Path, windows: Windows, start: int, name: str, heads: Sequence[Tensor | None]
    ) -> list[Acceptance]:
        """What the parent takes of a draft with each of some heads, from a file or measured.

        Args:
            folder: of the draft, packed.
            windows: token ids [windows, length].
            start: start tokens of a window.
            name: of the windows.
            heads: the token ids of each head.
        """
        file = self._file("acceptance", folder, name)
        if not file.exists():
            label, count = f"what the parent takes of {folder.parent.name}", len(windows)
            with window_progress(self.context.progress, label, count) as report:
                draft = load(folder, trust_remote_code=self.context.recipe.trust_remote_code)
                found = acceptance(
                    draft, self.parent, windows, heads=heads, start_tokens=start, progress=report
                )
            write_json(file, [one.to_json() for one in found])
        return [
            Acceptance.model_validate(one) for one in json.loads(file.read_text(encoding="utf-8"))
        ]

    @property
    def alone(self) -> TurnTimes:
        """The times of the parent before there is a draft, from a file or measured."""
        return self.times(None)

    def times(self, folder: Path | None) -> TurnTimes:
        """The times of the parent and of a draft, from a file or measured.

        Args:
            folder: of the draft, packed; None for the parent as a draft of its own.
        """
        file = self._file("times", folder or self.context.work / "parent", "")
        if not file.exists():
            self.context.progress.start("timing parent and draft", 1)
            draft = self.parent
            if folder is not None:
                draft = load(folder, trust_remote_code=self.context.recipe.trust_remote_code)
            prompt = self.context.choosing.windows.flatten()[:PROMPT_TOKENS]
            found = time_calls(self.parent, draft, prompt)
            write_json(file, {"parent": found.parent, "draft": found.draft})
            self.context.progress.finish()
        known = json.loads(file.read_text(encoding="utf-8"))
        return TurnTimes(tuple(known["parent"]), known["draft"])

    def _file(self, what: str, folder: Path, name: str) -> Path:
        """Where a measured value of a folder among the work of the run is kept."""
        parts = folder.relative_to(self.context.work).parts
        return self.context.work / f"{'-'.join(filter(None, (what, *parts, name)))}.json"

    def judged(self, draft: MeasuredDraft, head: Tensor | None) -> Acceptance:
        """What the parent takes of a draft on text that was used for nothing else."""
        judging, folder = self.context.judging, draft.built.packed
        [found] = self.acceptances(folder, judging.windows, judging.start, "judged", [head])
        return found

    def measured(self, built: BuiltCandidate) -> MeasuredDraft:
        """A draft with each of the heads, on the windows that choose."""
        choosing, values = self.context.choosing, embedded(built.formats[EMBEDDINGS])
        found = self.acceptances(
            built.packed, choosing.windows, choosing.start, "chosen", self.heads
        )
        times = self.times(built.packed)
        hidden = self.parent.config.hidden_size
        stored = weight_format(StorageFormat(values, 0.0))
        rows = [self.vocabulary if ids is None else len(ids) for ids in self.heads]
        each = [time_head((n, hidden), stored) for n in rows] if len(rows) > 1 else [0.0]
        # never less than what the rest of the draft takes at least
        seconds = [max(times.draft - each[0] + one, times.draft / 10) for one in each]
        heads = []
        for count, taken, own in zip(rows, found, seconds, strict=True):
            both = [taken.runs, taken.greedy_runs]
            gains = [speculation(runs, times.parent, own, least=1).speedup for runs in both]
            heads.append(DraftHead(count, taken, own, math.sqrt(math.prod(gains))))
        whole = heads[0]
        row = DraftCandidate(
            built.row.name,
            built.row.file_bytes,
            built.row.last,
            built.row.healed is not None,
            whole.acceptance,
            whole.seconds,
            speculation(whole.acceptance.runs, times.parent, whole.seconds, least=1),
            speculation(whole.acceptance.greedy_runs, times.parent, whole.seconds, least=1),
        )
        return MeasuredDraft(built, row, tuple(heads), times)


@dataclass(frozen=True)
class MeasuredDraft:
    """A draft that was made, with everything that was measured to choose it.

    Attributes:
        built: the draft.
        row: its numbers with the whole head.
        heads: with each of the heads, the whole one first.
        times: of parent and draft.
    """

    built: BuiltCandidate
    row: DraftCandidate
    heads: tuple[DraftHead, ...]
    times: TurnTimes

    @property
    def best_head(self) -> int:
        """The number of the head with which it gains the most."""
        return max(range(len(self.heads)), key=lambda n: self.heads[n].gain)

    @property
    def gain(self) -> float:
        """What it gains with that head."""
        return self.heads[self.best_head].gain


def frequent_tokens(windows: Windows, always: set[int], vocabulary: int, count: int) -> Tensor:
    """The tokens that a text uses most, ascending, int64 [count].

    Args:
        windows: the text.
        always: tokens that are among them in any case.
        vocabulary: number of all tokens. Tokens that are as frequent go by their number, which is
            the order of frequency where a tokenizer has learned them by merging.
        count: of the tokens, at most the vocabulary.

    Example:
        >>> import torch
        >>> from secateur.steps.fitting.drafts import frequent_tokens
        >>> frequent_tokens(torch.tensor([[5, 5, 3, 3, 4, 2]]), {7}, 8, 4)
        tensor([2, 3, 5, 7])
    """
    uses = torch.bincount(windows.flatten(), minlength=vocabulary)
    uses[[one for one in always if one < vocabulary]] = windows.numel() + 1
    return uses.argsort(descending=True, stable=True)[:count].sort().values
