"""`secateur demo`: what compression brings for a model on this machine, beside llama.cpp's types.

Each way is what a user would type: one verb or two. What it makes is judged on held-out text beside
the dense model, and all models take turns to decode. With `balanced` and above, `fit` meets two
sizes below that of int4, and half of the weights become zeros.

A finished way is kept with its numbers, so a stopped demo goes on. `demo.json` has everything, with
protocol, versions and machine.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from secateur.calibration.documents import read_documents
from secateur.engine.stream.hidden_states import STATES_BYTES
from secateur.engine.stream.layerwise import RememberingReader
from secateur.errors import RecipeError, SecateurError
from secateur.evaluation.speed import take_turns
from secateur.models.architecture import experts_of, positions_of
from secateur.models.checkpoint import shard_files
from secateur.models.counting import counted
from secateur.models.skeleton import build_skeleton
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer, text_tokens
from secateur.progress import Labelled, Progress
from secateur.recipes.keywords import public_function
from secateur.recipes.measure import EvaluateRecipe
from secateur.recipes.prune import DemoRecipe
from secateur.reporting import charts
from secateur.reporting.fields import Result
from secateur.reporting.next_steps import command, free_place, generation
from secateur.reporting.tables import Block, next_steps
from secateur.runs.environment import choose_device, environment
from secateur.runs.output import write_json
from secateur.runs.records import BFLOAT16_BYTES, Record, read_record
from secateur.runtime.kernels.library import kernel_info
from secateur.steps.evaluate import Stored, run_evaluation

RESULT, PICTURE = "demo.json", "curve"
LENGTH, PROMPT, NEW_TOKENS, ROUNDS = 512, 16, 32, 5
"""At most so many tokens of a window; tokens of the prompt that is timed, and after it; rounds."""
DENSE, INT4, Q4 = "dense", "int4", "llama.cpp Q4_0"
TOKENS, EXPERTS = "tokens of the text, int4", "3/4 of the experts, int4"
MEMORY = 0.7
"""The part of the free memory that models which are timed together may take."""
SMALLER = (0.85, 0.7)
"""The sizes that `fit` meets, as shares of that of int4."""

Call = tuple[str, dict[str, Any]]
"""A verb, and its options in Python's spelling."""


class DemoWay(NamedTuple):
    """How a model is made smaller: verbs, each on what the one before it made."""

    name: str
    calls: tuple[Call, ...]

    @property
    def folders(self) -> list[str]:
        """The names of the folders that its verbs write."""
        name = re.sub(r"[^\w.]+", "-", self.name)
        return [f"{name}-cut" for _ in self.calls[1:]] + [name]

    def commands(self, model: str) -> tuple[str, ...]:
        """What a user types."""
        place, typed = model, list[str]()
        for verb, options in self.calls:
            flags = (x for n, v in options.items() for x in ("--" + n.replace("_", "-"), v))
            output = free_place(self.folders[len(typed)])
            typed.append(command(verb, place, *flags, "--output", output))
            place = output
        return tuple(typed)


class DemoRow(Record):
    """What one way makes of the model.

    Attributes:
        way: its name.
        commands: how it is made.
        place: its folder or file, within the demo's folder.
        file_bytes: of the weights.
        perplexity: on the held-out text, for each token of the dense model.
        divergence: from the dense model, in nats; None where the tokens are others.
        longer: the tokens of this text, by those of the dense model.
        tokens_per_second: after a prompt, one sequence; None if it was not timed.
        untimed: why not.
        failure: why it could not be made; it has no numbers then.
    """

    way: str
    commands: tuple[str, ...]
    place: str = ""
    file_bytes: int = 0
    perplexity: float = 0.0
    divergence: float | None = None
    longer: float = 1.0
    tokens_per_second: float | None = None
    untimed: str | None = None
    failure: str | None = None

    @property
    def speed(self) -> float | None:
        """Tokens of the dense model per second: fewer where a text takes more tokens."""
        return self.tokens_per_second and self.tokens_per_second / self.longer

    @property
    def backend(self) -> str:
        """What runs it, by its name in `evaluation.speed`."""
        if self.place.endswith(".gguf"):
            return self.place
        return "packed" if self.commands else "dense bf16"


def run_demo(recipe: DemoRecipe, listener: Progress) -> DemoResult:
    """Make every way that is not there yet, judge it, and time all models.

    Raises:
        RecipeError: the output is the folder of something else, or of another demo.
        SecateurError: the model cannot be opened.
    """
    demo = Demo(recipe, listener)
    for way in demo.ways():
        demo.make(way)
    demo.time()
    charts.save_plots([demo.result.chart], demo.folder / PICTURE)
    return demo.result


class Demo:
    """One demo and its folder.

    Args:
        recipe: of it.
        progress: receives every step.
    """

    def __init__(self, recipe: DemoRecipe, progress: Progress) -> None:
        self.recipe, self.progress = recipe, progress
        self.folder = Path(recipe.output)
        self.source = resolve(recipe.model, progress=progress).folder
        self.tokenizer: Any = load_tokenizer(self.source)
        stored = Stored(DENSE, self.source, choose_device("auto"))
        self.dense = RememberingReader(stored.target(), STATES_BYTES, progress)
        self.length = min(LENGTH, positions_of(build_skeleton(self.source).config) or LENGTH)
        self.text = {"calibration": recipe.source, "windows": recipe.windows}
        self.text |= {"sequence_length": self.length}
        protocol = {
            **{name: str(value) for name, value in recipe if name != "output"},
            "sequence_length": self.length, "prompt_tokens": PROMPT, "new_tokens": NEW_TOKENS,
            "rounds": ROUNDS, "kernels": kernel_info().tier, **environment(torch.device("cpu")),
        }  # fmt: skip
        self.result = self._known(
            DemoResult(model=recipe.model, output=self.folder, protocol=protocol)
        )

    def _known(self, new: DemoResult) -> DemoResult:
        """What an earlier call has finished."""
        file = self.folder / RESULT
        if not self.folder.exists():
            return new
        if not file.is_file():
            raise RecipeError(
                "it exists and is no demo",
                where=str(self.folder),
                remedy="name another folder with --output",
            )
        known = read_record(DemoResult, file)
        if (known.model, known.protocol) != (new.model, new.protocol):
            raise RecipeError(
                "the folder has a demo of another model, or with other options or versions",
                where=str(self.folder),
                remedy="delete it, or name another folder with --output",
            )
        return known

    def keep(self, **fields: Any) -> None:
        """Put fields into the result, and the result into its file."""
        self.result = self.result.model_copy(update=fields)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / RESULT, self.result.to_json())

    def ways(self) -> Iterator[DemoWay]:
        """All ways, the dense model first."""
        int4: Call = ("compress", {"values": "int4", **self.text})
        yield DemoWay(DENSE, ())
        yield DemoWay("int8", (("compress", {"values": "int8"}),))
        yield DemoWay(INT4, (int4,))
        for type in ("q8_0", "q4_0"):
            yield DemoWay(f"llama.cpp {type.upper()}", (("export", {"to": "gguf", "type": type}),))
        if experts_of(build_skeleton(self.source)) is not None:
            yield DemoWay(EXPERTS, (("structure", {"experts": 0.75, **self.text}), int4))
        else:
            yield DemoWay(TOKENS, (("structure", {"vocabulary": self.recipe.source}), int4))
        if self.recipe.effort == "fast":
            return
        size = next(row.file_bytes for row in self.result.rows if row.way == INT4)
        effort = {"effort": self.recipe.effort, **self.text}
        for share in SMALLER if size else ():
            fitted = {"max_size": int(share * size), **effort}
            yield DemoWay(f"fit, {share:.0%} of int4", (("fit", fitted),))
        zeros = {"sparsity": 0.5, "compress": "int8", **effort}
        yield DemoWay("half zeros, int8", (("prune", zeros),))

    def make(self, way: DemoWay) -> None:
        """Make and judge what a way gives, unless it is there.

        Raises:
            SecateurError: the dense model cannot be judged.
        """
        if any(row.way == way.name for row in self.result.rows):
            return
        progress = Labelled(self.progress, way.name)
        row = DemoRow(way=way.name, commands=way.commands(self.recipe.model))
        try:
            row = self.judged(row, self.made(way, progress), progress)
        except SecateurError as error:
            if not way.calls:
                raise
            row = row.model_copy(update={"failure": error.what})
        self.keep(rows=(*self.result.rows, row))

    def made(self, way: DemoWay, progress: Progress) -> Path:
        """What the verbs make: a folder, or a GGUF file. What lies between them is removed."""
        place = self.source
        for (verb, options), name in zip(way.calls, way.folders, strict=False):
            before, output = place, self.folder / name
            shutil.rmtree(output, ignore_errors=True)  # of a call that was stopped
            given = self.recipe.model if before == self.source else before
            public_function(verb)(given, output=output, progress=progress, **options)
            place = next(iter(output.glob("*.gguf")), output)
            if before != self.source:
                shutil.rmtree(before)
        return place

    def judged(self, row: DemoRow, place: Path, progress: Progress) -> DemoRow:
        """The row with size and quality."""
        files, how = [place] if place.is_file() else shard_files(place), dict[str, Any]()
        size, longer = sum(file.stat().st_size for file in files), 1.0
        if place == self.source:
            how = {"model": self.dense}
            size = BFLOAT16_BYTES * counted("", build_skeleton(place)).parameters
        if same := not any("--vocabulary" in each for each in row.commands):
            how |= {"dense": self.dense, "tokenizer": self.tokenizer}
        else:
            longer = self.tokens(load_tokenizer(place)) / self.tokens(self.tokenizer)
        recipe = EvaluateRecipe(
            model=str(place), dense=self.recipe.model if same else None, text=(self.recipe.text,),
            windows=self.recipe.text_windows, sequence_length=self.length,
        )  # fmt: skip
        found = run_evaluation(recipe, progress, **how)
        if place.is_file():  # a GGUF file was read by its conversion, in the cache
            shutil.rmtree(resolve(str(place)).folder)
        return row.model_copy(
            update={
                "place": str(place),
                "file_bytes": size,
                "perplexity": math.exp(found.mean_loss * longer),
                "divergence": found.divergence[0].kl if same else None,
                "longer": longer,
            }
        )

    def tokens(self, tokenizer: Any) -> int:
        """How many tokens the held-out text has."""
        return sum(map(len, text_tokens(tokenizer, read_documents(self.recipe.text), ())))

    def time(self) -> None:
        """Time all rows without a speed. As many models as memory holds take turns."""
        timed = ("failure", "untimed", "tokens_per_second")
        waiting = [x for x in self.result.rows if not any(getattr(x, name) for name in timed)]
        while waiting:
            free, group = MEMORY * psutil.virtual_memory().available, list[DemoRow]()
            while waiting and (not group or waiting[0].file_bytes < free):
                group.append(waiting.pop(0))
                free -= group[-1].file_bytes
            speeds = take_turns(
                [(row.backend, Path(row.place)) for row in group],
                prompt=[*range(PROMPT)], new_tokens=NEW_TOKENS, rounds=ROUNDS,
                progress=Labelled(self.progress, "time"),
            )  # fmt: skip
            found = {
                row.way: {"untimed": speed.failure}
                if speed.failure
                else {"tokens_per_second": speed.tokens_per_second}
                for row, speed in zip(group, speeds, strict=True)
            }
            rows = (row.model_copy(update=found.get(row.way, {})) for row in self.result.rows)
            self.keep(rows=tuple(rows))


class DemoResult(Result):
    """The ways to make a model smaller, side by side: `demo.json`.

    Attributes:
        model: the name from the user.
        output: the folder of the demo.
        protocol: options, versions and machine.
        rows: a row for each way.
    """

    model: str
    output: Path
    protocol: dict[str, Any]
    rows: tuple[DemoRow, ...] = ()

    def beside(self, *others: tuple[str, str]) -> list[dict[str, Any]]:
        """Ways and others, as far as both have numbers: how much smaller and faster each is.

        What is lost is the rise of the loss of a token of the dense model, in nats.
        """
        known = {row.way: row for row in self.rows if row.failure is None}
        pairs = [(known[a], known[b]) for a, b in others if {a, b} <= {*known}]
        return [
            {
                "own": own,
                "other": other,
                "smaller": other.file_bytes / own.file_bytes,
                "faster": own.speed / other.speed if own.speed and other.speed else None,
                "lost": math.log(own.perplexity / known[DENSE].perplexity),
                "against": math.log(other.perplexity / known[DENSE].perplexity),
            }
            for own, other in pairs
        ]

    @property
    def found(self) -> list[dict[str, Any]]:
        """The ways with numbers, each beside the dense model."""
        return self.beside(*((row.way, DENSE) for row in self.rows))

    @property
    def points(self) -> list[dict[str, Any]]:
        """What the demo is made for: int4 beside others, and what a cut adds to it."""
        return self.beside((INT4, DENSE), (INT4, Q4), (TOKENS, INT4), (EXPERTS, INT4))

    @property
    def chart(self) -> charts.LineChart:
        """The loss of each way against its bytes."""
        points = {x["own"].way: (x["own"].file_bytes / 2**20, x["lost"]) for x in self.found}
        return charts.LineChart(
            "demo", f"{self.model}: what a size costs", "MiB of weight files",
            "nats lost per token of held-out text",
            tuple(charts.Series(way, (point,), joined=False) for way, point in points.items()),
        )  # fmt: skip

    def following(self) -> list[Block]:
        """Where the files are, and what to try next."""
        made = [x["own"] for x in self.found if x["own"].backend == "packed"]
        commands = {f"make {row.way}": " && ".join(row.commands) for row in made}
        for row in made:
            commands |= generation(Path(row.place)) if row.way == INT4 else {}
        chart = self.output / f"{PICTURE}.svg"
        return next_steps(
            {"all numbers, with the protocol": self.output / RESULT, "the chart": chart}, commands
        )
