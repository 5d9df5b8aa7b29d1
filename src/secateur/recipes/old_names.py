"""Names that options had before. They are refused, and the error gives the new name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

OLD_NAMES: Mapping[str, tuple[str, ...]] = {
    # verbs
    "distill": ("train",),
    "eval": ("evaluate",),
    "judge": ("evaluate",),
    "retrain": ("train",),
    # options
    "body_mib": ("max_body",),
    "budget_gib": ("max_memory",),
    "by": ("depth_by",),
    "context": ("context_length",),
    "context_tokens": ("context_length",),
    "epochs": ("distill_epochs",),
    "file_mib": ("max_size",),
    "for": ("target",),
    "generated": ("generated_windows",),
    "heads": ("kv_groups",),
    "hidden": ("hidden_size", "hidden_weight"),
    "judged_windows": ("text_windows",),
    "kept_layers": ("teacher_layers",),
    "learning_rate": ("tune_learning_rate",),
    "judge_length": ("text_sequence_length",),
    "max_windows": ("windows", "text_windows"),
    "memory_budget_gib": ("max_memory",),
    "micro_batch": ("micro_batch_windows",),
    "next_token": ("distill_next_token",),
    "override": ("overrides",),
    "parameters": ("keep_parameters", "method_parameters"),
    "passes": ("tune_passes",),
    "peak_learning_rate": ("distill_learning_rate",),
    "perplexity": ("text",),
    "prefix_cache_mib": ("prefix_cache",),
    "reference": ("dense",),
    "remask": ("tune_remask",),
    "samples": ("windows",),
    "target": ("machine",),
    "texts": ("text",),
    "units": ("depth_units",),
    "validation": ("validation_text",),
}
"""Old name → new names. `renamed` leaves out the names that a verb does not have."""


def renamed(name: str, known: Collection[str]) -> list[str]:
    """The new names of an old one.

    Args:
        name: as the user wrote it, with underscores or dashes.
        known: the present names.

    Returns:
        The new names that are in `known`; empty if `name` is not an old name.

    Example:
        >>> from secateur.recipes.old_names import renamed
        >>> renamed("samples", ["windows", "seed"])
        ['windows']
        >>> renamed("hidden", ["hidden_size", "ffn"])
        ['hidden_size']
    """
    return [new for new in OLD_NAMES.get(name.replace("-", "_"), ()) if new in known]


def unknown_name(what: str, name: str, known: Sequence[str]) -> str:
    """The hint of an error about an unknown name: its new name, a similar one, or all names.

    Args:
        what: a key, an option, …
        name: as the user wrote it.
        known: all present names.
    """
    new = renamed(name, known)
    if new:
        return f"this {what} is now called {' or '.join(repr(x) for x in new)}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what}; {hint}"
