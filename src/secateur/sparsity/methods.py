"""The named methods: each combines a score, a solver and a scope.

    wanda      = score `wanda`, pruned weights set to zero, weights compete within a row
    sparsegpt  = score `obs` and solver `obs`: chooses and repairs column by column

Any score can be combined with any solver and any pattern; `compose` refuses what cannot work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch

from secateur.errors import PatternError, RecipeError
from secateur.parallel.ranks import ALONE, Ranks
from secateur.registry import Registry, did_you_mean, parameters_of
from secateur.sparsity.hessian import output_energy
from secateur.sparsity.patterns import Pattern, parse_pattern
from secateur.sparsity.refinements import Refinement, refinements
from secateur.sparsity.scores import ScoreFunction, scores
from secateur.sparsity.shared_rows import SharedRows, row_shares
from secateur.sparsity.solvers import ChoosingSolver, Solution, Solver, solvers
from secateur.types import STORED, Gram, Statistics, Weight


class NamedMethod(NamedTuple):
    """A line in the table of methods.

    Attributes:
        score: name of its score.
        solver: name of its solver.
        scope: the default scope of unstructured sparsity.
        description: what it does, in one line.
        paper: where it comes from.
    """

    score: str
    solver: str
    scope: str
    description: str
    paper: str


methods: Mapping[str, NamedMethod] = MappingProxyType(
    {
        "magnitude": NamedMethod(
            "magnitude",
            "zero",
            "layer",
            "smallest weights first; needs no calibration",
            "Han et al. 2015, arXiv:1506.02626",
        ),
        "wanda": NamedMethod(
            "wanda",
            "zero",
            "row",
            "weight times input norm, compared within each output row",
            "Sun et al. 2023, arXiv:2306.11695",
        ),
        "ria": NamedMethod(
            "ria",
            "zero",
            "layer",
            "weight relative to its row and column, times the root of the input norm",
            "Zhang et al. 2024, ICLR",
        ),
        "taylor": NamedMethod(
            "taylor",
            "zero",
            "layer",
            "first-order change of the loss; needs gradients",
            "Molchanov et al. 2017, arXiv:1611.06440",
        ),
        "obd": NamedMethod(
            "obd",
            "zero",
            "layer",
            "second-order change of the loss by the Fisher diagonal; needs gradients",
            "LeCun et al. 1989, Optimal Brain Damage",
        ),
        "obs": NamedMethod(
            "obs",
            "zero",
            "layer",
            "weights that the others could compensate best, without compensation",
            "Hassibi et al. 1993, Optimal Brain Surgeon",
        ),
        "sparsegpt": NamedMethod(
            "obs",
            "obs",
            "layer",
            "prunes column by column and adjusts the columns to the right",
            "Frantar and Alistarh 2023, arXiv:2301.00774",
        ),
        "alps": NamedMethod(
            "wanda",
            "alps",
            "layer",
            "finds mask and weights together by ADMM on the layer's error, then refits",
            "Meng et al. 2024, arXiv:2406.07831",
        ),
    }
)
"""The methods by name."""


@dataclass(frozen=True)
class Method:
    """A pruning method ready to run.

    Attributes:
        name: its name in the table, or `score+solver` if the pair has none.
        score_name: the name of the score.
        score: the score itself.
        solver_name: the name of the solver.
        solver: the solver itself.
        pattern: the zeros that are allowed.
        refinement_name: the name of the refinement, or None.
        refinement: improves the score's mask before the solver receives it, or None.
    """

    name: str
    score_name: str
    score: ScoreFunction
    solver_name: str
    solver: Solver
    pattern: Pattern
    refinement_name: str | None = None
    refinement: Refinement | None = None

    @property
    def solver_selects(self) -> bool:
        """Whether the solver chooses the mask itself, by the weights as it updates them."""
        return self.refinement is None and self.solver.selects_by == self.score_name

    @property
    def by_rows(self) -> bool:
        """Whether several processes can solve one linear together, each some of its rows."""
        return self.solver_selects and self.solver.by_rows and SharedRows.suits(self.pattern)

    @property
    def requires(self) -> frozenset[str]:
        """The statistics to gather; the score needs none of its own where the solver selects."""
        if self.solver_selects:
            return self.solver.requires
        refining = self.refinement.requires if self.refinement else frozenset()
        return (self.score.requires | self.solver.requires | refining) - {STORED}

    @property
    def batched(self) -> bool:
        """Whether `solve` takes batches [batch, out, in]: whether each part that it calls does."""
        parts = [self.solver, self.pattern]
        if not self.solver_selects:
            parts += [self.score] if self.refinement is None else [self.score, self.refinement]
        # Parts of other packages need not say it.
        return all(getattr(part, "batched", False) for part in parts)

    def check(self, shape: tuple[int, int], sparsity: float) -> None:
        """Refuse a matrix [out, in] that cannot be pruned like this.

        Raises:
            PatternError: the pattern cannot have this sparsity, or score or solver choose only
                whole columns.
            ShapeError: the pattern does not fit the matrix.
        """
        self.pattern.check(shape, sparsity)
        name, whole = self.score_name, self.score.whole_units
        if self.solver_selects:
            name, whole = self.solver_name, self.solver.whole_units
        if whole and not self.pattern.whole_units:
            raise PatternError(
                f"{name!r} chooses whole columns, not weights of the pattern {self.pattern.name!r}",
                remedy="ask for whole columns, such as '*x1'",
            )

    def fallback_bytes(self, shape: tuple[int, int]) -> int:
        """The part of `working_bytes` that a solver takes only where float32 is not enough.

        0 if the solver has no method of this name.
        """
        fallback = getattr(self.solver, "fallback_bytes", None)
        return fallback(shape) if fallback is not None else 0

    def working_bytes(self, shape: tuple[int, int]) -> int:
        """The most memory that solving one linear [out, in] takes, besides weight and statistics.

        The prepared data stays in memory while a mask is chosen, so both count. A solver that reads
        no statistics prepares nothing, so the larger of both counts.
        """
        if self.solver_selects:
            return self.solver.working_bytes(shape) + self.pattern.working_bytes(shape)
        choosing = self.score.working_bytes(shape) + self.pattern.working_bytes(shape)
        if self.refinement is not None:
            choosing = max(choosing, self.refinement.working_bytes(shape))
        if not self.solver.requires:
            return max(self.solver.working_bytes(shape), choosing)
        return self.solver.working_bytes(shape) + choosing

    def prepare(self, statistics: Statistics, ranks: Ranks = ALONE) -> Any:
        """`solver.prepare`; for several processes that solve linears together, if it is `by_rows`.

        Args:
            statistics: those that the solver requires.
            ranks: the processes.
        """
        solver: Any = self.solver
        return solver.prepare(statistics, *([ranks] if ranks.count > 1 else []))

    def solve(
        self,
        weight: Weight,
        prepared: Any,
        statistics: Statistics,
        sparsity: float,
        ranks: Ranks = ALONE,
    ) -> Solution:
        """Choose the weights of a linear to prune, and compute the remaining ones.

        Several processes solve some rows each, and all get the solution. Its weights are those of
        one process, bit for bit, if their matrix products round alike. The error is not: its sums
        are added up in another order.

        Args:
            weight: [out, in], any floating dtype; not changed.
            prepared: the result of `prepare` for the inputs of this linear, by these processes.
            statistics: those in `requires`, and `stored` where the score reads it.
            sparsity: the fraction of zeros.
            ranks: the processes that solve this linear together; only for a method `by_rows`.

        Returns:
            A mask of the pattern, with exactly `pattern.pruned(weight.shape, sparsity)` zeros, and
            the new weight, float32, zero where the mask is False.

        Raises:
            PatternError, ShapeError: the pattern cannot hold this sparsity or shape.
            NumericalError: a number is infinite or not a number, or a matrix cannot be factorised.
        """
        if ranks.count > 1:
            return self._solve_rows(weight, prepared, statistics["gram"], sparsity, ranks)
        if self.solver_selects:
            solver = cast(ChoosingSolver, self.solver)
            return solver.choose(weight, prepared, self.pattern, sparsity)
        mask = self.pattern.mask(self.score(weight, statistics), sparsity)
        if self.refinement is not None:
            mask = self.refinement.refine(weight, mask, statistics, self.pattern, sparsity)
        return self.solver.solve(weight, prepared, mask)

    def _solve_rows(
        self, weight: Weight, prepared: Any, gram: Gram, sparsity: float, ranks: Ranks
    ) -> Solution:
        """The solution of all rows, of which each process solves some."""
        solver, shares = cast(ChoosingSolver, self.solver), row_shares(len(weight), ranks.count)
        own = shares[ranks.rank]
        pattern = cast(Pattern, SharedRows(self.pattern, len(weight), ranks))
        found = solver.choose(weight[own], prepared, pattern, sparsity)
        whole = torch.empty(weight.shape, dtype=found.weight.dtype, device=weight.device)
        mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
        parts, blocks = [(whole, found.weight), (mask, found.mask)], None
        if found.blocks is not None:
            blocks = found.blocks.new_empty(len(weight), found.blocks.shape[1])
            parts.append((blocks, found.blocks))
        for every, mine in parts:
            every[own] = mine
            for owner, rows in enumerate(shares):
                ranks.share(every[rows], owner)
        energy = output_energy(weight[own], gram)
        sums = torch.stack([energy * (0.0 if found.error is None else found.error), energy])
        ranks.total(sums)
        error = torch.where(sums[1] > 0, sums[0] / sums[1], 0.0)
        return Solution(whole, mask, error, blocks=blocks)


def compose(
    method: str | None,
    pattern_text: str,
    scope: str | None = None,
    score: str | None = None,
    solver: str | None = None,
    refine: str | None = None,
    **params: Any,
) -> Method:
    """Put a method together from names.

    Args:
        method: a name in `methods`, or None to start from a score alone.
        pattern_text: `unstructured`, N:M or rows x columns.
        scope: `row`, `layer` or `global`; None takes the method's own (for unstructured
            sparsity) or the pattern's.
        score: replaces the method's score.
        solver: replaces the method's solver; `zero` without a method.
        refine: a refinement of the score's mask; the solver then holds this mask.
        **params: parameters of the score, the solver and the refinement, such as `a` or
            `damping`. A parameter that several parts have is set for all of them.

    Raises:
        RecipeError: a name or parameter is unknown or out of range, or there is no score.
        PatternError: the pattern cannot be read, or cannot have this scope.

    Example:
        >>> import torch
        >>> from secateur.sparsity.methods import compose
        >>> method = compose("wanda", "2:4")
        >>> method.solver_name, sorted(method.requires)
        ('zero', ['column_norm'])
        >>> weight = torch.tensor([[3.0, -1.0, 2.0, 2.0]])
        >>> norms = {"column_norm": torch.tensor([1.0, 4.0, 1.0, 2.0])}
        >>> method.solve(weight, method.solver.prepare(norms), norms, 0.5).mask
        tensor([[False,  True, False,  True]])
        >>> compose(None, "unstructured", score="wanda", solver="obs", damping=0.1).name
        'wanda+obs'
    """
    if method is not None and method not in methods:
        raise RecipeError(
            f"unknown method {method!r}", remedy=did_you_mean(method, sorted(methods))
        )
    if method is None and score is None:
        raise RecipeError(
            "neither a method nor a score is given",
            remedy=f"name a method ({', '.join(methods)}) or a score ({', '.join(scores)})",
        )
    named = methods[method] if method is not None else None
    score_name = score or (named.score if named else "")
    solver_name = solver or (named.solver if named else "zero")
    names = [score_name, solver_name, *([refine] if refine is not None else [])]
    registries: list[Registry[Any]] = [scores, solvers, refinements]
    kinds = [registry[part] for registry, part in zip(registries, names, strict=False)]
    _refuse_unknown(params, names, kinds)

    pattern = parse_pattern(pattern_text, scope)
    pair = score_name, solver_name
    # A pair of score and solver that has a name is called by it, however it was composed.
    famous = (name for name, known in methods.items() if (known.score, known.solver) == pair)
    name = next(famous, "+".join(pair)) + (f"+{refine}" if refine else "")
    default = named or methods.get(name)
    if scope is None and default is not None and default.scope in pattern.scopes:
        pattern = parse_pattern(pattern_text, default.scope)
    # Each part gets the parameters that it has; one that several have is set for all of them.
    chosen, solving, *refining = (kind(**parameters_of(kind, params)) for kind in kinds)
    return Method(name, score_name, chosen, solver_name, solving, pattern, refine, *refining)


def _refuse_unknown(params: Mapping[str, Any], names: list[str], kinds: list[Any]) -> None:
    """Refuse parameters that no part has."""
    known = sorted({field.name for kind in kinds for field in fields(kind)})
    for name in params:
        if name not in known:
            raise RecipeError(
                f"{' and '.join(dict.fromkeys(names))} have no parameter {name!r}",
                remedy=did_you_mean(name, known) if known else "leave it out",
            )
