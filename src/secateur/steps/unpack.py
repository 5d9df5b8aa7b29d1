"""Decompresses a checkpoint into a dense one that any engine can load."""

from __future__ import annotations

import time

import torch

from secateur.models.architecture import experts_of
from secateur.models.checkpoint import CheckpointReader, shard_files
from secateur.models.configuration import read_configuration
from secateur.models.expert_layout import FusedExperts, loads_one_by_one
from secateur.models.experts import OpenExperts
from secateur.models.opening import write_dense
from secateur.models.skeleton import build_skeleton, model_names, skeleton_of
from secateur.recipes.compress import DecompressRecipe
from secateur.reporting import cards
from secateur.reporting.models import DecompressResult
from secateur.runs.output import write_text
from secateur.runtime.install import DenseView
from secateur.runtime.packed import PackedCheckpoint
from secateur.steps.runner import RunContext, Step


class Decompress(Step[DecompressRecipe, DecompressResult]):
    """Write a compressed checkpoint as ordinary dense safetensors, with all zeros.

    Losslessly stored values are restored bit for bit. Integers are restored as
    their scaled numbers, in the dtype of the configuration. In bfloat16 those of 4 bits or fewer
    are exact, so compressing them again changes nothing.
    """

    verb = "decompress"

    def __init__(self, recipe: DecompressRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        self.packed = PackedCheckpoint(run.source.folder)
        self.view = DenseView(self.packed)

    @property
    def disk_bytes(self) -> int:
        """The dense weights."""
        return self.view.total_bytes

    def work(self) -> DecompressResult:
        """Write all weights with their zeros, and what belongs to the model."""
        source, folder, view = self.run.source.folder, self.run.folder, self.view
        layouts, made = self.packed.layouts, folder.fresh_model()
        config = read_configuration(source)
        del config["quantization_config"]
        # int8 values times scales are rounded to the dtype of the configuration; those
        # of 4 bits or fewer have few enough bits for any dtype, but float16 lacks the exponents
        inexact = view.computed == torch.float16
        rounded = any(x.coded and (x.grid is None or inexact) for x in layouts.values())
        write_dense(_as_transformers_loads(view), made, self.run.progress)
        self.run.carry_over(config, same_weights=not rounded)
        if not any(folder.notes.iterdir()):
            folder.notes.rmdir()
        card = source / "README.md"
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            front, body = cards.split_card(text)
            _, packed, dense = body.partition(f"{cards.MARK}\n")
            text = front + dense if packed else text
            if text.strip():
                write_text(made / "README.md", text)
        return DecompressResult(
            output=folder.output,
            source_bytes=sum(file.stat().st_size for file in view.files),
            file_bytes=sum(file.stat().st_size for file in shard_files(made)),
            matrices=len(layouts),
            seconds=time.perf_counter() - self.run.meter.started,
        )


def _as_transformers_loads(view: DenseView) -> CheckpointReader:
    """The tensors of a view, with fused experts where transformers cannot fuse them itself.

    A compressed folder stores experts one by one.
    """
    if not any(".experts." in name for name in view.entries):
        return view
    opened = build_skeleton(view.folder)
    experts = experts_of(opened)
    if experts is None or loads_one_by_one(opened):
        return view
    paths = (path for path, m in opened.named_modules() if isinstance(m, OpenExperts))
    whole = skeleton_of(type(opened), opened.config, opened.dtype)
    names = [f"{path}.{leaf}" for path in paths for leaf in experts.layout.tensors]
    shapes = {name: tuple(whole.get_parameter(name).shape) for name in names}
    return FusedExperts(view, model_names(opened, view), experts.layout, shapes)
