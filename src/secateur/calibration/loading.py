"""Loads calibration windows from a text, several texts, or a file of windows, with their record."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from secateur.calibration.documents import parts_of, read_documents, shares
from secateur.calibration.windows import (
    EXTRA,
    START,
    WindowPlan,
    check_fit,
    load_windows,
    make_windows,
    stored_extra,
    stored_start,
)
from secateur.errors import RecipeError
from secateur.models.tokenizer import Tokenizer, start_tokens
from secateur.types import Windows


def load_calibration(
    source: str,
    tokenizer: Tokenizer | None,
    plan: WindowPlan,
    *,
    vocab_size: int,
    positions: int | None = None,
    field: str = "text",
    split: str | None = None,
    config: str | None = None,
    pictures: bool = False,
) -> tuple[Windows, dict[str, Any]]:
    """Calibration windows from texts or a file of ready windows, with a record of both.

    Args:
        source: a source of `read_documents`, several with weights (`mix.parts_of`), or a
            `.safetensors` file of windows. All windows of such a file are used unchanged: the file
            decides their number and length.
        tokenizer: of the model that will read the windows; may be None for ready windows.
        plan: how windows are cut from a text.
        vocab_size: of the model; token ids must be below it.
        positions: how many tokens the model reads at once; None if it does not say.
        field: as in `read_documents`.
        split: as in `read_documents`.
        config: as in `read_documents`.
        pictures: as in `load_windows`.

    Returns:
        The windows [samples, sequence_length], and a record of JSON values: the source, the plan,
        the start tokens if each window begins with some, the SHA-256 of the windows, by which two
        runs can be seen to have used the same, and the number of extra windows at the end, if there
        are any; the other numbers are without them.

    Raises:
        SourceError: the source cannot be read, has too little text, or gives tokens outside the
            model's vocabulary.
        RecipeError: the source is a text and there is no tokenizer, or the windows are longer than
            the model's context.
    """
    parts = parts_of(source)
    if len(parts) > 1:
        load = partial(
            load_calibration,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            positions=positions,
            field=field,
            split=split,
            config=config,
        )
        return _mixed(parts, plan, load)
    record: dict[str, Any] = {"source": source}
    source = parts[0][0]
    if source.endswith(".safetensors"):
        file = Path(source).expanduser()
        windows = load_windows(file, vocab_size=vocab_size, positions=positions, pictures=pictures)
        start, extra = stored_start(file), stored_extra(file)
    else:
        if tokenizer is None:
            raise RecipeError(
                "calibration on a text needs a tokenizer",
                where=source,
                remedy="give the tokenizer, or token windows [samples, sequence_length] or a "
                ".safetensors file of them",
            )
        documents = read_documents(source, field=field, split=split, config=config)
        windows = make_windows(documents, tokenizer, plan)
        check_fit(windows, source, vocab_size=vocab_size, positions=positions)
        start, extra = start_tokens(tokenizer), max(0, len(windows) - plan.windows)
        record |= {"documents": len(documents), "seed": plan.seed, "packing": plan.packing}
    record |= {START: list(start)} if start else {}
    record |= {EXTRA: extra} if extra else {}
    own = windows[: len(windows) - extra]
    return windows, record | _size_of(own) | {"vocabulary": vocab_size}


def _mixed(
    parts: Sequence[tuple[str, float]], plan: WindowPlan, load: Callable[..., Any]
) -> tuple[Windows, dict[str, Any]]:
    """Calibration windows of several texts, in an order that the seed draws."""
    weights = tuple(weight for _, weight in parts)
    counts, extras = shares(plan.windows, weights), shares(plan.extra, weights)
    for (name, _), count in zip(parts, counts, strict=True):
        if not count or name.endswith(".safetensors"):
            raise RecipeError(
                f"{name} would have none of the {plan.windows} windows"
                if not count
                else f"{name} has ready windows, which cannot be mixed with texts",
                where="calibration",
                remedy="ask for more windows, or leave this text out",
            )
    found = [
        load(name, plan=replace(plan, windows=count, extra=extra))
        for (name, _), count, extra in zip(parts, counts, extras, strict=True)
    ]
    order = list(range(plan.windows))
    random.Random(plan.seed).shuffle(order)
    windows = torch.cat([x[:n] for (x, _), n in zip(found, counts, strict=True)])[order]
    more = torch.cat([x[n:] for (x, _), n in zip(found, counts, strict=True)])
    records = [record for _, record in found]
    record = records[0] | {
        "source": ",".join(f"{name}={weight:g}" for name, weight in parts),
        "texts": [{"source": r["source"], "samples": r["samples"]} for r in records],
        "documents": sum(r["documents"] for r in records),
        **_size_of(windows),
    }
    record |= {EXTRA: len(more)} if len(more) else {}
    return torch.cat([windows, more]), record


def _size_of(windows: Windows) -> dict[str, Any]:
    """The numbers and the digest of windows, for their record."""
    return {
        "samples": windows.shape[0],
        "sequence_length": windows.shape[1],
        "tokens": windows.numel(),
        "sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
    }
