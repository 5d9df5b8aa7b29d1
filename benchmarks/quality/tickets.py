"""Lottery tickets and rounds of pruning on a tiny language model that is trained here.

    python -m benchmarks.quality.tickets [--seeds 0 1 2]

The model and its text are those of `tests/support/trained.py`: two layers of width 64 that read the Python
standard library letter by letter. All that is compared has the same sparsity in every matrix, and
is judged by the loss on held-out files, in nats per character. One training is 600 steps from the
beginning; what is rewound to step 60 does the 540 that are left. What was measured before for other
seeds or parts, under the same protocol, stays in the file of results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from benchmarks.stored import known_rows
from torch import Tensor

from secateur.recipes.train import IterativeOptions
from secateur.sparsity.schedules import schedules
from secateur.training.batches import Batches
from secateur.training.gradual import Criterion, Rounds, renew
from secateur.training.loop import Outcome, TrainingTask
from secateur.training.masks import open_masks
from secateur.training.objectives import next_token
from secateur.training.saved import write_whole
from secateur.training.training_plan import TrainingPlan

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))
from trained import STEPS, held_out_loss, source_ids, train, untrained

MEASURES = ("src/secateur/training",)

EARLY_STEP = 60
ONE_SHOT = "one-shot, weights rewound to step 60"
TICKET = "iterative, weights rewound to step 60"
ANEW = "the same mask, new random weights"
Masks = dict[str, Tensor]


class Loops:
    """The training of `trained.py` in place of the library's loop.

    Args:
        model: learns in place.
        text: its tokens.
        seed: of the order of the text.
        kept: the masks that it holds.
    """

    def __init__(self, model: Any, text: Tensor, seed: int, kept: Masks) -> None:
        self.model, self.text, self.seed, self.kept = model, text, seed, kept

    def __call__(self, task: Any, plan: Any, saved: Any = None, **options: Any) -> Any:
        """The next training."""
        self.plan, self.saved, self.hooks = plan, saved, task.hooks
        return self

    def validation_loss(self) -> None:
        """Nothing is watched."""

    def run(self) -> Outcome:
        """Train, and save the weights."""
        on_step = self.hooks[0].on_step if self.hooks else None
        first = self.plan.first_step
        train(self.model, self.text, seed=self.seed, first_step=first, kept=self.kept,
              on_step=on_step)  # fmt: skip
        write_whole(self.saved / "final.safetensors", dict(self.model.named_parameters()))
        return Outcome(step=STEPS)


class Tickets:
    """All that is done with one seed.

    Args:
        seed: of the initial weights and of the order of the text.
        sparsity: of every matrix.
        rounds: of iterative pruning.
    """

    def __init__(self, seed: int, sparsity: float, rounds: int) -> None:
        self.seed, self.sparsity, self.rounds = seed, sparsity, rounds
        self.text, self.held_out = source_ids(), source_ids(held_out=True)
        self.dense = untrained(seed)
        train(self.dense, self.text, seed=seed)

    def rewound(self) -> Iterator[tuple[str, float]]:
        """Weights go back to an early step, or are new ones, under the same mask."""
        model, _ = self.in_rounds(1)
        yield ONE_SHOT, self.loss(model)
        model, masks = self.in_rounds(self.rounds)
        yield TICKET, self.loss(model)
        yield ANEW, self.loss(self.anew(masks))

    def in_rounds(self, rounds: int) -> tuple[Any, Masks]:
        """A new model, trained, and pruned in rounds with its early weights; its masks."""
        model = untrained(self.seed)
        masks = open_masks(model)
        how = IterativeOptions(rounds=rounds, rewind="weights", rewind_step=EARLY_STEP)
        schedule = schedules["geometric"](self.sparsity)
        loops = Loops(model, self.text, self.seed, masks)
        with tempfile.TemporaryDirectory() as folder:
            # the loops read their own text, so the task holds the model alone
            task = TrainingTask(model, Batches(self.text[None], 1), next_token(model))
            together = Rounds(masks, schedule, Criterion(), how, Path(folder), task)
            together.train(loops, TrainingPlan(steps=STEPS))
        return model, masks

    def anew(self, masks: Masks) -> Any:
        """A model with other initial weights, trained from the beginning under the same masks."""
        model = untrained(seed=1000 + self.seed)
        renew(model, open_masks(model), masks)
        train(model, self.text, seed=self.seed, kept=masks)
        return model

    def loss(self, model: Any) -> float:
        """On held-out text."""
        return held_out_loss(model, self.held_out)


def differences(rows: list[dict[str, Any]], better: str, worse: str) -> str:
    """How much lower the loss of the one is, seed by seed."""
    gains = [row[worse] - row[better] for row in rows if worse in row and better in row]
    listed = ", ".join(f"{gain:+.3f}" for gain in gains)
    return f"{better} < {worse}: {sum(g > 0 for g in gains)} of {len(gains)} seeds ({listed})"


def with_earlier(protocol: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by seed, with what earlier runs under the same protocol have measured."""
    by_seed: dict[int, dict[str, Any]] = {}
    for row in [*known_rows("tickets", protocol), *rows]:
        by_seed[row["seed"]] = by_seed.get(row["seed"], {}) | row
    return [by_seed[seed] for seed in sorted(by_seed)]


def losses(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for everything that was measured."""
    names = dict.fromkeys(name for row in rows for name in row if name not in ("seed", "measured"))
    measured = {name: [row[name] for row in rows if name in row] for name in names}
    lines = [[name, spread(losses), str(len(losses))] for name, losses in measured.items()]
    return ["", "loss", "seeds"], lines


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


TABLES = {"losses": losses}


def main() -> None:
    """Train, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(heading())
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        tickets = Tickets(seed, args.sparsity, args.rounds)
        rows.append({"seed": seed, "dense": tickets.loss(tickets.dense)})
        for name, loss in tickets.rewound():
            rows[-1][name] = loss
            print(f"seed {seed}: {name}: {loss:.4f}", flush=True)
    protocol = {
        "sparsity": args.sparsity, "rounds": args.rounds, "steps": STEPS,
        "early_step": EARLY_STEP, "loss": "nats per character, held-out files",
    }  # fmt: skip
    rows = with_earlier(protocol, rows)
    print(f"written to {keep('tickets', protocol, rows)}")
    print(markdown(*losses(rows)))
    print(differences(rows, TICKET, ANEW))
    print(differences(rows, TICKET, ONE_SHOT))


if __name__ == "__main__":
    main()
