"""Imports what another tool wrote into an ordinary folder, and counts its zeros."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from secateur.diagnostics.audit import Audit, audit_checkpoint
from secateur.errors import RecipeError, SourceError
from secateur.importing import import_formats
from secateur.importing.adapter import WEIGHTS, MergedReader
from secateur.importing.masks import MaskedReader
from secateur.models.at_rest import SourceFolder
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import described_by, read_configuration
from secateur.models.opening import computed_dtype, refuse_quantized, write_dense
from secateur.models.skeleton import StoredModel, build_skeleton
from secateur.recipes.deploy import ImportRecipe
from secateur.recipes.recipe_files import dump_recipe
from secateur.reporting.cards import import_card
from secateur.reporting.models import ImportResult
from secateur.runs import records
from secateur.runs.environment import Meter, environment
from secateur.runs.folder import file_digests
from secateur.runs.output import write_json, write_text
from secateur.steps.runner import RunContext, Step

IMPORT, MANIFEST = "import.json", "manifest.json"
UNKNOWN = "unknown"


class ImportModel(Step[ImportRecipe, ImportResult]):
    """Make an ordinary folder from what another tool wrote: dense safetensors with its zeros.

    The kind of source is recognised. The values are those that the source means, in the dtype of
    the model; where that dtype cannot hold them exactly, they are rounded once, and counted. The
    written files are read again: sparsity and pattern of every matrix are in the result.
    """

    verb = "import"

    def __init__(self, recipe: ImportRecipe, run: RunContext) -> None:
        super().__init__(recipe, run)
        folder = run.source.folder
        config = read_configuration(folder)
        source = SourceFolder(folder, config, CheckpointReader(folder), computed_dtype(folder))
        kinds = [kind for kind in import_formats if import_formats[kind].recognises(source)]
        if not kinds:
            refuse_quantized(folder)
        if len(kinds) != 1:
            raise SourceError(
                f"this could be {' and '.join(kinds) or 'anything'}; it must be one kind of source",
                where=str(folder),
                remedy=f"secateur imports {', '.join(import_formats)}",
            )
        self.kind, self.compression = kinds[0], described_by(config)
        self.plain = import_formats[self.kind].open(source)
        self.reader: CheckpointReader = self.plain  # with masks or an adapter applied
        if recipe.adapter is not None:
            if self.plain.made or recipe.masks is not None:
                raise RecipeError(
                    "an adapter needs a model in plain safetensors",
                    remedy="import the model first, then import the result with --adapter",
                )
            self.reader = MergedReader(folder, Path(recipe.adapter))
        elif recipe.masks is not None:
            self.reader = MaskedReader(self.plain, Path(recipe.masks))

    @classmethod
    def reads(cls, recipe: ImportRecipe) -> tuple[str | None, ...]:
        """Masks and an adapter."""
        return recipe.masks, recipe.adapter

    @property
    def disk_bytes(self) -> int:
        """The dense weights."""
        return self.reader.total_bytes

    def work(self) -> ImportResult:
        """Write the dense model, count its zeros, and record where they came from."""
        recipe, source, folder = self.recipe, self.run.source, self.run.folder
        made = folder.fresh_model()
        write_dense(self.reader, made, self.run.progress)
        self.run.carry_over(self.plain.config, same_weights=False)
        # refuses missing tensors and other shapes
        StoredModel(build_skeleton(made, opened=False), CheckpointReader(made))
        audit = audit_checkpoint(made, find_patterns=True, progress=self.run.progress)
        record = self.record(audit)
        write_json(folder.notes / IMPORT, record.to_json())
        if not (folder.notes / MANIFEST).is_file():  # else the model was pruned by secateur
            manifest = _manifest_of(record, audit, self.run.meter)
            write_json(folder.notes / MANIFEST, manifest.to_json())
        write_text(folder.notes / "import.yaml", dump_recipe(recipe))
        result = ImportResult(output=folder.output, record=record, parameters=audit.parameters)
        place = recipe.output or folder.output
        write_text(made / "README.md", import_card(record, source.folder, place))
        return result

    def record(self, audit: Audit) -> records.Import:
        """The record of an import."""
        recipe, plain, masks, adapter = self.recipe, self.plain, None, None
        if recipe.masks is not None:
            masks = _digested(Path(recipe.masks))
        if isinstance(self.reader, MergedReader):
            assert recipe.adapter is not None
            folder = Path(recipe.adapter)
            adapter = {**_digested(folder / WEIGHTS), "name": folder.name, "kind": self.reader.kind}
        stored_as = {
            name.removesuffix(".weight"): assembly.stored_as
            for name, assembly in plain.made.items()
        }
        rounded = {name.removesuffix(".weight") for name, lost in plain.rounded.items() if lost}
        return records.Import(
            schema_name="secateur.import/1",
            source=self.run.source.record,
            kind=self.kind,
            masks=masks,
            adapter=adapter,
            told=self.compression,
            dropped=tuple(plain.dropped),
            notes=tuple(plain.notes),
            environment=environment(torch.device("cpu")),
            sparsity=audit.sparsity,
            matrices=tuple(
                records.ImportedMatrix(
                    name=x.name,
                    shape=x.shape,
                    zeros=x.zeros,
                    pattern=x.found,
                    stored_as=stored_as.get(x.name),
                    rounded=x.name in rounded,
                )
                for x in audit.linears
            ),
            seconds=time.perf_counter() - self.run.meter.started,
        )


def _digested(file: Path) -> dict[str, str]:
    """The name and SHA-256 of a file."""
    return {"name": file.name, "sha256": file_digests([file])[file.name]}


def _manifest_of(record: records.Import, audit: Audit, meter: Meter) -> records.Manifest:
    """The manifest of a model that another tool has pruned: what is known of its making."""
    patterns = {matrix.pattern for matrix in record.matrices} - {"dense"}
    return records.Manifest(
        manifest_version=records.MANIFEST_VERSION,
        source=record.source,
        family=audit.family,
        method={
            "name": "imported",
            "score": UNKNOWN,
            "solver": UNKNOWN,
            "pattern": patterns.pop() if len(patterns) == 1 else "unstructured",
            "scope": UNKNOWN,
        },
        allocation={"name": UNKNOWN},
        environment=record.environment,
        cost=records.Cost.model_validate({**meter.read(), "resumed": False}),
        result=audit.result,
        left=tuple(audit.left),
    )
