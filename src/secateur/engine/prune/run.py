"""The story of a run.

    first inputs ─► for each decoder layer: read it ─► gather, prune ─► next inputs ─► write, ledger

Magnitude needs no calibration and skips the forwards; Taylor and OBD get their gradients from a
pass of their own before (`gradients`); an allocation settles beforehand how much each linear
loses (`survey`). With reconstruction the dense model's hidden states travel along, and before its
outputs are passed on, a pruned layer is tuned to give those of the dense one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.allocator import reused_pages
from secateur.engine.prune.collapse import collapse_error, collapsed, told
from secateur.engine.prune.layer_pass import LayerPass
from secateur.engine.prune.reconstruction import Reconstruction
from secateur.engine.prune.routing import coverage
from secateur.engine.prune.selection import Selection
from secateur.engine.prune.solver_cost import warn_of_work
from secateur.engine.prune.surgery import INPUT_STATISTICS, LinearRecord, all_zero, check_finite
from secateur.engine.stream.kinds import kind_of, layouts, refuse_unknown
from secateur.engine.stream.passage import Passage
from secateur.engine.stream.targets import Target
from secateur.errors import PatternError, VerificationError
from secateur.models.architecture import Linear, linears_of
from secateur.precision import fast_matmuls, full_float32
from secateur.progress import Progress
from secateur.runs.ledger import Ledger
from secateur.sparsity.methods import Method
from secateur.sparsity.patterns import Pattern, misplaced
from secateur.sparsity.patterns.whole_columns import WholeColumns

__all__ = ["Run", "Settings"]


log = logging.getLogger(__name__)

NO_RECONSTRUCTION = Reconstruction(passes=0)
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Settings:
    """How the work is done; none of it changes what is asked of the result.

    Attributes:
        sequential: `group` prunes each group of linears before the next one's statistics are
            gathered, in one pass; `layer` gathers for a whole layer first, as the papers do.
        micro_batch_tokens: tokens that pass through a layer at once.
        fast_matmuls: forwards of calibration in bfloat16 where the processor is faster at it.
        asymmetric: fit each linear to what the dense model's has for outputs (`dense_target`),
            not to its own; the dense model's forwards then go along, group by group.
        asymmetric_damping: how strongly what is fitted is drawn towards the dense weights, as a
            fraction of the mean diagonal of the gram.
        activations: `memory` or `disk`: where hidden states wait.
        work: folder for hidden states, ledger and gradients; None only for a run in memory.
        on_collapse: `stop` or `warn` when a layer has lost its outputs (`engine.prune.collapse`).
    """

    sequential: str = "group"
    asymmetric: bool = False
    asymmetric_damping: float = 0.2
    fast_matmuls: bool = False
    micro_batch_tokens: int = 2048
    activations: str = "memory"
    work: Path | None = None
    on_collapse: str = "warn"


class Run:
    """One pruning run over all decoder layers of a target.

    Args:
        target: the model.
        method: score, pattern and solver.
        sparsity: asked of every linear that has no sparsity of its own.
        selection: which linears, with what exceptions.
        windows: calibration tokens [samples, sequence_length], or None if the method needs none.
        settings: how the work is done.
        ledger: where finished layers are entered.
        progress: told of every step.
        reconstruction: how pruned layers are tuned; not at all without passes.
        patterns: of linears that have another one than the method's, by glob.
        costs: what a unit of a linear counts in an allocation's budget, by name; its weights for
            those that are not named.
    """

    def __init__(
        self,
        target: Target,
        method: Method,
        sparsity: float,
        selection: Selection,
        windows: Tensor | None,
        settings: Settings,
        ledger: Ledger,
        progress: Progress,
        reconstruction: Reconstruction = NO_RECONSTRUCTION,
        patterns: Mapping[str, Pattern] = NOTHING,
        costs: Mapping[str, int] = NOTHING,
    ) -> None:
        self.target, self.method, self.settings = target, method, settings
        self.windows, self.ledger, self.progress = windows, ledger, progress
        self.selection, self.sparsity = selection, sparsity
        self.patterns, self.costs = patterns, costs
        self.reconstruction = reconstruction
        self.passage: Passage | None = None
        if windows is not None:
            self.passage = Passage(
                target,
                windows,
                settings.micro_batch_tokens,
                settings.activations == "memory",
                settings.work,
            )
        refuse_unknown(target)
        self.layouts = layouts(target, windows.shape[1]) if windows is not None else []
        self.told = 0
        self.verified: set[Hashable] = set()
        self.sparsity_of = self.plan_sparsity()
        warn_of_work(self.shapes, self.sparsity_of, self.method_for)

    # -- what is asked of each linear ----------------------------------------------------------

    def plan_sparsity(self) -> dict[str, float]:
        """The sparsity of every linear, 0 for those left dense.

        Raises:
            RecipeError, PatternError, ShapeError: a glob matches nothing, a matrix does not fit.
        """
        self.shapes = {
            linear.name: linear.shape
            for index, layer in enumerate(self.target.layers)
            for linear in linears_of(layer, self.target.architecture.layer_name(index)).values()
        }
        self.selection.check(self.shapes)
        asked, unseen = {}, self.inputs_unseen()
        for name, shape in self.shapes.items():
            asked[name] = 0.0 if name in unseen else self.selection.asked(name, self.sparsity)
            if asked[name] > 0:
                try:
                    self.method_for(name).check(shape, asked[name])
                except PatternError as error:
                    raise type(error)(error.what, where=name, remedy=error.remedy) from None
        return asked

    def inputs_unseen(self) -> set[str]:
        """Linears left as they are in a calibrated run, because no hook sees their inputs."""
        name = self.target.architecture.layer_name
        return {f"{name(i)}.{n}" for i, layout in enumerate(self.layouts) for n in layout.unseen}

    def method_for(self, name: str) -> Method:
        """The method, with the pattern that a linear has."""
        for glob, pattern in self.patterns.items():
            if fnmatchcase(name, glob):
                return replace(self.method, pattern=pattern)
        return self.method

    def works_on(self, name: str) -> bool:
        """Whether a linear is changed: one that loses weights, or that a method rounds."""
        rounded = self.method.rounds and self.selection.selects(name)
        return rounded or self.sparsity_of[name] > 0

    @property
    def input_statistics(self) -> frozenset[str]:
        """The statistics of inputs that have to be gathered on the way."""
        own = {"gram"} if self.settings.asymmetric else set()
        return self.method.requires & INPUT_STATISTICS | own

    def matmuls(self) -> AbstractContextManager[object]:
        """A context for the forwards of calibration."""
        return fast_matmuls(self.target.device) if self.settings.fast_matmuls else nullcontext()

    @property
    def dense_needed(self) -> bool:
        """Whether the dense model's hidden states go along."""
        return self.reconstruction.passes > 0 or self.settings.asymmetric

    @property
    def forwards_needed(self) -> bool:
        """Whether calibration tokens pass through the layers at all."""
        return bool(self.input_statistics) or self.reconstruction.passes > 0

    # -- the loop -------------------------------------------------------------------------------

    @property
    def steps_per_layer(self) -> int:
        """Steps of progress that one layer is worth: one for every forward of a micro-batch."""
        if not self.forwards_needed:
            return 1
        assert self.passage is not None
        forwards = 1 if self.settings.sequential == "group" else 2
        steps = len(self.passage.batches()) * forwards
        if self.dense_needed:
            steps += len(self.passage.batches())
        if self.reconstruction.passes:
            steps += (2 + self.reconstruction.passes) * len(self.passage.batches())
        return steps

    def step(self, index: int) -> None:
        """Tell of one step within a layer."""
        self.told += 1
        self.progress.step(note=f"layer {index}")

    @torch.no_grad()
    @full_float32()
    def execute(self, done: int = 0) -> None:
        """Prune every layer from number `done` on."""
        layers = self.target.layers
        if self.forwards_needed and done < len(layers):
            assert self.passage is not None
            done = self.passage.open(done, dense=self.dense_needed)
            if done == 0:  # also where the hidden states of a stopped run are lost
                self.ledger.begin()
        for entry in self.ledger.layers:
            self.leave(entry.get("unseen", ()))
        self.progress.start("pruning", self.steps_per_layer * (len(layers) - done))
        with reused_pages():
            for index in range(done, len(layers)):
                self.prune_layer(index)
        if self.passage is not None:
            self.passage.close()
        self.progress.finish()
        found = coverage(self.ledger.layers, self.target.architecture)
        if found is not None:
            found.tell()

    def leave(self, unseen: Sequence[str]) -> None:
        """Nothing is asked any more of linears that calibration did not reach."""
        self.sparsity_of.update(dict.fromkeys(unseen, 0.0))

    def prune_layer(self, index: int) -> None:
        """One decoder layer, from reading it to the ledger."""
        started = time.perf_counter()
        self.told = 0
        name = self.target.architecture.layer_name(index)
        tuned: dict[str, float] = {}
        with self.target.layer(index) as layer:
            passing = LayerPass(self, index, layer)
            check_finite(list(passing.linears.values()))
            for empty in all_zero(passing.linears.values()):
                log.warning("%s is all zero before it is pruned", empty)
            records = passing.prune()
            changed = [f"{record.name}.weight" for record in records]
            if self.method.shifts:
                biased = {x.name for x in passing.linears.values() if x.has_bias}
                changed += [f"{x.name}.bias" for x in records if x.name in biased]
            if passing.tunes:
                tuned = passing.tune()
                changed = [f"{name}.{parameter}" for parameter, _ in layer.named_parameters()]
            self.leave(passing.unseen)
            self.verify_kind(layer, list(passing.linears.values()))
            self.target.commit(index, changed)
        self.finish_layer(index, records, tuned, passing.unseen, started)

    def verify_kind(self, layer: nn.Module, linears: Sequence[Linear]) -> None:
        """Look for the zeros of every matrix in the first layer of each kind.

        A fault that would show in every layer of a kind so ends the run while little is lost.

        Raises:
            VerificationError: naming layer, matrix and how many zeros are missing.
        """
        kind = kind_of(layer)
        if kind in self.verified:
            return
        for linear in linears:
            asked = self.sparsity_of[linear.name]
            pattern = self.method_for(linear.name).pattern
            missing = misplaced(pattern, linear.weight, asked)
            if missing:
                raise VerificationError(
                    f"{missing} of {linear.weight.numel()} weights are not zero and should be, "
                    f"at sparsity {asked:g} in the pattern {pattern.name}; this is the first "
                    f"{type(layer).__name__} of its kind, and no layer behind it was worked on",
                    where=f"{linear.name}.weight",
                    remedy="this is a fault in secateur or in a plug-in; please report it, and "
                    f"leave the matrix out: --exclude '{linear.name}'",
                )
        self.verified.add(kind)

    def finish_layer(
        self,
        index: int,
        records: list[LinearRecord],
        tuned: dict[str, float],
        unseen: Sequence[str],
        started: float,
    ) -> None:
        """Enter a layer into the ledger when all it leaves behind is safe."""
        if self.passage is not None and index + 1 < len(self.target.layers):
            self.passage.advance(index + 1)
        seconds = time.perf_counter() - started
        lost = collapsed([record for record in records if not self.takes_all(record)])
        entries = [record.to_json() for record in records]
        self.ledger.finish_layer(index, entries, seconds, tuned, lost, unseen)
        if self.passage is not None:
            self.passage.forget(index)
        # The last layer's forwards end early, as nobody needs their outputs.
        self.progress.step(self.steps_per_layer - self.told, note=f"layer {index}")
        if lost:
            self.react(self.target.architecture.layer_name(index), lost)

    def takes_all(self, record: LinearRecord) -> bool:
        """Whether a linear was to lose all its columns: a block that goes has not collapsed."""
        whole = isinstance(self.method_for(record.name).pattern, WholeColumns)
        return whole and record.pruned == record.shape[0] * record.shape[1]

    def react(self, layer: str, lost: dict[str, float]) -> None:
        """Stop, or say so, when a finished layer has collapsed.

        Raises:
            VerificationError: it has, and the run is to stop.
        """
        if self.settings.on_collapse == "stop":
            raise collapse_error(layer, lost)
        log.warning("%s has collapsed: %s", layer, told(lost))

    def own_statistics(self, index: int) -> Callable[[Linear], dict[str, Tensor]]:
        """Statistics of each linear itself, from the gradient pass."""
        wanted = self.method.requires - INPUT_STATISTICS
        if not wanted:
            return lambda linear: {}
        assert self.settings.work is not None
        stored = load_file(self.settings.work / f"gradients-{index:04d}.safetensors")
        return lambda linear: {
            name: stored[f"{linear.name}/{name}"].to(self.target.device) for name in wanted
        }
