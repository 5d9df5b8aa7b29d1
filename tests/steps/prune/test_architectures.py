"""Every architecture that was tried: pruned with true claims, or refused by name before any work.

Zeros are counted from the stored tensors by hand. Each stored matrix either lost half its weights
or is unchanged and named with its reason.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from safetensors.torch import save_file
from slow import slow_but
from tiny import tensors_of
from torch import Tensor, nn
from zoo import tiny_windows

import secateur
from secateur.cli import main
from secateur.errors import ArchitectureError, CheckpointError
from secateur.models.skeleton import quiet_transformers
from secateur.progress import Silent
from secateur.runs.records import Manifest
from secateur.steps.inspect import inspect

REFUSED = {
    **dict.fromkeys(["bert", "roberta"], "is an encoder, not a causal decoder"),
    **dict.fromkeys(["whisper", "bart"], "is part of an encoder-decoder"),
    "zamba2": "parameters of decoder layers are shared with other layers",
    **dict.fromkeys(
        ["t5"],
        "transformers cannot build this model",
    ),
}  # fmt: skip
"""Refused whatever the method is."""

FEW = (
    "llama", "gpt2", "gemma4_text small", "lfm2", "falcon_h1", "zamba2", "qwen3_next", "mixtral",
    "bert", "t5", "gemma3 vision",
)  # fmt: skip
"""One of each sort: what is pruned, what is refused, and why. The others are slow tests."""

COUNTED = (
    "experts in a layout that is not known",
    "a decoder layer's tensor in a form that is not known",
    "calibration cannot see its inputs",
)
"""What is not pruned and belongs to the decoder's matrices all the same."""


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "windows.safetensors"
    save_file({"input_ids": tiny_windows(2, 12)}, file)
    return file


def saved(name: str, folder: Path) -> Path:
    """A tiny checkpoint of an architecture; only its configuration where it is no causal LM."""
    config = architectures.config_of(name)
    try:
        with quiet_transformers():
            if "cannot build" in REFUSED.get(name, ""):
                config.save_pretrained(folder)
                layers = {f"layers.{i}.x": torch.zeros(2**18, dtype=torch.uint8) for i in range(8)}
                save_file(layers, folder / "model.safetensors")
            else:
                architectures.tiny_architecture(name).save_pretrained(folder)
    except ImportError as missing:
        pytest.skip(f"{name}: {str(missing).strip().splitlines()[0]}")
    return folder


def check(before: dict[str, Tensor], after: dict[str, Tensor], manifest: Manifest) -> None:
    """Hold what a manifest claims against the stored tensors."""
    zeros = weights = 0
    left = {one.names: one.reason for one in manifest.left}
    used = set()
    for name, was in before.items():
        now = after[name]
        # biases of experts are fused, and a table of token ids is no matrix
        if now.ndim < 2 or name.endswith("_proj_bias") or not now.is_floating_point():
            assert torch.equal(now, was), name
            continue
        glob = next((g for g in left if fnmatchcase(name, g) or name.startswith(f"{g}.")), None)
        if glob is None:
            assert (now == 0).sum() * 2 == now.numel(), name
        else:
            used.add(glob)
            assert torch.equal(now, was), name
        if glob is None or left[glob] in COUNTED:
            zeros += int((now == 0).sum())
            weights += now.numel()
    assert used == set(left)
    result = manifest.result
    assert result.decoder_sparsity == zeros / weights
    every = [tensor for tensor in after.values() if tensor.is_floating_point()]
    assert result.model_sparsity == pytest.approx(
        sum(int((t == 0).sum()) for t in every) / sum(t.numel() for t in every), abs=1e-12
    )


@pytest.mark.parametrize("name", slow_but(FEW, architectures.names()))
def test_claims_are_true_or_the_model_is_refused(name: str, tmp_path: Path, windows: Path) -> None:
    source = saved(name, tmp_path / "source")
    for method in ("magnitude", "wanda"):
        options: dict[str, Any] = {"method": method, "sparsity": 0.5, "calibration": str(windows)}
        out = tmp_path / method
        if name in REFUSED:
            with pytest.raises(ArchitectureError, match=REFUSED[name]):
                planned(source, options)
            with pytest.raises(ArchitectureError, match=REFUSED[name]):
                secateur.prune(source, output=out, **options)
            assert not out.exists()
            assert not out.with_name(f"{method}.partial").exists()
            continue
        left = planned(source, options) if method == "wanda" else None
        report = secateur.prune(source, output=out, **options)
        check(tensors_of(source), tensors_of(out), report.manifest)
        assert left in (None, report.manifest.to_json()["left"])
        audit = inspect(str(out)).audit
        assert audit.sparsity == report.sparsity == report.manifest.result.decoder_sparsity
        assert audit.model_sparsity == report.manifest.result.model_sparsity


def planned(source: Path, options: dict[str, Any]) -> Any:
    """What a plan says will not be pruned."""
    options = {**options, "calibration": {"source": options["calibration"]}}
    return secateur.prune(str(source), dry_run=True, **options).to_json()["left"]


def half_pruned(name: str, folder: Path) -> tuple[Path, float]:
    """A checkpoint whose linears have 50 % zeros and whose experts have none; its true sparsity."""
    model: Any = architectures.tiny_architecture(name)
    zeros = weights = 0
    with torch.no_grad():
        for path, module in model.get_submodule("model.layers").named_modules():
            if isinstance(module, nn.Linear):
                module.weight[:, ::2] = 0
                zeros += module.weight.numel() // 2
                weights += module.weight.numel()
            elif path.endswith("experts"):
                weights += sum(p.numel() for p in module.parameters(recurse=False))
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder, zeros / weights


def test_dense_experts_are_not_called_sparse_or_healthy(tmp_path: Path) -> None:
    """As tools leave them that do not see the experts that transformers fuses."""
    folder, true = half_pruned("deepseek_v3", tmp_path / "source")
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in tensors_of(folder)
    assert 0.1 < true < 0.4
    audit = inspect(str(folder)).audit
    assert audit.sparsity == pytest.approx(true, abs=1e-12)
    assert sum(x.weights for x in audit.linears if ".experts." in x.name) == 2 * 6 * 3 * 24 * 32
    found = secateur.diagnose(folder, progress=Silent())
    assert found.weights.sparsity == pytest.approx(true, abs=1e-12)
    assert not found.verdict.startswith("healthy")
    dense = [f for f in found.findings if f.id == "dense-linear"]
    assert len(dense) == 1
    assert "36 matrices" in dense[0].evidence


def test_shared_layers_are_counted_once(tmp_path: Path) -> None:
    source = saved("zamba2", tmp_path / "source")
    audit = inspect(str(source)).audit
    names = [x.name for x in audit.linears]
    assert len(set(names)) == len(names)
    assert any("layers.1.shared_transformer" in n for n in names)
    assert not any("layers.3.shared_transformer" in n for n in names)
    assert audit.parameters == sum(t.numel() for t in tensors_of(source).values())
    assert secateur.diagnose(source, progress=Silent()).weights.sparsity == 0


def test_an_incomplete_checkpoint_says_which_matrix_is_missing(tmp_path: Path) -> None:
    source = saved("llama", tmp_path / "source")
    tensors = tensors_of(source)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 of 21 matrices of the decoder layers are not"):
        inspect(str(source))


def test_tensors_of_no_module_are_named(tmp_path: Path) -> None:
    """Layers that predict further tokens, for example: stored, and not built by transformers."""
    source = saved("qwen3_5_text", tmp_path / "source")
    extra = {"mtp.layers.0.mlp.up_proj.weight": torch.ones(4, 8)}
    save_file(tensors_of(source) | extra, source / "model.safetensors", metadata={"format": "pt"})
    left = {one.names: (one.reason, one.weights) for one in inspect(str(source)).audit.left}
    assert left["mtp"][1] == 32


def test_left_out_matrices_are_reported_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved("gemma3 vision", tmp_path / "source")
    recipe = ["--sparsity", "0.5", "--method", "magnitude"]
    for verb in (["prune", "--dry-run", str(source), *recipe], ["inspect", str(source)],
                 ["prune", str(source), *recipe, "--output", str(tmp_path / "out")]):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["secateur", *verb])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "vision_tower: not in the decoder's layers" in printed.replace("│ │ │ ", ""), verb
    card = (tmp_path / "out" / "README.md").read_text()
    tower = [
        t for n, t in tensors_of(source).items() if n.startswith("vision_tower.") and t.ndim > 1
    ]
    weights = sum(t.numel() for t in tower)
    assert f"vision_tower: not in the decoder's layers, {weights:,} weights" in card
    page = tmp_path / "report.html"
    monkeypatch.setattr("sys.argv", ["secateur", "report", str(tmp_path / "out"), "-o", str(page)])
    with pytest.raises(SystemExit):
        main()
    assert "not in the decoder&#39;s layers" in page.read_text()
    model = architectures.tiny_architecture("lfm2")
    report = secateur.prune(model, method="magnitude", sparsity=0.5, exclude=["*.w1"])
    reasons = {one.names: one.reason for one in report.left}
    assert "recipe" in reasons["model.layers.*.feed_forward.w1.weight"]
    matrices = [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    zeros = sum(int((w == 0).sum()) for w in matrices)
    assert report.sparsity == pytest.approx(zeros / sum(w.numel() for w in matrices), abs=1e-12)
