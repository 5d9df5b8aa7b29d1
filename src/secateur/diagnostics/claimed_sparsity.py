"""Checks whether the sparsity is as claimed, linear by linear."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from dataclasses import replace

from secateur.diagnostics.findings import Claims, finding, listed
from secateur.diagnostics.weights import LinearHealth, Weights
from secateur.engine.prune.tasks import COLLAPSED
from secateur.runs.measured import Finding

DENSE = 0.01
"""A linear with fewer zeros than this is dense; pretrained ones have almost none."""

PRUNED = 0.05
"""A model whose median linear has more zeros than this is pruned."""

SURPLUS = 0.02
"""A larger share of unrecorded zeros gives a warning."""

SURPLUS_ROUNDED = 0.1
"""The same for the whole model, if rounding to int8 has made zeros since the run."""

TOTAL = 1e-3
"""How far the sparsity of the whole model may be below the recorded one."""


def check_sparsity(weights: Weights, claims: Claims, *, rounded: bool) -> list[Finding]:
    """Compare the stored zeros with the claimed ones.

    Args:
        weights: the matrices.
        claims: the records of the run; without any, the linears are compared with each other.
        rounded: the weights were rounded to int8 since the run, which makes zeros.
    """
    found = [*claims.faults, *_dense_linears(weights, claims)]
    for linear in weights.linears:
        found += _against_claim(linear, claims, rounded)
    if claims.sparsity is None:
        return found
    surplus = weights.sparsity - claims.sparsity
    evidence = (
        f"{weights.sparsity:.2%} of the weights of the decoder's matrices are zero, "
        f"but the records claim {claims.sparsity:.2%}"
    )
    where = f"{claims.folder}/manifest.json"
    if surplus < -TOTAL:
        found.append(finding("sparsity-not-as-claimed", where, evidence))
    elif surplus > (SURPLUS_ROUNDED if rounded else SURPLUS):
        found.append(finding("more-zeros-than-claimed", where, evidence))
    return found


def _against_claim(linear: LinearHealth, claims: Claims, rounded: bool) -> list[Finding]:
    """The faults of one linear that the records describe."""
    claim = claims.linears.get(linear.name)
    if claim is None:
        return []
    weights = linear.weights
    has = f"{linear.sparsity:.2%} of its weights are zero ({linear.zeros:,} of {weights:,})"
    # fewer than the mask removed: the source may have had more, never less
    if linear.zeros < claim.pruned:
        evidence = f"{has}, but the records claim {claim.pruned / weights:.2%} ({claim.pruned:,})"
        lost = finding("sparsity-not-as-claimed", linear.name, evidence)
        return [replace(lost, id="dense-linear") if linear.sparsity < DENSE else lost]
    found = []
    if linear.misplaced:
        assert claims.pattern is not None
        evidence = (
            f"{linear.misplaced} of {weights} weights are not zero although the pattern "
            f"{claims.pattern.name} needs them to be"
        )
        found.append(finding("pattern-broken", linear.name, evidence))
    if not rounded and linear.zeros - claim.zeros > SURPLUS * weights:
        evidence = f"{has}, but the records say {claim.zeros / weights:.2%} ({claim.zeros:,})"
        found.append(finding("more-zeros-than-claimed", linear.name, evidence))
    error = claim.lost if claim.error is None else claim.error
    if error is not None and error > COLLAPSED:
        evidence = (
            f"pruning it lost {error:.1%} of the energy of its output on the calibration "
            "text, according to the run"
        )
        found.append(finding("linear-collapse", linear.name, evidence))
    return found


DENSE_FINDINGS = {
    "unknown": ("dense-linear", "{} matrices in an unknown layout are dense, others {:.1%} zero"),
    "experts": ("dense-linear", "{} matrices of experts are dense, others {:.1%} zero"),
    "unseen": ("expert-unseen", "{} expert matrices are dense: no calibration token reached them"),
    "excluded": ("left-dense", "{} linears are dense, as the recipe says"),
}
"""Kind and evidence of a finding, by why linears are dense."""


def _dense_linears(weights: Weights, claims: Claims) -> list[Finding]:
    """Linears that are dense although others are pruned, and whether the recipe says so."""
    # experts may all be dense, so they say what is usual only where nothing else does
    known = [x.sparsity for x in weights.linears if x.known]
    others = [x.sparsity for x in weights.linears if x.known and not _of_expert(x)]
    usual = statistics.median(others or known) if known else 0.0
    if usual < PRUNED:
        return []
    dense: dict[str | None, list[LinearHealth]] = defaultdict(list)
    for x in weights.linears:
        if x.sparsity < min(DENSE, usual / 2) and not (claims.claimed(x.name) or 0) > 0:
            dense[_why_dense(x, claims)].append(x)
    found = []
    for why, (kind, evidence) in DENSE_FINDINGS.items():
        if dense[why]:
            names = listed([x.name for x in dense[why]], 4)
            found.append(finding(kind, names, evidence.format(len(dense[why]), usual)))
    return found + _unexplained(dense[None], weights, claims, usual)


def _why_dense(linear: LinearHealth, claims: Claims) -> str | None:
    """The entry of `DENSE_FINDINGS` for a dense linear; None if nothing explains it."""
    if linear.name in claims.unseen:
        return "unseen"
    if not linear.known:
        return "unknown"
    if claims.kept_dense(linear.name):
        return "excluded"
    return "experts" if _of_expert(linear) and not claims.linears else None


def _of_expert(linear: LinearHealth) -> bool:
    """Whether a matrix belongs to an expert of a mixture; most matrices may do."""
    return re.search(r"\bexperts\.\d+\.", linear.name) is not None


def _unexplained(
    linears: list[LinearHealth], weights: Weights, claims: Claims, usual: float
) -> list[Finding]:
    """Dense linears that no record explains: a note where all of a kind are dense."""
    found = []
    for kind in dict.fromkeys(x.kind for x in linears):
        odd = [x for x in linears if x.kind == kind]
        everywhere = len(odd) == sum(x.kind == kind for x in weights.linears)
        if everywhere and not claims.linears:
            evidence = f"it is dense in all {len(odd)} layers, others have {usual:.1%} zeros"
            remedy = "this is probably intended; if not, prune again"
            found.append(finding("left-dense", kind, evidence, remedy=remedy))
            continue
        said = (
            f"of its weights are zero, {usual:.1%} in the median linear, and no recipe excludes it"
        )
        found += [finding("dense-linear", x.name, f"{x.sparsity:.2%} {said}") for x in odd]
    return found
