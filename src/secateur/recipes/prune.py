"""The recipes of `prune`, and of `demo`, `methods` and `chain`, which prune among other things."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from pydantic import Strict as Strictness

from secateur.recipes import shared
from secateur.recipes.options import Conflict, Flag, Heading, Recipe, Section, Texts

Effort = Literal["fast", "balanced", "thorough", "best"]
"""The names of the presets."""


Sparsity = Annotated[float, Field(ge=0, lt=1)]
"""A fraction of zeros."""

Blocks = Literal[
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
    "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
]  # fmt: skip
"""The types of llama.cpp in which compressed weights can be stored."""

Values = Literal[
    "auto", "keep", "bfloat16", "float16", "float32", "int8", "int4", "int3", "int2", Blocks
]
"""How compressed weights are stored."""

Embeddings = Literal["auto", "keep", "int8", "int4", "int3", Blocks]
"""How a compressed embedding and head are stored."""


class _WhatToPrune(Section):
    """The model, and which of its weights become zero."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Hub id, folder, GGUF file, named sample, or a recipe (`*.yaml`)."""
    sparsity: Annotated[float | None, Flag(default="the pattern's own")] = Field(None, ge=0, lt=1)
    """Fraction of weights that become zero, 0 to 1."""
    pattern: str = "unstructured"
    """Which zeros are allowed: unstructured, N:M (N kept of M), or blocks as ROWSxCOLUMNS."""
    include: Annotated[Texts, Flag(value="GLOB")] = ("*",)
    """Names of the linear layers to prune."""
    exclude: Annotated[Texts, Flag(value="GLOB")] = ()
    """Names of linear layers that stay dense."""
    overrides: Annotated[dict[str, Sparsity], Flag(value="GLOB=SPARSITY")] = Field(
        default_factory=dict
    )
    """Own sparsity for some linear layers; 0 keeps them dense."""


class _HowToPrune(Section):
    """The method, and where it puts the zeros."""

    effort: Annotated[Effort | None, Flag(default="balanced, if no method is given")] = None
    """Preset: fast, balanced, thorough or best. It fills in the options that you do not give."""
    method: str | None = None
    """Pruning method; `secateur methods` lists them all."""
    score: Annotated[str | None, Flag(advanced=True)] = None
    """Score that rates the weights, to compose a method of your own instead of naming one."""
    solver: Annotated[str | None, Flag(advanced=True)] = None
    """Solver that adjusts the kept weights, to compose a method of your own."""
    refine: Annotated[str | None, Flag(advanced=True)] = None
    """Improve the mask before solving: swaps."""
    method_parameters: Annotated[
        dict[str, int | float | Blocks], Flag(value="NAME=NUMBER", advanced=True)
    ] = Field(default_factory=dict)
    """Parameters of the score, the solver and the refinement."""
    method_overrides: Annotated[
        dict[str, dict[str, int | float | Blocks]], Flag(hidden=True, value="GLOB={NAME: NUMBER}")
    ] = Field(default_factory=dict)
    """Own method parameters for some linear layers, such as {'*.down_proj': {bits: 8}}."""
    scope: Annotated[
        Literal["row", "layer", "global"] | None, Flag(default="as in the method's paper")
    ] = None
    """The set of weights that compete: row, layer or global."""
    allocation: str = "uniform"
    """How to divide the sparsity among the linear layers: uniform, owl, layer-sensitivity,
    divergence, global or search."""
    asymmetric_damping: Annotated[float, Flag(advanced=True)] = Field(0.2, ge=0)
    """Damping of the asymmetric fit towards the dense weights."""
    sequential: Annotated[Literal["group", "layer"], Flag(advanced=True)] = "group"
    """group: each group of linear layers sees inputs from the pruned groups before it. layer: all
    linear layers of a layer see inputs from the unpruned layer, as in the papers."""
    on_collapse: Literal["stop", "warn"] = "warn"
    """What to do if a linear layer lost most of its output by pruning: stop or warn."""


class Fitting(Section):
    """How the kept weights are fitted to the calibration text."""

    group = Heading.ADVANCED

    asymmetric: Annotated[bool, Flag(off="symmetric")] = False
    """asymmetric fits pruned linear layers to the dense model's outputs. symmetric fits each linear
    layer to its own outputs on the same inputs."""
    fast_matmuls: Annotated[bool, Flag(off="exact_matmuls")] = False
    """Calibrate in bfloat16 on processors where this is faster."""


class _StoredFormat(Section):
    """How the weights of the result are written."""

    group = Heading.OUTPUT

    compress: Annotated[Values | None, Flag(default="not compressed", value="VALUES")] = None
    """Also compress the result like `secateur compress --values VALUES`: auto, keep, bfloat16,
    float16, float32, int8, int4, int3, int2, or a type of llama.cpp such as q4_k."""
    keep_format: bool = False
    """Write a source in FP8, MXFP4 or integers back in its own format, with the scales that it has,
    instead of in bfloat16. Zeros stay zeros; weights that the method changes are rounded."""


_BALANCED: Mapping[str, Any] = {
    "method": "alps",
    "method_parameters": {"iterations": 15, "growth": 1.6},
    "allocation": "divergence",
    "asymmetric": True,
    "fast_matmuls": True,
}
presets: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {"method": "sparsegpt", "fast_matmuls": True},
        "balanced": _BALANCED,
        "thorough": {
            **_BALANCED,
            "distillation": {"epochs": 1, "next_token": 0.5, "hidden": 3.0, "tokens": 65_536},
        },
        "best": {
            **_BALANCED,
            "distillation": {"epochs": 1, "next_token": 0.5, "hidden": 3.0, "tokens": 262_144},
        },
    }
)
"""The recipe values of each effort. A preset fills in the options that a recipe leaves open, and
trades time for quality: `benchmarks/quality/presets.py` measures what each brings and costs, and
docs/methods/presets.md shows the results."""


class PruneRecipe(
    # pydantic lists the fields of the last base first
    shared.Device,
    shared.GgufDtype,
    shared.PlanFor,
    Fitting,
    _HowToPrune,
    _WhatToPrune,
    _StoredFormat,
    shared.OutputFolder,
    Recipe,
):
    """One pruning run."""

    presets = presets
    run = shared.Planning
    needs: ClassVar = {"asymmetric_damping": ("asymmetric",), **shared.DISTILLING, **shared.GATED}
    conflicts = (
        Conflict("keep_format", "compress", "both say how the weights are stored", shared.ONE),
        Conflict(
            "keep_format",
            "distill_epochs",
            "distillation changes all weights, which the format of the source would round again",
            "leave --keep-format out, or do not distill",
        ),
        Conflict(
            "asymmetric",
            "sequential=layer",
            "asymmetric fitting needs the inputs of each group as they are after the groups before "
            "it were pruned; in the order 'layer' they are not known",
            "use --sequential group, or --symmetric",
        ),
        Conflict(
            "processes",
            "dry_run=False",
            "torchrun says how many processes it starts",
            "give --dry-run to plan for so many",
        ),
    )

    reconstruction: shared.Reconstruct = shared.Reconstruct()
    distillation: shared.Distill = shared.Distill()
    calibration: shared.Calibration = shared.Calibration()
    memory: shared.Memory = shared.Memory()
    gate: shared.Gate = shared.Gate()


class _WhatToShow(Section):
    """The model."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL", positional=True)] = "smollm2-135m"
    """Hub id, folder, GGUF file or named sample."""


class _DemoTexts(Section):
    """The texts, and how much of them is read."""

    group = Heading.CALIBRATION

    source: Annotated[str, Flag("calibration", value="TEXT")] = "boolq-calibration"
    """Calibration text."""
    windows: int = Field(16, ge=1)
    """Calibration windows of 512 tokens, or of as many as the model reads."""
    text: Annotated[str, Flag(value="TEXT")] = "boolq-held-out"
    """Text to judge on."""
    text_windows: int = Field(8, ge=1)
    """Windows to judge on, as long."""


class _DemoOutput(Section):
    """Where the demo writes."""

    group = Heading.OUTPUT

    output: Annotated[str, Flag(short="-o", value="DIR")] = "demo-run"
    """Folder for the models and the result. A demo that was stopped goes on there."""


class DemoRecipe(_DemoOutput, _DemoTexts, _WhatToShow, Recipe):
    """One demo."""

    group = Heading.HOW

    effort: Effort = "fast"
    """fast shows int8, int4, llama.cpp's types and a cut. The other presets also show `fit` at two
    sizes, and zeros."""


class MethodsRecipe(Recipe):
    """The list of methods has no options."""


class Steps(Section):
    """The model, and the steps to run on it."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="RECIPE")]
    """The model; on the command line, a YAML file with the keys `model`, `output` and `steps`."""
    steps: Annotated[list[dict[str, Any]], Strictness(False), Flag(hidden=True)] = Field(
        min_length=1
    )
    """Each step is a verb (structure, prune, train, compress) with its options."""


class ChainRecipe(shared.RemoteCode, Steps, shared.OutputFolder, Recipe):
    """Several verbs in a row. Each works on the result of the one before it."""

    run = shared.Planning
