"""`secateur draft --head`: a head that reads its parent's hidden states, trained and chosen here.

    text ─► continued by the parent ─► its states in files ─► training ─► list and format ─► judged

The head is one decoder layer in EAGLE-3's form (`models.draft_head`). It learns on text that the
parent itself writes: that is what it will propose for (`training.draft_head`). The parent continues
beginnings of the calibration text, at temperature 1 and for a part with its most likely tokens; the
text itself is read too.

How many tokens it proposes, and how its matrices are stored where it runs, is chosen as the head of
a draft is (`steps.draft`): by the gain that is expected from acceptance and times, both measured
beside the parent as it runs. Text that the parent has written after beginnings of its own chooses,
and other text judges.

What was made and measured is kept in files, so a resumed run decides the same.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.calibration.run_windows import WINDOWS, RunWindows, WindowReader
from secateur.calibration.windows import START, load_windows, stored_start
from secateur.evaluation.acceptance import MOST_PROPOSED, Chains, chained_acceptance
from secateur.machine import fast_dtype
from secateur.models.architecture import positions_of, text_config
from secateur.models.checkpoint import INDEX_NAMES, copy_others
from secateur.models.draft_head import DraftHead, head_config, tapped_layers, write_head
from secateur.models.opening import load_whole
from secateur.models.skeleton import build_skeleton
from secateur.recipes.compress import DraftRecipe
from secateur.recipes.recipe_files import dump_recipe
from secateur.reporting import fit as reports
from secateur.reporting.plan import HeadPlanResult
from secateur.runs.measured import Acceptance
from secateur.runs.output import write_json, write_text
from secateur.runs.records import read_record
from secateur.runtime.decode import SlotDecoder
from secateur.runtime.heads import HeadDecoder, chain_seconds
from secateur.runtime.load import load
from secateur.steps import draft
from secateur.training import draft_head as learning
from secateur.training.batches import Batches
from secateur.training.loop import Loop, TrainingTask
from secateur.training.training_plan import TrainingPlan
from secateur.types import Windows

CPU = torch.device("cpu")

LENGTH = 256
"""Tokens of a window, unless the recipe says it."""

EPOCHS, BATCH, RATE, RATE_TIMES_WIDTH = 4, 8, 3e-3, 1.75
"""How often each window is read, windows of a step, and what bounds the highest learning rate."""

ALONE = 0.75
"""The share of the steps that train the first place of a chain alone."""

LEARNED = 16384
"""Tokens that a head learns to propose, at most: the most frequent ones."""

VALUES = ("bfloat16", "int8", "int4")
"""How the matrices of a head may be stored where it runs."""

WRITTEN, GREEDY = 0.75, 0.25
"""The share of the windows that the parent writes, and of those with its most likely tokens."""

STATES_BYTES = 4 * 2**30
"""The most that the states of the parent take on the disk: beyond it, fewer tokens are learned."""

AT_ONCE = 4
"""Windows whose acceptance is measured together."""


class _Sizes(NamedTuple):
    """What a head is trained on.

    Attributes:
        taps: after how many layers it reads states.
        length: tokens of a window.
        tokens: of all windows, at most.
        lists: numbers of tokens that the head may propose, the one that learns first.
        each: bytes of the states of a token on the disk.
    """

    taps: tuple[int, int, int]
    length: int
    tokens: int
    lists: tuple[int, ...]
    each: int

    @classmethod
    def of(cls, recipe: DraftRecipe, config: Any) -> _Sizes:
        """By the options, and the configuration of the parent."""
        own = text_config(config)
        length = recipe.calibration.sequence_length or min(LENGTH, positions_of(config) or LENGTH)
        each = learning.STATES * own.hidden_size * torch.bfloat16.itemsize
        tokens, most = min(recipe.tokens_to_learn, STATES_BYTES // each), own.vocab_size
        lists = (min(LEARNED, most), *(n for n in draft.HEADS if n < min(LEARNED, most)))
        return cls(tapped_layers(own.num_hidden_layers), length, tokens, lists, each)

    @property
    def windows(self) -> int:
        """Of the text, and of what the parent writes."""
        return max(2, self.tokens // self.length)

    @property
    def written(self) -> int:
        """Windows that the parent writes."""
        return round(WRITTEN * self.windows)


def plan_head(recipe: DraftRecipe, folder: Path) -> HeadPlanResult:
    """What training a head of the model in a folder would make and take."""
    config = build_skeleton(folder).config
    sizes = _Sizes.of(recipe, config)
    with torch.device("meta"):
        head = DraftHead(head_config(config), sizes.taps, torch.arange(sizes.lists[0]))
    return HeadPlanResult(
        weights=sum(x.numel() for x in head.parameters()),
        taps=sizes.taps,
        tokens=sizes.windows * sizes.length,
        written=sizes.written * sizes.length,
        steps=EPOCHS * sizes.windows // BATCH,
        disk_bytes=sizes.windows * sizes.length * sizes.each,
        minutes=recipe.minutes,
        heads=sizes.lists,
    )


class HeadDraft(draft.Draft):
    """Train a head that reads the states of a model, and choose how it runs.

    The text of the model stays exactly the same: see `Draft`.
    """

    @classmethod
    def result(cls, output: Path) -> reports.HeadResult:
        """Read the result of a finished run from its notes."""
        return read_record(reports.HeadResult, output / draft.NOTES / draft.DRAFT)

    def work(self) -> reports.HeadResult:
        """Write text, train the head on it, choose its list and its format, and judge it."""
        run, recipe = self.run, self.recipe
        self.sizes = _Sizes.of(recipe, build_skeleton(run.source.folder).config)
        learned, self.choosing, judging = self._windows()
        self.lists = self._lists(learned)
        head, steps = self._trained(learned)
        formats = self._formats(head)
        values = max(formats, key=lambda one: max(x.gain for x in formats[one]))
        best = max(formats[values], key=lambda one: one.gain)
        ids = self.lists[self.sizes.lists.index(best.tokens)]
        [taken] = self._acceptances(head, values, judging, [ids], "judged")
        parents, _ = self._times(head)
        sampled, greedy = draft.gains(taken, parents, best.seconds, best.tokens, self.vocabulary)
        result = reports.HeadResult(
            output=run.folder.output,
            seconds=time.perf_counter() - run.meter.started,
            parent=recipe.runs_as or recipe.model,
            head_tokens=best.tokens,
            vocabulary=self.vocabulary,
            parent_seconds=parents,
            draft_seconds=best.seconds,
            acceptance=taken,
            sampled=sampled,
            greedy=greedy,
            heads=formats[values],
            taps=head.taps,
            tokens=learned.numel(),
            steps=steps,
            values=values,
            formats={one: max(found, key=lambda x: x.gain) for one, found in formats.items()},
        )
        self._write(head.proposing(ids), result)
        return result

    @cached_property
    def running(self) -> Any:
        """The parent as it runs, whole in memory."""
        return load(self.parent)

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the parent."""
        return int(text_config(self.running.config).vocab_size)

    def _windows(self) -> tuple[Windows, Windows, Windows]:
        """The windows that the head learns on, and those that choose and judge."""
        run, sizes = self.run, self.sizes
        given = self.recipe.calibration
        options = given.model_copy(update={"sequence_length": sizes.length})
        files = [
            run.folder.work / f"{name}.safetensors" for name in ("learned", "chosen", "judged")
        ]
        reader = WindowReader.of_folder(run.source.folder, self.running.config)
        reader.save_parts(
            str(given.source), options, files, "train a head, choose its list and judge it",
            run.progress, (sizes.windows - sizes.written) * sizes.length,
        )  # fmt: skip
        text, *others = map(load_windows, files)
        sizes = sizes._replace(length=text.shape[1])  # that of ready windows
        written = self._written(files[0], text, sizes.written, GREEDY)
        chosen, judged = (
            self._written(file, some, len(some))
            for file, some in zip(files[1:], others, strict=True)
        )
        return torch.cat([text[: sizes.windows - sizes.written], written]), chosen, judged

    def _written(self, file: Path, text: Windows, count: int, greedy: float = 0.0) -> Windows:
        """Windows that the parent writes after beginnings of others, unless they are there."""
        place, run = file.with_suffix(""), self.run
        place.mkdir(exist_ok=True)
        done = place / WINDOWS
        if not done.exists():
            begun = RunWindows(text, text[:0], {START: [*stored_start(file)]}, count, greedy=greedy)
            seed = self.recipe.calibration.seed
            begun.complete(place, run.source.folder, CPU, seed, run.progress)
        return load_windows(done)[len(text) :]

    def _lists(self, learned: Windows) -> list[Tensor]:
        """The tokens of every head, largest first."""
        folder = self.run.source.folder
        return draft.frequent_lists(folder, self.running, learned, self.sizes.lists)

    def _trained(self, learned: Windows) -> tuple[DraftHead, int]:
        """The head, and the steps that it took."""
        run, recipe, sizes = self.run, self.recipe, self.sizes
        parent = load_whole(run.source.folder, CPU, dtype=fast_dtype(CPU))
        states = run.folder.work / "states"
        states.mkdir(exist_ok=True)
        run.progress.start("states of the parent", len(learned))
        learning.store_states(parent, learned, sizes.taps, states, run.progress.step)
        run.progress.finish()
        head = learning.begin_head(parent, sizes.taps, self.lists[0], recipe.calibration.seed)
        tables = learning.ParentTables(parent)
        del parent
        batches = Batches(learned, BATCH, recipe.calibration.seed)
        read, step = learning.StoredStates(states), 0
        steps = max(2, EPOCHS * len(learned) // BATCH)
        turn = round(ALONE * steps)
        spent = (time.perf_counter() - run.meter.started) / 60
        left = None if recipe.minutes is None else max(recipe.minutes - spent, recipe.minutes / 4)
        rate = min(RATE, RATE_TIMES_WIDTH / head.config.hidden_size)
        for places, first, last in ((1, 0, turn), (learning.PLACES, turn, steps)):
            task = TrainingTask(
                learning.HeadLearner(head, tables), batches, learning.ChainLoss(read, places)
            )
            length: dict[str, Any] = {"steps": steps, "first_step": first, "last_step": last}
            plan = TrainingPlan(
                **(length if left is None else {"minutes": left / 2}),
                learning_rate=rate, save_minutes=1.0,
            )  # fmt: skip
            saved, label = run.folder.work / f"training-{places}", f"training {places} places"
            step += Loop(task, plan, saved=saved, progress=run.progress, label=label).run().step
        for parameter in head.parameters():  # as the file will have them
            parameter.data = parameter.data.bfloat16()
        return head.eval(), step if left is not None else steps

    def _once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A measured value, from a file or measured."""
        file = self.run.folder.work / f"{name}.json"
        if not file.exists():
            write_json(file, measure())
        return json.loads(file.read_text(encoding="utf-8"))

    def _formats(self, head: DraftHead) -> dict[str, tuple[reports.TriedHead, ...]]:
        """What the head gains with every list, for each way to store its matrices."""
        parents, seconds = self._times(head)
        found = {}
        for values in VALUES:
            taken = self._acceptances(head, values, self.choosing, self.lists, "chosen")
            found[values] = draft.judged_heads(
                self.sizes.lists, taken, seconds[values], parents, self.vocabulary
            )
        return found

    def _times(self, head: DraftHead) -> tuple[tuple[float, ...], dict[str, list[float]]]:
        """Seconds of the parent's calls, and of one token of the head with each list."""

        def measure() -> dict[str, Any]:
            prompt = self.choosing.flatten()[: draft.PROMPT_TOKENS]
            parent = SlotDecoder(self.running, 2 * draft.PROMPT_TOKENS, taps=head.taps)
            parent.read(0, prompt)
            _, states = parent.take_states(0)
            some = [head.proposing(ids) for ids in self.lists]
            heads = [HeadDecoder(one, parent, values) for values in VALUES for one in some]
            for one in heads:
                one.give(0, states[:-1])
                one.read(0, prompt[1:])
            proposing = [partial(chain_seconds, one, draft.DRAFT_CALLS) for one in heads]
            with torch.inference_mode():
                calls, own = draft.time_turns(draft.verified_in(parent, prompt), proposing)
            each = iter(own)
            return {"parent": calls, "heads": {x: [next(each) for _ in some] for x in VALUES}}

        known = self._once("times", measure)
        return tuple(known["parent"]), known["heads"]

    def _acceptances(
        self, head: DraftHead, values: str, windows: Windows, lists: list[Tensor], name: str
    ) -> list[Acceptance]:
        """What the parent takes of the head with each of some lists."""

        def measure() -> list[dict[str, Any]]:
            start = len(stored_start(self.run.folder.work / "learned.safetensors"))
            run = self.run.progress
            run.start(f"what the parent takes of the head in {values}", len(windows))
            found = chained_acceptance(
                self._chains(head, values, windows), heads=lists, start_tokens=start
            )
            run.finish()
            return [one.to_json() for one in found]

        return [*map(Acceptance.model_validate, self._once(f"taken-{name}-{values}", measure))]

    def _chains(self, head: DraftHead, values: str, windows: Windows) -> Iterator[Chains]:
        """The chains that the head makes after every position of some windows."""
        tables = learning.ParentTables(self.running)
        parent = SlotDecoder(self.running, 1)
        own: DraftHead = HeadDecoder(head, parent, values).model.model

        def logits(hidden: Tensor) -> Tensor:
            every = torch.full((len(hidden), self.vocabulary), -torch.inf)
            every[:, head.ids] = own.lm_head(own.norm(hidden)).float()
            return every

        for some in windows.split(AT_ONCE):
            read, last = learning.states_of(self.running, some, head.taps)
            embedded = tables.embedding(some[:, 1:]).float()
            read = read[:, : some.shape[1] - MOST_PROPOSED].float()
            yield Chains(own.chain(read, embedded, MOST_PROPOSED), logits, last, tables.logits)
            self.run.progress.step(len(some))

    def _write(self, head: DraftHead, result: reports.HeadResult) -> None:
        """The folder of the head: weights, the parent's tokenizer, card and notes."""
        folder, source = self.run.folder, self.run.source.folder
        made, config = folder.fresh_model(), self.running.config
        copy_others(source, made, ("config.json", "generation_config.json", *INDEX_NAMES))
        k = max(result.sampled.k, result.greedy.k)
        head.values = result.values
        write_head(made, head, self.recipe.model, (config.architectures or [""])[0], k)
        write_json(folder.notes / draft.DRAFT, result.to_json())
        write_text(folder.notes / "recipe.yaml", dump_recipe(self.recipe))
        write_text(made / "README.md", _card(result))


def _card(result: reports.HeadResult) -> str:
    """The model card."""
    name, taken = Path(result.parent).name, result.acceptance
    return (
        f"---\ntags: [secateur, eagle3, speculative-decoding]\n---\n\n# A draft head of {name}\n\n"
        f"It reads the hidden states of {name} and proposes {result.head_tokens:,} of its tokens "
        f"for speculative decoding. {name} takes or refuses them, so the text stays exactly its "
        f"own. The form is that of EAGLE-3, as vLLM and the library speculators read it. In text "
        f"that {name} writes, it takes {taken.mean:.0%} of the first proposed tokens at "
        f"temperature 1 and {taken.agreement:.0%} in greedy decoding.\n"
    )
