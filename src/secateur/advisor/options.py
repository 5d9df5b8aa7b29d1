"""The ways to make a model smaller that the advice compares: structure × zeros × values.

An option is offered only where something runs it faster or smaller (`ENGINES`). So unstructured
zeros are not offered for GPUs, where no engine skips them, and 2:4 is not offered for CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from secateur.advisor.facts import Estimate, Facts, Hardware
from secateur.models.shape import LARGE_ENDS, ModelShape


@dataclass(frozen=True)
class Values:
    """How weights are stored.

    Attributes:
        name: such as `int4`.
        bits: of a weight, with its scales.
        value_bits: of a weight, without scales.
        product: the type of its products, a key of `Hardware.tflops`. int4 is expanded to bfloat16.
        loss: the key of its published loss.
        takes: the method whose published time it takes to make; empty if nothing is made.
        commands: what makes it; {model} is the model, {source} what the step before wrote.
        small_ends: whether embedding and head have 8 bits in every model.
    """

    name: str
    bits: float
    value_bits: int
    product: str
    loss: str
    takes: str
    commands: tuple[str, ...]
    small_ends: bool = False


VALUES = {
    one.name: one
    for one in (
        Values("bf16", 16, 16, "bf16", "none", "", ()),
        Values("fp8", 8, 8, "fp8", "fp8", "magnitude",
               ("quantize {source} to FP8 (W8A8) with llm-compressor or vLLM",)),
        Values("int8", 8, 8, "int8", "int8", "alps",
               ("secateur compress {source} --values int8 --calibration TEXT --output SMALL",)),
        Values("int4", 4.125, 4, "bf16", "int4", "alps",
               ("secateur compress {source} --values int4 --calibration TEXT --output SMALL",)),
        Values("q8_0", 8.5, 8, "bf16", "q8_0", "magnitude",
               ("secateur export {source} --to gguf --type q8_0 --output GGUF",), True),
        Values("q4_0", 4.5, 4, "bf16", "int4", "alps",
               ("secateur compress {source} --values int4 --calibration TEXT --output SMALL",
                "secateur export {source} --to gguf --type q4_0 --output GGUF"), True),
    )
}  # fmt: skip
"""int4 counts a scale of 8 bits for 64 weights, or of 16 bits for 128. The last two are llama.cpp's
types; rounding without a calibration text is one pass over the weights, as magnitude pruning is."""


@dataclass(frozen=True)
class Zeros:
    """Which weights are zero.

    Attributes:
        name: such as `50%`.
        sparsity: the fraction of zeros.
        index_bits: bits of a weight that say where the zeros are.
        decode: decoding is faster by this much than the bytes say; None where bytes decide.
        loss: the key of its published loss.
        takes: the method whose published time it takes to make; empty if nothing is made.
        commands: what makes them, likewise.
    """

    name: str
    sparsity: float
    index_bits: float
    decode: Estimate | None
    loss: str
    takes: str
    commands: tuple[str, ...]


ZEROS = {
    one.name: one
    for one in (
        Zeros("dense", 0.0, 0.0, None, "none", "", ()),
        Zeros("2:4", 0.5, 1.0, Estimate(1.0, 1.15, 1.24), "2:4", "alps",
              ("secateur prune {source} --pattern 2:4 --effort best --output SPARSE",)),
        Zeros("50%", 0.5, 1.0, None, "50%", "alps",
              ("secateur prune {source} --sparsity 0.5 --effort best --output SPARSE",)),
    )
}  # fmt: skip
"""2:4: Wanda's paper has 1.24 for a whole model, TensorRT-LLM's issues 1731 and 1802 none."""


@dataclass(frozen=True)
class CutAway:
    """What is cut away.

    Attributes:
        name: such as `layers-25%`.
        linears: the fraction of every layer that stays.
        layers: the fraction of layers that stays.
        experts: the fraction of experts that stays.
        loss: the key of its published loss.
        takes: the method whose published time it takes to make; empty if nothing is made.
        commands: what makes it; {model} is the model, {source} what the step before wrote.
        tokens: tokens of distillation that its published loss needs.
    """

    name: str
    linears: float
    layers: float
    experts: float
    loss: str
    takes: str
    commands: tuple[str, ...]
    tokens: float = 0.0


STRUCTURES = {
    one.name: one
    for one in (
        CutAway("whole", 1, 1, 1, "none", "", ()),
        CutAway("layers-25%", 1, 0.75, 1, "layers-25%", "alps",
                ("secateur structure {source} --keep-layers 0.75 --effort best --output CUT",)),
        CutAway("width-25%", 0.75, 1, 1, "width-25%", "alps",
                ("secateur structure {source} --keep-parameters 0.75 --effort best --output CUT",)),
        CutAway("width-50%-distilled", 0.5, 1, 1, "width-50%-distilled", "alps",
                ("secateur structure {source} --keep-parameters 0.5 --output CUT",
                 "secateur train CUT --teacher {model} --text TEXT --output TAUGHT"), 90e9),
        CutAway("experts-25%", 1, 1, 0.75, "experts-25%", "alps",
                ("secateur structure {source} --experts 0.75 --output CUT",)),
        CutAway("experts-50%", 1, 1, 0.5, "experts-50%", "alps",
                ("secateur structure {source} --experts 0.5 --output CUT",)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class CompressionWay:
    """One way.

    Attributes:
        structure: what is cut away.
        zeros: which weights are zero.
        values: how weights are stored.
    """

    structure: CutAway
    zeros: Zeros
    values: Values

    @property
    def name(self) -> str:
        """The parts that differ from the model itself."""
        names = self.structure.name, f"{self.zeros.name} zeros", self.values.name
        pairs = zip(names, self.parts, strict=True)
        return " + ".join(name for name, part in pairs if part.loss != "none") or "as it is"

    @property
    def parts(self) -> tuple[CutAway | Zeros | Values, ...]:
        """What is done, in order."""
        return self.structure, self.zeros, self.values

    @property
    def stored(self) -> str:
        """How its linears are stored, whatever is cut: zeros and values."""
        return f"{self.zeros.name} {self.values.name}"

    @property
    def changed(self) -> int:
        """How many of the three parts differ from the model itself."""
        return sum(part.loss != "none" for part in self.parts)

    @property
    def bits(self) -> float:
        """Bits of a linear's weight: value_bits · (1 − sparsity) + index_bits + scales."""
        values, zeros = self.values, self.zeros
        scales = values.bits - values.value_bits
        return values.value_bits * (1 - zeros.sparsity) + zeros.index_bits + scales

    def head_bits(self, model: ModelShape) -> float:
        """Bits of a weight of embedding and head: 8 beside few bits where they are large, else 16.

        `compress` has this rule; llama.cpp's types always have 8.
        """
        large = model.outer >= LARGE_ENDS * model.parameters
        few = self.values.small_ends or (large and self.values.name != "bf16")
        return 8 if few else 16

    def shape(self, model: ModelShape) -> ModelShape:
        """The sizes of the model after the cut."""
        one = self.structure
        return model.scaled(one.linears, one.layers, one.experts)

    def kept(self, facts: Facts) -> tuple[float, float]:
        """The fraction of the accuracy that stays: the product of the three parts, low to high."""
        low = high = 1.0
        for part in self.parts:
            found = facts.compressions[part.loss].kept
            low, high = low * found[0], high * found[1]
        return low, high

    def sources(self, facts: Facts) -> tuple[str, ...]:
        """Where the losses of its parts were published."""
        losses = (part.loss for part in self.parts)
        return tuple(facts.compressions[loss].source for loss in losses if loss != "none")

    def commands(self, model: str) -> tuple[str, ...]:
        """The commands that make it, in order."""
        lines, source = [], model
        for part in self.parts:
            for command in part.commands:
                lines.append(command.format(source=source, model=model))
                source = command.partition("--output ")[2] or source
        return tuple(lines)


@dataclass(frozen=True)
class ServingEngine:
    """What runs models on a kind of hardware.

    Attributes:
        stored: the values that it runs, by the zeros that it skips.
        shared: whether several devices may share a model.
        batched: whether several sequences share a step.
    """

    stored: Mapping[str, tuple[str, ...]]
    shared: bool = False
    batched: bool = True


ENGINES: Mapping[str, ServingEngine] = {
    "cuda": ServingEngine(
        {"dense": ("bf16", "fp8", "int8", "int4"), "2:4": ("bf16", "int4")}, shared=True
    ),
    "llama.cpp": ServingEngine({"dense": ("bf16", "q8_0", "q4_0")}),
    "cpu": ServingEngine(dict.fromkeys(("dense", "50%"), ("bf16", "int8", "int4")), batched=False),
}
"""By kind. vLLM removed its 2:4 kernels in March 2026 (pull request 36799): older releases have
them, for int4 too, and TensorRT-LLM has those for bfloat16."""


def options_for(model: ModelShape, device: Hardware) -> Iterator[CompressionWay]:
    """The options that a device can gain from, the model itself first."""
    for structure in STRUCTURES.values():
        if structure.experts < 1 and not model.experts:
            continue
        for zeros, values in ENGINES[device.kind].stored.items():
            if zeros == "2:4" and not device.semi_structured:
                continue
            for value in values:
                if value != "fp8" or "fp8" in device.tflops:
                    yield CompressionWay(structure, ZEROS[zeros], VALUES[value])
