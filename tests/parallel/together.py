"""Real processes for tests, forked from one that has imported everything, so they are cheap."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from secateur.calibration.statistics import statistics
from secateur.engine import plan
from secateur.engine.prune import run
from secateur.engine.prune.layer import OpenLayer
from secateur.errors import NumericalError
from secateur.parallel import processes
from secateur.parallel.ranks import Ranks
from secateur.progress import Silent
from secateur.recipes.measure import EvaluateRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.verbs import VERBS, imported
from secateur.steps import train
from secateur.steps.evaluate import run_evaluation
from secateur.steps.runner import carry_out

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["together", "transformers.models.mixtral.modeling_mixtral"])


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as own:
        own.bind(("localhost", 0))
        return int(own.getsockname()[1])


ONE_THREAD = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        **ONE_THREAD,
    }  # fmt: skip


def enter(variables: Mapping[str, str], work: Callable[..., None], log: str, words: Any) -> None:
    """Begin a process: its variables, its stderr, then its work."""
    os.environ.update(variables)
    with open(log, "w") as stream:
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    try:
        work(*words)
    except Exception as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(getattr(error, "exit_code", 70))


class Started:
    """Processes at work.

    Args:
        count: their number.
        work: what each does; a function of a module.
        place: folder for what they print.
        words: arguments of `work`.
    """

    def __init__(self, count: int, work: Callable[..., None], place: Path, *words: Any) -> None:
        port = free_port()
        self.logs = [place / f"stderr-{rank}.txt" for rank in range(count)]
        self.all = [
            CONTEXT.Process(
                target=enter, args=(environment(rank, count, port), work, str(log), words)
            )
            for rank, log in enumerate(self.logs)
        ]
        for process in self.all:
            process.start()

    def join(self, seconds: float = 120) -> list[int | None]:
        """Wait for all. Return their exit codes; None for one that has not ended by then."""
        for process in self.all:
            process.join(seconds)
        codes = [process.exitcode for process in self.all]
        for process in self.all:
            process.kill()
        return codes

    def output(self, rank: int) -> str:
        """What a process has printed to stderr."""
        return self.logs[rank].read_text()


def run_together(
    count: int, work: Callable[..., None], place: Path, *words: Any, seconds: float = 120
) -> None:
    """Run processes, which must all succeed."""
    started = Started(count, work, place, *words)
    codes = started.join(seconds)
    assert codes == [0] * count, (codes, [started.output(rank) for rank in range(count)])


def step_of(verb: str, values: Mapping[str, Any]) -> tuple[Any, Any]:
    """The step of a verb, and a recipe."""
    return imported(VERBS[verb].step), build_recipe(imported(VERBS[verb].recipe), values)


def carried_out(verb: str, values: Mapping[str, Any], **call: bool) -> Any:
    """Carry out a step in one process."""
    return carry_out(*step_of(verb, values), Silent(), **call)


def together(verb: str, recipes: list[Mapping[str, Any]], call: Mapping[str, bool]) -> None:
    """What each process does: its share of several runs, one after the other."""
    with processes.joined("cpu") as ranks:
        for values in recipes:
            do_share(verb, values, ranks, **call)


def as_command(verb: str, values: Mapping[str, Any], **call: bool) -> None:
    """What each process of a command does. Only the first one has the result."""
    recipe = step_of(verb, values)[1]
    result = VERBS[verb].run(recipe, call, partial(nullcontext, Silent()), command=True)
    assert (result is None) == (os.environ["RANK"] != "0")


def do_share(verb: str, values: Mapping[str, Any], ranks: Ranks, **call: bool) -> None:
    """Carry out a step, or the share of a process that is not the first."""
    kind, recipe = step_of(verb, values)
    if ranks.first:
        carry_out(kind, recipe, Silent(), ranks=ranks, **call)
    else:
        kind.share(recipe, ranks)
    ranks.wait()


def silence_soon() -> None:
    """Wait for a killed process a third of what users wait."""
    processes.Watchdog = partial(processes.Watchdog, silence_seconds=5.0)  # type: ignore[assignment]


def fail_in_a_layer(recipe: Mapping[str, Any], victim: int, layer: int, killed: bool) -> None:
    """What each process does, when one fails or is killed as it begins a layer."""
    whole = run.prune_layer
    silence_soon()

    def prune_layer(opened: OpenLayer, *rest: Any) -> Any:
        if opened.index == layer and opened.settings.ranks.rank == victim:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise NumericalError("the weights are NaN", where="layer one", remedy="get them again")
        return whole(opened, *rest)

    run.prune_layer = prune_layer
    together("prune", [recipe], {})


def train_until_killed(values: Mapping[str, Any], victim: int, steps: int) -> None:
    """What each process does, when one is killed in the middle of a training."""
    taken = []

    def stepped(*_: Any) -> None:
        taken.append(1)
        if len(taken) == steps and os.environ["RANK"] == str(victim):
            os.kill(os.getpid(), signal.SIGKILL)

    silence_soon()
    register_optimizer_step_post_hook(stepped)
    as_command("train", values)


def sum_statistics(place: str) -> None:
    """What each process does: it gathers every statistic from its own rows, and all are summed."""
    rows = load_file(f"{place}/rows.safetensors")
    with processes.joined("cpu") as ranks:
        found = {}
        for name in statistics.names():
            kind = statistics[name]
            own = kind((24, 40))
            share = rows[kind.source.name].tensor_split(ranks.count)[ranks.rank]
            for part in share if kind.source.name == "gradients" else share.split(7):
                own.update(part)
            ranks.total(own.total)
            found[name] = own.value().clone()
        ranks.once(lambda: save_file(found, f"{place}/sums.safetensors"))
        turned = torch.full((3, 4), float(ranks.rank), dtype=torch.bfloat16).t()
        ranks.share(turned, 1)
        assert turned.eq(1).all()
        ranks.total(turned)
        assert turned.eq(ranks.count).all()
        assert ranks.gather({"rank": ranks.rank, "text": "é" * ranks.rank}) == [
            {"rank": rank, "text": "é" * rank} for rank in range(ranks.count)
        ]
        assert ranks.once(lambda: None) is None


def train_in_python(values: Mapping[str, Any]) -> None:
    """What each process does that calls the function, where sums are as in NCCL.

    A sum of the group of all starts and returns at once. The first process writes slowly.
    """
    summed, written, started = dist.all_reduce, train._write, []

    def all_reduce(tensor: torch.Tensor, group: Any = None) -> None:
        if group is None:
            started.append(summed(tensor, async_op=True))
        else:
            summed(tensor, group=group)

    def write_slowly(*args: Any) -> None:
        time.sleep(0.5)
        written(*args)

    dist.all_reduce, train._write = all_reduce, write_slowly
    VERBS["train"].run(step_of("train", values)[1], {}, partial(nullcontext, Silent()))
    dist.destroy_process_group()


def call_differently() -> None:
    """What each process does: after calls that all make, the first makes another than the rest."""
    processes.Watchdog = partial(processes.Watchdog, grace_seconds=1.0)  # type: ignore[assignment]
    with processes.joined("cpu") as ranks:
        ranks.share(torch.zeros(2), 0)
        if ranks.first:
            ranks.gather("the first")
        else:
            ranks.share(torch.zeros(1), 0)


def judge_together(model: str, dense: str, text: str, output: str, *max_memory: str) -> None:
    """What each process does: its share of an evaluation, for which the program takes nothing."""
    values = {"model": model, "dense": dense, "text": [text], "sequence_length": 32}
    memory = [{"memory": {"max_memory": size}} for size in max_memory]
    more = {"windows": 13, "output": output, **(memory[0] if memory else {})}
    recipe = build_recipe(EvaluateRecipe, {**values, **more})
    plan.resident_bytes = lambda: 0  # type: ignore[assignment]
    with processes.joined("cpu") as ranks:
        run_evaluation(recipe, Silent(), ranks=ranks)
