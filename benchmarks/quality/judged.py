"""One judge for all contenders: loss and divergence beside the dense model, window by window."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from secateur.calibration.run_windows import WindowReader
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.shared import CalibrationWindows

LENGTH = 512

MEASURES = ("loss", "divergence", "agreement")
"""Of a window: the mean loss of the next token, the mean Kullback-Leibler divergence from the dense
model's distribution, both in nats, and the share of tokens with the dense model's first choice."""


def arguments(described: str, judged: int, *texts: str) -> argparse.ArgumentParser:
    """The model, its texts, and how many windows of each judge by default."""
    parser = argparse.ArgumentParser(description=described.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", help="in the table")
    for name in ("calibration", *texts, "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--judged", type=int, default=judged, help="windows of each text")
    return parser


def windows_of(source: Path, text: Path, count: int, work: Path) -> Tensor:
    """The same windows for all contenders: read once, then kept in `work`."""
    file = work / f"{text.name}-{count}.safetensors"
    if not file.exists():
        config = secateur.load(source, dtype=torch.float32, expand=True).config
        reader = WindowReader(config, lambda: load_tokenizer(source))
        options = CalibrationWindows(windows=count, sequence_length=LENGTH)
        save_file({"input_ids": reader.read(str(text), options)[0]}, file)
    return load_file(file)["input_ids"]


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """The logits of one window [length, vocabulary]."""
    found: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return found


class Judge:
    """Compares models with the dense model.

    Args:
        source: the folder of the dense model.
        texts: windows of each text.
        work: where the dense model's states are kept.
    """

    def __init__(self, source: Path, texts: dict[str, Tensor], work: Path) -> None:
        self.source, self.texts, self.work = source, texts, work

    @cached_property
    def dense(self) -> Any:
        """The dense model."""
        return secateur.load(self.source, dtype=torch.float32, expand=True).eval()

    @torch.no_grad()
    def states(self, text: str, count: int) -> Tensor:
        """The dense model's last states [count, length, channels]; its head makes logits of them."""
        file = self.work / f"dense-{text}.safetensors"
        known = load_file(file)["states"] if file.exists() else torch.empty(0)
        if len(known) < count:
            rows = self.texts[text][len(known) : count]
            made = [self.dense.base_model(input_ids=row[None], use_cache=False)[0] for row in rows]
            known = torch.cat([known, *made])
            save_file({"states": known}, file)
        return known[:count]

    @torch.no_grad()
    def measured(
        self, logits: Callable[[Tensor], Tensor], text: str, first: int, last: int
    ) -> Iterator[list[float]]:
        """The `MEASURES` of some windows of a text.

        Args:
            logits: of the contender, float32 [length, vocabulary] of token ids [length].
            text: the name of the text.
            first: the number of the first window.
            last: one more than the number of the last.
        """
        states, head = self.states(text, last), self.dense.get_output_embeddings()
        for number in range(first, last):
            ids = self.texts[text][number]
            found = logits(ids).log_softmax(-1)
            exact = head(states[number]).log_softmax(-1)
            loss = -found[:-1].gather(-1, ids[1:, None]).mean()
            agreement = (found.argmax(-1) == exact.argmax(-1)).float().mean()
            divergence = (exact.exp() * exact.sub_(found)).sum(-1).mean()
            yield [float(loss), float(divergence), float(agreement)]
