"""Everything that an advice depends on, as data: the same question has the same answer.

`secateur advise` writes it beside the answer, so `secateur report` computes the answer again and
the what-if page can vary it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from secateur.advisor.advice import Advice, Need, advise_on
from secateur.advisor.capacity import Load, ServingDevice
from secateur.advisor.facts import Facts, Hardware
from secateur.advisor.options import CompressionWay, options_for
from secateur.advisor.shape import LayerKind, ModelShape
from secateur.advisor.speed import Measured, Roofline, TimeModel, TokenTimes
from secateur.models.layer_cache import LayerCache


@dataclass(frozen=True)
class AdviceQuestion:
    """A model, a device and a need.

    Attributes:
        model: the sizes, not cut.
        hardware: what it runs on, with its price.
        memory_bytes: of one device.
        facts: efficiency, prices, published losses.
        need: the load and the bounds.
        times: measured on this machine, by the name of each option; None for the roofline.
    """

    model: ModelShape
    hardware: Hardware
    memory_bytes: int
    facts: Facts
    need: Need
    times: Mapping[str, TokenTimes] | None = None

    @property
    def device(self) -> ServingDevice:
        """The memory of the device and its time model."""
        kind = self.hardware.kind
        alone = {"most": 1, "most_batch": 1} if kind == "cpu" else {}
        return ServingDevice(kind, self.memory_bytes, self.speed, **alone)

    def speed(self, devices: int) -> TimeModel:
        """The times when so many devices share a model."""
        if self.times is not None:
            return Measured(self.model, self.times)
        return Roofline(self.hardware, self.facts.efficiency[self.hardware.kind], devices)

    def options(self) -> list[CompressionWay]:
        """The ways to compare, the model itself first."""
        return list(options_for(self.model, self.hardware))

    def answer(self) -> Advice:
        """The advice."""
        return advise_on(
            self.model, self.hardware, self.device, self.facts, self.need, self.others()
        )

    def others(self) -> list[tuple[Hardware, ServingDevice]]:
        """All other devices with a data sheet, with their memory and speed."""
        return [
            (other, self.on(other).device)
            for other in self.facts.hardware.values()
            if other.on_paper and other.name != self.hardware.name
        ]

    def on(self, other: Hardware) -> AdviceQuestion:
        """The same question about another device, by its data sheet."""
        size = round((other.memory_gib or 0) * 2**30)
        return replace(self, hardware=other, memory_bytes=size, times=None)

    def with_need(self, **changes: Any) -> AdviceQuestion:
        """The same question with another load or other bounds.

        Args:
            **changes: fields of `Need` or of `Load`.
        """
        bounds = {name: value for name, value in changes.items() if name in BOUNDS}
        load = {name: value for name, value in changes.items() if name not in BOUNDS}
        need = replace(self.need, load=replace(self.need.load, **load), **bounds)
        return replace(self, need=need)

    def to_json(self) -> dict[str, Any]:
        """The question as one JSON object."""
        return {
            "model": asdict(self.model),
            "hardware": self.hardware.model_dump(mode="json"),
            "memory_bytes": self.memory_bytes,
            "facts": self.facts.model_dump(mode="json"),
            "need": asdict(self.need),
            "times": self.times and {name: asdict(one) for name, one in self.times.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> AdviceQuestion:
        """The question that `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is no such object.
        """
        times, need = record["times"], record["need"]
        kinds = tuple(
            LayerKind(kind["layers"], LayerCache(**kind["cache"]))
            for kind in record["model"]["kinds"]
        )
        return cls(
            ModelShape(**{**record["model"], "kinds": kinds}),
            Hardware.model_validate(record["hardware"]),
            int(record["memory_bytes"]),
            Facts.model_validate(record["facts"]),
            Need(**{**need, "load": Load(**need["load"])}),
            times and {name: TokenTimes(**one) for name, one in times.items()},
        )


BOUNDS = ("quality_loss", "gpu_hours")
