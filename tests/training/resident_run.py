"""Run alone or by torchrun: a training whose tensors are counted, byte by byte.

torchrun --nproc-per-node 2 resident_run.py PLACE FOLDER OUTPUT OPTIONS

PLACE is where weights, gradients and moments are: host or device.

Writes OUTPUT.json.RANK: the most bytes that lived while the model was read, the bytes when all was
set up, and the most in the steps and while the result was written.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401 imported early, so that what it makes is not counted
import torch
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama  # noqa: F401
from torch import Tensor, nn

import secateur
from secateur.steps import train as retraining
from secateur.training.loop import Loop

COUNTED = 2**14
"""Parameters with at least so many weights are a reason to look."""
COLLECTIVES = {"all_gather_into_tensor", "reduce_scatter_tensor",
               "all_gather_single", "reduce_scatter_single"}  # fmt: skip
"""What FSDP2 calls, in older and newer releases of torch."""
KINDS = (torch.bool, torch.bfloat16, torch.float32)
"""Weights and masks."""


def live_bytes() -> int:
    """The bytes of the storages of all weights and masks that there are."""
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in gc.get_objects():
            if isinstance(found, Tensor) and found.dtype in KINDS and not found.is_meta:
                storage = getattr(found, "_local_tensor", found).untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Census:
    """The most that was alive, as often as one looked."""

    def __init__(self) -> None:
        self.most = 0

    def look(self, *_: object) -> None:
        """Count once."""
        self.most = max(self.most, live_bytes())

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that looks before and after it does its work."""

        def looking(*args: Any, **options: Any) -> Any:
            self.look()
            done = call(*args, **options)
            self.look()
            return done

        return looking

    def taken(self) -> int:
        """The most since the last call."""
        most, self.most = self.most, 0
        return most


def main(place: str, folder: str, output: str, options: dict[str, Any]) -> None:
    """Train, and write down what lived."""
    torch.set_num_threads(1)
    retraining.TrainingSetup = partial(retraining.TrainingSetup, on_host=place == "host")
    gc.disable()  # what is alive only because nobody collected it is alive
    gc.freeze()  # of the modules that are imported nothing is counted, which takes long
    census, taken = Census(), {}
    load, begin, train, make = retraining.load, Loop.begin, Loop.train, nn.Parameter.__new__

    def making(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made = make(cls, data, requires_grad)
        if not made.is_meta and made.numel() >= COUNTED:
            census.look()
        return made

    def loading(*args: Any, **more: Any) -> Any:
        census.taken()
        model = load(*args, **more)
        census.look()
        taken["reading"] = census.taken()
        return model

    def beginning(loop: Loop) -> None:
        begin(loop)
        taken["set_up"] = live_bytes()
        for name, module in loop.model.named_modules():
            if name.endswith(("down_proj", "lm_head")):
                module.register_forward_hook(census.look)
        for name in COLLECTIVES & vars(torch.distributed).keys():
            setattr(torch.distributed, name, census.around(getattr(torch.distributed, name)))
        census.taken()

    def training(loop: Loop) -> None:
        train(loop)
        taken["steps"] = census.taken()

    retraining.load = loading
    Loop.begin, Loop.train = beginning, training  # type: ignore[method-assign]
    nn.Parameter.__new__ = making  # type: ignore[method-assign,assignment]
    report = secateur.train(folder, output=output, **options)
    census.look()
    taken |= {"writing": census.taken(), **report.manifest.planned}
    if torch.distributed.is_initialized():
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        taken["timeout_seconds"] = backend.options._timeout.total_seconds()
    rank = os.environ.get("RANK", "0")
    Path(f"{output}.json.{rank}").write_text(json.dumps(taken), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
