"""The ways to make a model smaller that the advice compares: structure × zeros × values.

A way is offered only where something runs it faster or smaller (`ENGINES`). So unstructured zeros
are not offered for GPUs, where no engine skips them, and 2:4 is not offered for CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from secateur.advisor.facts import Estimate, Facts, Hardware
from secateur.models.shape import LARGE_ENDS, ModelShape


@dataclass(frozen=True)
class Part:
    """One of the three parts of a way. It changes nothing if it takes nothing.

    Attributes:
        name: such as `int4`; also the key of its published loss.
        takes: the method whose published time it takes to make; empty if nothing is made.
        commands: what makes it; {model} is the model, {source} what the step before wrote.
        bits: of a weight, with its scales.
        value_bits: of a weight, without scales.
        product: the type of its products, a key of `Hardware.tflops`. int4 is expanded to bfloat16.
        small_ends: whether embedding and head have 8 bits in every model.
        sparsity: the fraction of zeros.
        index_bits: bits of a weight that say where the zeros are.
        decode: decoding is faster by this much than the bytes say; None where bytes decide.
        linears: the fraction of every layer that stays.
        layers: the fraction of layers that stays.
        experts: the fraction of experts that stays.
        tokens: tokens of distillation that its published loss needs.
    """

    name: str
    takes: str = ""
    commands: tuple[str, ...] = ()
    # how weights are stored
    bits: float = 16
    value_bits: int = 16
    product: str = "bf16"
    small_ends: bool = False
    # which weights are zero
    sparsity: float = 0.0
    index_bits: float = 0.0
    decode: Estimate | None = None
    # what is cut away
    linears: float = 1
    layers: float = 1
    experts: float = 1
    tokens: float = 0.0


def _table(*parts: Part) -> dict[str, Part]:
    return {one.name: one for one in parts}


COMPRESS = "secateur compress {{source}} --values {} --calibration TEXT --output SMALL"
GGUF = "secateur export {{source}} --to gguf --type {} --output GGUF"
FP8 = "quantize {source} to FP8 (W8A8) with llm-compressor or vLLM"
VALUES = _table(
    Part("bf16"),
    Part("fp8", "magnitude", (FP8,), bits=8, value_bits=8, product="fp8"),
    Part("int8", "alps", (COMPRESS.format("int8"),), bits=8, value_bits=8, product="int8"),
    Part("int4", "alps", (COMPRESS.format("int4"),), bits=4.125, value_bits=4),
    Part("q8_0", "magnitude", (GGUF.format("q8_0"),), bits=8.5, value_bits=8, small_ends=True),
    Part(
        "q4_0",
        "alps",
        (COMPRESS.format("int4"), GGUF.format("q4_0")),
        bits=4.5,
        value_bits=4,
        small_ends=True,
    ),
)
"""int4 counts a scale of 8 bits for 64 weights, or of 16 bits for 128. The last two are llama.cpp's
types; rounding without a calibration text is one pass over the weights, as magnitude pruning is."""


PRUNE = "secateur prune {{source}} {} --effort best --output SPARSE"
ZEROS = _table(
    Part("dense"),
    Part(
        "2:4",
        "alps",
        (PRUNE.format("--pattern 2:4"),),
        sparsity=0.5,
        index_bits=1,
        decode=Estimate(1.0, 1.15, 1.24),
    ),
    Part("50%", "alps", (PRUNE.format("--sparsity 0.5"),), sparsity=0.5, index_bits=1),
)
"""2:4: Wanda's paper has 1.24 for a whole model, TensorRT-LLM's issues 1731 and 1802 none."""


CUT = "secateur structure {{source}} {} --output CUT"
TEACH = "secateur train CUT --teacher {model} --text TEXT --output TAUGHT"
FEWER = CUT.format("--keep-layers 0.75 --effort best")
NARROWER = CUT.format("--keep-parameters 0.75 --effort best")
HALF_WIDTH = (CUT.format("--keep-parameters 0.5"), TEACH)
STRUCTURES = _table(
    Part("whole"),
    Part("layers-25%", "alps", (FEWER,), layers=0.75),
    Part("width-25%", "alps", (NARROWER,), linears=0.75),
    Part("width-50%-distilled", "alps", HALF_WIDTH, linears=0.5, tokens=90e9),
    Part("experts-25%", "alps", (CUT.format("--experts 0.75"),), experts=0.75),
    Part("experts-50%", "alps", (CUT.format("--experts 0.5"),), experts=0.5),
)


@dataclass(frozen=True)
class CompressionWay:
    """One way.

    Attributes:
        structure: what is cut away.
        zeros: which weights are zero.
        values: how weights are stored.
    """

    structure: Part
    zeros: Part
    values: Part

    @property
    def name(self) -> str:
        """The parts that differ from the model itself."""
        names = (f"{one.name} zeros" if one is self.zeros else one.name for one in self.changes)
        return " + ".join(names) or "as it is"

    @property
    def changes(self) -> list[Part]:
        """The parts that differ from the model itself, in the order in which they are made."""
        return [one for one in (self.structure, self.zeros, self.values) if one.takes]

    @property
    def stored(self) -> str:
        """How its linears are stored, whatever is cut: zeros and values."""
        return f"{self.zeros.name} {self.values.name}"

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
        """The fraction of the accuracy that stays: the product of its parts, low to high."""
        low = high = 1.0
        for part in self.changes:
            found = facts.compressions[part.name].kept
            low, high = low * found[0], high * found[1]
        return low, high

    def sources(self, facts: Facts) -> list[str]:
        """Where the losses of its parts were published."""
        return [facts.compressions[part.name].source for part in self.changes]

    def commands(self, model: str) -> list[str]:
        """The commands that make it, in order."""
        lines, source = [], model
        for part in self.changes:
            for command in part.commands:
                lines.append(command.format(source=source, model=model))
                source = command.partition("--output ")[2] or source
        return lines


CPU = ("bf16", "int8", "int4")
ENGINES: dict[str, dict[str, tuple[str, ...]]] = {
    "cuda": {"dense": ("bf16", "fp8", "int8", "int4"), "2:4": ("bf16", "int4")},
    "llama.cpp": {"dense": ("bf16", "q8_0", "q4_0")},
    "cpu": {"dense": CPU, "50%": CPU},
}
"""The values that something runs on a kind of hardware, by the zeros that it skips: vLLM or its
like, llama.cpp, our kernels. vLLM removed its 2:4 kernels in March 2026 (pull request 36799): older
releases have them, for int4 too, and TensorRT-LLM has those for bfloat16."""


def options_for(model: ModelShape, device: Hardware) -> Iterator[CompressionWay]:
    """The ways that a device can gain from, the model itself first."""
    for structure in STRUCTURES.values():
        if structure.experts < 1 and not model.experts:
            continue
        for zeros, values in ENGINES[device.kind].items():
            if zeros == "2:4" and not device.semi_structured:
                continue
            for value in values:
                if value != "fp8" or "fp8" in device.tflops:
                    yield CompressionWay(structure, ZEROS[zeros], VALUES[value])
