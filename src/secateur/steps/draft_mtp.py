"""`secateur draft --mtp`: what a model's own MTP layers bring on this machine.

Nothing is made or trained: the layers are in the checkpoint. Measured are what the parent takes at
each place of a chain (`evaluation/acceptance`), with the whole head and with those over frequent
tokens, and the seconds of the calls that our loop makes (`runtime/mtp`). The head with the largest
gain is written, as rows of the whole one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibration.documents import check_text
from secateur.calibration.run_windows import WindowReader
from secateur.calibration.windows import load_windows, stored_start
from secateur.errors import RecipeError
from secateur.evaluation.acceptance import MOST_PROPOSED, Chains, chained_acceptance
from secateur.evaluation.perplexity import TOKENS_PER_FORWARD, WholeReader, read_by, window_progress
from secateur.models.architecture import text_config
from secateur.models.mtp import MTP, stored_layers
from secateur.progress import Progress
from secateur.recipes.compress import DraftRecipe
from secateur.recipes.deploy import Sampling
from secateur.recipes.shared import texts_of
from secateur.reporting import fit as reports
from secateur.reporting.plan import MTPPlanResult
from secateur.runs.folder import NOTES, check_output
from secateur.runs.measured import Acceptance
from secateur.runs.output import write_json, write_text
from secateur.runs.records import read_record
from secateur.runtime.decode import Decoder, SlotDecoder
from secateur.runtime.layer_forms import why_not
from secateur.runtime.load import load
from secateur.runtime.mtp import ModuleDecoder, MTPDrafter, mtp_of, reader_of, rows_of, write_mtp
from secateur.runtime.sampling import Draws
from secateur.runtime.speculative import DraftedText
from secateur.steps import draft
from secateur.steps.runner import RunContext, Step, identity_of, source_of
from secateur.timing import seconds_of


class DraftMTP(Step[DraftRecipe, reports.MTPResult]):
    """Measure the MTP layers of a model, and choose the tokens that they propose."""

    verb = "draft"

    def __init__(self, recipe: DraftRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        for text in texts_of(recipe.calibration.source):
            check_text(text)
        self.folder = run.source.folder
        self.parent: Any = load(self.folder)
        self.mtp, _ = mtp_of(self.parent, self.folder)
        self.vocabulary = int(self.parent.get_output_embeddings().out_features)

    @classmethod
    def reads(cls, recipe: DraftRecipe) -> Sequence[str]:
        """The calibration texts."""
        return texts_of(recipe.calibration.source)

    def identity(self) -> dict[str, Any]:
        """Everything that affects the result."""
        files = sorted(self.folder.glob("*.safetensors"))
        return identity_of(self.recipe, {"minutes"}, files, self.run.progress)

    @classmethod
    def result(cls, output: Path) -> reports.MTPResult:
        """Read the result of a finished run from its notes."""
        return read_record(reports.MTPResult, output / NOTES / draft.DRAFT)

    @cached_property
    def windows(self) -> list[Path]:
        """Windows that choose the tokens of heads, that choose a head, and that judge it."""
        names = ("fitted", "chosen", "judged")
        files = [self.run.folder.work / f"{name}.safetensors" for name in names]
        WindowReader.of_folder(self.folder, self.parent.config).save_parts(
            str(self.recipe.calibration.source), self.recipe.calibration, files,
            "choose tokens, choose a head and judge it", self.run.progress,
        )  # fmt: skip
        return files

    def work(self) -> reports.MTPResult:
        """Measure every head, take the best, judge it, and write it."""
        run, folder = self.run, self.run.folder
        made, heads = folder.fresh_model(), self.heads()
        sizes = [self.vocabulary if ids is None else len(ids) for ids in heads]
        found = self.acceptances(self.windows[1], heads)
        parents, seconds = self.times(heads)
        rows = draft.judged_heads(sizes, found, seconds, parents, self.vocabulary)
        best = max(range(len(rows)), key=lambda n: rows[n].gain)
        [taken] = self.acceptances(self.windows[2], [heads[best]])
        own = seconds[best], sizes[best], self.vocabulary
        sampled, greedy = draft.gains(taken, parents, *own)
        result = reports.MTPResult(
            output=folder.output,
            seconds=time.perf_counter() - run.meter.started,
            parent=self.recipe.model,
            layers=len(self.mtp.layers),
            loop=why_not(self.parent) or "",
            head_tokens=sizes[best],
            vocabulary=self.vocabulary,
            parent_seconds=parents,
            draft_seconds=seconds[best],
            acceptance=taken,
            sampled=sampled,
            greedy=greedy,
            heads=rows,
        )
        write_mtp(made, self.mtp.head, heads[best], self.recipe.model, result.chain)
        folder.notes.mkdir(exist_ok=True)
        write_json(folder.notes / draft.DRAFT, result.to_json())
        write_text(made / "README.md", _card(result))
        return result

    def heads(self) -> list[Tensor | None]:
        """The token ids of every head, largest first; None for the whole vocabulary."""
        plain = isinstance(self.mtp.head, nn.Linear)  # a packed one has no rows to take
        sizes = [n for n in draft.HEADS if n < self.vocabulary and plain]
        read = load_windows(self.windows[0])
        return [None, *draft.frequent_lists(self.folder, self.parent, read, sizes)]

    def acceptances(self, file: Path, heads: Sequence[Tensor | None]) -> list[Acceptance]:
        """What the parent takes with each of some heads, on the windows of a file."""
        windows, start = load_windows(file), len(stored_start(file))
        places = min(MOST_PROPOSED, windows.shape[1] - max(2, start))
        if places < 1:
            raise RecipeError(
                f"windows of {windows.shape[1]} tokens have no room for a chain",
                remedy=f"use --sequence-length {start + MOST_PROPOSED + 2} or more",
            )
        batches = windows.split(max(1, TOKENS_PER_FORWARD // windows.shape[1]))
        label = "what the parent takes of its MTP layers"
        with window_progress(self.run.progress, label, len(windows)) as report:

            def chains() -> Iterator[Chains]:
                done, reader = 0, WholeReader(self.parent)
                for ids, [(states, parts)] in zip(batches, read_by([reader], batches), strict=True):
                    own = self.mtp.chain(states[:, :-places], ids[:, 1:], places)
                    yield Chains(own, self.mtp.head, states, parts.head)
                    done += len(ids)
                    report(done, len(windows))

            with torch.inference_mode():
                return chained_acceptance(chains(), heads=heads, start_tokens=start)

    def times(self, heads: Sequence[Tensor | None]) -> tuple[tuple[float, ...], list[float]]:
        """Seconds of the parent's calls, and of one token with each of some heads."""
        prompt = load_windows(self.windows[1]).flatten()[: draft.PROMPT_TOKENS]
        ids, before, room = prompt.tolist(), len(prompt), 2 * SlotDecoder.together
        kind = ModuleDecoder if why_not(self.parent) else Decoder
        slots = kind(self.parent, before + room).slots
        mtp = MTP([*self.mtp.layers][:1], self.mtp.embed, self.mtp.head)
        drafter = MTPDrafter(slots, mtp)
        slots.read(0, prompt)
        text = DraftedText(0, [*ids, ids[0]], Draws(Sampling()), 1)
        drafter.step([(0, drafter.unread(text))])
        [state], whole = drafter.states, self.mtp.head
        every = [whole if rows is None else rows_of(whole, rows) for rows in heads]

        def propose(head: nn.Module) -> float:
            drafter.unread(text)
            mtp.head, drafter.states[0] = head, state
            calls = [(0, [ids[n % before]]) for n in range(draft.DRAFT_CALLS)]
            return mean(seconds_of(partial(drafter.step, [one])) for one in calls)

        with torch.inference_mode():
            return draft.time_turns(
                draft.verified_in(slots, prompt), [partial(propose, head) for head in every]
            )


def plan_mtp(recipe: DraftRecipe, progress: Progress, call: Mapping[str, Any]) -> MTPPlanResult:
    """Check a recipe with `--mtp`, and show what it would measure; as `draft.plan_draft`."""
    for text in texts_of(recipe.calibration.source):
        check_text(text)
    source = source_of(recipe, progress)
    layers = stored_layers(reader_of(source.folder))
    read = [recipe.model, str(source.folder), *DraftMTP.reads(recipe)]
    check_output(recipe.output, "draft", 0, read, call)
    vocabulary = text_config(layers[0].model.config).vocab_size
    heads = vocabulary, *(n for n in draft.HEADS if n < vocabulary)
    return MTPPlanResult(layers=len(layers), heads=heads)


def _card(result: reports.MTPResult) -> str:
    """What the folder is, and how each engine uses the layers."""
    name, taken = Path(result.parent).name, result.acceptance
    own = "the tokens that they propose, and the rows of its head for these (`model.safetensors`)"
    if result.head_tokens == result.vocabulary:
        own = "no list of tokens: the whole head brings most"
    return (
        f"# MTP layers of {name}\n\n{name} has layers that predict further tokens. On text that "
        f"was used for nothing else, it takes {taken.mean:.0%} of their first tokens at "
        f"temperature 1, and {taken.agreement:.0%} in greedy decoding. This folder has {own}.\n\n"
        + "".join(f"- {where}: `{how}`\n" for where, how in result.uses.items())
        + "\nvLLM and llama.cpp read the layers from the model itself, and have no place for a list"
        " of tokens.\n"
    )
