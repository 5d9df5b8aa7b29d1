"""One walk over the decoder layers: in order, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from secateur.engine.stream.targets import Target


def walk_layers(
    target: Target, numbers: Iterable[int] | None = None
) -> Iterator[tuple[int, nn.Module]]:
    """Yield each decoder layer with its weights.

    A layer has its weights until the next one is yielded. When the loop ends early, by `break` or
    by an exception, the layer is emptied as well.

    Args:
        target: the model.
        numbers: numbers of the layers to visit, in this order; None for all, from first to last.

    Yields:
        The number of a layer, and the layer.
    """
    order = list(range(len(target.layers)) if numbers is None else numbers)
    try:
        for number, following in zip(order, [*order[1:], None], strict=False):
            with target.layer(number) as layer:
                target.expect(following)
                yield number, layer
    finally:
        target.expect(None)
