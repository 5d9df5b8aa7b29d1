"""`secateur demo`: prune, pack, time, evaluate and report a real model, without a hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from secateur.models.samples import TEXTS
from secateur.progress import Labelled, Progress
from secateur.recipes.keywords import public_function
from secateur.recipes.prune import DemoRecipe
from secateur.recipes.verbs import imported
from secateur.reporting.evaluate import BenchResult, EvaluateResult
from secateur.reporting.fields import Result, blocks_of
from secateur.reporting.models import CompressResult, PruneResult
from secateur.reporting.next_steps import command, generation
from secateur.reporting.tables import Block, Table, binary_size, next_steps
from secateur.steps.evaluate import evaluate
from secateur.steps.prune import prune

MODEL = "smollm2-135m"
CALIBRATION, JUDGING = "boolq-calibration", "boolq-held-out"
BACKENDS = ("packed", "dense int8", "dense bf16", "torch bf16")
"""The timed backends: the packed model, our kernels on dense weights, and torch."""
PAGE = "report.html"
PROMPTS = (
    "The Eiffel Tower is a famous landmark in",
    "Once upon a time, in a village by the sea, there lived an old woman who",
)


def run_demo(recipe: DemoRecipe, listener: Progress) -> DemoResult:
    """Run the four steps, then write the report.

    The dense model in int8 is judged beside the pruned one: it is what a user would take instead.
    Its speed is that of the contender `dense int8`; its files are deleted.
    """
    bench, compress = public_function("bench"), public_function("compress")
    folder = Path(recipe.output)
    pruned = prune(
        MODEL,
        output=folder,
        effort=recipe.effort,
        sparsity=recipe.sparsity,
        calibration=CALIBRATION,
        windows=recipe.windows,
        sequence_length=512,
        compress="int8",
        progress=Labelled(listener, "1 of 4, prune and pack"),
        restart=True,
        overwrite=(folder / PAGE).is_file(),  # only what a demo made
    )
    timed = bench(
        folder,
        contenders=BACKENDS,
        prompt_tokens=16,
        new_tokens=32,
        rounds=3,
        progress=Labelled(listener, "2 of 4, time"),
    )
    held_out: dict[str, Any] = {
        "text": JUDGING,
        "sequence_length": 512,
        "windows": recipe.text_windows,
    }
    judged = evaluate(
        folder,
        dense=MODEL,
        generation=True,
        prompts=PROMPTS,
        progress=Labelled(listener, "3 of 4, judge"),
        **held_out,
    )
    listener = Labelled(listener, "4 of 4, the dense model in int8")
    with TemporaryDirectory() as scratch:
        output = Path(scratch) / "int8"
        rounded = compress(MODEL, output=output, values="int8", progress=listener)
        rounded_judged = evaluate(output, progress=listener, **held_out)
    page = imported("secateur.report_page.report:report")([folder], folder / PAGE).page
    return DemoResult(
        model=MODEL, pruned=pruned, bench=timed, judged=judged, rounded=rounded,
        rounded_judged=rounded_judged, page=page,
    )  # fmt: skip


class DemoResult(Result):
    """A model that was pruned, packed, timed and evaluated.

    Attributes:
        model: the name of the dense model.
        pruned: the result of `prune`; it contains the result of `compress`.
        bench: the result of `bench`.
        judged: the result of `evaluate`, on one text and some prompts.
        rounded: the result of `compress` for the dense model in int8.
        rounded_judged: the result of `evaluate` for it, on the same text.
        page: the report.
    """

    model: str
    pruned: PruneResult
    bench: BenchResult
    judged: EvaluateResult
    rounded: CompressResult
    rounded_judged: EvaluateResult
    page: Path

    def to_json(self) -> dict[str, Any]:
        """All numbers, by verb."""
        return {
            "report": str(self.page),
            "prune": self.pruned.to_json(),
            "bench": self.bench.to_json(),
            "evaluation": self.judged.to_json(),
            "dense_int8": {
                "compress": self.rounded.to_json(),
                "evaluation": self.rounded_judged.to_json(),
            },
        }

    def tables(self) -> list[Block]:
        """Size, speed, quality and texts of the dense model, in int8 too, and of the pruned one."""
        [text], packed, manifest = self.judged.texts, self.pruned.compression, self.pruned.manifest
        assert packed is not None
        assert manifest is not None
        rates = {x.contender: x.tokens_per_second for x in self.bench.contenders}
        speeds = (rates.get(name) for name in ("dense bf16", "dense int8", "packed"))
        sizes = (packed.bfloat16_bytes, self.rounded.file_bytes, packed.file_bytes)
        perplexities = (text.reference_perplexity, self.rounded_judged.perplexity, text.perplexity)
        rows = [
            ("weight files", *map(binary_size, sizes)),
            ("tokens per second, our kernels", *(f"{x:.0f}" if x else "" for x in speeds)),
            ("perplexity", *(f"{number:.2f}" for number in perplexities)),
            ("zeros in decoder matrices", "", "", f"{packed.sparsity:.2%}"),
            ("time to prune", "", "", f"{manifest.cost.seconds:.0f} s"),
            ("peak memory", "", "", binary_size(manifest.cost.peak_resident_bytes)),
        ]
        columns = ("", "dense, bfloat16", "dense, int8", "pruned, int8")
        first = self.judged.generation[0].samples[0]
        dense = first.prompt + (first.reference_text or "")
        said = blocks_of("DemoResult", self, written=dense, kept=first.prompt + first.text)
        return [Table.of(self.model, columns, rows), *said]

    def following(self) -> list[Block]:
        """Where the files are, and what to try next."""
        assert self.pruned.output is not None
        return places(self.pruned.output, self.page)


def places(folder: Path, page: Path) -> list[Block]:
    """Where the files are, and what to try next."""
    own = ("prune", "MODEL", "--sparsity", "0.5", "--calibration", TEXTS[0])
    return next_steps(
        {
            "the packed model": folder,
            "its card": folder / "README.md",
            "the report": page.resolve(),
        },
        {
            **generation(folder),
            "time it in more ways": command("bench", folder),
            "see what pruning your own model needs": command(*own, "--dry-run"),
            "prune your own model, a folder or a hub id": command(
                *own, "--compress", "int8", "--output", "MODEL-pruned"
            ),
        },
    )
