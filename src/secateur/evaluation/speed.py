"""Measure speed and memory of a model on this machine, next to other ways to run it.

Every backend runs in its own process (`python -m secateur.evaluation.speed`), so that its memory
can be measured and thread pools do not interfere. All backends load first. Then they take turns:
one reads the prompt and generates its tokens while the others sleep, then the next. So other load
on the machine affects all of them alike.

| backend                  | weights                            | loop                         |
|--------------------------|------------------------------------|------------------------------|
| `packed`                 | as they are stored                 | one call into C per token    |
| `packed in transformers` | as they are stored                 | transformers                 |
| `dense bf16`             | expanded, bfloat16                 | one call into C per token    |
| `dense int8`             | expanded, int8, one scale per row  | one call into C per token    |
| `torch bf16`             | expanded, bfloat16                 | transformers                 |
| `torch int8`             | expanded, int8 weight-only, torch's | transformers                 |
| a GGUF file              | as llama.cpp has quantized them    | llama.cpp                    |

The third and fourth are our own kernels without sparsity. So a gain over them comes from the zeros
alone.

Those in transformers run on a GPU too, but for torch's int8.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from secateur.errors import KernelError, SecateurError, install_extra
from secateur.machine import give_back
from secateur.models.skeleton import empty_cache
from secateur.progress import Progress, Silent
from secateur.quantization.int8 import quantize_rows
from secateur.runs.environment import usable_processors
from secateur.runs.measured import TimingEntry
from secateur.runtime.decode import Decoder
from secateur.runtime.install import rounded
from secateur.runtime.kernels.library import library
from secateur.runtime.kernels.linear import PackedLinear
from secateur.runtime.layer_forms import why_not
from secateur.runtime.load import load
from secateur.timing import alternate

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Speed:
    """Time and memory of one backend, or the reason why it could not run.

    Args:
        name: name of the backend, or of a GGUF file.
        each_token: seconds per token after the first; one number per round.
        first_token: seconds from the prompt to the first token; one number per round.
        resident_bytes: memory of the process with the model loaded, minus the memory of a process
            with only the libraries.
        failure: why it could not run; None if it ran.
    """

    name: str
    each_token: tuple[float, ...] = ()
    first_token: tuple[float, ...] = ()
    resident_bytes: int = 0
    failure: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the first token; the median over rounds."""
        return 1 / statistics.median(self.each_token)

    def record(self, prompt_tokens: int) -> TimingEntry:
        """Medians, and the slowest and the fastest round."""
        if self.failure is not None:
            return TimingEntry(contender=self.name, failure=self.failure)
        rates = sorted(1 / x for x in self.each_token)
        return TimingEntry(
            contender=self.name,
            tokens_per_second=self.tokens_per_second,
            tokens_per_second_least=rates[0],
            tokens_per_second_most=rates[-1],
            prompt_tokens_per_second=prompt_tokens / statistics.median(self.first_token),
            first_token_seconds=statistics.median(self.first_token),
            resident_bytes=self.resident_bytes,
            rounds=len(rates),
        )


class Process:
    """A backend in its own process. It loads later."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.rounds: list[Round] = []
        self.ready: dict[str, Any] = {"failure": "it was not loaded"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "secateur.evaluation.speed"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def load(self, prompt: Sequence[int], new_tokens: int, device: str) -> None:
        """Start loading; `ready` returns the outcome."""
        asked = {"name": self.name, "folder": str(self.folder), "prompt": list(prompt)}
        asked["device"] = device
        threads = usable_processors()
        self.ready = self.ask({**asked, "new_tokens": new_tokens, "threads": threads})

    def ask(self, question: Any) -> dict[str, Any]:
        """Send one line to the process and read one line back; a failure if the process ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError:  # a closed pipe
            answer = ""
        if not answer:
            return {"failure": f"the process ended with code {self.process.wait()}"}
        answered: dict[str, Any] = json.loads(answer)
        return answered

    def round(self, progress: Progress) -> None:
        """Time a round, unless an earlier one failed."""
        if "failure" in self.ready:
            return
        answered = self.ask("round")
        if "failure" in answered:
            self.ready = answered
        else:
            self.rounds.append(answered)
        progress.step(note=f"round {len(self.rounds)}: {self.name}")

    def speed(self) -> Speed:
        """The result of all rounds."""
        name = self.name if self.name in BACKENDS else Path(self.name).name
        if "failure" in self.ready or not self.rounds:
            return Speed(name, failure=self.ready.get("failure", "no round was finished"))
        return Speed(
            name,
            tuple(r["each_token"] for r in self.rounds),
            tuple(r["first_token"] for r in self.rounds),
            self.ready["resident_bytes"],
        )

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # the process ended before it read the question
                    stream.close()


def take_turns(
    backends: Sequence[tuple[str, Path]],
    *,
    prompt: Sequence[int],
    new_tokens: int,
    rounds: int,
    seconds: float | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Speed]:
    """Time backends in turns, each with its own checkpoint.

    Args:
        backends: names of `BACKENDS`, or paths of GGUF files, each with a checkpoint's folder.
        prompt: token ids.
        new_tokens: tokens to generate in each round, at least 2.
        rounds: largest number of rounds; before them each backend generates two tokens to warm up
        seconds: no round starts after this many seconds, but at least two rounds run.
        device: where they run; on a GPU only those for which `on_gpu` is true.
        progress: receives every backend and every round.

    Returns:
        One result per backend, in the same order.
    """
    progress = progress or Silent()
    processes: list[Process] = []
    try:
        for name, folder in backends:  # all import libraries in parallel
            processes.append(Process(name, folder))
        for process in processes:  # each takes another time, so no share of all is known
            progress.start(f"loading {process.name}", 1)
            process.load(prompt, new_tokens, device)
            progress.finish()
        running = [p for p in processes if "failure" not in p.ready]
        progress.start("measuring", rounds * len(running))
        alternate(running, lambda p: p.round(progress), len, turns=rounds, seconds=seconds)
        progress.finish()
    finally:
        for process in processes:
            process.end()
    return [p.speed() for p in processes]


def _serve() -> None:
    """Run the process of one backend: read a line, answer with a line."""
    if sys.platform == "linux":  # end with the parent; elsewhere the end of the input does it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    asked = json.loads(sys.stdin.readline())
    torch.set_num_threads(asked["threads"])
    if (kernels := library()) is not None:
        kernels.sct_set_threads(asked["threads"])
    before = psutil.Process().memory_info().rss  # with all libraries, without a model
    prompt = torch.tensor(asked["prompt"])
    capacity = len(prompt) + asked["new_tokens"]
    try:
        device, folder = torch.device(asked["device"]), Path(asked["folder"])
        run = load_backend(asked["name"], folder, capacity, asked["threads"], device)
        run(prompt, 2)
        give_back()  # an int8 backend has rounded larger weights, which are gone
        held = psutil.Process().memory_info().rss - before
        if device.type == "cuda":
            held = torch.cuda.memory_allocated(device)
        _answer({"resident_bytes": held})
        for _ in sys.stdin:
            _answer(run(prompt, asked["new_tokens"]))
    except Exception as error:  # any error is reported, so that the other backends continue
        _answer({"failure": _failure_of(error)})


def _failure_of(error: Exception) -> str:
    """An error in one line, with its remedy."""
    if isinstance(error, SecateurError):
        return "; ".join(part for part in (error.what, error.remedy) if part)
    return next(iter(str(error).splitlines()), type(error).__name__)


def _answer(record: dict[str, Any]) -> None:
    """Write one line as the answer."""
    ANSWERS.write(json.dumps(record) + "\n")
    ANSWERS.flush()


Round = dict[str, float]
"""Seconds to the first token, and seconds per token after it."""

Run = Callable[[Tensor, int], Round]
"""Reads a prompt and generates so many tokens, always the most likely one."""


def _timed(read: Callable[[], Any], step: Callable[[Any], Any], new_tokens: int) -> Round:
    """Time a model that reads its prompt and then takes each token that it gave."""
    started = time.perf_counter()
    token = read()
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        token = step(token)
    each = (time.perf_counter() - first) / max(1, new_tokens - 1)
    return {"first_token": first - started, "each_token": each}


def _in_transformers(model: Any) -> Run:
    """A transformers model, called token by token with its own cache, without `generate`."""
    cache: dict[str, Any] = {}

    def after(ids: Tensor, **options: Any) -> Tensor:
        ids = ids.view(1, -1).to(model.device)
        out = model(input_ids=ids, use_cache=True, **options, **cache)
        token: Tensor = out.logits[0, -1].argmax().cpu()  # a GPU has finished then
        return token

    def read(prompt: Tensor) -> Tensor:
        cache.update(empty_cache(model))
        return after(prompt, logits_to_keep=1)  # no logits of the other tokens

    @torch.inference_mode()
    def run(prompt: Tensor, new_tokens: int) -> Round:
        return _timed(partial(read, prompt), after, new_tokens)

    return run


def _in_our_loop(model: Any, capacity: int) -> Run:
    """Our decode loop."""
    if reason := why_not(model, capacity):
        raise KernelError(reason, remedy="contenders in transformers run it")
    decoder = Decoder(model, capacity)

    def run(prompt: Tensor, new_tokens: int) -> Round:
        return _timed(
            lambda: int(decoder.prefill(prompt).argmax()),
            lambda token: int(decoder.step(token).argmax()),
            new_tokens,
        )

    return run


def _in_llama_cpp(file: Path, capacity: int, threads: int) -> Run:
    """A GGUF file in llama.cpp, called token by token as our own loop is."""
    try:
        from llama_cpp_py_sync import Llama
    except ImportError as error:
        remedy = install_extra("llamacpp")
        raise KernelError("llama.cpp is not installed", remedy=remedy) from error
    engine = Llama(str(file), n_ctx=capacity, n_threads=threads)

    def after(tokens: Any, past: int) -> int:
        engine._eval_tokens(tokens, past)
        logits = engine._lib.llama_get_logits_ith(engine._ctx, -1)
        row = engine._ffi.buffer(logits, 4 * engine.n_vocab)
        return int(torch.frombuffer(row, dtype=torch.float32).argmax())

    def run(prompt: Tensor, new_tokens: int) -> Round:
        engine._clear_context_state()
        past = itertools.count(len(prompt))
        return _timed(
            lambda: after(prompt.tolist(), 0),
            lambda token: after([token], next(past)),
            new_tokens,
        )

    return run


class _TorchInt8(nn.Module):
    """torch's weight-only int8 product: its fastest one for few tokens on a CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.integers, scale = quantize_rows(linear.weight.detach().float())
        self.scale, self.bias = scale.to(torch.bfloat16), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """The product for [..., in]."""
        flat = x.reshape(-1, x.shape[-1])
        # [tokens, in] times [out, in], one scale for each row
        y = torch._weight_int8pack_mm(flat, self.integers, self.scale)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class _How(NamedTuple):
    """How a backend runs a model: expanded or packed, rounded to int8, in our loop or not."""

    expand: bool
    int8: Callable[[nn.Linear], nn.Module] | None = None
    ours: bool = True


BACKENDS: Mapping[str, _How] = {
    "packed": _How(expand=False),
    "packed in transformers": _How(expand=False, ours=False),
    "dense bf16": _How(expand=True),
    "dense int8": _How(
        expand=True, int8=lambda x: PackedLinear(rounded(x.weight.detach()), x.bias)
    ),
    "torch bf16": _How(expand=True, ours=False),
    "torch int8": _How(expand=True, int8=_TorchInt8, ours=False),
}
USUAL_BACKENDS = ("packed", "dense bf16", "dense int8", "torch bf16")
"""The most useful backends. The others take long and are never the fastest."""


def on_gpu(name: str) -> bool:
    """Whether a backend runs on a GPU too."""
    return name in BACKENDS and not BACKENDS[name].ours and BACKENDS[name].int8 is None


def load_backend(name: str, folder: Path, capacity: int, threads: int, device: torch.device) -> Run:
    """Load a backend. Any other name is the path of a GGUF file."""
    if name not in BACKENDS:
        return _in_llama_cpp(Path(name), capacity, threads)
    how = BACKENDS[name]
    dtype = torch.bfloat16 if how.expand else None
    model = load(folder, dtype=dtype, expand=how.expand, device=device)
    if how.int8 is not None:  # all linears, the output head among them
        linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        for path, linear in linears:
            model.set_submodule(path, how.int8(linear))
    return _in_our_loop(model, capacity) if how.ours else _in_transformers(model)


if __name__ == "__main__":
    # output of libraries must not mix with the answers
    ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _serve()
