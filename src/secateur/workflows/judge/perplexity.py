"""Perplexity of a model on a text, with its protocol; `judging` is the whole judgement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.calibration.documents import read_text
from secateur.errors import RecipeError
from secateur.evaluation.perplexity import evaluation_windows, perplexity
from secateur.evaluation.perplexity import protocol as describe_protocol
from secateur.evaluation.protocol import protocol_id
from secateur.models.positions import positions_of
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer, start_tokens
from secateur.models.whole import load_whole
from secateur.progress import Progress, Silent
from secateur.runtime.load import load
from secateur.runtime.packed import is_packed
from secateur.types import Windows
from secateur.workflows.prune.prepare import choose_device

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """A perplexity, and everything it depends on.

    Attributes:
        perplexity: exp of the mean loss.
        mean_loss: nats per token.
        standard_error: of the mean loss, over windows.
        protocol: data set, join, sequence length, windows, tokens, start tokens, dtype, tokenizer.
        protocol_id: its short name; the same where perplexities may be compared.
        seconds: of the evaluation.
    """

    perplexity: float
    mean_loss: float
    standard_error: float | None
    protocol: dict[str, Any]
    protocol_id: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def evaluate(
    model: str | Path | nn.Module,
    *,
    text: str | Path,
    tokenizer: Any = None,
    sequence_length: int | None = None,
    max_windows: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """The perplexity of a model on a text.

    Args:
        model: hub id, folder, GGUF file or named sample; or a loaded causal language model.
        text: file, named text or hub data set; all of it is one stream.
        tokenizer: needed for a loaded model.
        sequence_length: tokens per window; 2048, or less if the model is shorter.
        max_windows: judge on the first windows only; the protocol says so.
        device: auto, cpu, cuda or cuda:N; a loaded model stays where it is.
        trust_remote_code: whether code that comes with the checkpoint may run.
        progress: told of every step.
    """
    progress = progress or Silent()
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise RecipeError("a loaded model needs tokenizer=...")
        loaded, name = model, type(tokenizer).__name__
    else:
        loaded, tokenizer = load_model(str(model), device, trust_remote_code)
        name = str(model)
    windows, protocol = windows_of(text, loaded, tokenizer, name, sequence_length, max_windows)
    with told_of_windows(progress, "perplexity", len(windows)) as tell:
        result = perplexity(loaded, windows, start_tokens=started(protocol), progress=tell)
    return Evaluation(
        result.perplexity,
        result.mean_loss,
        result.standard_error,
        protocol,
        protocol_id("ppl", protocol),
        result.seconds,
    )


def windows_of(
    text: str | Path,
    loaded: Any,
    tokenizer: Any,
    name: str,
    sequence_length: int | None,
    max_windows: int | None,
) -> tuple[Windows, dict[str, Any]]:
    """The windows that a model is judged on, and the protocol that goes with them."""
    longest = positions_of(loaded.config) or 2048
    joined = read_text(str(text))
    windows = evaluation_windows(
        joined.text, tokenizer, sequence_length or min(2048, longest), max_windows=max_windows
    )
    protocol = describe_protocol(
        windows,
        dataset=joined.dataset,
        join=joined.join,
        tokenizer=name,
        dtype=next(loaded.parameters()).dtype,
        start=start_tokens(tokenizer),
    )
    return windows, protocol


def started(protocol: Mapping[str, Any]) -> int:
    """How many start tokens the windows of a protocol begin with."""
    return len(protocol.get("start_tokens", ()))


@contextmanager
def told_of_windows(
    progress: Progress, label: str, count: int
) -> Iterator[Callable[[int, int], None]]:
    """A function that takes windows done and their total, and tells a progress of the steps."""
    progress.start(label, count)
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        progress.step(done - told, note=f"window {done} of {total}")
        told = done

    yield tell
    progress.finish()


def load_model(model: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A model with its tokenizer, ready to judge; a compressed one packed, if on the CPU."""
    source = resolve(model, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    place = choose_device(device)
    if is_packed(source.folder):
        loaded = load(
            source.folder, expand=place.type != "cpu", trust_remote_code=trust_remote_code
        ).to(place)
    else:
        loaded = load_whole(source.folder, place, trust_remote_code=trust_remote_code)
    return loaded, tokenizer
