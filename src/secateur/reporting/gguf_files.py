"""What commands show of GGUF files: how they are built, what could be cut, and what a cut left."""

from __future__ import annotations

import shlex
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from secateur.models.gguf_file import GGUFSource
from secateur.reporting import next_steps
from secateur.reporting.fields import Result, blocks_of
from secateur.reporting.tables import Block, Table, binary_size
from secateur.reporting.tables import next_steps as lines_of
from secateur.runs.records import Record


class StoredType(Record):
    """The tensors of one type.

    Attributes:
        tensors: how many.
        weights: in all of them.
        bytes: in all of them.
    """

    tensors: int
    weights: int
    bytes: int


class FileCounts(Record):
    """How a GGUF file is built, by its header alone.

    Attributes:
        architecture: as llama.cpp names it.
        name: of the model; None if the file has none.
        parameters: weights of all tensors.
        layers: decoder layers, without those that predict several tokens.
        predicting_layers: layers that predict several tokens.
        experts: of each layer with experts, or of the largest; 0 if the model is dense.
        experts_used: of them, for each token.
        experts_shared: experts that every token passes.
        tokens: of the vocabulary; 0 if the file has none.
        parts: number of files.
        file_bytes: of all files.
        types: of the tensors, largest first.
    """

    architecture: str
    name: str | None
    parameters: int
    layers: int
    predicting_layers: int
    experts: int
    experts_used: int
    experts_shared: int
    tokens: int
    parts: int
    file_bytes: int
    types: dict[str, StoredType]

    @classmethod
    def of(cls, source: GGUFSource) -> FileCounts:
        """Count a file."""

        def number(key: str) -> int:  # the largest, where layers differ
            value = np.asarray(source.get(key, 0))
            return int(value.max()) if value.dtype.kind in "iu" and value.size else 0

        name = source.fields.get("general.name")
        predicting = number("nextn_predict_layers")
        words = source.fields.get("tokenizer.ggml.tokens")
        sums: dict[str, Counter[str]] = {}
        for tensor in source.tensors.values():
            own = sums.setdefault(tensor.type.name, Counter())
            own.update(tensors=1, weights=prod(tensor.shape), bytes=tensor.nbytes)
        types = {name: StoredType(**own) for name, own in sums.items()}
        return cls(
            architecture=source.architecture,
            name=name.value if name and isinstance(name.value, str) else None,
            parameters=sum(own.weights for own in types.values()),
            layers=number("block_count") - predicting,
            predicting_layers=predicting,
            experts=number("expert_count"),
            experts_used=number("expert_used_count"),
            experts_shared=number("expert_shared_count"),
            tokens=number("vocab_size") if words is None else np.size(words.value),
            parts=len(source.parts),
            file_bytes=source.size_bytes,
            types=dict(sorted(types.items(), key=lambda item: -item[1].bytes)),
        )

    @property
    def bits_per_weight(self) -> float:
        """Bits of the tensors for each weight."""
        return 8 * sum(own.bytes for own in self.types.values()) / max(1, self.parameters)


class InspectFileResult(Result):
    """A GGUF file, by its header alone.

    Attributes:
        model: the name from the user.
        counts: how it is built.
        cuts: for each kind of unit why `structure` cannot cut it; None if it can.
    """

    model: str
    counts: FileCounts
    cuts: dict[str, str | None]

    joined = "counts"

    def tables(self) -> list[Block]:
        """The whole file, and its types."""
        counts = self.counts
        return blocks_of(
            "InspectFileResult",
            self,
            predicting=counts.predicting_layers or None,
            experts=counts.experts or None,
            shared=counts.experts_shared or None,
            tokens=counts.tokens or None,
            parts=counts.parts if counts.parts > 1 else None,
            can=[units for units, why_not in self.cuts.items() if not why_not],
            cannot=[f"{units}: {why_not}" for units, why_not in self.cuts.items() if why_not],
            types=[*counts.types.items()],
        )


class CutFileResult(Result):
    """A cut of a GGUF file, or the plan of one.

    Attributes:
        output: the file, or the first of its parts; None for a plan.
        source: the file that is cut.
        before: how it is built.
        after: the result, as it is read back; of a plan with `--vocabulary` as if all tokens
            stayed.
        cut: what was chosen and how, as in the key `secateur.cut` of the file.
        seconds: of the run; None for a plan, and for a run that was finished already.
        unknown: of a plan, what is known only during the run.
    """

    output: Path | None = None
    source: str
    before: FileCounts
    after: FileCounts
    cut: dict[str, dict[str, Any]] = Field(default_factory=dict)
    seconds: float | None = None
    unknown: list[str] = Field(default_factory=list)

    def tables(self) -> list[Block]:
        """Both files, and what was chosen."""
        then, now = _sizes(self.before), _sizes(self.after)
        rows = []
        for name in {**then, **now}:
            one, other = then.get(name, 0), now.get(name, 0)
            form = binary_size if name == "files" or name.startswith("tensors") else "{:,}".format
            if one or other:
                rows.append((name, form(one), form(other), f"{other / one:.1%}" if one else ""))
        title = "cut" if self.output else "plan of the cut"
        chosen = [{"kind": kind, **own} for kind, own in self.cut.items()]
        table = Table.of(title, ("", "before", "after", "left"), rows)
        texts = self.cut.get("tokens", {}).get("texts", ())
        return [table, *blocks_of("CutFileResult", self, chosen=chosen, texts=texts)]

    def following(self) -> list[Block]:
        """Commands for the file. A model in parts is not expanded, so it cannot be evaluated."""
        file, source = self.output, self.source
        if file is None:
            return []
        words = ["llama-cli", "-m", str(file), "-p", next_steps.PROMPT]
        commands = {
            "let it write, in llama.cpp": shlex.join(words),
            "see its parts": next_steps.command("inspect", file),
        }
        if self.after.parts == 1:
            commands["measure what it lost"] = next_steps.command(
                "evaluate", file, "--dense", source, "--text", next_steps.HELD_OUT
            )
        return lines_of({"the file": file}, commands)


def _sizes(counts: FileCounts) -> dict[str, int]:
    """What two files can be compared in."""
    return {
        "files": counts.file_bytes,
        "parameters": counts.parameters,
        "decoder layers": counts.layers,
        "experts": counts.experts,
        "tokens": counts.tokens,
        **{f"tensors in {name}": own.bytes for name, own in counts.types.items()},
    }
