"""The inputs of every perplexity measurement: a loaded model, windows, and their protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.calibration.documents import read_text
from secateur.evaluation.perplexity import computed_by, evaluation_windows
from secateur.evaluation.perplexity import protocol as describe_protocol
from secateur.models.architecture import positions_of
from secateur.models.opening import load_whole
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer, start_tokens
from secateur.progress import Progress
from secateur.runtime.load import load
from secateur.runtime.packed import is_packed
from secateur.types import Windows
from secateur.workflows.prune.prepare import choose_device


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


def started(protocol: Mapping[str, Any]) -> int:
    """The number of start tokens that each window of a protocol begins with."""
    return len(protocol.get("start_tokens", ()))


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
    place = choose_device(device)
    if is_packed(source.folder):
        loaded = load(
            source.folder,
            kernels=place.type == "cpu",
            device=place,
            trust_remote_code=trust_remote_code,
        )
    else:
        loaded = load_whole(source.folder, place, trust_remote_code=trust_remote_code)
    return loaded, tokenizer
