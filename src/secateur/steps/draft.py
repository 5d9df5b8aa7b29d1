"""`secateur draft`: the draft with the largest expected speed-up of its parent on this machine.

    survey ─► drafts for several times of a token ─► made, measured ─► healed ─► judged

Speculative decoding gives exactly the parent's text, so a draft needs no quality of its own: only
to be fast, and taken often. Both are known before anything is generated (`evaluation/acceptance`):

    speed-up(k) = (1 + accepted(k)) · c(1) / (k · c_draft + c(k + 1))

The search is that of a fit, with the seconds of a token as its only bound. For each of several
bounds the knapsack chooses the formats that are predicted to diverge least from the parent. By
Pinsker, a divergence D means a refusal of at most

    1 − acceptance = TV ≤ √(D / 2)        so it is predicted as    s · √(D / 2)

The bound with the largest predicted speed-up is made as a real model, and measured. That sets s and
the ratio of its seconds to those of the table, and the choice is made again, at most twice. The
best draft is healed, and then the number of tokens of its head is chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save

from secateur.engine.search.knapsack import Knapsack
from secateur.errors import ArchitectureError
from secateur.evaluation.acceptance import MOST_PROPOSED, speculation
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.progress import Progress
from secateur.recipes.draft import DraftRecipe
from secateur.recipes.shared import texts_of
from secateur.reporting.draft import DraftPlanResult, DraftPoint, DraftResult
from secateur.runs.folder import NOTES, check_output
from secateur.runs.output import write_bytes, write_json, write_text
from secateur.runs.records import read_record
from secateur.runtime.layer_forms import why_not
from secateur.runtime.speculative import FREQUENT
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.sparsity.evolution import Candidate
from secateur.steps.fitting.candidates import Workshop, pack_winner
from secateur.steps.fitting.costs import Costs, costs_of, time_heads
from secateur.steps.fitting.drafts import HEADS, DraftBench, MeasuredDraft
from secateur.steps.fitting.models import FitContext, TimeBudget, open_model
from secateur.steps.fitting.storage_formats import EMBEDDINGS, embedded
from secateur.steps.runner import RunContext, Step, identity_of, source_of

DRAFT = "draft.json"

BOUNDS = 9
"""Times of a token that drafts are chosen for: from the fastest one to that of dense int8."""

MOST_MADE = 3
"""How many drafts are made without a cut, at most."""

BETTER = 1.01
"""Another draft is made where it is predicted to bring so many times as much as the best one."""

REFUSED = 0.7
"""s, until a draft is measured. Pinsker's inequality is a bound, so it is below 1."""


def plan_draft(recipe: DraftRecipe, progress: Progress, call: Mapping[str, Any]) -> DraftPlanResult:
    """Check a recipe, and show what making the draft would try.

    Args:
        recipe: recipe of the draft.
        progress: receives the reading of the model.
        call: the other options of the call.

    Raises:
        SecateurError: as the run would.
    """
    source = source_of(recipe, progress)
    model = open_model(recipe.fitted, source)
    refuse_parent(recipe, source)
    read = [recipe.model, str(source.folder), *Draft.reads(recipe)]
    check_output(recipe.output, "draft", 0, read, call)
    costs = Costs((), model.shapes)
    config = build_skeleton(source.folder, trust_remote_code=recipe.trust_remote_code).config
    return DraftPlanResult(
        linears=len(model.shapes),
        file_bytes=model.file_bytes,
        bounds={},
        formats=tuple(stored.name for stored in costs.formats),
        tokens_to_heal=recipe.fitted.tokens_to_heal,
        minutes=recipe.minutes,
        heads=(config.vocab_size, *(n for n in HEADS if n < config.vocab_size)),
    )


def refuse_parent(recipe: DraftRecipe, source: LocalCheckpoint) -> None:
    """Refuse a parent that our loop does not decode.

    Raises:
        ArchitectureError: says why.
    """
    trust = recipe.trust_remote_code
    reason = why_not(build_skeleton(source.folder, trust_remote_code=trust))
    if reason is not None:
        raise ArchitectureError(
            f"a draft of this model would not be used: {reason}",
            where=recipe.model,
            remedy="drafts are for families that one call decodes (docs/families.md); "
            "transformers drafts by itself: generate(prompt_lookup_num_tokens=…)",
        )


class Draft(Step[DraftRecipe, DraftResult]):
    """Find and make the draft of a model that makes it decode fastest.

    The text of the model stays exactly the same: a draft proposes tokens, and the model takes or
    refuses them. A draft is made of the model's own weights, rounded and pruned, and then learns
    from it. What it brings on this machine is known from how often its tokens are taken on text,
    and from the times of both.
    """

    verb = "draft"

    def __init__(self, recipe: DraftRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.model: PackableCheckpoint = open_model(recipe.fitted, run.source)
        refuse_parent(recipe, run.source)
        trust = recipe.trust_remote_code
        runs_as = recipe.runs_as or str(run.source.folder)
        self.parent = resolve(runs_as, trust_remote_code=trust, progress=run.progress).folder

    @classmethod
    def reads(cls, recipe: DraftRecipe) -> Iterable[str]:
        """The calibration texts, and the parent as it runs."""
        return [*texts_of(recipe.calibration.source), *filter(None, [recipe.runs_as])]

    def identity(self) -> dict[str, Any]:
        """Everything that affects the result."""
        return identity_of(self.recipe, {"minutes"}, self.model.reader.files, self.run.progress)

    @classmethod
    def result(cls, output: Path) -> DraftResult:
        """Read the result of a finished run from its notes."""
        return read_record(DraftResult, output / NOTES / DRAFT)

    def work(self) -> DraftResult:
        """Survey the parent, make drafts and measure them beside it, heal and judge the best."""
        run, folder, fitted = self.run, self.run.folder, self.recipe.fitted
        costs = costs_of(fitted, self.model, run.progress)
        costs = replace(costs, head=time_heads([*costs.outer.values()][-1]))
        budget = TimeBudget(fitted.minutes, folder.work / "pace.json", run.meter.started)
        context = FitContext.prepare(
            fitted, run.source, self.model, costs, budget, folder.work, run.progress
        )
        workshop, bench = Workshop(context), DraftBench(context, self.parent)
        found, points = make_drafts(workshop, bench, costs)
        unhealed = max(found, key=lambda one: one.gain)
        [built] = workshop.healed([unhealed.built])
        winner = unhealed
        if built.packed != unhealed.built.packed:
            healed = bench.measured(built)
            found.append(healed)
            winner = max(unhealed, healed, key=lambda one: one.gain)
        packed = pack_winner(run, context, winner.built)
        head, place = bench.heads[winner.best_head], winner.heads[winner.best_head]
        if head is not None:
            write_bytes(folder.notes / FREQUENT, save({"ids": head}))
        taken = bench.judged(winner, head)
        sampled, greedy = (
            speculation(runs, winner.times.parent, place.seconds, least=1)
            for runs in (taken.runs, taken.greedy_runs)
        )
        formats = winner.built.formats
        result = DraftResult(
            output=folder.output,
            parent=self.recipe.runs_as or self.recipe.model,
            seconds=time.perf_counter() - run.meter.started,
            dropped=tuple(budget.dropped),
            kind_of={n: stored.name for n, stored in formats.items() if n != EMBEDDINGS},
            embeddings=embedded(formats[EMBEDDINGS]),
            head_tokens=place.tokens,
            vocabulary=bench.vocabulary,
            parent_seconds=winner.times.parent,
            draft_seconds=place.seconds,
            unhealed=None if winner is unhealed else bench.judged(unhealed, head),
            acceptance=taken,
            sampled=sampled,
            greedy=greedy,
            candidates=tuple(one.row for one in found),
            heads=winner.heads,
            frontier=tuple(points),
            packed=packed,
        )
        write_json(folder.notes / DRAFT, result.to_json())
        card = folder.model / "README.md"
        write_text(card, f"{card.read_text(encoding='utf-8').rstrip()}\n\n{draft_section(result)}")
        return result


@dataclass(frozen=True)
class Prediction:
    """Predicts what drafts bring, by what the survey and the drafts so far say.

    Attributes:
        knapsack: the formats of every unit.
        costs: size, and seconds by the table.
        parent: c(1), c(2), …
        refused: (1 − acceptance) / √(D / 2).
        slower: seconds of a draft over those by the table.
    """

    knapsack: Knapsack
    costs: Costs
    parent: Sequence[float]
    refused: float = REFUSED
    slower: float = 1.0

    def table_seconds(self, candidate: Candidate) -> float:
        """Seconds of a token of a draft, by the table of times."""
        return self.costs.rest[1] + self.knapsack.total(candidate)[1]

    def of(self, candidate: Candidate) -> DraftPoint:
        """What is predicted for a draft."""
        divergence = max(0.0, self.knapsack.predicted(candidate))
        taken = 1 - min(1.0, self.refused * math.sqrt(divergence / 2))
        seconds = self.slower * self.table_seconds(candidate)
        runs = [taken**i for i in range(1, MOST_PROPOSED + 1)]
        expected = speculation(runs, self.parent, seconds, least=1)
        return DraftPoint(seconds, divergence, taken, expected)

    def choices(self) -> dict[Candidate, DraftPoint]:
        """The drafts of least divergence for several times of a token, fastest first."""
        int8 = [stored.name for stored in self.costs.formats].index("int8")
        low, high = self.knapsack.least[1], self.knapsack.total((int8,) * len(self.costs.units))[1]
        bounds = [low + (high - low) * step / (BOUNDS - 1) for step in range(BOUNDS)]
        found = [self.knapsack.best((math.inf, bound)) for bound in bounds]
        return {candidate: self.of(candidate) for candidate in found if candidate is not None}

    def after(self, measured: MeasuredDraft, candidate: Candidate) -> Prediction:
        """The same after a draft was made and measured."""
        head, divergence = measured.heads[measured.best_head], measured.built.row.last
        refused = self.refused
        if divergence > 0:
            refused = (1 - head.acceptance.mean) / math.sqrt(divergence / 2)
        return replace(
            self,
            parent=measured.times.parent,
            refused=refused,
            slower=head.seconds / self.table_seconds(candidate),
        )


def make_drafts(
    workshop: Workshop, bench: DraftBench, costs: Costs
) -> tuple[list[MeasuredDraft], list[DraftPoint]]:
    """Make and measure the drafts that are predicted to bring most.

    Returns:
        Those that were made, and what is predicted for others after all measurements.
    """
    time, made = workshop.context.time, dict[Candidate, MeasuredDraft]()
    prediction = Prediction(workshop.predictions.knapsack(costs), costs, bench.alone.parent)
    while True:
        choices = prediction.choices()
        best = max(choices, key=lambda one: choices[one].expected.speedup)
        known = max((prediction.of(one).expected.speedup for one in made), default=0.0)
        if choices[best].expected.speedup < BETTER * known or len(made) == MOST_MADE:
            break
        if made and not time.allows("another draft", "making"):
            break
        name = f"draft {len(made) + 1}"
        made[best] = bench.measured(workshop.made(name, prediction.knapsack, best, costs))
        prediction = replace(prediction, knapsack=workshop.predictions.knapsack(costs))
        prediction = prediction.after(made[best], best)
    return [*made.values()], [*choices.values()]


def draft_section(result: DraftResult) -> str:
    """The part of the model card that says whose draft it is."""
    taken, head = result.acceptance, ""
    if result.head_tokens < result.vocabulary:
        head = f" Its head proposes {result.head_tokens:,} frequent tokens (`{NOTES}/{FREQUENT}`)."
    return (
        f"## A draft\n\nThis model is a draft of {Path(result.parent).name} for speculative "
        f"decoding: it proposes tokens, and {Path(result.parent).name} takes or refuses them, so "
        f"the text stays exactly its own. On text that was used for nothing else, it takes "
        f"{taken.mean:.0%} of the tokens at temperature 1 and {taken.agreement:.0%} in greedy "
        f"decoding.{head}\n"
    )
