"""Perplexity of a language model on a text.

    perplexity = exp( − 1/N · Σ log p(tokenᵢ | the tokens before it in its window) )

The protocol: the text is tokenised once, as one stream, and cut into windows that do not overlap.
The last partial window is dropped. If the tokenizer puts a start token in front of a text, each
window of S tokens begins with it and has S − 1 tokens of text (`calibration.windows`). The model
predicts tokens 2 to S of each window, so N = windows · (S − 1). A start token is never predicted:
after k > 1 start tokens the first prediction is token k + 1. You can compare perplexities only if
the windows are the same token ids, with the same start tokens. `protocol` records them.

A protocol is a dictionary of everything that a number depends on besides the weights. Its id, for
example `ppl-1a2b3c4d-bfloat16-int8g64`, has two parts:

| part                | what it says                                                           |
|---------------------|------------------------------------------------------------------------|
| `ppl-1a2b3c4d`      | what was judged, and how: a hash of the protocol without labels        |
| `bfloat16-int8g64`  | how the model computed: its dtype, and how activations were rounded    |

Data enters the hash by its content (`fingerprint`), so the same text under another file name has
the same id. Numbers with the same first part are comparable. If the whole id is the same, the
models also computed alike.

`LossComparison` compares a packed model, as it runs, with the dense one. The packed folder is
loaded and measured as `secateur evaluate` does it: kernels multiply, activations that meet integers
are rounded, and sums are those of its dtype. The dense model passes through its layers one at a
time, so that only one of them is in memory.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.calibration.documents import read_text
from secateur.calibration.windows import evaluation_windows, load_windows, stored_start
from secateur.engine import plan
from secateur.engine.stream.calls import calls_of
from secateur.engine.stream.hidden_states import STATES_BYTES, EmbeddingAndHead
from secateur.engine.stream.layerwise import Continuing, LayerwiseReader
from secateur.errors import NumericalError, RecipeError, SourceError
from secateur.evaluation.uncertainty import mean_of, standard_error
from secateur.models.architecture import positions_of, refuse_non_decoders, text_config
from secateur.models.targets import CheckpointTarget
from secateur.models.tokenizer import start_tokens
from secateur.parallel.ranks import ALONE, Ranks, micro_batches, rows_of
from secateur.progress import Progress
from secateur.runs.output import kept
from secateur.runtime.kernels.linear import activations_of
from secateur.runtime.load import PackedTarget
from secateur.types import Windows

TOKENS_PER_FORWARD = 2048
REPORTS = 8
"""Progress of a text with enough windows is reported at least so many times."""
LOGITS_BYTES, LOGITS_COPIES = 64 * 2**20, 4
"""Float32 logits in memory at once, and how many tensors of this size a number needs."""
PROBE_TOKENS = 8


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on.

    Args:
        perplexity: exp of the mean loss; infinite if that overflows.
        mean_loss: nats per predicted token.
        tokens: number of predicted tokens: all tokens of each window except the first one, or
            except its start tokens.
        windows: number of windows.
        sequence_length: tokens in each window.
        standard_error: standard error of the mean loss, over windows; None for one window.
        seconds: duration of the measurement.
        losses: the mean loss of each window.
    """

    perplexity: float
    mean_loss: float
    tokens: int
    windows: int
    sequence_length: int
    standard_error: float | None
    seconds: float
    losses: tuple[float, ...] = ()


def protocol(
    windows: Windows,
    *,
    dataset: str,
    join: str,
    computed: Mapping[str, str],
    start: Sequence[int] = (),
) -> dict[str, Any]:
    """Everything that a perplexity depends on besides the weights, as JSON values.

    The token ids say all that a tokenizer does, so its name is not there.

    Args:
        windows: from `calibration.windows.evaluation_windows`.
        dataset: data set and split, or file.
        join: how its documents were joined.
        computed: how the model computes, from `protocol.computed_by`.
        start: the start tokens of the tokenizer; the protocol has them if there are any.
    """
    count, length = windows.shape
    named = {"start_tokens": list(start)} if start else {}
    return {
        "dataset": dataset,
        "join": join,
        "sequence_length": length,
        "windows": count,
        "tokens": count * (length - given(len(start))),
        "token_ids": fingerprint(windows),
        **named,
        **computed,
    }


def given(start_tokens: int) -> int:
    """Number of tokens that a window reads but does not predict: the first, or all start tokens."""
    return max(1, start_tokens)


def perplexity(
    model: nn.Module | Reader,
    windows: Windows,
    *,
    start_tokens: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> PerplexityResult:
    """Measure the perplexity of a causal language model on windows.

    The loss is computed in float32. If the logits are only the output head applied to the last
    hidden state (a trial finds out), they are computed for a few tokens at a time and take at most
    64 MiB. Otherwise the logits of a whole batch are in memory.

    Args:
        model: a transformers model, or any module that maps ids [batch, sequence] to logits or to
            an object with `logits`, on the device of its weights; or one that reads layer by layer.
        windows: token ids [windows, sequence_length].
        start_tokens: number of start tokens in each window; none of them is predicted.
        batch_size: windows in one forward; by default about 2048 tokens.
        progress: called after each forward with the number of windows done and in total.
        ranks: the processes that share the windows; all get the result.

    Raises:
        ArchitectureError: the model is an encoder, or part of an encoder-decoder.
        NumericalError: the loss of a window is not a number, or infinite.
        RecipeError: windows are shorter than 2, longer than the model's context, or fewer than the
            processes.
        SourceError: a token id is not in the model's vocabulary.
    """
    module = reader_of(model).module
    refuse_non_decoders(module, module)
    started = time.perf_counter()
    found = numbers_of(
        [model], windows, _losses, start_tokens=start_tokens, batch_size=batch_size,
        progress=progress, ranks=ranks,
    )  # fmt: skip
    # a mean for each window, in float64
    own: list[float] = found[0].double().mean(dim=1).tolist()
    losses = [loss for part in ranks.gather(own) for loss in part]
    seconds = time.perf_counter() - started
    return summary(losses, windows.shape[1], given(start_tokens), seconds)


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The losses of a few tokens, float32 [1, tokens]."""
    return functional.cross_entropy(logits, targets, reduction="none")[None]


Numbers = Callable[..., Tensor]
"""Numbers of a few tokens [k, tokens] by the logits [tokens, vocabulary] of every model, float32,
and the tokens that follow."""


def numbers_of(
    models: Sequence[nn.Module | Reader],
    windows: Windows,
    numbers: Numbers,
    *,
    start_tokens: int = 0,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Read windows with one or several models at once; arguments and errors as of `perplexity`.

    Returns:
        The numbers wherever a token is predicted, float32 [k, windows of this process, positions].
    """
    readers = [reader_of(model) for model in models]
    for reader in readers:
        check_windows(reader.module, windows, start_tokens)
    (count, length), done, found = windows.shape, 0, list[Tensor]()
    # by default so few windows that progress is seen to move; every process has some
    batch_size = batch_size or max(1, min(TOKENS_PER_FORWARD // length, count // REPORTS))
    batches = micro_batches(count, min(batch_size, max(1, count // ranks.count)), ranks.count)
    own = [windows[rows] for rows in rows_of(ranks.rank, batches, ranks.count)]
    with torch.no_grad():
        for ids, every in zip(own, read_by(readers, own), strict=True):
            found.append(_of_batch(every, ids, given(start_tokens), numbers))
            done += len(ids)
            if progress is not None:
                progress(min(count, done * ranks.count), count)
    return torch.cat(found, dim=1)


def _of_batch(every: Sequence[Read], ids: Tensor, first: int, numbers: Numbers) -> Tensor:
    """Numbers of a batch; the `first` tokens of each window are not predicted."""
    vocabularies = [parts.vocabulary for _, parts in every]
    if len({*vocabularies}) > 1:
        raise RecipeError(
            f"vocabularies of {' and '.join(map(str, vocabularies))} tokens cannot be compared",
            remedy="name the dense model that this one was made from",
        )
    # the state at a position predicts the next token, and the last one predicts none
    states = [found[:, first - 1 : -1].flatten(0, 1) for found, _ in every]
    targets = ids[:, first:].reshape(-1).to(states[0].device)
    # float32 logits of so many tokens take at most 64 MiB
    chunk = max(1, LOGITS_BYTES // (4 * vocabularies[0]))
    found = []
    for following, *some in zip(*(x.split(chunk) for x in (targets, *states)), strict=True):
        logits = (x.head(own).float() for (_, x), own in zip(every, some, strict=True))
        found.append(numbers(*(one.to(following.device) for one in logits), following))
    # [k, windows, positions]
    return torch.cat(found, dim=1).unflatten(1, (len(ids), -1)).cpu()


def summary(losses: Sequence[float], length: int, first: int, seconds: float) -> PerplexityResult:
    """Compute the perplexity from the mean losses of windows.

    Args:
        losses: mean loss of each window, nats per predicted token.
        length: tokens in a window.
        first: number of tokens of a window that are not predicted.
        seconds: duration of the measurement.

    Raises:
        NumericalError: a loss is not a number, or infinite.
    """
    count = len(losses)
    for number, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise NumericalError(
                f"the loss is {loss}",
                where=f"window {number} of {count}",
                remedy="a weight or activation overflowed: evaluate in float32 or bfloat16, "
                "and run 'secateur diagnose' on the model",
            )
    mean = mean_of(losses)
    return PerplexityResult(
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        mean_loss=mean,
        tokens=count * (length - first),
        windows=count,
        sequence_length=length,
        standard_error=standard_error(losses),
        seconds=seconds,
        losses=tuple(losses),
    )


def check_windows(model: nn.Module, windows: Windows, start_tokens: int = 0) -> None:
    """Check windows against the model's vocabulary and context before anything runs."""
    length, least = windows.shape[1], given(start_tokens) + 1
    config: Any = getattr(model, "config", None)
    context = positions_of(config)
    if hasattr(config, "get_text_config"):  # models that also read images or audio
        config = config.get_text_config()
    if length < least or (context is not None and length > context):
        raise RecipeError(
            f"windows of {length} tokens, the model reads {least} to {context}",
            remedy=f"give a sequence length of at most {context}",
        )
    vocabulary = getattr(config, "vocab_size", None)
    highest = int(windows.max())
    if isinstance(vocabulary, int) and highest >= vocabulary:
        raise SourceError(
            f"token id {highest} in the windows, the model's vocabulary has {vocabulary}",
            remedy="make the windows with the tokenizer of this model",
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode, and restore the mode of each module afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class WholeReader:
    """A model in memory as a reader, with the members of `LayerwiseReader`."""

    def __init__(self, module: nn.Module) -> None:
        first = next(itertools.chain(module.parameters(), module.buffers()))
        self.module, self.device, self.dtype = module, first.device, first.dtype

    def tokens_at_once(self, ids: Tensor) -> float:
        """There is no bound: a batch is read only when its states are used."""
        return math.inf

    @contextmanager
    def passed(self, batches: Sequence[Tensor]) -> Iterator[Continuing]:
        """A context in which the model is in evaluation mode."""
        with evaluating(self.module):
            yield lambda place, tokens=None: nullcontext()


Reader = WholeReader | LayerwiseReader


def reader_of(model: nn.Module | Reader) -> Reader:
    """What reads token ids with a model."""
    return WholeReader(model) if isinstance(model, nn.Module) else model


class Parts(NamedTuple):
    """The parts of a model: ids → last hidden state, hidden state → logits, vocabulary size."""

    body: Callable[[Tensor], Tensor]
    head: nn.Module
    vocabulary: int


Read = tuple[Tensor, Parts]
"""The last hidden states of a batch [batch, sequence, width], and what predicts by them."""


def read_by(readers: Sequence[Reader], batches: Sequence[Tensor]) -> Iterator[list[Read]]:
    """Read batches of token ids, of any shapes; yields what each reader has of a batch."""
    # each of consecutive batches whose hidden states all readers have in memory at once
    most, portions = min(reader.tokens_at_once(batches[0]) for reader in readers), [list[Tensor]()]
    for ids in batches:
        if portions[-1] and sum(x.numel() for x in (*portions[-1], ids)) > most:
            portions.append([])
        portions[-1].append(ids)
    for some in portions:
        with ExitStack() as contexts:
            every = [contexts.enter_context(_reading(reader, some)) for reader in readers]
            for place in range(len(some)):
                yield [read(place) for read in every]


@contextmanager
def _reading(reader: Reader, batches: Sequence[Tensor]) -> Iterator[Callable[[int], Read]]:
    """A context with a function from the place of a batch to what the model has of it."""
    there = [ids.to(reader.device) for ids in batches]
    with reader.passed(there) as continuing:
        with continuing(0, PROBE_TOKENS):
            parts = body_and_head(reader.module, there[0][:1, :PROBE_TOKENS])

        def read(place: int) -> Read:
            with continuing(place):
                return parts.body(there[place]), parts

        yield read


def needs_of_layers(target: CheckpointTarget, length: int | None) -> list[plan.Need]:
    """What `LayerwiseReader` needs; hidden states are those of one batch.

    Args:
        target: the model, its layers empty.
        length: tokens of a window; None for the default.
    """
    model, size = target.model, target.dtype.itemsize
    length = length or min(TOKENS_PER_FORWARD, positions_of(model.config) or TOKENS_PER_FORWARD)
    vocabulary = int(text_config(model.config).vocab_size)
    ids = torch.arange(max(1, TOKENS_PER_FORWARD // length) * length).view(-1, length) % vocabulary
    hidden, calls = calls_of(target, ids)
    outer = EmbeddingAndHead(target, ids)
    with torch.no_grad(), outer.outside(), outer.returning(None):
        parts = body_and_head(model, ids[:1, :PROBE_TOKENS].to(target.device))
    logits = 4 * ids.numel() * parts.vocabulary
    if not isinstance(parts.head, nn.Identity):
        logits = min(logits, LOGITS_BYTES)
    kinds = plan.layers_by_kind(target, calls)
    forward = max(plan.rehearse(target.layers[i], (), hidden, call)[0] for i, call, _ in kinds)
    states = hidden.nbytes + sum(call.values().nbytes for call in calls if call.varying)
    layer = size * max(map(plan.weights_of, target.layers))
    ends = plan.model_bytes(target) - size * plan.weights_of(target.layers)
    first, last = (plan.READING,), (plan.PREDICTING,)
    # those of a packed model stay in memory
    stay, shorter = first * isinstance(target, PackedTarget), "lower --sequence-length"
    return [
        plan.Need("layer", layer, (*first, plan.SENDING), "a decoder layer"),
        plan.Need("ends", ends, (*stay, *last), "embedding and head"),
        plan.Need("forward", forward, first, "the forward of a batch", shorter),
        plan.Need("logits", LOGITS_COPIES * logits, last, "logits", shorter),
        plan.Need("states", states, (*first, *last), "hidden states of a batch", shorter),
    ]


def needs_of_whole(sizes: Sequence[int]) -> list[plan.Need]:
    """What models of these sizes need in memory, with a forward of one of them (an estimate)."""
    largest, both = max(sizes, default=0), (plan.READING, plan.PREDICTING)
    forward = largest // 16 + LOGITS_COPIES * LOGITS_BYTES * bool(sizes)
    return [
        plan.Need("models", sum(sizes), both, "whole models"),
        plan.Need("loading", largest, (plan.LOADING,), "the whole model"),
        plan.Need("batch", forward, both, "the forward of a batch, and logits"),
    ]


def body_and_head(model: nn.Module, probe: Tensor) -> Parts:
    """Split the model into a body (ids → last hidden state) and an output head, if possible.

    Some families scale or cap their logits, or scale the hidden state. Body and head alone would
    then give a wrong number without a warning. So both ways run on a few tokens and must agree. If
    they do not, the body is the whole model, and the head does nothing.
    """

    def whole(ids: Tensor) -> Tensor:
        result = model(ids)
        return result if isinstance(result, Tensor) else result.logits

    logits, body = whole(probe), getattr(model, "base_model", model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    vocabulary = logits.shape[-1]
    if body is model or not isinstance(head, nn.Module):
        return Parts(whole, nn.Identity(), vocabulary)
    takes_cache = "use_cache" in inspect.signature(body.forward).parameters
    options = {"use_cache": False} if takes_cache else {}

    def hidden(ids: Tensor) -> Tensor:
        return body(input_ids=ids, **options).last_hidden_state

    parts_logits = head(hidden(probe))
    same = parts_logits.shape == logits.shape and torch.allclose(
        parts_logits.float(), logits.float(), rtol=1e-5, atol=1e-6, equal_nan=True
    )
    return Parts(hidden, head, vocabulary) if same else Parts(whole, nn.Identity(), vocabulary)


COMPUTED = ("dtype", "activations")
"""Keys of a protocol that say how a model computed."""

APART = frozenset({"dataset", "split", "items_in_split", "shots_from", "join", *COMPUTED})
"""Keys that the hash ignores: names of data hashed by its content, and those of the second part."""


def computed_by(model: nn.Module | Reader) -> dict[str, str]:
    """How a model computes: the dtype of its parameters, and how it rounds activations."""
    reader = reader_of(model)
    dtype = str(reader.dtype).removeprefix("torch.")
    return {"dtype": dtype, "activations": activations_of(reader.module)}


def protocol_id(kind: str, protocol: Mapping[str, Any]) -> str:
    """The id of a protocol.

    Args:
        kind: ppl, div, task or gen.
        protocol: JSON values; the module says which keys are ignored.
    """
    counted = {key: value for key, value in protocol.items() if key not in APART}
    hashed = _digest(json.dumps([kind, counted], sort_keys=True).encode())[:8]
    computed = [str(protocol[key]) for key in COMPUTED if protocol.get(key, "none") != "none"]
    return "-".join([kind, hashed, *computed]).replace(" ", "")


def judged_part(protocol_id: str) -> str:
    """The first part of an id; numbers of all models that share it are comparable."""
    return "-".join(protocol_id.split("-")[:2])


def fingerprint(content: Tensor | Sequence[Any]) -> str:
    """A hash of sixteen digits for token windows, or for JSON values such as task requests."""
    if isinstance(content, Tensor):
        return _digest(repr(tuple(content.shape)).encode() + content.cpu().numpy().tobytes())[:16]
    return _digest(json.dumps(list(content), ensure_ascii=False).encode())[:16]


def _digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def windows_of(
    text: str | Path, reader: Reader, tokenizer: Any, sequence_length: int | None, first: int | None
) -> tuple[Windows, dict[str, Any]]:
    """Return the windows of a text, and their protocol."""
    longest = positions_of(reader.module.config) or 2048
    joined = read_text(str(text))
    windows = evaluation_windows(
        joined.text, tokenizer, sequence_length or min(2048, longest), max_windows=first
    )
    named: dict[str, Any] = {"dataset": joined.dataset, "join": joined.join}
    start, computed = start_tokens(tokenizer), computed_by(reader)
    return windows, protocol(windows, **named, computed=computed, start=start)


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


class LossComparison:
    """Measures packed folders against the dense model, on some windows.

    Args:
        target: the dense model.
        file: the windows (`calibration.save_windows`); the dense losses are kept next to it.
        progress: receives every window.
    """

    def __init__(self, target: CheckpointTarget, file: Path, progress: Progress) -> None:
        self.target, self.file, self.progress = target, file, progress
        self.windows, self.start = load_windows(file), len(stored_start(file))

    def dense(self) -> list[float]:
        """The loss of the dense model on each window, from a file or measured."""

        def measure() -> Sequence[float]:
            reader = LayerwiseReader(self.target, STATES_BYTES, self.progress)
            return self._losses(reader, "judging the dense model")

        found: list[float] = kept(self.file.with_suffix(".dense.json"), measure)
        return found

    def increase(self, model: nn.Module | Reader) -> tuple[float, float | None]:
        """The rise of the loss of a model, in nats per token.

        Returns:
            Its mean over windows, and the standard error of the mean, from the differences of the
            windows; None for one window.
        """
        dense = self.dense()
        losses = self._losses(model, "judging the packed model")
        rises = [own - before for own, before in zip(losses, dense, strict=True)]
        return mean_of(rises), standard_error(rises)

    def _losses(self, model: nn.Module | Reader, label: str) -> tuple[float, ...]:
        """The loss of a model on each window."""
        with window_progress(self.progress, label, len(self.windows)) as report:
            found = perplexity(model, self.windows, start_tokens=self.start, progress=report)
        return found.losses
