"""Scores of the experts of a GGUF file, higher = keep: by weights, an importance matrix, or a run.

Layers that predict several tokens have experts too, and neither llama.cpp's runs nor importance
matrices reach them. Their experts are scored by their weights (`aimer`).

An importance matrix has sums of squared inputs of matrices, as llama.cpp's `imatrix` collects them.
It is published beside most GGUF files, in one of two forms.

- A GGUF file: of each matrix, `NAME.in_sum2` [experts, columns] and `NAME.counts` [experts], the
  number of tokens that each expert received. A matrix that is not of experts has one row.
- An older file, often `.dat`: names and sums, each divided by its count and multiplied by a number
  of calls, the same for all experts. So it does not say how often an expert was chosen.
"""

from __future__ import annotations

import logging
import re
import struct
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.engine.search.experts import ExpertUse, aimer, scores_of
from secateur.errors import ArchitectureError, CheckpointError, SourceError, located
from secateur.exporting.gguf.llama_cpp import LlamaCpp, Node, decoded
from secateur.models.checkpoint import damaged
from secateur.models.gguf_file import MAGIC, GGUFSource
from secateur.progress import Progress, each_step
from secateur.recipes.shared import Calibration
from secateur.runs.output import write_tensors

log = logging.getLogger(__name__)

PARTS = ("gate", "up", "gate_up", "down")
ROUTED = re.compile(r"(ffn_moe_topk|ffn_moe_weighted|ffn_moe_down)-(\d+)")
"""The nodes of a layer: chosen experts [tokens, chosen], and outputs [tokens, chosen, hidden] with
and without the weights of the router."""

READING = ("reap", "frequency")
"""Scores for which llama.cpp runs the file."""

DONE = "windows"
"""The number of windows in stored sums."""

STORED_SECONDS = 5.0
"""Sums are stored so often."""


SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Sums of squared inputs.

    Attributes:
        sums: Σ x² of each input of each matrix, float64 [experts, columns], by the tensor's name.
        counts: the number of tokens in these sums, int64 [experts].
        has_counts: whether counts are of each expert; in the older form they are not.
    """

    sums: dict[str, Tensor]
    counts: dict[str, Tensor]
    has_counts: bool = True

    @classmethod
    def read(cls, file: Path) -> ImportanceMatrix:
        """Read either form.

        Raises:
            SourceError: there is no such file.
            CheckpointError: the file is damaged, or is no importance matrix.
        """
        if not file.is_file():
            raise SourceError("no such file", where=str(file), remedy="check the path")
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                stream.seek(0)
                return cls._read_old(stream, file)
        stored, found = GGUFSource.read(file).tensors, cls({}, {})
        for name in [x.removesuffix(SUMS) for x in stored if x.endswith(SUMS)]:
            pair = stored[name + SUMS], stored.get(name + COUNTS)
            if pair[1] is None or any(x.type != gguf.GGMLQuantizationType.F32 for x in pair if x):
                raise damaged(f"{name} has no sums and counts in float32", file)
            sums, counts = (torch.from_numpy(x.read().view(np.float32)) for x in pair if x)
            if sums.numel() % counts.numel():
                raise damaged(f"{name} has {sums.numel()} sums of {counts.numel()} matrices", file)
            _check(name, sums, file)
            _check(name, counts, file)
            found.counts[name] = counts.flatten().round().long()
            found.sums[name] = sums.double().view(counts.numel(), -1)
        if not found.sums:
            raise CheckpointError(
                "the file has no sums of squared inputs, so it is no importance matrix",
                where=str(file),
                remedy="name the imatrix file that belongs to the model",
            )
        return found

    @classmethod
    def _read_old(cls, stream: BinaryIO, file: Path) -> ImportanceMatrix:
        found = cls({}, {}, has_counts=False)
        size_bytes = file.stat().st_size

        def number() -> int:
            raw = stream.read(4)
            return int(*struct.unpack("<i", raw)) if len(raw) == 4 else -1

        def some(count: int, each: int, what: str) -> bytes:
            if not 0 < count * each <= size_bytes - stream.tell():
                raise damaged(f"no importance matrix, or a damaged one: {count} {what}", file)
            return stream.read(count * each)

        entries = number()
        if not 0 < entries <= size_bytes // 12:
            raise damaged(f"no importance matrix: it has {entries} entries", file)
        for _ in range(entries):
            name = some(number(), 1, "bytes of a name").decode(errors="replace")
            calls = max(1, number())
            values = some(number(), 4, f"values of {name}")
            sums = torch.frombuffer(bytearray(values), dtype=torch.float32)
            _check(name, sums, file)
            found.sums[name] = sums.double()[None]
            found.counts[name] = torch.tensor([calls])
        return found


def _check(name: str, values: Tensor, file: Path) -> None:
    """Refuse what is no sum of squares."""
    if not (values.isfinite().all() and (values >= 0).all()):
        raise damaged(f"{name} has values that are no sums of squares", file)


def expert_weights(
    source: GGUFSource, layer: int, part: str, expert: int, *, scaled: bool
) -> Tensor | None:
    """One matrix of an expert, float32 [out, in]; None if the file has none of this part.

    Args:
        source: the file.
        layer: number of the layer.
        part: one of `PARTS`.
        expert: number of the expert.
        scaled: multiply by the expert's scale. That of NVFP4 belongs to its numbers, and always
            counts; that of Gemma 4 is a weight of the router.

    Raises:
        CheckpointError: nothing that is installed decodes its type.
    """
    name = f"blk.{layer}.ffn_{part}_exps"
    stored = source.tensors.get(f"{name}.weight")
    if stored is None:
        return None
    with located(stored.name):
        weight = decoded(stored.read([expert]).reshape(stored.shape[1], -1), stored.type)
    scale = source.tensors.get(f"{name}.scale")
    if scale is not None and (scaled or stored.type == gguf.GGMLQuantizationType.NVFP4):
        weight = weight * torch.from_numpy(scale.read().view("<f4")).flatten()[expert]
    return weight


def aimer_scores(
    source: GGUFSource, layers: Collection[int], progress: Progress
) -> dict[int, Tensor]:
    """The score `aimer` of all experts, float64 [experts], by number of the layer."""

    def score(layer: int, expert: int) -> float:
        matrices = (expert_weights(source, layer, part, expert, scaled=False) for part in PARTS)
        return aimer(x for x in matrices if x is not None)

    experts = range(int(source.get("expert_count")))
    return {
        layer: torch.tensor([score(layer, expert) for expert in experts], dtype=torch.float64)
        for layer in each_step(progress, "experts of layers", layers)
    }


def imatrix_scores(
    source: GGUFSource, matrix: ImportanceMatrix, layers: Collection[int], progress: Progress
) -> dict[int, Tensor]:
    """Scores by an importance matrix, float64 [experts], by number of the layer.

        S_e = n_e · sqrt(Σ_i r_ei² · E[x_i²]) · sqrt(Σ_j ‖D_e[:, j]‖² · E[h_j²])

    An estimate of Σ g(t) · ‖f_e(t)‖ over the n_e tokens t of expert e. The expectations over these
    tokens are in the matrix: of the inputs x of gate and up, and of the inputs h of the down
    projection D_e [hidden, neurons].

    - ‖f‖: E‖D_e h‖² = Σ_jk (D_eᵀ D_e)_jk · E[h_j h_k]. The matrix has only the terms j = k, so
      inputs count as uncorrelated.
    - g, the router's weight, is not in the matrix. The size of the expert's logit r_e · x, by the
      same rule, stands for it: an expert whose row of the router answers strongly gets large
      weights. It is left out where router and experts read different inputs (Nemotron-H), and in
      Llama 4, whose x has the weight in it.
    - The older form of the file has no n_e; it counts as 1, or as 0 where no token came.

    Raises:
        CheckpointError: the matrix is of another model.
    """
    found = {}
    for layer in each_step(progress, "experts of layers", layers):
        means, tokens = _means_of(source, matrix, layer, "down")
        if means is not None:
            norms = []
            for expert, mean in enumerate(means):
                down = expert_weights(source, layer, "down", expert, scaled=True)
                assert down is not None
                norms.append((down.double().square().sum(0) @ mean).sqrt())
            found[layer] = tokens * torch.stack(norms)
            router = source.tensors.get(f"blk.{layer}.ffn_gate_inp.weight")
            known = (_means_of(source, matrix, layer, part)[0] for part in PARTS[:-1])
            read = next((x for x in known if x is not None), torch.empty(0, 0))
            unscaled = source.architecture != "llama4"
            if unscaled and router is not None and router.shape[-1] == read.shape[-1]:
                rows = decoded(router.read().reshape(len(read), -1), router.type).double()
                found[layer] *= (rows.square() * read).sum(1).sqrt()
    return found


def _means_of(
    source: GGUFSource, matrix: ImportanceMatrix, layer: int, part: str
) -> tuple[Tensor | None, Tensor]:
    """Mean squares of the inputs of each expert, float64 [experts, inputs], and their tokens."""
    name = f"blk.{layer}.ffn_{part}_exps.weight"
    sums, stored = matrix.sums.get(name), source.tensors.get(name)
    if sums is None or stored is None:
        return None, torch.empty(0)
    tokens, (count, _, inputs) = matrix.counts[name].double(), stored.shape
    if sums.numel() != count * inputs or (matrix.has_counts and len(tokens) != count):
        raise CheckpointError(
            f"the importance matrix has {sums.numel()} inputs, and the file {count} experts with "
            f"{inputs}",
            where=name,
            remedy="name the importance matrix of this model",
        )
    means = (sums / tokens.clamp_min(1)[:, None]).view(count, inputs)
    unseen = (means == 1).all(dim=1)  # as the older form writes it
    return means, tokens if matrix.has_counts else (~unseen).double()


class _UseSums:
    """The sums of `ExpertUse` over the windows of a run, stored now and then.

    Args:
        source: the file that runs.
        store: where the sums are stored.
    """

    def __init__(self, source: GGUFSource, store: Path) -> None:
        self.store, self.count = store, int(source.get("expert_count"))
        # llama.cpp multiplies the inputs of this architecture by the router's weights
        self.output = "down" if source.architecture == "llama4" else "weighted"
        self.chosen: dict[int, Tensor] = {}
        self.stored = time.monotonic()
        self.sums: dict[str, Tensor] = load_file(store) if store.exists() else {}

    @property
    def done(self) -> int:
        """The windows that are finished."""
        return int(self.sums.get(DONE, 0))

    def wanted(self, node: Node) -> bool:
        """Whether a node is one of those that count."""
        match = ROUTED.fullmatch(node.name)
        return match is not None and match[1].endswith(("topk", self.output))

    def add(self, node: Node) -> None:
        """Add what a node has of some tokens."""
        match = ROUTED.fullmatch(node.name)
        assert match is not None
        layer, value = int(match[2]), node.value()[0]
        if match[1].endswith("topk"):
            if layer in self.chosen:
                raise ArchitectureError(
                    f"layer {layer} chooses experts twice for each token",
                    remedy="choose by their weights: --experts-by aimer",
                )
            self.chosen[layer] = value[0].long().flatten()
            return
        chosen = self.chosen.pop(layer)
        tokens, outputs = f"tokens.{layer}", f"outputs.{layer}"
        zeros = torch.zeros(self.count, dtype=torch.float64)
        own = self.sums.setdefault(outputs, zeros)
        own.index_add_(0, chosen, value.double().norm(dim=-1).flatten())
        counts = chosen.bincount(minlength=self.count)
        self.sums[tokens] = self.sums.get(tokens, 0) + counts

    def step(self, last: int) -> None:
        """A window is finished; `last` is the number of all."""
        self.sums[DONE] = torch.tensor(self.done + 1)
        now = time.monotonic()
        if now - self.stored >= STORED_SECONDS or self.done == last:
            write_tensors(self.store, self.sums)
            self.stored = now

    def use(self) -> dict[int, ExpertUse]:
        """The use of experts, by number of the layer."""
        layers = sorted(int(x.removeprefix("tokens.")) for x in self.sums if x[:6] == "tokens")
        return {n: ExpertUse(self.sums[f"tokens.{n}"], self.sums[f"outputs.{n}"]) for n in layers}


def expert_use(
    source: GGUFSource, engine: LlamaCpp, windows: Tensor, store: Path, progress: Progress
) -> dict[int, ExpertUse]:
    """Pass windows through a file by llama.cpp, and measure how much it uses its experts.

    Args:
        source: the file.
        engine: the same file, loaded.
        windows: token ids [samples, sequence_length].
        store: a safetensors file with the sums of finished windows. A killed run goes on there.
        progress: receives every window.

    Raises:
        ArchitectureError: llama.cpp shows no experts, or two choices of them in a layer.
    """
    sums = _UseSums(source, store)
    for _ in engine.run(windows, sums.wanted, sums.add, progress=progress, done=sums.done):
        sums.step(len(windows))
    found = sums.use()
    if not found:
        raise ArchitectureError(
            f"llama.cpp shows no experts of {source.architecture}",
            where=str(source.file),
            remedy="choose by their weights: --experts-by aimer",
        )
    return found


def expert_scores(
    source: GGUFSource,
    layers: Collection[int],
    by: str,
    options: Calibration,
    imatrix: Path | None,
    work: Path,
    progress: Progress,
) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """The scores of all experts of a file, float64 [experts] by number of the layer; and notes.

    Args:
        source: the file.
        layers: with experts.
        by: reap, frequency, random, aimer or imatrix.
        options: the calibration text; its seed is that of `random`.
        imatrix: the importance matrix for `imatrix`.
        work: the folder of the run, for sums of a run that may be killed.
        progress: receives every step.

    Raises:
        ArchitectureError: llama.cpp does not show the experts of this file.
        CheckpointError: the importance matrix is damaged, or of another model.
        RecipeError: the text and the windows do not fit, or llama.cpp is not installed.
    """
    notes: dict[str, Any] = {"by": by}
    scores: dict[int, Tensor] = {}
    if by == "random":
        blank = torch.zeros(int(source.get("expert_count")))
        scores = scores_of(dict.fromkeys(layers, ExpertUse(blank, blank)), by, options.seed)
    elif by == "imatrix":
        assert imatrix is not None
        matrix = ImportanceMatrix.read(imatrix)
        scores = imatrix_scores(source, matrix, layers, progress)
        notes["unseen"] = _unseen(scores)
        if not scores:
            raise CheckpointError(
                "the importance matrix has no experts of this file",
                where=str(imatrix),
                remedy="name the importance matrix of this model",
            )
    elif by in READING:
        with LlamaCpp(source.file) as engine:
            windows, notes["calibration"] = engine.windows(options)
            store = work / "experts.safetensors"
            use = expert_use(source, engine, windows, store, progress)
        scores = scores_of(use, by)
        notes["unseen"] = _unseen({layer: own.tokens for layer, own in use.items()})
    others = [layer for layer in layers if layer not in scores]
    if others and by != "aimer":
        notes["by_weights"] = others
        log.warning("layers %s are scored by their weights: nothing else reaches them", others)
    scores |= aimer_scores(source, others, progress) if others else {}
    scores = {layer: scores[layer] for layer in layers}
    notes["scores"] = {n: [float(f"{x:.4g}") for x in own] for n, own in scores.items()}
    return scores, notes


def _unseen(tokens: Mapping[int, Tensor]) -> dict[int, list[int]]:
    """The experts of each layer that received no token; a warning names them."""
    found = {layer: (own == 0).nonzero().flatten().tolist() for layer, own in tokens.items()}
    found = {layer: experts for layer, experts in found.items() if experts}
    if found:
        total = sum(map(len, found.values()))
        layer, experts = next(iter(found.items()))
        message = "%d experts received no token and go first (layer %d: %s): use more text"
        log.warning(message, total, layer, experts[:8])
    return found
