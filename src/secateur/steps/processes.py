"""What the first process of a pruning sends the others, and what they do.

The first process does everything that one process does: it reads the recipe, checks it, opens the
run folder, and writes the result. When all is ready, it sends a job. Until then the others have
done nothing, so whatever the first one refuses is refused before any work. They open the same
source, take the calibration windows from the work folder, and prune layer by layer together with
the first process. They write only their own hidden states.
"""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.run_windows import WINDOWS
from secateur.engine.prepared import Prepared, prepare
from secateur.errors import RecipeError
from secateur.parallel.ranks import Ranks, refuse_another_model
from secateur.progress import Silent
from secateur.recipes.prune import PruneRecipe
from secateur.runs.folder import STATE, RunFolder
from secateur.runs.ledger import Ledger
from secateur.steps.runner import source_of


@dataclass(frozen=True)
class WorkerJob:
    """Everything that the other processes cannot find out by themselves.

    Attributes:
        partial: the folder of the run while it works, as the first process sees it.
        state: the content of its `run.json`.
        windows: file of the calibration windows; None if nothing needs them.
        activations: `memory` or `disk`.
        done: number of layers that an earlier run has finished.
        entries: the ledger so far.
        source: digest of the names, shapes and dtypes of the source's tensors.
    """

    partial: str
    state: str
    windows: str | None
    activations: str
    done: int
    entries: list[dict[str, Any]]
    source: str

    @classmethod
    def of(
        cls, prepared: Prepared, folder: RunFolder, activations: str, done: int, ledger: Ledger
    ) -> WorkerJob:
        """Describe the work of a run in its folder."""
        return cls(
            partial=str(folder.partial),
            state=folder.state_text(),
            windows=None if prepared.windows is None else str(folder.work / WINDOWS),
            activations=activations,
            done=done,
            entries=ledger.entries,
            source=prepared.target.reader.tensor_digest,
        )


def broadcast(job: Any | None, ranks: Ranks) -> dict[str, Any] | None:
    """Send the job of the first process, a dataclass, to the others; None if there is none."""
    return ranks.once(lambda: None if job is None else asdict(job))


def run_worker(recipe: PruneRecipe, ranks: Ranks) -> None:
    """Do the share of one process, which is not the first.

    Args:
        recipe: the recipe; the first process has the same.
        ranks: the processes.

    Raises:
        RecipeError: this process sees other files than the first one.
    """
    values = broadcast(None, ranks)
    if values is None:  # an earlier run has finished everything
        return
    job = WorkerJob(**values)
    try:
        same = (Path(job.partial) / STATE).read_text(encoding="utf-8") == job.state
    except OSError:
        same = False
    if not same:
        raise RecipeError(
            f"process {ranks.rank} on {socket.gethostname()} does not see the folder of the run",
            where=job.partial,
            remedy="put --output on a file system that all machines share",
        )
    prepared = prepare(
        recipe,
        source_of(recipe, Silent()),
        stored_windows=Path(job.windows) if job.windows else None,
    )
    if prepared.target.reader.tensor_digest != job.source:
        refuse_another_model(ranks.rank, prepared.source.folder)
    ledger = Ledger()
    ledger.entries = list(job.entries)
    work = prepared.job(prepared.tasks(), job.activations, Path(job.partial) / "work", ranks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.calibration.seed)
        work.run(ledger, Silent(), job.done)


def refuse_several(recipe: PruneRecipe, count: int) -> None:
    """Refuse what several processes cannot do yet.

    Raises:
        RecipeError: names the option.
    """
    if count == 1:
        return
    refused = {
        "--compress": (
            recipe.compress.values is not None,
            "leave it out, and run `secateur compress` on the result",
        ),
        "--distill-epochs": (
            recipe.distillation.epochs > 0,
            "use --distill-epochs 0, and then `torchrun … -m secateur train --teacher MODEL` on "
            "the result, which divides both models among the processes",
        ),
    }
    for option, (given, remedy) in refused.items():
        if given:
            raise RecipeError(
                f"{option} does not work with several processes yet, and there are {count}",
                remedy=remedy,
            )


def refuse_cluster(recipe: PruneRecipe) -> None:
    """Refuse a cluster for a pruning that is a part of other work, or is on a cluster already.

    Raises:
        RecipeError: the recipe names a cluster.
    """
    if recipe.cluster.ray is not None:
        raise RecipeError(
            "only `secateur prune` starts processes on a Ray cluster, and torchrun starts them "
            "without one",
            where=f"--ray {recipe.cluster.ray}",
            remedy="leave out --ray",
        )
