"""Run by torchrun in two processes: a training from a folder, with the bytes of all tensors counted.

torchrun --nproc-per-node 2 resident_run.py VERB FOLDER OUTPUT OPTIONS

Prints one line of JSON for each process: the bytes that live when the training is set up, the most
that lived before that, and the most while decoder layers and head ran.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.training.loop import Loop


def live_bytes() -> int:
    """The bytes of the storages of all tensors there are, of numbers with a point and of masks."""
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for found in gc.get_objects():
            if not isinstance(found, Tensor):
                continue
            tensor = getattr(found, "_local_tensor", found)
            if tensor.device.type == "meta" or not (
                tensor.is_floating_point() or tensor.dtype == torch.bool
            ):
                continue
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Census:
    """Looks often, from a thread, and after every module while the training runs."""

    def __init__(self) -> None:
        self.most, self.over = 0, threading.Event()

    def look(self, *_: Any) -> None:
        """Count once."""
        self.most = max(self.most, live_bytes())

    def taken(self) -> int:
        """The most since the last call."""
        most, self.most = self.most, 0
        return most


def main(verb: str, folder: str, output: str, options: dict[str, Any]) -> None:
    """Train, and say what lived."""
    torch.set_num_threads(1)
    census, told = Census(), {"rank": int(os.environ.get("RANK", 0))}
    begin, train = Loop.begin, Loop.train
    plain = torch.nn.Module._apply, torch.nn.Parameter.__new__

    def counted_parameter(cls: Any, *args: Any, **more: Any) -> Any:
        made = plain[1](cls, *args, **more)
        if not made.is_meta and made.numel() > 2**14:
            census.look()
        return made

    def counted_begin(loop: Loop) -> None:
        begin(loop)
        census.look()
        gc.collect()
        told["before"], told["set_up"] = census.taken(), live_bytes()
        for name, module in loop.model.named_modules():
            if name.endswith(("down_proj", "lm_head")):
                module.register_forward_hook(census.look)
                module.register_full_backward_hook(census.look)

    def counted_train(loop: Loop) -> None:
        train(loop)
        told["during"] = census.taken()

    Loop.begin, Loop.train = counted_begin, counted_train  # type: ignore[method-assign]
    torch.nn.Parameter.__new__ = counted_parameter  # type: ignore[method-assign,assignment]
    report = getattr(secateur, verb)(folder, output=output, **options)
    torch.nn.Parameter.__new__ = plain[1]  # type: ignore[method-assign]
    gc.collect()
    told |= {"after": census.taken(), "planned": report.manifest["planned"]}
    print(json.dumps(told), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
