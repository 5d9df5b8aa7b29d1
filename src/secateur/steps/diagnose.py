"""Checks that a model is sound and matches its own records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.calibration.documents import read_text
from secateur.calibration.windows import (
    evaluation_windows,
    load_windows,
    stored_start,
    window_length,
)
from secateur.diagnostics.claimed_sparsity import check_sparsity
from secateur.diagnostics.drift import (
    LayerDrift,
    check_layers,
    check_same_model,
    could_bear,
    layer_drifts,
)
from secateur.diagnostics.findings import SEVERITIES, Claims, finding, read_claims
from secateur.diagnostics.weights import (
    Weights,
    check_units,
    check_values,
    head_size,
    layer_sparsity,
    look_at_weights,
)
from secateur.models.architecture import positions_of
from secateur.models.sources import resolve
from secateur.models.targets import CheckpointTarget
from secateur.models.tokenizer import load_tokenizer, start_tokens
from secateur.progress import Progress
from secateur.recipes.measure import DiagnoseRecipe
from secateur.reporting.diagnose import DiagnoseResult
from secateur.runs.environment import choose_device, environment
from secateur.runs.measured import Finding
from secateur.runs.output import write_record
from secateur.runtime.install import DenseView, open_checkpoint

PRUNED = 0.01
"""A model with a larger fraction of zeros in its decoder's matrices counts as pruned."""

STANDARD_LENGTH = 256


def run_diagnosis(recipe: DiagnoseRecipe, progress: Progress) -> DiagnoseResult:
    """Look for every known fault of a pruned model.

    For the folder of a pruning run, the result is also written to `secateur/diagnosis.json`.
    A fault of the model is a finding, not an error.
    """
    own = _open_in_float32(recipe.model, recipe)
    dense, tokens, protocol = None, torch.empty(0), dict[str, Any]()
    if recipe.dense is not None:
        dense = _open_in_float32(recipe.dense, recipe)
        check_same_model(own, dense)
        tokens, start = _token_windows(own, recipe)
        protocol = {
            "text": recipe.text,
            "windows": len(tokens),
            "sequence_length": tokens.shape[1],
            **({"start_tokens": list(start)} if start else {}),
            "computed_in": "float32",
        }
    claims = read_claims(own.reader.folder)
    weights, findings = _check_weights(own, claims, dense, progress)
    drift, bears = list[LayerDrift](), dict[int, float]()
    if dense is not None:
        drift = layer_drifts(own, dense, tokens, progress)
        bears = could_bear(layer_sparsity(weights), drift)
        findings += check_layers(drift, own.architecture.layer_name, bears)
    # the checks of a pruned model that were impossible
    if weights.sparsity > PRUNED and not claims.linears:
        evidence = (
            "there are no records of a pruning run, so zeros were counted but not compared with "
            "a claim"
        )
        findings.append(finding("no-records", "secateur/layers.jsonl", evidence))
    if weights.sparsity > PRUNED and dense is None:
        evidence = "whether layers have collapsed or drifted was not looked at"
        remedy = f"name the dense model: --dense {claims.source or 'REF'}"
        findings.append(finding("no-reference", "the layers", evidence, remedy=remedy))
    found = DiagnoseResult.of(
        weights,
        claims,
        drift,
        bears,
        model=recipe.model,
        dense=recipe.dense,
        findings=sorted(findings, key=lambda one: SEVERITIES.index(one.severity)),
        environment=environment(own.device),
        protocol=protocol,
    )
    if claims.folder is not None:
        write_record(claims.folder / "diagnosis.json", found.to_json())
    return found


def _open_in_float32(model: str, recipe: DiagnoseRecipe) -> CheckpointTarget:
    """Open a checkpoint, compressed or not, for computation in float32.

    float32 shows the effect of pruning without the rounding of bfloat16.
    """
    source = resolve(model, trust_remote_code=recipe.trust_remote_code, values=False)
    reader, device = open_checkpoint(source.folder), choose_device(recipe.device)
    return CheckpointTarget(reader, None, device, dtype=torch.float32)


def _token_windows(
    target: CheckpointTarget, recipe: DiagnoseRecipe
) -> tuple[Tensor, tuple[int, ...]]:
    """The windows that both models read, and the start tokens that each of them begins with."""
    text, windows = recipe.text, recipe.windows
    config = target.model.config.get_text_config()
    if text.endswith(".safetensors"):
        file = Path(text).expanduser()
        stored = load_windows(file, vocab_size=config.vocab_size, positions=positions_of(config))
        return stored[:windows], stored_start(file)
    length = window_length(recipe.sequence_length, STANDARD_LENGTH, positions_of(config))
    tokenizer = load_tokenizer(target.reader.folder)
    tokens = evaluation_windows(read_text(text).text, tokenizer, length, max_windows=windows)
    return tokens, start_tokens(tokenizer)


def _check_weights(
    own: CheckpointTarget, claims: Claims, dense: CheckpointTarget | None, progress: Progress
) -> tuple[Weights, list[Finding]]:
    """Check every stored tensor, and return the findings."""

    def read(target: CheckpointTarget, claims: Claims, label: str) -> Weights:
        progress.start(label, len(target.reader.entries))
        found = look_at_weights(target, claims, lambda name: progress.step(note=name))
        progress.finish()
        return found

    weights = read(own, claims, "weights")
    before = None if dense is None else read(dense, Claims(), "dense weights")
    name, size = own.architecture.layer_name, head_size(own.model.config)
    layouts = own.reader.packed.layouts.values() if isinstance(own.reader, DenseView) else ()
    rounded = any(layout.values == "int8" for layout in layouts)
    findings = [*check_values(weights), *check_sparsity(weights, claims, rounded=rounded)]
    return weights, findings + check_units(weights, claims, size, name, before)
