"""Findings of a diagnosis, and the claims that they check.

A finding says what, how severe, where, the evidence, and the remedy. Claims are what the records of
a pruned folder promise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from secateur.engine.prune.tasks import Selection
from secateur.errors import SecateurError
from secateur.runs.measured import Finding, Severity
from secateur.runs.records import Layer, LinearRecord, Manifest, parsed
from secateur.sparsity.patterns import Pattern, parse_pattern

DAMAGED = (
    *(ValueError, KeyError, TypeError, AttributeError, RecursionError),
    *(yaml.YAMLError, SecateurError),
)
"""Errors of reading a damaged record."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""The worst first: an error is proven, a warning is likely, a note is worth knowing."""


LESS = "prune less of this layer: --overrides '{where}.*=0.3', or an --allocation"
AGAIN = "the files were changed after pruning: prune again"

KINDS: Mapping[str, tuple[Severity, str]] = {
    "dead-column": ("note", "calibrate on more text if there are many"),
    "dead-head": ("warning", LESS),
    "dead-neuron": ("note", "prune less of these layers, or cut the dead neurons out"),
    "dead-row": ("note", "prune less of it, or let weights compete in rows (--scope row)"),
    "dense-linear": ("warning", "prune again, or exclude it in the recipe (--exclude)"),
    "drift": ("warning", "prune less, by a better method (--effort best), or train"),
    "expert-unseen": ("warning", "calibrate on more text, of more kinds, or --exclude them"),
    "hidden-states-not-finite": ("error", "look for values too large in it; prune again"),
    "hit-hardest": ("note", "prune these less and others more: --overrides, or an --allocation"),
    "layer-collapse": ("error", LESS),
    "layer-damaged": ("warning", LESS),
    "layer-exploded": ("error", LESS),
    "left-dense": ("note", "nothing to do"),
    "linear-collapse": ("warning", "prune less of it: --overrides '{where}=0.3'"),
    "more-zeros-than-claimed": ("warning", "ask the author of the folder"),
    "no-records": ("note", "diagnose the folder that `secateur prune` wrote"),
    "no-reference": ("note", "name the dense model: --dense REF"),
    "not-finite": ("error", "get the model again, or prune it again in float32 or bfloat16"),
    "pattern-broken": ("error", AGAIN),
    "records-unreadable": ("warning", "copy the folder again; its claims were not checked"),
    "residual-lost": ("error", "compare its weights with the dense model's, and prune again"),
    "sparsity-not-as-claimed": ("error", AGAIN),
    "weights-vanished": ("warning", "compare it with the dense model (--dense REF)"),
}
"""The kinds of findings: how severe one usually is, and what to do about it."""


def finding(
    id: str,
    where: str,
    evidence: str,
    *,
    severity: Severity | None = None,
    remedy: str | None = None,
) -> Finding:
    """A finding of a kind; severity and remedy if they are not the usual ones."""
    usual, advice = KINDS[id]
    advice = advice.format(where=where) if remedy is None else remedy
    return Finding(id, severity or usual, where, evidence, advice)


def listed(items: Sequence[object], most: int = 8) -> str:
    """The first items in one line, and the number of the others."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more


@dataclass(frozen=True)
class Claims:
    """The claims of the records of a run.

    Attributes:
        folder: `secateur/` of the model's folder; None where there is none.
        linears: the claims for each linear that the run processed.
        pattern: the pattern of the zeros; None if it is unknown.
        selection: which linears the recipe prunes; None without a recipe.
        sparsity: of all decoder matrices together.
        unseen: linears of experts that calibration did not reach, and that were left dense.
        source: the model that was pruned.
        faults: records that cannot be read.
    """

    folder: Path | None = None
    linears: dict[str, LinearRecord] = field(default_factory=dict)
    pattern: Pattern | None = None
    selection: Selection | None = None
    sparsity: float | None = None
    unseen: frozenset[str] = frozenset()
    source: str | None = None
    faults: tuple[Finding, ...] = ()

    def claimed(self, name: str) -> float | None:
        """The claimed sparsity of a linear; 0 for one that a run with records left out."""
        if name in self.linears:
            return self.linears[name].asked
        return 0.0 if self.linears else None

    def kept_dense(self, name: str) -> bool:
        """Whether the recipe keeps a linear dense."""
        if self.selection is None:
            return False
        own = self.selection.override(name)
        return not self.selection.selects(name) or own == 0


def read_claims(model: Path) -> Claims:
    """Read the existing records of a run; a damaged one becomes a finding."""
    folder = model / "secateur"
    if not folder.is_dir():
        return Claims()
    faults: list[Finding] = []

    def read(name: str, reader: Callable[[str], Any], empty: Any) -> Any:
        file = folder / name
        if not file.is_file():
            return empty
        try:
            return reader(file.read_text(encoding="utf-8"))
        except DAMAGED as e:
            said = str(e).splitlines()[0] if str(e) else type(e).__name__
            evidence = f"the records of the run cannot be read: {said}"
            faults.append(finding("records-unreadable", str(file), evidence))
            return empty

    manifest = read("manifest.json", lambda text: parsed(Manifest, text, "manifest.json"), None)
    pattern, selection = None, None
    if manifest is None or manifest.method.get("name") != "structure":  # a cut claims no zeros
        pattern, selection = read("recipe.yaml", lambda x: _of_recipe(x, manifest), (None, None))

    def lines_of(text: str) -> list[Layer]:
        return [parsed(Layer, x, "layers.jsonl") for x in text.splitlines() if x.strip()]

    # the last line of each layer; a repeated layer has two
    layers: dict[int, Layer] = {x.layer: x for x in read("layers.jsonl", lines_of, ())}
    return Claims(
        folder,
        {linear.name: linear for layer in layers.values() for linear in layer.linears},
        pattern,
        selection,
        manifest and manifest.result.decoder_sparsity,
        frozenset(name for layer in layers.values() for name in layer.unseen),
        manifest and manifest.source.name,
        tuple(faults),
    )


def _of_recipe(text: str, manifest: Manifest | None) -> tuple[Pattern, Selection]:
    """Pattern and selection of a resolved recipe."""
    recipe = yaml.safe_load(text)
    scope = manifest.method["scope"] if manifest else recipe["scope"]
    include, exclude = tuple(recipe["include"]), tuple(recipe["exclude"])
    pattern = parse_pattern(recipe["pattern"], None if scope == "group" else scope)
    return pattern, Selection(include, exclude, dict(recipe["overrides"]))
