"""`secateur draft --head` and `--mtp`: drafts that read the hidden states of their parent.

    text ─► (continued by the parent ─► its states in files ─► training) ─► choice ─► judged

A head is one decoder layer in EAGLE-3's form (`models.draft_head`). It learns on text that the
parent itself writes: that is what it will propose for (`training.draft_head`). The parent continues
beginnings of the calibration text, at temperature 1 and for a part with its most likely tokens; the
text itself is read too. MTP layers are in the checkpoint, so nothing is made or trained
(`models.mtp`).

How many tokens are proposed, and how the matrices of a head are stored where it runs, is chosen as
the head of a draft is (`steps.draft`): by the gain that is expected from acceptance at each place
of a chain, and from times, both measured beside the parent as it runs. For a head, text that the
parent has written after beginnings of its own chooses, and other text judges.

What was made and measured is kept in files, so a resumed run decides the same.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.calibration.documents import check_text
from secateur.calibration.run_windows import WINDOWS, RunWindows, WindowReader
from secateur.calibration.windows import START, load_windows, stored_start
from secateur.errors import RecipeError
from secateur.evaluation.acceptance import MOST_PROPOSED, Chains, chained_acceptance
from secateur.evaluation.perplexity import TOKENS_PER_FORWARD, WholeReader, read_by
from secateur.machine import fast_dtype
from secateur.models.architecture import positions_of, text_config
from secateur.models.checkpoint import INDEX_NAMES, copy_others
from secateur.models.draft_head import DraftHead, tapped_layers, write_head
from secateur.models.mtp import stored_layers
from secateur.models.opening import load_whole
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import LocalCheckpoint
from secateur.recipes.compress import DraftRecipe
from secateur.recipes.recipe_files import dump_recipe
from secateur.recipes.shared import texts_of
from secateur.reporting import fit as reports
from secateur.reporting.plan import HeadPlanResult, MTPPlanResult
from secateur.runs.measured import Acceptance
from secateur.runs.output import kept, write_json, write_text
from secateur.runtime.decode import Decoder
from secateur.runtime.heads import HeadDecoder
from secateur.runtime.install import open_checkpoint
from secateur.runtime.layer_forms import why_not
from secateur.runtime.load import load
from secateur.runtime.mtp import ModuleDecoder, MTPDecoder, mtp_of, rows_of, write_mtp
from secateur.steps import draft
from secateur.steps.runner import RunContext
from secateur.training import draft_head as learning
from secateur.training.batches import Batches
from secateur.training.loop import Loop, TrainingTask
from secateur.training.training_plan import TrainingPlan
from secateur.types import Windows

CPU = torch.device("cpu")

LENGTH = 256
"""Tokens of a window that a head learns on, unless the recipe says it."""

EPOCHS, BATCH, RATE, RATE_TIMES_WIDTH = 4, 8, 3e-3, 1.75
"""How often each window is read, windows of a step, and what bounds the highest learning rate."""

ALONE = 0.75
"""The share of the steps that train the first place of a chain alone."""

LEARNED = 16384
"""Tokens that a head learns to propose, at most: the most frequent ones."""

WRITTEN, GREEDY = 0.75, 0.25
"""The share of the windows that the parent writes, and of those with its most likely tokens."""

STATES_BYTES = 4 * 2**30
"""The most that the states of the parent take on the disk: beyond it, fewer tokens are learned."""

NEW_STATES = 3
"""States of the parent that the first token of a chain reads while it is timed."""

Found = dict[str, tuple[reports.TriedHead, ...]]
"""What is gained with every list of tokens, for each way to store the matrices."""


class StatesDraft(draft.Draft):
    """What both kinds share: what is measured, and the choice."""

    values: ClassVar[tuple[str, ...]]
    """How the matrices may be stored where they run."""

    about: ClassVar[str]
    """What it is, for the model card."""

    taps: tuple[int, ...] = ()
    """After how many of the parent's layers states are read; none: its last hidden states."""

    # -- what differs ------------------------------------------------------------------------------

    @abstractmethod
    def lists(self, learned: Windows) -> list[Tensor | None]:
        """The tokens that may be proposed, by the text that makes the draft: first all (None)."""

    @abstractmethod
    def decoder(self, values: str, ids: Tensor | None) -> Any:
        """Decodes the draft, stored so, with a list of tokens."""

    @abstractmethod
    def written(
        self, made: Path, values: str, ids: Tensor | None, found: Found, shared: dict[str, Any]
    ) -> Any:
        """Write the draft that gains most; returns the result.

        Args:
            made: the folder.
            values: how its matrices are stored.
            ids: its list.
            found: what was tried.
            shared: the fields of all results.
        """

    # -- what is shared ----------------------------------------------------------------------------

    @cached_property
    def running(self) -> Any:
        """The parent as it runs, whole in memory."""
        return load(self.parent)

    @cached_property
    def slots(self) -> Any:
        """Decode the parent."""
        kind = ModuleDecoder if why_not(self.running) else Decoder
        return kind(self.running, 2 * draft.PROMPT_TOKENS).slots

    def windows(self, length: int | None = None, extra: int = 0) -> list[Windows]:
        """The windows that make a draft or choose its tokens, that choose it, and that judge it.

        Args:
            length: tokens of a window; None for what the recipe says.
            extra: tokens of the text that the first part has besides.
        """
        folder, run, options = self.run.folder, self.run, self.recipe.calibration
        files = [folder.work / f"{name}.safetensors" for name in ("learned", "chosen", "judged")]
        options = options.model_copy(update={"sequence_length": length or options.sequence_length})
        WindowReader.of_folder(run.source.folder, self.running.config).save_parts(
            str(options.source), options, files,
            "make a draft, choose its tokens and judge it", run.progress, extra,
        )  # fmt: skip
        self.start = [*stored_start(files[0])]
        return [*map(load_windows, files)]

    def work(self) -> reports.DraftedResult:
        """Measure every list in every format, take the best, judge it, and write it."""
        run, recipe = self.run, self.recipe
        learned, choosing, judging = self.windows()
        lists, vocabulary = self.lists(learned), self.slots.vocabulary
        every = [(values, ids) for values in self.values for ids in lists]
        decoders = [self.decoder(*one) for one in every]
        parents, seconds = self.times(decoders, choosing)
        taken = self.acceptances("chosen", decoders[:: len(lists)], choosing, lists)
        sizes = [one.tokens for one in decoders]
        tried = draft.judged_heads(sizes, taken, seconds, parents, vocabulary)
        best = max(range(len(every)), key=lambda n: tried[n].gain)
        [judged] = self.acceptances("judged", [decoders[best]], judging, [every[best][1]])
        found = {
            values: tuple(x for x, (own, _) in zip(tried, every, strict=True) if own == values)
            for values in self.values
        }
        shared = self.drafted(vocabulary, tried[best], judged, parents)
        shared["heads"], made = found[every[best][0]], run.folder.fresh_model()
        result = self.written(made, *every[best], found, shared)
        write_json(run.folder.notes / reports.DRAFT, result.to_json())
        write_text(run.folder.notes / "recipe.yaml", dump_recipe(recipe))
        uses = "".join(f"- {name}: `{how}`\n" for name, how in result.engines.items())
        write_text(made / "README.md", f"# A draft\n\n{draft.about(result, self.about)}\n{uses}")
        return result

    def acceptances(
        self, name: str, decoders: Sequence[Any], windows: Windows, lists: Sequence[Tensor | None]
    ) -> list[Acceptance]:
        """What the parent takes of each draft with each of some lists, from a file or measured."""

        def measure() -> list[dict[str, Any]]:
            self.run.progress.start("what the parent takes", len(windows))
            chains = self.chains(decoders, windows)
            found = chained_acceptance(chains, heads=lists, start_tokens=len(self.start))
            self.run.progress.finish()
            return [one.to_json() for one in found]

        found = kept(self.run.folder.work / f"taken-{name}.json", measure)
        return [*map(Acceptance.model_validate, found)]

    def chains(self, decoders: Sequence[Any], windows: Windows) -> Iterator[Chains]:
        """The chains that drafts make after every position of some windows."""
        length = windows.shape[1]
        places = min(MOST_PROPOSED, length - max(2, len(self.start)))
        if places < 1:
            raise RecipeError(
                f"windows of {length} tokens have no room for a chain",
                remedy=f"use --sequence-length {len(self.start) + MOST_PROPOSED + 2} or more",
            )
        batches = windows.split(max(1, TOKENS_PER_FORWARD // length))
        with learning.tapped(self.running, self.taps) as seen:
            read = read_by([WholeReader(self.running)], batches)
            for ids, [(last, parts)] in zip(batches, read, strict=True):
                states = torch.cat([seen[tap] for tap in self.taps], -1) if self.taps else last
                drafts = []
                for own in decoders:
                    given = states[:, :-places], own.embed(ids[:, 1:]), places
                    drafts.append((own.proposer.chain(*given), own.proposer.logits))
                yield Chains(drafts, last, parts.head)
                self.run.progress.step(len(ids))

    def times(self, decoders: Sequence[Any], windows: Windows) -> tuple[Any, list[float]]:
        """Seconds of the parent's calls, and of one token of each draft, from a file or timed."""

        @torch.inference_mode()
        def measure() -> Any:
            prompt = windows.flatten()[: draft.PROMPT_TOKENS]
            self.slots.read(0, prompt)
            _, states = self.slots.take_states(0)
            for one in decoders:
                one.give(0, states[:-1])
                one.read(0, prompt[1:])
            proposing = [draft.proposed_in(x, prompt, states[-NEW_STATES:]) for x in decoders]
            return draft.time_turns(draft.verified_in(self.slots, prompt), proposing)

        parents, own = kept(self.run.folder.work / "times.json", measure)
        return tuple(parents), own


def _sizes(recipe: DraftRecipe, config: Any) -> tuple[int, int, int]:
    """Tokens of a window that a head learns on, of all windows at most, and bytes of the states of
    one on the disk, by the options and the configuration of the parent.
    """
    length = recipe.calibration.sequence_length or min(LENGTH, positions_of(config) or LENGTH)
    each = learning.STATES * text_config(config).hidden_size * torch.bfloat16.itemsize
    return length, min(recipe.tokens_to_learn, STATES_BYTES // each), each


def _counts(tokens: int, length: int) -> tuple[int, int]:
    """Windows of the text, and those that the parent writes."""
    count = max(2, tokens // length)
    return count - round(WRITTEN * count), round(WRITTEN * count)


class HeadDraft(StatesDraft):
    """Train a head that reads the states of a model, and choose how it runs."""

    values = ("bfloat16", "int8", "int4")
    record = reports.HeadResult
    about = "It is a head in EAGLE-3's form, as vLLM and the library speculators read it."

    def __init__(self, recipe: DraftRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        config = build_skeleton(run.source.folder).config
        self.length, self.tokens, _ = _sizes(recipe, config)
        self.taps = tapped_layers(text_config(config).num_hidden_layers)

    @classmethod
    def plan(cls, recipe: DraftRecipe, source: LocalCheckpoint) -> HeadPlanResult:
        """What training a head of a model would take."""
        cls.checked(recipe, source)
        config = build_skeleton(source.folder).config
        own, (length, most, each) = text_config(config), _sizes(recipe, config)
        tokens = sum(_counts(most, length)) * length
        return HeadPlanResult(
            taps=tapped_layers(own.num_hidden_layers),
            tokens=tokens,
            disk_bytes=tokens * each,
            minutes=recipe.minutes,
            heads=draft.sizes_of(min(LEARNED, own.vocab_size)),
        )

    def windows(self, length: int | None = None, extra: int = 0) -> list[Windows]:
        """The same, continued by the parent: all that choose and judge, and most that it learns."""
        few, _ = _counts(self.tokens, self.length)
        text, *others = super().windows(self.length, few * self.length)
        few, many = _counts(self.tokens, text.shape[1])  # that of ready windows
        learned = torch.cat([text[:few], self._continued("learned", text, many, GREEDY)])
        pairs = zip(("chosen", "judged"), others, strict=True)
        return [learned, *(self._continued(name, some, len(some)) for name, some in pairs)]

    def _continued(self, name: str, text: Windows, count: int, greedy: float = 0.0) -> Windows:
        """Windows that the parent writes after beginnings of others, unless they are there."""
        place, run = self.run.folder.work / name, self.run
        place.mkdir(exist_ok=True)
        if not (place / WINDOWS).exists():
            begun = RunWindows(text, text[:0], {START: self.start}, count, greedy=greedy)
            seed = self.recipe.calibration.seed
            begun.complete(place, run.source.folder, CPU, seed, run.progress)
        return load_windows(place / WINDOWS)[len(text) :]

    def lists(self, learned: Windows) -> list[Tensor | None]:
        """Those of a head, which is trained before it is measured."""
        folder, most = self.run.source.folder, min(LEARNED, self.slots.vocabulary)
        ids, *fewer = draft.frequent_lists(folder, self.running, learned, most)
        self.head, self.learned = self._trained(learned, ids), learned.numel()
        return [None, *fewer]

    def _trained(self, learned: Windows, ids: Tensor) -> DraftHead:
        """A head that has learned on some windows to propose some tokens."""
        run, recipe = self.run, self.recipe
        seed, states = recipe.calibration.seed, run.folder.work / "states"
        parent = load_whole(run.source.folder, CPU, dtype=fast_dtype(CPU))
        states.mkdir(exist_ok=True)
        run.progress.start("states of the parent", len(learned))
        learning.store_states(parent, learned, self.taps, states, run.progress.step)
        run.progress.finish()
        head = learning.begin_head(parent, self.taps, ids, seed)
        learner, batches = learning.HeadLearner(head, parent), Batches(learned, BATCH, seed)
        del parent
        read, steps = learning.StoredStates(states), max(2, EPOCHS * len(learned) // BATCH)
        spent = (time.perf_counter() - run.meter.started) / 60
        left = None if recipe.minutes is None else max(recipe.minutes - spent, recipe.minutes / 4)
        rate, turn = min(RATE, RATE_TIMES_WIDTH / head.config.hidden_size), round(ALONE * steps)
        for places, first, last in ((1, 0, turn), (learning.PLACES, turn, steps)):
            task = TrainingTask(learner, batches, learning.ChainLoss(read, places))
            length: dict[str, Any] = {"steps": steps, "first_step": first, "last_step": last}
            length = length if left is None else {"minutes": left / 2}
            plan = TrainingPlan(**length, learning_rate=rate, save_minutes=1.0)
            saved, label = run.folder.work / f"training-{places}", f"training {places} places"
            Loop(task, plan, saved=saved, progress=run.progress, label=label).run()
        for parameter in head.parameters():  # as the file will have them
            parameter.data = parameter.data.bfloat16()
        return head.eval()

    def decoder(self, values: str, ids: Tensor | None) -> HeadDecoder:
        """As the module says."""
        return HeadDecoder(self.head.proposing(ids), self.slots, values)

    def written(
        self, made: Path, values: str, ids: Tensor | None, found: Found, shared: dict[str, Any]
    ) -> reports.HeadResult:
        """Weights and the parent's tokenizer."""
        source, head = self.run.source.folder, self.head.proposing(ids)
        best = {one: max(tried, key=lambda x: x.gain) for one, tried in found.items()}
        said = {"taps": head.taps, "tokens": self.learned, "values": values, "formats": best}
        result, head.values = reports.HeadResult(**shared, **said), values
        copy_others(source, made, ("config.json", "generation_config.json", *INDEX_NAMES))
        name = (self.running.config.architectures or [""])[0]
        write_head(made, head, self.recipe.model, name, result.chain)
        return result


class MTPDraft(StatesDraft):
    """Measure the MTP layers of a model, and choose the tokens that they propose."""

    values = ("",)
    record = reports.MTPResult
    about = (
        "It has the tokens that the MTP layers of the model propose, and their rows of its head."
    )

    def __init__(self, recipe: DraftRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.mtp, _ = mtp_of(self.running, self.parent)

    @classmethod
    def checked(cls, recipe: DraftRecipe, source: LocalCheckpoint) -> Any:
        """The layers of a model, compressed or not, its texts there."""
        for text in texts_of(recipe.calibration.source):
            check_text(text)
        return stored_layers(open_checkpoint(source.folder))

    @classmethod
    def plan(cls, recipe: DraftRecipe, source: LocalCheckpoint) -> MTPPlanResult:
        """What would be measured."""
        layers = cls.checked(recipe, source)
        vocabulary = text_config(layers[0].model.config).vocab_size
        return MTPPlanResult(layers=len(layers), heads=draft.sizes_of(vocabulary))

    def lists(self, learned: Windows) -> list[Tensor | None]:
        """Also fewer tokens, unless the head is packed: it has no rows to take."""
        if not isinstance(self.mtp.head, nn.Linear):
            return [None]
        given = self.parent, self.running, learned, self.slots.vocabulary
        return [None, *draft.frequent_lists(*given)[1:]]

    def decoder(self, values: str, ids: Tensor | None) -> MTPDecoder:
        """With the rows of a list."""
        return MTPDecoder(self.mtp, self.slots, rows_of(self.mtp.head, ids))

    def written(
        self, made: Path, values: str, ids: Tensor | None, found: Found, shared: dict[str, Any]
    ) -> reports.MTPResult:
        """The list, and the rows of the head for it."""
        loop, layers = why_not(self.running) or "", len(self.model)
        result = reports.MTPResult(**shared, layers=layers, loop=loop)
        write_mtp(made, self.mtp.head, ids, self.recipe.model, result.chain)
        return result
