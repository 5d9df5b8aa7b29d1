"""Reads the tensors of a layer from disk while another layer computes on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from secateur.models.checkpoint import CheckpointReader


class ReadAhead:
    """Reads tensors in a thread of its own, one after the other.

    Nobody else has a tensor before `read` gives it away, so no memory is used by two at once.

    Args:
        reader: reads them; each call opens its file anew, so threads share nothing.
        names: in the order in which they will be asked for.
    """

    def __init__(self, reader: CheckpointReader, names: Iterable[str]) -> None:
        self.reader = reader
        pool = ThreadPoolExecutor(1, "read ahead")
        self.coming: dict[str, Future[Tensor]] = {n: pool.submit(reader.read, n) for n in names}
        pool.shutdown(wait=False)

    def read(self, name: str) -> Tensor:
        """A tensor, as soon as it is there; one that was not begun is read here."""
        begun = self.coming.pop(name, None)
        return self.reader.read(name) if begun is None else begun.result()

    def drop(self) -> None:
        """Give up what nobody has asked for."""
        for begun in self.coming.values():
            begun.cancel()
        self.coming.clear()
