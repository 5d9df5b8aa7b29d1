"""A tiny language model that has really learned: Python, letter by letter.

    python tests/support/trained.py FOLDER        writes the model and its tokenizer

Its text is the standard library of the Python that runs this, so it needs no network. One file in
ten is held out.
"""

from __future__ import annotations

import functools
import math
import re
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import CHARACTERS, SPECIAL, tiny_tokenizer
from torch import Tensor

from secateur.models.skeleton import quiet_transformers

STEPS, WARM_UP, BATCH, LENGTH, RATE = 600, 20, 24, 64, 4e-3
OnStep = Callable[[int, int, Any, Any], None]


def source_files(held_out: bool = False) -> list[Path]:
    """The top-level modules of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file for number, file in enumerate(files) if (number % 10 == 5) == held_out]


@functools.cache
def source_text(held_out: bool = False) -> str:
    """Their text, in the tokenizer's characters."""
    unknown = re.compile(f"[^{re.escape(''.join(CHARACTERS))}]+")
    texts = (file.read_text(encoding="utf-8", errors="ignore") for file in source_files(held_out))
    return unknown.sub("", "".join(texts))


def source_ids(held_out: bool = False) -> Tensor:
    """Its token ids; one character is one token."""
    ids = bytearray(256)
    for number, character in enumerate(CHARACTERS, len(SPECIAL)):
        ids[ord(character)] = number
    text = bytearray(source_text(held_out).encode().translate(ids))
    return torch.frombuffer(text, dtype=torch.uint8).long()


def untrained(seed: int = 0) -> Any:
    """86 000 weights in the matrices of two layers."""
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def rate(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: a short warm-up, then half a cosine to 5 %."""
    warm = min(1.0, (step + 1) / WARM_UP)
    return RATE * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: Any,
    ids: Tensor,
    *,
    seed: int = 0,
    steps: int = STEPS,
    first_step: int = 0,
    kept: dict[str, Tensor] | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Adam on random windows, in place; the plainest loop there is, independent of the library's.

    Args:
        model: to be trained.
        ids: all text.
        seed: of the windows; a step sees the same ones whatever the first step is.
        steps: of the whole training.
        first_step: where to begin in it.
        kept: masks to hold.
        on_step: a hook.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=random).tolist()
        if step < first_step:
            continue
        windows = torch.stack([ids[i : i + LENGTH] for i in starts])
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        model(input_ids=windows, labels=windows, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in (kept or {}).items():
                model.get_parameter(name).mul_(mask)
        if on_step is not None:
            on_step(step + 1, steps, model, optimizer)
    model.eval()


@torch.no_grad()
def held_out_loss(model: Any, ids: Tensor, windows: int = 256) -> float:
    """Nats per character on windows of text that was not trained on."""
    model.eval()
    cut = ids[: windows * LENGTH].view(windows, LENGTH)
    losses = [model(input_ids=b, labels=b, use_cache=False).loss.item() for b in cut.split(64)]
    return sum(losses) / len(losses)


def save_trained(folder: Path, *, seed: int = 0, steps: int = STEPS) -> Path:
    """Train the model and write it with its tokenizer."""
    model = untrained(seed)
    train(model, source_ids(), seed=seed, steps=steps)
    with quiet_transformers():
        model.save_pretrained(folder)
    tiny_tokenizer(model_max_length=256).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    save_trained(Path(sys.argv[1]))
