"""Carries out a fit: levels, search, the winner packed, and the bounds checked on what was made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.windows import load_windows
from secateur.engine.choose.fitting import FitSearch, Point
from secateur.engine.choose.tournament import Lockstep, Tournament, fingerprint
from secateur.engine.choose.values import StoredVariants
from secateur.engine.stream.ends import ModelEnds
from secateur.engine.stream.targets import CheckpointTarget
from secateur.errors import RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.folder_checks import refuse_quantized
from secateur.models.sources import LocalCheckpoint, resolve
from secateur.progress import Progress, Silent
from secateur.recipes.compress import CompressRecipe
from secateur.recipes.fit import FitRecipe, bytes_of
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.recipes.reading import build_recipe
from secateur.reporting.plots import save_plots
from secateur.reporting.results.fit import FitLoss, FitResult
from secateur.runs.atomic import write_json
from secateur.runs.folder import RunFolder
from secateur.runs.identity import file_digests
from secateur.sparsity.evolution import Candidate, Evolution
from secateur.workflows.compress.mixed_values import MixedReader
from secateur.workflows.compress.pack import ChosenValues, pack_into
from secateur.workflows.compress.packable import PackableMatrix, find_matrices
from secateur.workflows.compress.window_parts import save_parts
from secateur.workflows.fit.levels import KINDS, least_bytes, made_levels
from secateur.workflows.prune.prepare import choose_device

__all__ = ["fit", "fit_recipe"]

FIT = "fit.json"

SHARE = 6
"""One calibration window in so many chooses, and one in so many judges the result."""

PROBE = "50% zeros, int4"
"""The level at which the layers are surveyed."""

HEADER_BYTES = 900
"""Of a matrix in the headers of the files, at most."""

DRAWN_TOKENS = 1024
"""Tokens on which all mutants of a generation are measured; the better ones see all."""

BISECTIONS = 6


@takes_options_of(FitRecipe)
def fit(model: str | Path, *, progress: Progress | None = None, **options: Any) -> FitResult:
    """Find the best compressed model within a budget, and make it.

    Every linear may stay as it is, be rounded to 8, 4 or 3 bits, be pruned to 50 or 70 %, or both.
    A search measured on the whole model chooses, and the winner is packed.

    Args:
        model: folder, hub id, GGUF file or named sample.
        progress: receives every step.
        **options: the other options of the recipe.

    Returns:
        The winner, the frontier, and what each single technique gives.

    Raises:
        SecateurError: what, where, and what to do.
    """
    recipe, call = recipe_of(FitRecipe, {"model": model}, options)
    return fit_recipe(recipe, progress or Silent(), **call)


def fit_recipe(
    recipe: FitRecipe,
    progress: Progress,
    *,
    resume: bool = False,
    restart: bool = False,
    overwrite: bool = False,
) -> FitResult:
    """Carry out a recipe into a new folder.

    Args:
        recipe: the recipe.
        progress: receives every step.
        resume: resume a stopped run, or start if there is none.
        restart: discard the files of a stopped run.
        overwrite: replace an existing output folder.
    """
    begun = time.perf_counter()
    folder = RunFolder(recipe.output, "fit", resume=resume, restart=restart, overwrite=overwrite)
    folder.keep_apart(recipe.model, recipe.calibration.source)
    source = resolve(recipe.model, trust_remote_code=recipe.trust_remote_code, progress=progress)
    folder.keep_apart(source.folder)
    refuse_quantized(source.folder)
    reader = CheckpointReader(source.folder)
    matrices = find_matrices(reader, "int8", recipe.trust_remote_code)
    rest = other_bytes(reader, matrices)
    check_feasible(recipe, rest + least_bytes(reader, matrices))
    folder.worth_resuming = lambda: any(folder.work.iterdir())
    with folder:
        folder.begin(identity(recipe, reader, progress))
        if folder.finished:
            return FitResult.read(folder.notes / FIT)
        run = FitRun(recipe, source, reader, matrices, folder.work, progress)
        result = run.execute(folder, rest, begun)
        write_json(folder.notes / FIT, result.to_json())
        save_plots([result.chart()], folder.notes / "frontier")
        folder.finish()
    return result


def identity(recipe: FitRecipe, reader: CheckpointReader, progress: Progress) -> dict[str, Any]:
    """Everything that the result depends on."""
    return {
        **recipe.model_dump(mode="json", exclude={"output", "memory"}),
        "micro_batch_tokens": recipe.memory.micro_batch_tokens,
        "levels": [kind.name for kind in KINDS],
        "source_files": file_digests(reader.files, progress),
    }


def other_bytes(reader: CheckpointReader, matrices: Mapping[str, PackableMatrix]) -> int:
    """Bytes of everything that is no linear: int8 embeddings, norms in bfloat16, headers."""
    total = 4096
    for name, entry in reader.entries.items():
        matrix = matrices.get(name)
        count = entry.size_bytes // entry.dtype.itemsize
        if matrix is None:
            total += count * min(entry.dtype.itemsize, 2)
        elif matrix.prunable:
            total += HEADER_BYTES
        else:
            total += count + 4 * entry.shape[0]
    return total


def check_feasible(recipe: FitRecipe, least: int) -> None:
    """Refuse a size that no level can reach, before any work.

    Raises:
        RecipeError: names the smallest size that is possible.
    """
    wanted = None if recipe.max_size is None else bytes_of(recipe.max_size)
    if wanted is not None and wanted < least:
        raise RecipeError(
            f"no level fits into {recipe.max_size}",
            where="max_size",
            remedy=f"the smallest possible size is {least / 2**20:.1f}MiB; or cut the model first "
            "with `secateur structure`",
        )


class FitRun:
    """One fit, from the windows to the packed winner.

    Args:
        recipe: the recipe.
        source: the dense model.
        reader: reads it.
        matrices: that can be packed, by stored name.
        work: folder for levels and measured values.
        progress: receives every step.
    """

    def __init__(
        self,
        recipe: FitRecipe,
        source: LocalCheckpoint,
        reader: CheckpointReader,
        matrices: dict[str, PackableMatrix],
        work: Path,
        progress: Progress,
    ) -> None:
        self.recipe, self.source, self.reader = recipe, source, reader
        self.matrices, self.work, self.progress = matrices, work, progress
        device = choose_device(recipe.device)
        trust = recipe.trust_remote_code
        self.target = CheckpointTarget(reader, None, device, trust_remote_code=trust)
        self.fitted, self.searched, self.judged = self.windows()
        self.levels = list(made_levels(recipe, reader, matrices, self.fitted, work, progress))

    def windows(self) -> tuple[Path, Tensor, Tensor]:
        """The file of the windows that make levels, and the windows that choose and that judge.

        Raises:
            RecipeError: there are too few.
        """
        files = [self.work / f"{name}.safetensors" for name in ("fitted", "searched", "judged")]
        options = self.recipe.calibration
        save_parts(
            options.source, options, self.target, files, SHARE,
            "make levels, choose among them and judge", self.progress,
            trust_remote_code=self.recipe.trust_remote_code,
        )  # fmt: skip
        return files[0], load_windows(files[1]), load_windows(files[2])

    def execute(self, folder: RunFolder, rest: int, begun: float) -> FitResult:
        """Search, pack and judge.

        Args:
            folder: of the run, opened.
            rest: bytes of everything that is no linear.
            begun: when the run began.
        """
        search = self.search()
        singles = search.singles()
        search.survey(self.probe)
        size = None if self.recipe.max_size is None else bytes_of(self.recipe.max_size)
        budgets = search.budgets()
        frontier = search.frontier(budgets, "all") + search.frontier(budgets, "quantize")
        budget = float("inf") if size is None else float(size - rest)
        if self.recipe.max_loss_increase is not None:
            budget = min(budget, self.smallest_within(search, self.recipe.max_loss_increase))
        starts = [p.candidate for p in (*singles, *frontier) if p.cost <= budget]
        best = search.menu.best(budget)
        quantized = search.menu.best(budget, search.allowed("quantize"))
        starts += [candidate for candidate in (best, quantized) if candidate is not None]
        starts += search.between(budget)
        winner = search.refined(starts, budget, self.evolution)
        rivals = {
            "the best single technique": single_within(singles, budget),
            "quantize only, mixed": quantized,
        }
        losses = self.judge(search, {"winner": winner.candidate, **rivals})
        packed = self.pack(folder, search, winner, begun)
        return FitResult(
            folder.output,
            size,
            self.recipe.max_loss_increase,
            tuple(one.name for one in self.levels),
            dict(zip(search.names, winner.candidate, strict=True)),
            winner,
            tuple(singles),
            tuple(frontier),
            losses,
            rest,
            packed,
            time.perf_counter() - begun,
        )

    def search(self) -> FitSearch:
        """The search among the levels; costs are bytes."""
        linears = [m.linear for m in self.matrices.values() if m.prunable]
        costs = {n: [float(one.level.bytes_of[n]) for one in self.levels] for n in linears}
        file = self.work / "search.jsonl"
        return FitSearch(self.target, self.levels, costs, self.searched, file, self.progress)

    @property
    def probe(self) -> int:
        """The level at which the layers are surveyed."""
        return next(n for n, one in enumerate(self.levels) if one.name == PROBE)

    def evolution(self, tokens: int) -> Evolution:
        """The parameters of the search."""
        first = min(DRAWN_TOKENS, tokens)
        return Evolution(
            generations=self.recipe.generations,
            offspring=self.recipe.offspring,
            stages=((2, first), (1, tokens)),
            seed=self.recipe.calibration.seed,
            tries=4,
            revisits=False,
        )

    def losses(self, search: FitSearch, windows: Tensor, file: str) -> Tournament:
        """Measures the loss of the next token on some windows."""
        ends = ModelEnds(self.target, windows)
        variants = StoredVariants(ends, search.names, [one.level for one in self.levels])
        told = fingerprint(ends, windows.numel(), "loss", search.names)
        lockstep = Lockstep(ends, variants, "loss", self.progress)
        return Tournament(lockstep, variants.versions, self.work / file, told)

    @torch.no_grad()
    def smallest_within(self, search: FitSearch, bound: float) -> float:
        """The smallest cost found, by bisection, whose loss rises by no more than a bound."""
        measure = self.losses(search, self.searched, "losses.jsonl")
        tokens = self.searched.numel()
        (dense,) = measure([(0,) * len(search.names)], tokens, 0)
        low, high = search.menu.least, search.menu.total((0,) * len(search.names))
        self.progress.start("finding the smallest size", BISECTIONS)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            candidate = search.menu.best(middle)
            assert candidate is not None
            (found,) = measure([candidate], tokens, 0)
            low, high = (low, middle) if found - dense <= bound else (middle, high)
            self.progress.step(note=f"{middle / 2**20:.1f} MiB of linears: {found - dense:+.4f}")
        self.progress.finish()
        return high

    @torch.no_grad()
    def judge(
        self, search: FitSearch, candidates: Mapping[str, Candidate | None]
    ) -> dict[str, FitLoss]:
        """The loss of candidates on text that neither made nor chose them."""
        measure = self.losses(search, self.judged, "judged.jsonl")
        tokens = self.judged.numel()
        (dense,) = measure([(0,) * len(search.names)], tokens, 0)
        found = {}
        for name, candidate in candidates.items():
            if candidate is not None:
                (loss,) = measure([candidate], tokens, 0)
                found[name] = FitLoss(search.menu.total(candidate), loss - dense)
        return found

    def pack(self, folder: RunFolder, search: FitSearch, winner: Point, begun: float) -> Any:
        """Pack the winner."""
        stored = {m.linear: name for name, m in self.matrices.items() if m.prunable}
        level_of = {
            stored[linear]: self.levels[level]
            for linear, level in zip(search.names, winner.candidate, strict=True)
        }
        values = {
            stored[linear]: KINDS[level].values
            for linear, level in zip(search.names, winner.candidate, strict=True)
        }
        readers = {n: one.level.reader for n, one in level_of.items() if one is not self.levels[0]}
        recipe = build_recipe(
            CompressRecipe,
            {
                "model": self.recipe.model, "output": self.recipe.output, "values": "bfloat16",
                "embeddings": "int8",
            },
        )  # fmt: skip
        mixed = MixedReader(self.reader.folder, readers)
        chosen = ChosenValues(mixed, self.matrices, values, {})
        return pack_into(folder, recipe, self.source, chosen, self.progress, begun)


def single_within(singles: list[Point], budget: float) -> Candidate | None:
    """The best single level within a budget."""
    fitting = [point for point in singles if point.cost <= budget]
    best = min(fitting, key=lambda point: point.divergence, default=None)
    return None if best is None else best.candidate
