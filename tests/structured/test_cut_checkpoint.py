"""Checkpoints cut one tensor at a time, and what reads the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cuts import CUTS, is_plain
from same_logits import assert_same_logits
from slow import few_families
from tiny import save_tiny
from zoo import CONFIGS, tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import CheckpointError, RecipeError
from secateur.models.checkpoint import CheckpointReader
from secateur.models.skeleton import build_skeleton, quiet_transformers, stored_names
from secateur.steps.inspect import inspect
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.design import Accounting, accounting
from secateur.structured.surgery import (
    VariedSizesWarning,
    cut_checkpoint,
    cut_from_zeros,
    cut_model,
)

DECLARED = [family for family in CONFIGS if family != "generic"]
LOADED = [(family, name) for family in DECLARED for name in ("layers", "neurons", "everything")] + [
    ("llama", "groups"),
    ("qwen2", "hidden"),
    ("gemma3", "groups"),
    ("phi3", "groups, differing"),
    ("gpt2", "without attention"),
    *(
        (family, "experts")
        for family in ("mixtral", "deepseek_v3", "minimax_m2", "lfm2_moe", "gemma4")
    ),
]
FEWER_EXPERTS = {"experts": lambda s: Cut(experts={2: (0, 2, 3, 5)[: s.experts[2] - 2]})}
"""In one layer, as many of each of two groups where there are six."""


def load(folder: Path) -> Any:
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def cut_folder(folder: Path, cut: Cut, output: Path, **options: Any) -> Accounting:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VariedSizesWarning)
        return cut_checkpoint(folder, cut, output, **options)


@pytest.mark.parametrize("name", ["groups", "hidden", "everything"])
@pytest.mark.parametrize("family", few_families(DECLARED))
def test_streaming_gives_the_tensors_of_the_cut_model(
    family: str, name: str, tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", family, shards=3, dtype=torch.bfloat16)
    model = load(source)
    cut = CUTS[name](sizes_of(model))
    counted = cut_folder(source, cut, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VariedSizesWarning)
        expected = cut_model(model, cut)
        assert counted == accounting(model, cut)
    reader = CheckpointReader(tmp_path / "out")
    parameters = dict(expected.named_parameters())
    stored = stored_names(build_skeleton(tmp_path / "out"), reader)
    assert stored.keys() == parameters.keys()
    assert set(stored.values()) == reader.entries.keys() <= CheckpointReader(source).entries.keys()
    assert all(torch.equal(reader.read(stored[n]), p) for n, p in parameters.items())
    assert counted.after.file_bytes == reader.total_bytes
    windows = tiny_windows(2)
    with torch.no_grad():
        assert_same_logits(load(tmp_path / "out")(windows).logits, expected(windows).logits)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"] == "secateur_varied") != is_plain(family, name)


@pytest.mark.slow
def test_plain_transformers_loads_the_results(tmp_path: Path) -> None:
    folders = []
    windows = tiny_windows(1)
    for family, name in LOADED:
        source = tmp_path / family
        if not source.exists():
            save_tiny(source, family)
        cut = {**CUTS, **FEWER_EXPERTS}[name](sizes_of(build_skeleton(source)))
        folder = tmp_path / f"{family} {name}".replace(" ", "-").replace(",", "")
        cut_folder(source, cut, folder)
        with torch.no_grad():
            counted = {"windows": windows, "logits": load(folder)(windows, use_cache=False).logits}
        torch.save(counted, folder / "expected.pt")
        folders.append(str(folder))
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("load_plain.py")), *folders],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == len(LOADED)


def test_the_rooms_read_varied_folders(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    cut = Cut(groups={0: (), 1: (1,)}, neurons={2: ()})
    cut_folder(source, cut, tmp_path / "varied")
    folder, windows = tmp_path / "varied", tiny_windows()
    skeleton = build_skeleton(folder)
    assert sizes_of(skeleton).groups == (0, 1, 2)
    assert sizes_of(skeleton).neurons == (48, 48, 0)
    with torch.no_grad():
        before = load(folder)(windows).logits
    text = tmp_path / "text.txt"
    text.write_text("a pruned tree bears more fruit. " * 20)
    save_windows(windows, tmp_path / "windows.safetensors")
    options = {"method": "wanda", "sparsity": 0.5, "output": tmp_path / "pruned"}
    secateur.prune(folder, calibration=tmp_path / "windows.safetensors", **options)
    pruned = load(tmp_path / "pruned")
    assert type(pruned).__name__ == "VariedLlamaForCausalLM"
    assert sizes_of(pruned) == sizes_of(skeleton)
    weight = pruned.model.layers[1].self_attn.o_proj.weight
    assert float((weight == 0).float().mean()) == 0.5
    with torch.no_grad():
        assert not torch.equal(pruned(windows).logits, before)
    [counted] = secateur.evaluate(tmp_path / "pruned", text=text, sequence_length=16).texts
    assert counted.perplexity > 0
    findings = secateur.diagnose(
        tmp_path / "pruned", dense=folder, text=str(tmp_path / "windows.safetensors"), windows=2
    )
    assert not any(finding.severity == "error" for finding in findings.findings)
    assert inspect(str(folder)).audit.family == "llama"
    secateur.compress(str(folder), output=tmp_path / "small", values="keep")
    with torch.no_grad():
        assert_same_logits(secateur.load(tmp_path / "small")(windows).logits, before)


def test_zeros_of_a_checkpoint_become_a_cut(tmp_path: Path) -> None:
    model = load(save_tiny(tmp_path / "source", "gpt2"))
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[:120] = 0
    with quiet_transformers():
        model.save_pretrained(tmp_path / "pruned")
    cut = cut_from_zeros(CheckpointReader(tmp_path / "pruned"))
    assert cut == Cut(neurons={1: tuple(range(120, 128))}) == cut_from_zeros(model)


def test_nothing_is_written_for_an_impossible_cut(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    with pytest.raises(RecipeError):
        cut_checkpoint(source, Cut(hidden=()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match="the source itself"):
        cut_checkpoint(source, Cut(layers=(0,)), source)


def test_a_missing_tensor_is_reported_before_anything_is_written(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match="3 layers"):
        cut_checkpoint(source, Cut(layers=(0, 3)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
