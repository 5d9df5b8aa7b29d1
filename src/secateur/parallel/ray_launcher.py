"""Starts the processes of one run on a Ray cluster.

Ray Train's TorchTrainer places the processes of a run and connects them through torch.distributed.
From then on it is a run like any other of several processes (`processes.py`). Ray does not restart
what has failed: `--resume` does.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from secateur.errors import RankError, RecipeError, SecateurError, install_extra
from secateur.parallel.processes import WORKING

LOCAL = "local"
"""In place of an address: processes on this machine, without a cluster."""


def launch(address: str, processes: int | None, device: str, work: Callable[[], object]) -> None:
    """Do some work in several processes of a cluster, and wait for its end.

    Args:
        address: the cluster's address as `ray.init` takes it, or `local`.
        processes: their number; None for all GPUs of the cluster, or all its machines without GPUs.
        device: of the recipe. With `auto`, each process has a GPU if the cluster has any; this
            machine may have none.
        work: what each process does. It finds its place by `joined`. A function that Ray can
            import in the processes, or a partial of one.

    Raises:
        RecipeError: Ray is missing, or the cluster has too few GPUs.
        SecateurError: the first error of a process.
        RankError: a process has ended without an error of its own.
    """
    ray = _imported()
    with _connected(ray, address, processes), tempfile.TemporaryDirectory() as place:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        on_gpu = device.startswith("cuda") or (device == "auto" and gpus > 0)
        machines = sum(1 for node in ray.nodes() if node["Alive"])
        count = processes or (gpus if on_gpu else machines)
        if on_gpu and not 0 < count <= gpus:
            raise RecipeError(
                f"the cluster has {gpus} GPUs for {count or 'no'} processes",
                remedy="use --device cpu" + f", or --processes {gpus}" * (gpus > 0),
            )
        trainer = ray.train.torch.TorchTrainer(
            _in_folder,
            train_loop_config={"folder": os.getcwd(), "work": work},
            scaling_config=ray.train.ScalingConfig(num_workers=count, use_gpu=on_gpu),
            torch_config=ray.train.torch.TorchConfig(
                backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                timeout_s=int(WORKING.total_seconds()),
            ),
            run_config=ray.train.RunConfig(storage_path=place),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise cause_of(error) from error


def _imported() -> Any:
    """Import Ray with its trainer for torch."""
    try:
        import ray
        import ray.train
        import ray.train.torch
    except ImportError as error:
        raise RecipeError(f"Ray is not installed ({error})", remedy=install_extra("ray")) from None
    return ray


@contextmanager
def _connected(ray: Any, address: str, processes: int | None) -> Iterator[None]:
    """A context with a connection to a cluster, or with a small one on this machine."""
    if ray.is_initialized():
        yield
        return
    place: dict[str, Any] = {"address": address}
    if address == LOCAL:
        place = {"address": LOCAL, "include_dashboard": False}
        # one more for Ray's own controller of the run
        place["num_cpus"] = max(os.cpu_count() or 1, 1 + (processes or 1))
    try:
        ray.init(**place)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"no Ray cluster answers at {address!r}: {next(iter(str(error).splitlines()), '')}",
            remedy="start one (`ray start --head`), or use --ray local",
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _in_folder(options: dict[str, Any]) -> None:
    """What each process does: the work, in the folder in which the command was given."""
    os.chdir(options["folder"])
    options["work"]()


def cause_of(error: Exception) -> SecateurError:
    """The error that ended a run: that of the process which failed first, if it is known."""
    failures = getattr(error, "worker_failures", None) or {}
    causes = [getattr(failed, "_base_exc", failed) for _, failed in sorted(failures.items())]
    causes = causes or [getattr(error, "cause", error)]
    own = [cause for cause in causes if isinstance(cause, SecateurError)]
    first = [cause for cause in own if not isinstance(cause, RankError)]
    if first or own:
        return (first or own)[0]
    lines = [line for line in str(causes[0] if causes else error).splitlines() if line.strip()]
    return RankError(
        f"a process of the run has failed: {lines[-1] if lines else type(error).__name__}",
        remedy="run again with --resume",
    )
