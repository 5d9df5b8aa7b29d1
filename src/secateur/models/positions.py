"""The context length of a model."""

from __future__ import annotations

from typing import Any


def positions_of(config: Any) -> int | None:
    """The number of positions in a model's configuration; None if it has none.

    Args:
        config: of a transformers model; of a model that also sees or hears, its text part.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return found if isinstance(found, int) else None
