"""One of several processes, each on a pretended GPU: `together_on_cuda.py LIBRARY RUNS`.

The library must be there before torch; see `rehearse.py`. Numbers pass between GPUs as in NCCL: the
operation begins and returns at once, and only what follows on the GPU waits for it. A host that
relies on having waited reads too early, and a wait that does not wait is found.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock


@contextmanager
def as_nccl() -> Iterator[None]:
    """Sums and broadcasts of a tensor on a GPU return when they have begun."""
    import pretended
    import torch.distributed as dist

    from secateur.parallel import processes

    meet = processes._meet
    begun: list[Any] = []
    run, late = pretended.run, ("all_reduce", "broadcast")

    def after_all(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if begun and not str(func).startswith("c10d"):
            waited, begun[:] = list(begun), []
            for work in waited:
                work.wait()
        return run(func, args, kwargs)

    def begin(whole: Any, tensor: Any, *words: Any, **how: Any) -> None:
        if isinstance(tensor, pretended.OnCuda):
            begun.append(whole(tensor, *words, async_op=True, **how))
        else:
            whole(tensor, *words, **how)

    patches = [mock.patch.object(dist, n, partial(begin, getattr(dist, n))) for n in late]
    patches.append(mock.patch.object(pretended, "run", after_all))
    patches.append(mock.patch.object(processes, "_meet", lambda here, _: meet(here, "gloo")))
    for patch in patches:
        patch.start()
    yield
    for patch in patches:
        patch.stop()


def main() -> None:
    """Carry out the recipes of a file, one after the other."""
    from pretended import pretended_cuda
    from together import do_share

    from secateur.parallel.processes import joined

    with pretended_cuda(), as_nccl(), joined("cuda") as ranks:
        for verb, values in json.loads(Path(sys.argv[2]).read_text()):
            do_share(verb, values, ranks)


if __name__ == "__main__":
    ctypes.CDLL(sys.argv[1])
    os.environ["PRETENDED_CUDA"] = sys.argv[1]
    main()
