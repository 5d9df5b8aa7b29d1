"""Learned masks (Sheared LLaMA): the model learns which units stay while its weights train.

    windows of every domain ─► gates and weights learn ─► indices of a cut, and trained weights

Every KV group, neuron, layer or channel has a gate z in [0, 1]. For each set of gates with open
share o and target share t, the weights and gates minimise, and λ and φ maximise

    loss + Σ λ (o − t) + φ (o − t)²

where t falls from 1 to the target over the first 30 % of the steps. In the end the gates that are
open most often are kept; the same surgery makes this cut and all others. With several domains, the
domains whose loss is too high get more text:

    w ← w · exp(max(loss − reference, 0)),  then Σ w = 1

The references are the losses of the uncut model. All draws depend only on the seed, the step and
what is saved, so a resumed training draws the same gates and reads the same windows.

Paper: Xia et al. 2023, "Sheared LLaMA: Accelerating Language Model Pre-training via Structured
Pruning", arXiv:2310.06694. Deviations: the learning rate of the gates is 0.1, not 1, which suits
short runs; o counts each set separately, while the paper multiplies the gates of different kinds
that cover the same weight; kept gates become 1, while the paper multiplies their last value into
the weights.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.calibration.run_windows import WindowReader
from secateur.calibration.windows import load_windows, save_windows
from secateur.engine.plan import Need, fitting, memory_budget
from secateur.errors import NumericalError, RecipeError, SourceError
from secateur.machine import fast_matmuls
from secateur.models.architecture import describe, hidden_size
from secateur.models.opening import load_whole
from secateur.recipes.train import TrainRecipe
from secateur.runs.output import whole_folder
from secateur.structured.cut import Cut, consumers, sizes_of, unit_width
from secateur.structured.cut_plan import representative, uniform_cut
from secateur.structured.cut_steps import CutContext, Found
from secateur.structured.design import design
from secateur.training.batches import Batch, Batches
from secateur.training.loop import Loop, TrainingTask, mean_loss
from secateur.training.masks import Masks
from secateur.training.memory import TRAINING, plan_needs
from secateur.training.objectives import Objective, next_token
from secateur.training.process_group import ProcessGroup
from secateur.training.saved import Hook, open_tensors, write_trained
from secateur.training.training_plan import TrainingPlan
from secateur.types import Windows

WARM_UP = 0.3
"""The share of all steps in which the targets fall."""

UPDATE_EVERY, HELD_OUT = 50, 8
"""Steps between updates of the domains' shares, and the windows that measure a domain."""

SAVE_MINUTES = 5.0
_TEMPERATURE, _LOW, _HIGH, _START = 2 / 3, -0.1, 1.1, 3.0


class HardConcrete:
    """z = clamp(s · (ζ − γ) + γ, 0, 1),  s = σ((log u − log(1 − u) + log α) / β),  u uniform.

        P(z ≠ 0) = σ(log α − β log(−γ / ζ))               β = 2/3, γ = −0.1, ζ = 1.1
        P(z = 1) = σ(log α − β log((1 − γ) / (ζ − 1)))

    Gates begin at log α = 3, where P(z ≠ 0) = 0.990 and P(z = 1) = 0.802. They can be exactly 0 or
    1 and still have gradients.

    Paper: Louizos et al. 2018, "Learning Sparse Neural Networks through L₀ Regularization",
    arXiv:1712.01312.

    Args:
        units: number of gates.
        target: number of gates that stay open at the end.
        device: where the gates are.
    """

    def __init__(self, units: int, target: int, device: torch.device | str = "cpu") -> None:
        self.units, self.target = units, target
        self.log_alpha = nn.Parameter(torch.full((units,), _START, device=device))

    def sample(self, random: torch.Generator) -> Float[Tensor, " units"]:
        """Draw the gates of one forward independently.

        Args:
            random: a generator on the CPU, so that the draws are the same on every device.
        """
        tiny = torch.finfo(torch.float32).eps
        u = torch.rand(self.units, generator=random).clamp_(tiny, 1 - tiny)
        u = u.to(self.log_alpha.device)  # logistic noise: log u − log (1 − u)
        s = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / _TEMPERATURE)
        return (s * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def open_share(self) -> Float[Tensor, ""]:
        """The expected share of gates that are not 0; a scalar."""
        return torch.sigmoid(self.log_alpha - _TEMPERATURE * math.log(-_LOW / _HIGH)).mean()

    @torch.no_grad()
    def kept(self) -> Int64[Tensor, " target"]:
        """The `target` units that are open most often, ascending. Ties go to the later unit."""
        # the sort is stable; `topk` orders ties freely
        return self.log_alpha.argsort(stable=True)[self.units - self.target :].sort().values

    def settled(self) -> Float[Tensor, " units"]:
        """Return 1 for the kept units and 0 for the others. This never waits for a GPU."""
        return torch.zeros_like(self.log_alpha).index_fill_(0, self.kept(), 1.0)


class LearnedMasks:
    """Gates on a model in training. They wrap the loss (`objective`) and are a hook of the loop.

    Args:
        model: a causal language model; it has forward hooks from now on.
        targets: how many units stay, by kind: `groups` and `neurons` of every layer, `layers`,
            `hidden`.
        seed: seed of the draws.
        learning_rate: of Adam on gates and multipliers.

    Raises:
        RecipeError: the family does not declare what writes to the residual stream.
    """

    def __init__(
        self, model: Any, targets: Mapping[str, int], seed: int = 0, learning_rate: float = 0.1
    ) -> None:
        self.seed, self.sets = seed, dict[str, HardConcrete]()
        self.device = next(model.parameters()).device
        self.layers = list(describe(model).layers(model))
        for kind in targets.keys() & {"groups", "neurons"}:
            self._gate_consumers(model, kind, targets[kind])
        if "layers" in targets:
            self.sets["layers"] = HardConcrete(len(self.layers), targets["layers"], self.device)
            for index, layer in enumerate(self.layers):
                hook = partial(self._times_layer, index=index)
                layer.register_forward_hook(hook, with_kwargs=True)
        if "hidden" in targets:
            self._gate_hidden(model, targets["hidden"])
        self.drawn = {name: torch.ones_like(x.log_alpha) for name, x in self.sets.items()}
        self.multipliers = torch.zeros(len(self.sets), 2, device=self.device, requires_grad=True)
        self.progress, self.draws = torch.zeros(2, dtype=torch.int64), 0
        gates = [x.log_alpha for x in self.sets.values()]
        groups: list[dict[str, Any]] = [{"params": gates}, {"params": [self.multipliers]}]
        groups[1]["maximize"] = True  # λ and φ grow while o is not t
        self.optimizer = torch.optim.Adam(groups, lr=learning_rate)
        for parameter in (*gates, self.multipliers):  # torch makes its moments at the first step
            zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}

    def objective(self, inner: Objective) -> Objective:
        """Return the loss with new gates, plus the terms of the multipliers."""

        def gated(model: Any, batch: Batch) -> Tensor:
            # One number for each forward of each step: a resumed training draws the same.
            number = (self.seed * 1_000_003 + int(self.progress[0])) * 1_009 + self.draws
            random = torch.Generator().manual_seed(number % 2**63)
            self.drawn = {name: gates.sample(random) for name, gates in self.sets.items()}
            self.draws += 1
            step, steps = self.progress.tolist()
            # o − t of each set, where t = 1 − gone · (1 − target / units).
            gone = min(1.0, step / max(1.0, WARM_UP * steps))
            apart = torch.stack(
                [x.open_share() - 1 + gone * (1 - x.target / x.units) for x in self.sets.values()]
            )
            loss = inner(model, batch)
            return loss + (self.multipliers * torch.stack([apart, apart**2], 1)).sum()

        return gated

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`: gates go down, multipliers up."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.copy_(torch.tensor([step, steps]))
        self.draws = 0

    def state(self) -> dict[str, Tensor]:
        """Gates, multipliers, their moments, and the progress of the training."""
        learned = {f"gates/{n}": x.log_alpha for n, x in self.sets.items()}
        tensors: dict[str, Tensor] = {**learned, "multipliers": self.multipliers}
        for name, tensor in list(tensors.items()):
            tensors |= {f"{k}/{name}": x for k, x in self.optimizer.state[tensor].items()}
        return {**tensors, "progress": self.progress}

    def settle(self) -> Cut:
        """Open the kept gates and close the others. Return the units that stay."""
        self.drawn = {name: gates.settled() for name, gates in self.sets.items()}
        kept = {name: tuple(gates.kept().tolist()) for name, gates in self.sets.items()}
        staying = kept.get("layers", range(len(self.layers)))
        within = {
            kind: {i: kept[name] for i in staying if (name := f"{kind} {i}") in kept}
            for kind in ("groups", "neurons")
        }
        return Cut(kept.get("layers"), hidden=kept.get("hidden"), **within)

    def _gate_consumers(self, model: Any, kind: str, target: int) -> None:
        """Put gates on the input columns of the linear that reads these units, in every layer."""
        name, sizes = consumers(model)[kind], sizes_of(model)
        width = unit_width(sizes, kind)
        for index, layer in enumerate(self.layers):
            units, key = getattr(sizes, kind)[index], f"{kind} {index}"
            self.sets[key] = HardConcrete(units, target, self.device)
            times = partial(self._times_inputs, name=key, width=width)
            layer.get_submodule(name).register_forward_pre_hook(times)

    def _gate_hidden(self, model: Any, target: int) -> None:
        """Put gates on the start of the residual stream, and on every term added to it."""
        architecture = describe(model)
        if not architecture.writers or architecture.experts is not None:
            raise RecipeError(
                f"the family {architecture.family} does not declare all linears that write to "
                "the residual stream, so channels have no gates",
                remedy="leave hidden out",
            )
        self.sets["hidden"] = HardConcrete(hidden_size(model), target, self.device)
        first = partial(self._times_inputs, name="hidden", width=1)
        self.layers[0].register_forward_pre_hook(first)
        for layer in self.layers:
            for name, module in layer.named_modules():
                if name in architecture.writers:
                    module.register_forward_hook(self._times_outputs)

    def _times_inputs(
        self, module: nn.Module, inputs: tuple[Any, ...], *, name: str, width: int
    ) -> tuple[Any, ...]:
        # A gate for each unit becomes one for each of its columns.
        gates = self.drawn[name].repeat_interleave(width)
        return (inputs[0] * gates.to(inputs[0].dtype), *inputs[1:])

    def _times_outputs(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * self.drawn["hidden"].to(output.dtype)

    def _times_layer(
        self, module: nn.Module, inputs: tuple[Any, ...], named: Any, output: Any, *, index: int
    ) -> Any:
        before = inputs[0] if inputs else named["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        # z = 0 leaves the residual stream as it was: the layer is skipped.
        # A layer adds to the stream: h + z · (f(h) − h).
        mixed = before + self.drawn["layers"][index].to(after.dtype) * (after - before)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


class DomainLoading:
    """Proportions of domains that follow their losses: a hook, and the order of the windows.

    Args:
        windows: token ids [windows, length] of each domain; the length is the same for all.
        references: the loss to reach in each domain, in nats per token.
        losses: measures a model's loss on held-out text of each domain.
        size: number of windows in a step.
        seed: seed of the draws.
    """

    def __init__(
        self,
        windows: Mapping[str, Windows],
        references: Mapping[str, float],
        losses: Callable[[Any], Mapping[str, float]],
        *,
        size: int,
        seed: int = 0,
    ) -> None:
        self.names, self.counts = list(windows), [len(x) for x in windows.values()]
        self.references, self.losses, self.size, self.seed = references, losses, size, seed
        self.weights = torch.tensor(self.counts, dtype=torch.float64) / sum(self.counts)

    def on_step(self, step: int, steps: int, model: Any, optimizer: Any) -> None:
        """Called after the optimizer's step, 1 to `steps`."""
        if step % UPDATE_EVERY == 0 and step < steps:
            self.update(self.losses(model))

    def state(self) -> Mapping[str, Tensor]:
        """The proportions."""
        return {"weights": self.weights}

    def update(self, losses: Mapping[str, float]) -> None:
        """Update the proportions from the losses on held-out text of each domain.

        Raises:
            NumericalError: a loss is not a number.
        """
        excess = [max(losses[n] - self.references[n], 0.0) for n in self.names]
        if not all(map(math.isfinite, losses.values())):
            raise NumericalError(f"the losses of the domains are {dict(losses)}")
        most = max(excess)  # the same factor for all, so that exp cannot overflow
        self.weights *= torch.tensor([math.exp(x - most) for x in excess], dtype=torch.float64)
        # They are shares: of the next windows, by domain.
        self.weights /= self.weights.sum()

    def numbers(self, step: int) -> tuple[int, ...]:
        """Draw the windows of a step, numbered over all domains in order."""
        random = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        drawn = torch.multinomial(self.weights, self.size, replacement=True, generator=random)
        places = torch.rand(self.size, generator=random).tolist()
        return tuple(
            sum(self.counts[:domain]) + int(place * self.counts[domain])
            for domain, place in zip(drawn.tolist(), places, strict=True)
        )


def choose_learned(context: CutContext, folder: Path) -> Found:
    """Learn which units to keep. Return the cut, its notes, and the folder of the weights."""
    how = context.recipe.learned
    assert how is not None
    work, seed = context.scratch("learned"), context.recipe.calibration.seed
    # the loss rises while the gates close, so a rising loss does not end the training
    plan = TrainingPlan(
        steps=how.steps,
        learning_rate=how.learning_rate,
        validations=0,
        save_minutes=SAVE_MINUTES,
        diverged=0.0,
    )
    domains = _domains_of(context, work)
    held_out = HELD_OUT if how.domains else 0
    windows = {name: ids[held_out:] for name, ids in domains.items()}
    batches = Batches(torch.cat(list(windows.values())), how.batch, seed)
    _check_fits(context, folder, batches, plan)
    model = load_whole(folder, context.device)
    gates = LearnedMasks(model, _targets_of(context), seed, how.mask_learning_rate)
    loss, hooks, notes = next_token(model), list[Hook]([gates]), dict[str, Any]()

    def losses(model: Any) -> dict[str, float]:
        return {
            name: mean_loss(
                model, loss, Batches(ids[:held_out], held_out),
                plan.at_once(ids.shape[1]), context.device,
                partial(fast_matmuls, context.device),
            )
            for name, ids in domains.items()
        }  # fmt: skip

    if how.domains:
        loading = DomainLoading(windows, losses(model), losses, size=how.batch, seed=seed)
        batches = replace(batches, chosen=loading.numbers)
        hooks.append(loading)
    task = TrainingTask(model, batches, gates.objective(loss), Masks.of(model), hooks=hooks)
    loop = Loop(task, plan, saved=work, progress=context.progress, label="learning masks")
    outcome, cut = loop.run(), gates.settle()
    if how.domains:
        shares = dict(zip(loading.names, loading.weights.tolist(), strict=True))
        notes = {"references": loading.references, "losses": losses(model), "proportions": shares}
    notes |= {"by": "learned masks", "steps": outcome.step, "tokens": outcome.tokens}
    notes["learning_rate"] = loop.peak
    made = context.work / "learned-weights"
    shutil.rmtree(made, ignore_errors=True)
    with whole_folder(made) as partial_folder, open_tensors(work / "final.safetensors") as trained:
        write_trained(folder, trained, partial_folder)
    return cut, notes, made


def _targets_of(context: CutContext) -> dict[str, int]:
    """The number of units of each kind to keep, in every layer."""
    plan, found = context.plan, dict[str, int]()
    if plan.narrows:
        model = context.target(context.source).model
        left = design(model, representative(plan)).skeleton
        cut = uniform_cut(plan, left, context.recipe.multiple)
        for kind in ("groups", "neurons"):
            counts = {len(units) for units in getattr(cut, kind).values()}
            if len(counts) > 1:
                raise RecipeError(
                    f"learned masks need equal layers, and {sorted(counts)} {kind} would stay",
                    remedy="cut the model without learned",
                )
            if counts:
                found[kind] = counts.pop()
    if plan.drop_layers:
        found["layers"] = plan.sizes.layers - plan.drop_layers
    if plan.keep_hidden is not None:
        found["hidden"] = plan.keep_hidden
    return found


def _domains_of(context: CutContext, work: Path) -> dict[str, Windows]:
    """The windows of calibration and of other domains. A resumed run reads its own files."""
    recipe, windows = context.recipe, context.windows
    config = context.target(context.source).model.config
    length = int(windows.shape[1])
    reader = WindowReader.of_folder(context.source, config)
    found: dict[str, Tensor] = {recipe.calibration.source: windows}
    assert recipe.learned is not None
    for number, text in enumerate(recipe.learned.domains):
        file = work / f"domain-{number}.safetensors"
        if not file.exists():
            # as many windows as of the calibration text, of the same length
            save_windows(reader.read(text, recipe.calibration, length=length)[0], file)
        found[text] = load_windows(file)
    for name, ids in found.items():
        if recipe.learned.domains and (len(ids) <= HELD_OUT or ids.shape[1] != length):
            raise SourceError(
                f"{len(ids)} windows of {ids.shape[1]} tokens: a domain needs more than {HELD_OUT} "
                f"windows of {length} tokens",
                where=name,
                remedy="name longer texts, or ready windows of one length",
            )
    return found


def _check_fits(context: CutContext, folder: Path, batches: Batches, plan: TrainingPlan) -> None:
    """Refuse a training that does not fit in memory."""
    target, windows = context.target(folder), batches.windows
    recipe = TrainRecipe(model=str(folder))
    alone = ProcessGroup(context.device)
    needed = plan_needs(recipe, target, None, batches, plan, alone)
    # Tokens of one forward; activations of so many are alive in the backward.
    tokens = min(plan.at_once(windows.shape[1]), batches.size) * windows.shape[1]
    sizes = sizes_of(target.model)
    # The product of an activation and its gates is kept for the backward.
    gated = max(sizes.neurons) + max(sizes.queries) * sizes.head_dim
    gated += 3 * hidden_size(target.model)
    gates = Need("gates", 4 * tokens * gated * sizes.layers, (TRAINING,), "gates")
    needed = replace(needed, needs=(*needed.needs, gates))
    budget = memory_budget(context.recipe.memory.max_bytes, context.device)
    fitting(lambda way: needed, {"here": "{}"}, budget, "training needs ")
