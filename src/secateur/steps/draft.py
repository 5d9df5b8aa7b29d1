"""`secateur draft`: the draft with the largest expected speed-up of its parent on this machine.

    survey ─► drafts for several times of a token ─► made, measured ─► healed ─► judged

Speculative decoding gives exactly the parent's text, so a draft needs no quality of its own: only
to be fast, and taken often. Both are known before anything is generated (`evaluation/acceptance`):

    speed-up(k) = (1 + accepted(k)) · c(1) / (k · c_draft + c(k + 1))

and the seconds of drawing tokens count in both times.

The search is that of a fit, with the seconds of a token as its only bound. For each of several
bounds the knapsack chooses the formats that are predicted to diverge least from the parent. By
Pinsker, a divergence D means a refusal of at most

    1 − acceptance = TV ≤ √(D / 2)        so it is predicted as    s · √(D / 2)

The bound with the largest predicted speed-up is made as a real model, and measured. That sets s and
the ratio of its seconds to those of the table, and the choice is made again, at most twice. The
best draft is healed, and then the number of tokens of its head is chosen.

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

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save
from torch import Tensor

from secateur.calibration.windows import load_windows
from secateur.errors import ArchitectureError
from secateur.evaluation.acceptance import FREE, MOST_PROPOSED, acceptance, speculation, too_fast
from secateur.evaluation.perplexity import LossComparison, window_progress
from secateur.evaluation.token_times import time_drawing, time_head
from secateur.models.architecture import text_config
from secateur.models.checkpoint import shard_files
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.progress import Progress
from secateur.recipes.compress import DraftRecipe
from secateur.recipes.shared import texts_of
from secateur.recipes.verbs import imported
from secateur.reporting import fit as reports
from secateur.reporting.fields import Result
from secateur.reporting.plan import DraftPlanResult
from secateur.runs.folder import NOTES, check_output
from secateur.runs.measured import Acceptance, Drawing, Speculation
from secateur.runs.output import kept, write_bytes, write_json, write_text
from secateur.runs.records import read_record
from secateur.runtime.decode import SlotDecoder, Token
from secateur.runtime.formats import WeightFormat
from secateur.runtime.layer_forms import why_not
from secateur.runtime.load import load
from secateur.runtime.sampling import end_tokens
from secateur.runtime.speculative import FREQUENT
from secateur.sparsity.evolution import Candidate
from secateur.steps.fitting import problem as fit_problem
from secateur.steps.fitting.bench import BuiltCandidate, FitBench, open_model
from secateur.steps.fitting.problem import EMBEDDINGS, Costs, FitProblem, as_timed, embedded
from secateur.steps.fitting.survey import survey_model
from secateur.steps.runner import RunContext, Step, Way, identity_of, source_of
from secateur.timing import alternate, seconds_of
from secateur.types import Windows

BOUNDS = 9
"""Times of a token that drafts are chosen for: from the fastest one to that of dense int8."""

MOST_MADE = 3
"""How many drafts are made without a cut, at most."""

BETTER = 1.01
"""Another draft is made where it is predicted to bring so many times as much as the best one."""

REFUSED = 0.7
"""s, until a draft is measured. Pinsker's inequality is a bound, so it is below 1."""


def plan_draft(recipe: DraftRecipe, progress: Progress, call: Mapping[str, Any]) -> Result:
    """Check a recipe, and show what making the draft would try.

    Args:
        recipe: recipe of the draft.
        progress: receives the reading of the model.
        call: the other options of the call.

    Raises:
        SecateurError: as the run would.
    """
    source, kind = source_of(recipe, progress), Draft.kind(recipe)
    read = [recipe.model, str(source.folder), *kind.reads(recipe)]
    check_output(recipe.output, "draft", 0, read, call)
    return kind.plan(recipe, source)


class Draft(Step[DraftRecipe, reports.DraftedResult]):
    """Find and make the draft of a model that makes it decode fastest.

    The text of the model stays exactly the same: a draft proposes tokens, and the model takes or
    refuses them. A draft is made of the model's own weights, rounded and pruned, and then learns
    from it. What it brings on this machine is known from how often its tokens are taken on text,
    and from the times of both.
    """

    verb = "draft"
    record: ClassVar[type[reports.DraftedResult]] = reports.DraftResult

    def __init__(self, recipe: DraftRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.model = self.checked(recipe, run.source)
        trust = recipe.trust_remote_code
        runs_as = recipe.runs_as or str(run.source.folder)
        self.parent = resolve(runs_as, trust_remote_code=trust, progress=run.progress).folder

    @classmethod
    def kind(cls, recipe: DraftRecipe) -> type[Draft]:
        """The step: another one trains a head, or measures the layers that the model has."""
        other = "HeadDraft" if recipe.head else "MTPDraft" if recipe.mtp else None
        return cls if other is None else imported(f"secateur.steps.draft_head:{other}")

    @classmethod
    def way(cls, recipe: DraftRecipe) -> Way[DraftRecipe, reports.DraftedResult]:
        """By `kind`."""
        return Way(cls.kind(recipe))

    @classmethod
    def checked(cls, recipe: DraftRecipe, source: LocalCheckpoint) -> Any:
        """What the draft is made of, its texts there.

        Raises:
            ArchitectureError: our loop does not decode the parent; says why.
        """
        model, reason = open_model(recipe.fitted, source), why_not(build_skeleton(source.folder))
        if reason is not None:
            raise ArchitectureError(
                f"a draft of this model would not be used: {reason}",
                where=recipe.model,
                remedy="drafts are for families that one call decodes (docs/families.md); "
                "transformers drafts by itself: generate(prompt_lookup_num_tokens=…)",
            )
        return model

    @classmethod
    def plan(cls, recipe: DraftRecipe, source: LocalCheckpoint) -> Result:
        """What making the draft would try."""
        model = cls.checked(recipe, source)
        return DraftPlanResult(
            linears=len(model.shapes),
            file_bytes=model.file_bytes,
            bounds={},
            formats=tuple(stored.name for stored in Costs((), model.shapes).formats),
            tokens_to_heal=recipe.fitted.tokens_to_heal,
            minutes=recipe.minutes,
            heads=sizes_of(build_skeleton(source.folder).config.vocab_size),
        )

    @classmethod
    def reads(cls, recipe: DraftRecipe) -> Iterable[str]:
        """The calibration texts, and the parent as it runs."""
        return [*texts_of(recipe.calibration.source), *filter(None, [recipe.runs_as])]

    def identity(self) -> dict[str, Any]:
        """Everything that affects the result."""
        files = shard_files(self.run.source.folder)
        return identity_of(self.recipe, {"minutes"}, files, self.run.progress)

    @classmethod
    def result(cls, output: Path) -> reports.DraftedResult:
        """Read the result of a finished run from its notes."""
        return read_record(cls.record, output / NOTES / reports.DRAFT)

    def work(self) -> reports.DraftedResult:
        """Survey the parent, make drafts and measure them beside it, heal and judge the best."""
        run, folder, fitted = self.run, self.run.folder, self.recipe.fitted
        costs = fit_problem.costs_of(fitted, self.model, run.progress).with_timed_head()
        bench = DraftBench(self.parent, fitted, self.model, costs, run)
        found, points = _make_drafts(bench, survey_model(bench))
        unhealed = max(found, key=lambda one: one.gain)
        [built] = bench.healed([unhealed.built])
        winner = unhealed
        if built.packed != unhealed.built.packed:
            healed = bench.measured(built)
            found.append(healed)
            winner = max(unhealed, healed, key=lambda one: one.gain)
        packed = bench.pack(winner.built)
        head, place = bench.heads[winner.best_head], winner.heads[winner.best_head]
        if head is not None:
            write_bytes(folder.notes / FREQUENT, save({"ids": head}))
        taken = bench.judged(winner, head)
        formats = winner.built.formats
        result = reports.DraftResult(
            **self.drafted(bench.vocabulary, place, taken, winner.parent),
            dropped=tuple(bench.time.dropped),
            kind_of={n: stored.name for n, stored in formats.items() if n != EMBEDDINGS},
            embeddings=embedded(formats[EMBEDDINGS]),
            unhealed=None if winner is unhealed else bench.judged(unhealed, head),
            candidates=tuple(one.row for one in found),
            heads=winner.heads,
            frontier=tuple(points),
            packed=packed,
        )
        write_json(folder.notes / reports.DRAFT, result.to_json())
        card, said = folder.model / "README.md", about(result, "It is a model of its own.")
        text = f"{card.read_text(encoding='utf-8').rstrip()}\n\n## A draft\n\n{said}"
        write_text(card, text)
        return result

    def drafted(
        self, vocabulary: int, place: reports.TriedHead, taken: Acceptance, parent: Sequence[float]
    ) -> dict[str, Any]:
        """The fields that the results of all drafts have.

        Args:
            vocabulary: tokens of the parent.
            place: its head, as it was chosen.
            taken: what the parent takes, on text that was used for nothing else.
            parent: c(1), c(2), …
        """
        sampled, greedy = gains(taken, parent, place.seconds, place.tokens, vocabulary)
        return {
            "output": self.run.folder.output,
            "seconds": time.perf_counter() - self.run.meter.started,
            "parent": self.recipe.runs_as or self.recipe.model,
            "head_tokens": place.tokens,
            "vocabulary": vocabulary,
            "parent_seconds": parent,
            "draft_seconds": place.seconds,
            "acceptance": taken,
            "sampled": sampled,
            "greedy": greedy,
        }


@dataclass(frozen=True)
class Prediction:
    """Predicts what drafts bring, by what the survey and the drafts so far say.

    Attributes:
        problem: size, seconds by the table, and divergence of every unit.
        parent: c(1), c(2), …
        refused: (1 − acceptance) / √(D / 2).
        slower: seconds of a draft over those by the table.
        drawing: seconds of drawing tokens at temperature 1.
    """

    problem: FitProblem
    parent: Sequence[float]
    refused: float = REFUSED
    slower: float = 1.0
    drawing: Drawing = FREE

    def table_seconds(self, candidate: Candidate) -> float:
        """Seconds of a token of a draft, by the table of times."""
        return self.problem.costs.rest[1] + self.problem.knapsack.total(candidate)[1]

    def of(self, candidate: Candidate) -> reports.DraftPoint:
        """What is predicted for a draft."""
        divergence = max(0.0, self.problem.knapsack.predicted(candidate))
        taken = 1 - min(1.0, self.refused * math.sqrt(divergence / 2))  # Pinsker
        seconds = self.slower * self.table_seconds(candidate)
        # as if tokens were taken independently
        runs = [taken**i for i in range(1, MOST_PROPOSED + 1)]
        expected = speculation(runs, self.parent, seconds, drawing=self.drawing, least=1)
        return reports.DraftPoint(seconds, divergence, taken, expected)

    def choices(self) -> dict[Candidate, reports.DraftPoint]:
        """The drafts of least divergence for several times of a token, fastest first."""
        costs, knapsack = self.problem.costs, self.problem.knapsack
        int8 = [stored.name for stored in costs.formats].index("int8")
        low, high = knapsack.least[1], knapsack.total((int8,) * len(costs.units))[1]
        bounds = [low + (high - low) * step / (BOUNDS - 1) for step in range(BOUNDS)]
        found = [knapsack.best((math.inf, bound)) for bound in bounds]
        return {candidate: self.of(candidate) for candidate in found if candidate is not None}

    def after(self, made: _MeasuredDraft, candidate: Candidate, problem: FitProblem) -> Prediction:
        """The same after a draft was made and measured; `problem` is what its loss has made it."""
        head, divergence = made.heads[made.best_head], made.built.row.last
        refused = self.refused
        if divergence > 0:
            refused = (1 - head.acceptance.mean) / math.sqrt(divergence / 2)
        slower = head.seconds / self.table_seconds(candidate)
        return Prediction(problem, made.parent, refused, slower, self.drawing)


def _make_drafts(
    bench: DraftBench, problem: FitProblem
) -> tuple[list[_MeasuredDraft], list[reports.DraftPoint]]:
    """Make and measure the drafts that are predicted to bring most.

    Returns:
        Those that were made, and what is predicted for others after all measurements.
    """
    made = dict[Candidate, _MeasuredDraft]()
    alone, _ = bench.times(None)
    prediction = Prediction(problem, alone, drawing=time_drawing(1.0, bench.vocabulary))
    while True:
        choices = prediction.choices()
        best = max(choices, key=lambda one: choices[one].expected.speedup)
        known = max((prediction.of(one).expected.speedup for one in made), default=0.0)
        if choices[best].expected.speedup < BETTER * known or len(made) == MOST_MADE:
            break
        if made and not bench.time.allows("another draft", "making"):
            break
        built, after = bench.made(f"draft {len(made) + 1}", prediction.problem, best)
        made[best] = bench.measured(built)
        prediction = prediction.after(made[best], best, after)
    return [*made.values()], [*choices.values()]


def about(result: reports.DraftedResult, what: str) -> str:
    """What a model card says of a draft."""
    name, taken = Path(result.parent).name, result.acceptance
    return (
        f"This is a draft of {name} for speculative decoding. {what} It proposes {result.head}; "
        f"{name} takes or refuses them, so the text stays exactly its own. On text that was used "
        f"for nothing else, it takes {taken.mean:.0%} of the first tokens at temperature 1 and "
        f"{taken.agreement:.0%} in greedy decoding.\n"
    )


def promised(draft: Path, parent: str) -> tuple[float, float] | None:
    """The speed-ups at temperature 0 and 1 that a draft's record expects beside this parent."""
    if not (draft / NOTES / reports.DRAFT).is_file():
        return None
    record = read_record(reports.DraftedResult, draft / NOTES / reports.DRAFT)
    return (record.greedy.speedup, record.sampled.speedup) if record.parent == parent else None


HEADS = (32768, 16384, 8192, 4096)
"""Numbers of tokens that a head over frequent tokens may have."""

TURNS, PROMPT_TOKENS, DRAFT_CALLS = 25, 64, 4
"""Turns of every call, tokens before it, and calls of the draft in one turn: in a round they follow
each other too."""

TRIALS = 4
"""How often all turns are measured, at most, while a call with more tokens seems far too fast."""

Times = tuple[tuple[float, ...], float]
"""Seconds of calls that took turns: of the parent with 1, 2, … tokens; of the draft with one."""


@torch.inference_mode()
def time_calls(parent: Any, draft: Any, prompt: Tensor) -> Times:
    """Time the calls of a parent and of its draft in turns.

    Args:
        parent: a model that our loop decodes.
        draft: another one.
        prompt: token ids that both have read before [tokens].
    """
    room = len(prompt) + SlotDecoder.together
    verifying, proposing = (SlotDecoder(model, room) for model in (parent, draft))
    for decoder in (verifying, proposing):
        decoder.read(0, prompt)
    parents, [own] = time_turns(verified_in(verifying, prompt), [proposed_in(proposing, prompt)])
    return parents, own


def verified_in(decoder: SlotDecoder, prompt: Tensor) -> Callable[[int], float]:
    """Times a call of a parent with so many tokens, after what it has read."""
    ids, before = prompt.tolist(), decoder.lengths[0]

    def verify(count: int) -> float:
        some = [Token(0, before + n, ids[n % len(ids)]) for n in range(count)]
        seconds = seconds_of(lambda: decoder.step(some))
        decoder.rewind(0, before)
        return seconds

    return verify


def proposed_in(
    decoder: Any, prompt: Tensor, states: Sequence[Any] | Tensor = ()
) -> Callable[[], float]:
    """Times one token of a draft, after what it has read.

    Args:
        decoder: of the draft.
        prompt: tokens that it reads.
        states: of the parent, which a head or an MTP layer reads with the first token of a chain.
    """
    ids, before, read = prompt.tolist(), decoder.lengths[0], max(1, len(states))
    tokens = [
        Token(0, before + n, ids[n % len(ids)], n + 1 >= read)
        for n in range(read + DRAFT_CALLS - 1)
    ]
    calls = [tokens[:read], *([one] for one in tokens[read:])]

    def chain() -> None:
        if len(states):
            decoder.give(0, states)
        for call in calls:
            decoder.step(call)

    def propose() -> float:
        seconds = seconds_of(chain)
        decoder.rewind(0, before)
        return seconds / DRAFT_CALLS

    return propose


def time_turns(
    verify: Callable[[int], float], drafts: Sequence[Callable[[], float]]
) -> tuple[tuple[float, ...], list[float]]:
    """The lowest seconds of calls that take turns: of the parent, and of each draft.

    Args:
        verify: times a call of the parent with so many tokens.
        drafts: each times one token of a draft.
    """
    most = SlotDecoder.together
    calls: list[Callable[[], float]] = [*(partial(verify, n + 1) for n in range(most)), *drafts]
    for call in calls:  # the first ones touch all memory
        call()
    found = [math.inf] * len(calls)
    for _ in range(TRIALS):
        again = alternate(calls, lambda call: call(), min, turns=TURNS)
        found = [min(pair) for pair in zip(found, again, strict=True)]
        if too_fast(found[:most]) is None:
            break
    return tuple(found[:most]), found[most:]


@dataclass(frozen=True)
class _MeasuredDraft:
    """A draft that was made, with everything that was measured to choose it.

    Attributes:
        built: the draft.
        row: its numbers with the whole head.
        heads: with each of the heads, the whole one first.
        parent: seconds of the parent's calls in the turns of this draft.
    """

    built: BuiltCandidate
    row: reports.DraftCandidate
    heads: tuple[reports.TriedHead, ...]
    parent: tuple[float, ...]

    @property
    def best_head(self) -> int:
        """The number of the head with which it gains the most."""
        return max(range(len(self.heads)), key=lambda n: self.heads[n].gain)

    @property
    def gain(self) -> float:
        """What it gains with that head."""
        return self.heads[self.best_head].gain


class DraftBench(FitBench):
    """Makes drafts, and measures them beside their parent.

    Args:
        folder: of the parent, as it runs.
        given: as of `FitBench`.
    """

    def __init__(self, folder: Path, *given: Any) -> None:
        super().__init__(*given)
        self.folder = folder

    @cached_property
    def parent(self) -> Any:
        """The parent, whole in memory."""
        return load(self.folder)

    @cached_property
    def heads(self) -> tuple[Tensor | None, ...]:
        """The token ids of every head, largest first; None for the whole vocabulary."""
        given = self.parent, load_windows(self.windows_file), self.vocabulary
        return (None, *frequent_lists(self.source.folder, *given)[1:])

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the parent."""
        return int(self.parent.config.vocab_size)

    def acceptances(
        self, folder: Path, text: LossComparison, heads: Sequence[Tensor | None]
    ) -> list[Acceptance]:
        """What the parent takes of a draft with each of some heads, from a file or measured.

        Args:
            folder: of the draft, packed.
            text: the windows, with their file.
            heads: the token ids of each head.
        """

        def measure() -> list[dict[str, Any]]:
            label, count = f"what the parent takes of {folder.parent.name}", len(text.windows)
            with window_progress(self.progress, label, count) as report:
                found = acceptance(
                    load(folder), self.parent, text.windows, heads=heads, start_tokens=text.start,
                    progress=report,
                )  # fmt: skip
            return [one.to_json() for one in found]

        name = f"acceptance-{self._name_of(folder)}-{text.file.stem}.json"
        return [*map(Acceptance.model_validate, kept(self.work / name, measure))]

    def times(self, folder: Path | None) -> Times:
        """The times of the parent and of a draft, from a file or measured.

        Args:
            folder: of the draft, packed; None for the parent as a draft of its own.
        """

        def measure() -> Times:
            self.progress.start("timing parent and draft", 1)
            draft = self.parent if folder is None else load(folder)
            found = time_calls(self.parent, draft, self.choosing.windows.flatten()[:PROMPT_TOKENS])
            self.progress.finish()
            return found

        name = self._name_of(folder or self.folder)
        parents, own = kept(self.work / f"times-{name}.json", measure)
        return tuple(parents), own

    def judged(self, draft: _MeasuredDraft, head: Tensor | None) -> Acceptance:
        """What the parent takes of a draft on text that was used for nothing else."""
        return self.acceptances(draft.built.packed, self.judging, [head])[0]

    def measured(self, built: BuiltCandidate) -> _MeasuredDraft:
        """A draft with each of the heads, on the windows that choose."""
        found = self.acceptances(built.packed, self.choosing, self.heads)
        (parents, draft), values = self.times(built.packed), embedded(built.formats[EMBEDDINGS])
        hidden, stored = self.parent.config.hidden_size, as_timed(WeightFormat(values, 0.0))
        rows = [self.vocabulary if ids is None else len(ids) for ids in self.heads]
        each = [time_head((n, hidden), stored) for n in rows] if len(rows) > 1 else [0.0]
        # never less than what the rest of the draft takes at least
        seconds = [max(draft - each[0] + one, draft / 10) for one in each]
        heads = judged_heads(rows, found, seconds, parents, self.vocabulary)
        whole, row = heads[0], built.row
        said = row.name, row.file_bytes, row.last, row.healed is not None
        both = gains(whole.acceptance, parents, whole.seconds, whole.tokens, self.vocabulary)
        numbers = reports.DraftCandidate(*said, whole.acceptance, whole.seconds, *both)
        return _MeasuredDraft(built, numbers, heads, parents)


def gains(
    taken: Acceptance, parent: Sequence[float], seconds: float, tokens: int, vocabulary: int
) -> tuple[Speculation, Speculation]:
    """What a draft gains at temperature 1, and in greedy decoding.

    Args:
        taken: what the parent takes of it.
        parent: c(1), c(2), …
        seconds: of one token of the draft.
        tokens: that its head can propose.
        vocabulary: tokens of the parent.
    """
    rows = None if tokens == vocabulary else tokens
    sampled, greedy = (time_drawing(t, vocabulary, rows) for t in (1.0, 0.0))
    return (
        speculation(taken.runs, parent, seconds, drawing=sampled, least=1),
        speculation(taken.greedy_runs, parent, seconds, drawing=greedy, least=1),
    )


def judged_heads(
    sizes: Sequence[int],
    found: Sequence[Acceptance],
    seconds: Sequence[float],
    parent: Sequence[float],
    vocabulary: int,
) -> tuple[reports.TriedHead, ...]:
    """What a draft gains with each of some heads.

    Args:
        sizes: tokens of each head.
        found: what the parent takes with each.
        seconds: of one token of the draft with each.
        parent: c(1), c(2), …
        vocabulary: tokens of the parent.
    """
    heads = []
    for size, taken, own in zip(sizes, found, seconds, strict=True):
        both = [one.speedup for one in gains(taken, parent, own, size, vocabulary)]
        heads.append(reports.TriedHead(size, taken, own, math.sqrt(math.prod(both))))
    return tuple(heads)


def sizes_of(most: int) -> tuple[int, ...]:
    """Numbers of tokens that a head may propose, by the most that it can."""
    return most, *(n for n in HEADS if n < most)


def frequent_lists(folder: Path, parent: Any, windows: Windows, most: int) -> list[Tensor]:
    """Lists of the tokens that a text uses most, each with all special tokens, largest first.

    Args:
        folder: of the tokenizer.
        parent: the model, loaded.
        windows: the text.
        most: tokens of the first list.
    """
    always = {*load_tokenizer(folder).all_special_ids, *end_tokens(parent)}
    vocabulary = text_config(parent.config).vocab_size
    return [frequent_tokens(windows, always, vocabulary, count) for count in sizes_of(most)]


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
        >>> from secateur.steps.draft import frequent_tokens
        >>> frequent_tokens(torch.tensor([[5, 5, 3, 3, 4, 2]]), {7}, 8, 4)
        tensor([2, 3, 5, 7])
    """
    uses = torch.bincount(windows.flatten(), minlength=vocabulary)
    uses[[one for one in always if one < vocabulary]] = windows.numel() + 1
    return uses.argsort(descending=True, stable=True)[:count].sort().values
