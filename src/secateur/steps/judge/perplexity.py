"""The inputs of every perplexity (a loaded model, windows, their protocol), and rises of the loss.

`LossComparison` compares a packed model, as it runs, with the dense one. The packed folder is
loaded and measured as `secateur evaluate` does it: kernels multiply, activations that meet integers
are rounded, and sums are those of its dtype. The dense model passes through its layers one at a
time, so that only one of them is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from secateur.calibration.documents import read_text
from secateur.calibration.windows import load_windows, stored_start
from secateur.engine.stream.embedding_and_head import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget
from secateur.evaluation.perplexity import computed_by, evaluation_windows, perplexity
from secateur.evaluation.perplexity import protocol as describe_protocol
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.models.architecture import positions_of
from secateur.models.opening import load_whole
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer, start_tokens
from secateur.precision import exact_matmuls
from secateur.progress import Progress
from secateur.runs.atomic import write_json
from secateur.runs.environment import choose_device
from secateur.runtime.load import load
from secateur.runtime.packed import is_packed
from secateur.types import Windows


def windows_of(
    text: str | Path,
    loaded: Any,
    tokenizer: Any,
    sequence_length: int | None,
    first: int | None,
) -> tuple[Windows, dict[str, Any]]:
    """Return the windows of a text, and their protocol."""
    longest = positions_of(loaded.config) or 2048
    joined = read_text(str(text))
    windows = evaluation_windows(
        joined.text, tokenizer, sequence_length or min(2048, longest), max_windows=first
    )
    protocol = describe_protocol(
        windows,
        dataset=joined.dataset,
        join=joined.join,
        computed=computed_by(loaded),
        start=start_tokens(tokenizer),
    )
    return windows, protocol


@contextmanager
def window_progress(
    progress: Progress, label: str, count: int
) -> Iterator[Callable[[int, int], None]]:
    """Return a callback that reports finished windows and their total to a progress."""
    progress.start(label, count)
    before = 0

    def report(done: int, total: int) -> None:
        nonlocal before
        progress.step(done - before, note=f"window {done} of {total}")
        before = done

    yield report
    progress.finish()


def load_model(model: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load a model with its tokenizer. On the CPU, kernels multiply a compressed one."""
    source = resolve(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    torch_device = choose_device(device)
    if is_packed(source.folder):
        loaded = load(
            source.folder,
            kernels=torch_device.type == "cpu",
            device=torch_device,
            trust_remote_code=trust_remote_code,
        )
    else:
        loaded = load_whole(source.folder, torch_device, trust_remote_code=trust_remote_code)
    return loaded, tokenizer


@dataclass(frozen=True)
class LossIncrease:
    """A rise of the loss of the next token, in nats per token.

    Attributes:
        mean: over windows.
        standard_error: of the mean, from the differences of the windows; None for one window.
        tokens: of the windows.
    """

    mean: float
    standard_error: float | None
    tokens: int

    @property
    def cautious(self) -> float:
        """The mean and its standard error: a bound on this usually holds on other windows too."""
        return self.mean + (self.standard_error or 0.0)


class LossComparison:
    """Measures packed folders against the dense model, on some windows.

    Args:
        target: the dense model.
        file: the windows (`calibration.save_windows`); the dense losses are kept next to it.
        progress: receives every window.
        trust_remote_code: whether code from the folder of the model may run.
    """

    def __init__(
        self,
        target: CheckpointTarget,
        file: Path,
        progress: Progress,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.target, self.file, self.progress = target, file, progress
        self.trust_remote_code = trust_remote_code
        self.windows, self.start = load_windows(file), len(stored_start(file))

    def dense(self) -> list[float]:
        """The loss of the dense model on each window, from a file or measured."""
        kept = self.file.with_suffix(".dense.json")
        if not kept.exists():
            write_json(kept, dense_losses(self.target, self.windows, self.start, self.progress))
        found: list[float] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def increase(self, folder: Path) -> LossIncrease:
        """The rise of a packed folder."""
        dense = self.dense()
        model = load(folder, trust_remote_code=self.trust_remote_code)
        with window_progress(self.progress, "judging the packed model", len(dense)) as report:
            found = perplexity(model, self.windows, start_tokens=self.start, progress=report)
        rises = [own - before for own, before in zip(found.losses, dense, strict=True)]
        return LossIncrease(mean_of(rises), standard_error(rises), found.tokens)


@torch.no_grad()
def dense_losses(
    target: CheckpointTarget, windows: Tensor, start: int, progress: Progress
) -> list[float]:
    """The mean loss of the next token on each window, in nats, with one layer in memory.

    Args:
        target: the model.
        windows: token ids [windows, length].
        start: start tokens of a window, which are not predicted.
        progress: receives the windows.
    """
    outer, device, first = EmbeddingAndHead(target, windows), target.device, max(1, start)
    progress.start("judging the dense model", len(windows))
    losses: list[float] = []
    for rows in outer.parts(range(len(windows)), 2):
        hidden = outer.embedded(rows)
        for number in range(len(target.layers)):
            with target.layer(number) as layer:
                hidden = [outer.run(number, layer, one, fast=False) for one in hidden]
        with outer.outside(), exact_matmuls(device):
            for row, states in zip(rows, hidden, strict=True):
                logits = outer.head(row, states)[first - 1 : -1].float()
                losses.append(float(cross_entropy(logits, windows[row, first:].to(device))))
        progress.step(len(rows))
    progress.finish()
    return losses
