"""The plan of a sweep: its points, and the settings that all points share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from secateur.errors import RecipeError
from secateur.runs.records import PointKey
from secateur.sparsity.patterns import parse_pattern


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The points of a sweep, and the settings that all points share.

    Args:
        model: hub id, folder, GGUF file or named sample.
        methods: famous names or presets.
        sparsities: fractions of zeros, for unstructured sparsity and for blocks.
        patterns: patterns to try beside `unstructured`; N:M has its own sparsity.
        calibration: text or windows file for all points.
        windows: number of calibration windows.
        sequence_length: tokens of a calibration window; None as in `secateur prune`.
        seed: seed of the choice of windows.
        text: text for the evaluation.
        text_sequence_length: tokens of an evaluation window; 2048, or less if the model is shorter.
        text_windows: evaluate only this many windows at the start of each text.
        device: auto, cpu, cuda or cuda:N.
        trust_remote_code: whether code that comes with the checkpoint may run.
    """

    model: str
    methods: tuple[str, ...]
    sparsities: tuple[float, ...] = ()
    patterns: tuple[str, ...] = ()
    calibration: str = "c4"
    windows: int = 128
    sequence_length: int | None = None
    seed: int = 0
    text: tuple[str, ...] = ("wikitext2",)
    text_sequence_length: int | None = None
    text_windows: int | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    @property
    def conditions(self) -> dict[str, Any]:
        """The settings that must not change when a sweep resumes. New points are allowed."""
        told = asdict(self)
        for free in ("methods", "sparsities", "patterns"):
            del told[free]
        return {**told, "text": list(self.text)}

    def grid(self) -> list[PointKey]:
        """Return method, pattern and sparsity of each point, in order.

        Raises:
            RecipeError: there is no point, or a sparsity is no fraction.
            PatternError: a pattern has the wrong form.
        """
        odd = [sparsity for sparsity in self.sparsities if not 0 <= sparsity < 1]
        if odd:
            raise RecipeError(
                f"{', '.join(f'{x:g}' for x in odd)}: no fraction of zeros in [0, 1)",
                where="--sparsities",
                remedy="0.5 prunes half of the weights",
            )
        columns = [("unstructured", sparsity) for sparsity in self.sparsities]
        for text in self.patterns:
            implied = parse_pattern(text).sparsity
            columns += [(text, s) for s in (self.sparsities if implied is None else [implied])]
        grid = [(method, kind, round(s, 6)) for method in self.methods for kind, s in columns]
        if not grid or not self.text:
            raise RecipeError(
                f"{len(self.methods)} methods, {len(columns)} sparsities, {len(self.text)} texts "
                "to judge on: nothing to do",
                remedy="for example --methods wanda,sparsegpt --sparsities 0.3,0.5,0.6,0.7",
            )
        return list(dict.fromkeys(grid))


def point_name(key: PointKey) -> str:
    """The name of a point's folder: `wanda-50`, `wanda-2-4`, `wanda-16x1-50`."""
    method, pattern, sparsity = key
    implied = parse_pattern(pattern).sparsity
    kind = [] if pattern == "unstructured" else [pattern.replace(":", "-")]
    share = [f"{100 * sparsity:g}"] if implied is None else []
    return "-".join([method, *kind, *share])
