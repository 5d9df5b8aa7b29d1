"""Cuts of the models of `zoo`, of every kind, for whatever number of groups and neurons."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from zoo import class_of, tiny_windows

from secateur.models.skeleton import quiet_transformers
from secateur.structured.cut import Cut, Sizes
from secateur.structured.design import Accounting, accounting
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint, cut_model

CUTS: dict[str, Callable[[Sizes], Cut]] = {
    "layers": lambda s: Cut(layers=(0, 2)),
    "last layers": lambda s: Cut(layers=(1, 2)),
    "groups": lambda s: Cut(groups={i: odd(s.groups[i]) for i in range(3)}),
    "groups, differing": lambda s: Cut(groups={0: (s.groups[0] - 1,), 2: odd(s.groups[2])}),
    "queries": lambda s: Cut(queries={i: queries(s, i) for i in range(3)}),
    "queries and more": lambda s: Cut(
        layers=(0, 2),
        queries={i: queries(s, i) for i in (0, 2)},
        neurons={0: (1, 2, 5)},
        hidden=odd(s.hidden),
    ),
    "neurons": lambda s: Cut(neurons={i: odd(s.neurons[i]) for i in range(3)}),
    "neurons, differing": lambda s: Cut(neurons={0: (1, 2, 5), 2: odd(s.neurons[2])}),
    "hidden": lambda s: Cut(hidden=odd(s.hidden)),
    "hidden, odd": lambda s: Cut(hidden=tuple(range(2, 29))),
    "without attention": lambda s: Cut(groups={0: (), 1: odd(s.groups[1])}),
    "without FFN": lambda s: Cut(neurons={1: (), 2: odd(s.neurons[2])}),
    "everything": lambda s: Cut(
        layers=(0, 2),
        groups={0: odd(s.groups[0]), 2: ()},
        neurons={0: (), 2: odd(s.neurons[2])},
        hidden=odd(s.hidden),
    ),
}  # fmt: skip

NEVER_PLAIN = {"groups, differing", "neurons, differing", "without attention", "without FFN",
               "queries and more", "everything"}  # fmt: skip
TIED_TO_HEADS = {"gpt2", "opt", "gpt_neox"}
"""Families whose classes compute the size of a head from hidden size and number of heads; none of
them has several query heads in a KV group."""

WANT_WHOLE_HEADS = {"llama", "gemma2", "gemma3"}
"""Families whose configurations refuse a hidden size that is no multiple of the heads."""


def odd(count: int) -> tuple[int, ...]:
    """Every second unit."""
    return tuple(range(1, count, 2))


def queries(sizes: Sizes, layer: int) -> tuple[int, ...]:
    """One query head of each KV group, not always the same."""
    each = sizes.heads_per_group
    return tuple(group * each + (group + layer) % each for group in range(sizes.groups[layer]))


def is_plain(family: str, name: str) -> bool:
    """Whether plain transformers has a class for the result."""
    tied = family in TIED_TO_HEADS and name.startswith(("groups", "hidden"))
    refused = family in WANT_WHOLE_HEADS and name == "hidden, odd"
    return name not in NEVER_PLAIN and not tied and not refused


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal to float32 rounding, which norms of small values enlarge."""
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) <= 1e-4 * scale


def cut_on_disk(
    model: Any, cut: Cut, folder: Path, varied: Literal["ignore", "error"] = "ignore"
) -> tuple[Any, Any]:
    """Cut a stored model, and load the result, which has every tensor and no other.

    Args:
        model: is stored first.
        cut: what is kept.
        folder: receives `source` and `out`.
        varied: what becomes of a warning that no plain class has these sizes.

    Returns:
        The account of the cut, and the loaded model.
    """
    with quiet_transformers():
        model.save_pretrained(folder / "source")
    with warnings.catch_warnings():
        warnings.simplefilter(varied, VariedSizesWarning)
        counted = cut_checkpoint(folder / "source", cut, folder / "out")
    with quiet_transformers():
        loaded, found = class_of(model.config).from_pretrained(
            folder / "out", output_loading_info=True
        )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return counted, loaded


def cut_quietly(model: Any, cut: Cut) -> Any:
    """The cut model, whether a plain class has its sizes or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VariedSizesWarning)
        return cut_model(model, cut)


def logits(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Logits without a cache."""
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits


def assert_generates(model: Any, prompt: torch.Tensor, alike: bool = True) -> None:
    """Four greedy tokens are the same with a cache and without, and so are their logits."""
    with quiet_transformers():
        with_cache, without = (
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4,
                do_sample=False, use_cache=use, output_logits=True, return_dict_in_generate=True,
            )
            for use in (True, False)
        )  # fmt: skip
    assert torch.equal(with_cache.sequences, without.sequences)
    assert not alike or close(torch.stack(with_cache.logits), torch.stack(without.logits))


def cut_twice(
    model: Any, cut: Cut, folder: Path, *, same: bool = True, alike: bool = True
) -> tuple[Any, Accounting, Any]:
    """Cut a model in memory and on disk, compare both and their accounts, and generate.

    Args:
        model: is stored and cut.
        cut: what is kept.
        folder: receives `source` and `out`.
        same: compare logits and generate, which a norm with an ε of its class forbids.
        alike: compare logits with a cache and without, which routers can drive apart.

    Returns:
        The model cut in memory, the account, and the model loaded.
    """
    smaller, windows = cut_quietly(model, cut), tiny_windows(2)
    counted, loaded = cut_on_disk(model, cut, folder)
    assert counted == accounting(model, cut)
    assert counted.after.parameters == sum(p.numel() for p in smaller.parameters())
    if same:
        assert close(logits(loaded.eval(), windows), logits(smaller, windows))
        assert_generates(loaded, windows[:, :9], alike)  # longer than the sliding windows
    return smaller, counted, loaded
