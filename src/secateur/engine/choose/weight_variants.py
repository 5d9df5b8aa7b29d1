"""Versions of decoder layers that differ in the weights of their linears, for a tournament.

A version may also round the inputs of linears, as the kernels do where a matrix is integers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.func import functional_call

from secateur.engine.choose.tournament import Version, Versions
from secateur.engine.stream.ends import ModelEnds
from secateur.models.architecture import Linear, linears_of
from secateur.quantization.activations import round_activations
from secateur.sparsity.evolution import Candidate


class WeightVariants(ABC):
    """Decoder layers whose linears have the weights of given levels.

    The version of a layer is a tuple with the level of each of its named linears. In the dense
    model it is `dense`.

    Args:
        ends: ends of the model.
        names: names of the linears; a candidate has a level for each.
    """

    dense: ClassVar[Version] = "dense"

    def __init__(self, ends: ModelEnds, names: Sequence[str]) -> None:
        self.ends, self.names = ends, list(names)
        layer_name, count = ends.target.architecture.layer_name, len(ends.target.layers)
        prefixes = [layer_name(index) + "." for index in range(count)]
        self.places = [
            [place for place, name in enumerate(names) if name.startswith(prefix)]
            for prefix in prefixes
        ]

    def versions(self, candidate: Candidate) -> Versions:
        """The levels of a candidate, layer by layer."""
        return tuple(tuple(candidate[place] for place in places) for places in self.places)

    @contextmanager
    def opened(
        self, number: int, layer: nn.Module
    ) -> Iterator[Callable[[Version], Callable[[Tensor], Tensor]]]:
        """The forward of each version. Making a forward reads its weights."""
        with self.source(number) as source:

            def forward_of(version: Version) -> Callable[[Tensor], Tensor]:
                weights = self.weights(number, layer, version, source)
                rounded = self.rounded(number, layer, version)

                def replaced(*args: Any, **kwargs: Any) -> Any:
                    with rounded_inputs(rounded):
                        return functional_call(layer, weights, args, kwargs)

                return lambda hidden: self.ends.run(number, replaced, hidden)

            yield forward_of

    def weights(
        self, number: int, layer: nn.Module, version: Version, source: Any
    ) -> dict[str, Tensor]:
        """The weights of a version by their names in the layer; empty for the dense model."""
        found = {}
        for name, linear, level in self.leveled(number, layer, version):
            weight = self.weight_of(linear, level, source)
            if weight is not None:
                found[f"{name}.weight"] = weight
        return found

    def rounded(self, number: int, layer: nn.Module, version: Version) -> list[nn.Module]:
        """The linears of a version whose inputs are rounded."""
        found = self.leveled(number, layer, version)
        return [linear.module for _, linear, level in found if self.rounds_inputs(level)]

    def leveled(
        self, number: int, layer: nn.Module, version: Version
    ) -> Iterator[tuple[str, Linear, int | None]]:
        """Each linear of a version, its name in the layer, and its level; none if it is dense."""
        if not isinstance(version, tuple):
            return
        level_of = dict(zip((self.names[p] for p in self.places[number]), version, strict=True))
        prefix = self.ends.target.architecture.layer_name(number)
        for name, linear in linears_of(layer, prefix).items():
            yield name, linear, level_of.get(linear.name)

    def rounds_inputs(self, level: int | None) -> bool:
        """Whether a level rounds the inputs of its linears."""
        return False

    @abstractmethod
    def source(self, number: int) -> AbstractContextManager[Any]:
        """The place that the weights of a layer are read from, opened."""
        ...

    @abstractmethod
    def weight_of(self, linear: Linear, level: int | None, source: Any) -> Tensor | None:
        """The weight of a linear as its module stores it; None if it keeps its own.

        Args:
            linear: the linear.
            level: its level; None if it is not among the named ones.
            source: opened by `source`.
        """
        ...


@contextmanager
def rounded_inputs(linears: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which these linears round their inputs, and multiply in the dtype they have."""

    def rounded(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (round_activations(args[0]).to(args[0].dtype),)

    hooks = [linear.register_forward_pre_hook(rounded) for linear in linears]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
