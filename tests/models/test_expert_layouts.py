"""Experts in every form: the same statistics, masks and outputs as from tensors taken by hand."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow import slow_but
from tiny import saved, tiny_tokenizer
from torch import Tensor, nn
from zoo import MIXTURES, WITH_EXPERTS, class_of, config_of, tiny_model, tiny_windows

import secateur
from oracles import fused_experts
from secateur.calibration.windows import save_windows
from secateur.errors import CheckpointError
from secateur.models.architecture import describe, experts_of, families, family_of, text_config
from secateur.models.checkpoint import CheckpointReader, PatchedCopy
from secateur.models.expert_layout import ExpertLayout, stored_in_table
from secateur.models.experts import OpenExperts, opened_experts
from secateur.models.skeleton import quiet_transformers

FORMS = ("mixtral", "gpt_oss", "llama4", "nemotron_h", "minimax_m3", "step3p7 experts")
"""One of each form: standard; transposed, interleaved, with biases; transposed with scaled inputs;
without gate in a latent space; with a clamped gate; clamped by layer, in a model that sees."""

LEFT = (
    "norm", "router", "mlp.gate.", "mixer.gate.", "feed_forward.gate.", "conv1d", "conv.conv",
    "expert_gate", "_bias", ".bias", "sinks", "A_log", "dt_bias", ".D", "moe_statics", "_hc.",
    "o_a_proj",
)  # fmt: skip
"""Parts of the names of parameters of decoder layers that are no prunable matrices."""

IDS = tiny_windows(2, 9, seed=5)


def fused(model: nn.Module) -> list[str]:
    """The paths of the fused experts of a model."""
    return [name for name, m in model.named_modules() if isinstance(getattr(m, "down_proj", None),
            nn.Parameter)]  # fmt: skip


def logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS, **options).logits
    return out


def loaded(family: str, folder: Path) -> Any:
    """What plain transformers loads."""
    with quiet_transformers():
        return class_of(config_of(family)).from_pretrained(folder).eval()


@pytest.mark.parametrize("family", slow_but(FORMS, WITH_EXPERTS))
def test_pruned_as_by_hand(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the last layer with experts, in memory and on disk."""
    caplog.set_level(logging.ERROR)
    windows, by_hand, ours = tiny_windows(20, 16), tiny_model(family), tiny_model(family)
    source = saved(ours, tmp_path / "source")
    path = fused(by_hand)[-1]
    seen = fused_experts.prune(family, by_hand, path, windows)
    options: dict[str, Any] = {
        "method": "wanda", "sparsity": 0.5, "scope": "row", "sequential": "layer",
        "include": [f"{path}.*"],
    }  # fmt: skip
    report = secateur.prune(ours, calibration=windows, **options)
    save_windows(windows, tmp_path / "windows.safetensors")
    secateur.prune(
        source, output=tmp_path / "out", calibration=tmp_path / "windows.safetensors", **options
    )
    stored = loaded(family, tmp_path / "out")
    expected = dict(by_hand.named_parameters())
    for model in (ours, stored):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name
        torch.testing.assert_close(logits(model), logits(by_hand))
    counts = {r.name: r.tokens for layer in report.layers for r in layer.linears}
    assert {n: counts.get(f"{path}.{n}.down_proj", 0) for n in range(len(seen))} == dict(
        enumerate(seen)
    )


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_opened_experts_compute_the_same(family: str) -> None:
    model = tiny_model(family)
    expected = logits(model)
    with opened_experts(model):
        opened = [m for m in model.modules() if isinstance(m, OpenExperts)]
        assert opened
        for idle in (True, False):
            for module in opened:
                module.call_idle = idle
            torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_experts_are_views(family: str) -> None:
    """Each value of the fused tensors belongs to one matrix of one expert, and a write shows."""
    model: Any = tiny_model(family)
    paths = fused(model)
    before = {path: model.get_submodule(path) for path in paths}
    with opened_experts(model):
        for path in paths:
            for parameter in model.get_submodule(path).parameters():
                parameter.data.add_(1.0)
            taken = fused_experts.TAKEN.get(family, fused_experts.standard)
            for e, expert in enumerate(model.get_submodule(path)):
                for name, matrix in taken(before[path], e).items():
                    where = name if name.endswith("proj") else name.replace("_bias", "_proj")
                    linear = expert.get_submodule(where)
                    view = linear.weight if name.endswith("proj") else linear.bias
                    assert torch.equal(view, matrix), name
    fresh = tiny_model(family)
    for path in paths:
        for name, parameter in model.get_submodule(path).named_parameters():
            assert torch.equal(parameter, fresh.get_submodule(path).get_parameter(name) + 1), name


@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_declared_forms_are_those_of_transformers(family: str) -> None:
    model = tiny_model(family)
    experts = experts_of(model)
    assert experts is not None
    for path in fused(model):
        assert path.endswith(f".{experts.module}")
        flagged = ExpertLayout.of_class(model.get_submodule(path))
        if family in ("llama4", "step3p7 experts"):  # their classes say nothing
            assert flagged is None
        else:
            assert flagged == experts.layout
    declared = family_of(model)
    if declared is not None and declared.experts is not None:
        assert stored_in_table(model) == declared.experts.stored
        assert hasattr(text_config(model.config), experts.count)
        layers = describe(model).layers(model)
        assert any(experts.router in dict(layer.named_modules()) for layer in layers)
    assert experts.per_token(text_config(model.config)) == (1 if family == "llama4" else 2)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_calibration_reaches_experts_however_they_are_computed(family: str) -> None:
    """transformers passes fused experts to functions where no hook is; opened ones it cannot."""
    plain = tiny_model(family)
    secateur.prune(plain, method="wanda", sparsity=0.5, calibration=tiny_windows(20, 16))
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model: Any = tiny_model(family)
        model.set_experts_implementation(implementation)
        report = secateur.prune(
            model, method="wanda", sparsity=0.5, calibration=tiny_windows(20, 16)
        )
        experts = [r for x in report.layers for r in x.linears if ".experts." in r.name]
        assert experts
        assert all(record.tokens > 0 for record in experts)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, plain.get_parameter(name)), (implementation, name)


@pytest.mark.parametrize("family", slow_but(FORMS, WITH_EXPERTS))
def test_every_matrix_is_half_zero_and_no_other_tensor(family: str) -> None:
    """Zeros counted by hand, in every expert too."""
    dense, model, halved = tiny_model(family), tiny_model(family), set()
    secateur.prune(model, method="magnitude", sparsity=0.5)
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, dense.get_parameter(name)):
            experts = parameter.ndim == 3 and parameter.shape[0] in (5, 6)
            for matrix in parameter if experts else [parameter]:
                assert (matrix == 0).float().mean() == 0.5, name
            halved.add(name)
    layers = {n for n, _ in model.named_parameters() if ".layers." in n and "vision" not in n}
    assert halved == {n for n in layers if not any(part in n for part in LEFT)}


@pytest.mark.parametrize("family", ["gpt_oss", "llama4"])
def test_only_the_bytes_of_an_expert_change(family: str, tmp_path: Path) -> None:
    """In stored tensors where an expert's matrix is no range of bytes."""
    source = saved(tiny_model(family), tmp_path / "source")
    path = fused(tiny_model(family))[-1]
    for which in ("gate_proj", "up_proj", "down_proj"):
        secateur.prune(
            source, output=tmp_path / which, method="magnitude", sparsity=0.5,
            include=[f"{path}.2.{which}"],
        )  # fmt: skip
        before, after = (load_file(x / "model.safetensors") for x in (source, tmp_path / which))
        assert before.keys() == after.keys()
        for name, was in before.items():
            changed = after[name] != was
            if name.startswith(path) and changed.any():
                fused_now = type("Fused", (), {})()
                for leaf in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
                    empty = torch.zeros_like(before.get(f"{path}.{leaf}", torch.zeros(5, 2)))
                    own = changed if name == f"{path}.{leaf}" else empty
                    setattr(fused_now, leaf, own)
                mine = fused_experts.TAKEN[family](fused_now, 2)[which]
                assert mine.float().mean() == 0.5
                assert changed.sum() == mine.sum()
            else:
                assert not changed.any(), name


def test_a_view_is_read_and_written_as_torch_does(tmp_path: Path) -> None:
    """Gate, up and down of experts of odd sizes in every form, against torch on the whole file."""
    generator = torch.Generator().manual_seed(0)
    for layout in (
        ExpertLayout(gated=gated, transposed=transposed, interleaved=interleaved, biased=True)
        for gated, interleaved in ((True, False), (True, True), (False, False))
        for transposed in (False, True)
    ):
        rows = 14 if layout.gated else 7
        first, down, *biases = layout.tensors
        shapes = {first: (3, rows, 5), down: (3, 5, 7)}
        if layout.transposed:
            shapes = {name: (e, b, a) for name, (e, a, b) in shapes.items()}
        shapes |= dict(zip(biases, ((3, rows), (3, 5)), strict=True))
        assert layout.fits(shapes)
        assert not layout.fits(shapes | {down: (3, 5, 8)})
        whole = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
        folder = tmp_path / str(layout)
        folder.mkdir()
        save_file({**whole, "other": torch.ones(3)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        reader = CheckpointReader(folder)
        copy = PatchedCopy(reader, tmp_path / f"{layout} copy")
        copy.create()
        for name, tensor in whole.items():
            views = layout.apart(name, torch.empty(tensor.shape, device="meta"))
            named = {f"{e}.{p}": v for e, own in enumerate(views) for p, v in own.items()}
            reader.split(name, named)
            mine = {f"{e}.{p}": v for e, own in enumerate(layout.apart(name, tensor))
                    for p, v in own.items()}  # fmt: skip
            for part, view in mine.items():
                assert torch.equal(reader.read(part), view), (layout, part)
                view.mul_(2)
                copy.write(part, view)
        after = load_file(copy.folder / "model.safetensors")
        for name, tensor in whole.items():  # doubled above, through the views
            assert torch.equal(after[name], tensor), (layout, name)


def test_experts_stored_in_another_form_are_refused(tmp_path: Path) -> None:
    source = saved(tiny_model("gpt_oss"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="another form"):
        secateur.prune(source, output=tmp_path / "out", method="magnitude", sparsity=0.5)


def test_every_declared_mixture_is_in_the_zoo() -> None:
    declared = {name for name in families if families[name].experts is not None}
    assert declared <= {describe(tiny_model(name)).family for name in WITH_EXPERTS}


@pytest.mark.parametrize("family", slow_but(("gpt_oss",), MIXTURES))
def test_compressed_and_back_as_plain_transformers_loads_it(family: str, tmp_path: Path) -> None:
    """A compressed folder has experts one by one; where transformers cannot fuse them, we do."""
    source = saved(tiny_model(family), tmp_path / "source")
    tiny_tokenizer().save_pretrained(source)
    secateur.prune(source, output=tmp_path / "p", method="magnitude", sparsity=0.5)
    secateur.compress(tmp_path / "p", output=tmp_path / "c", values="keep")
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    dense, found = (loaded(family, tmp_path / name) for name in ("p", "d"))
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, dense.get_parameter(name)), name
    packed = secateur.load(tmp_path / "c", dtype=torch.float32)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", slow_but(("gpt_oss",), FORMS))
def test_tuned_views_are_tuned_as_plain_matrices(family: str, tmp_path: Path) -> None:
    """Views of a loaded model need not be contiguous; the matrices of a checkpoint are."""
    windows = tiny_windows(20, 16)
    save_windows(windows, tmp_path / "windows.safetensors")
    source = saved(tiny_model(family), tmp_path / "source")
    ours: Any = tiny_model(family)
    options: dict[str, Any] = {
        "method": "wanda", "sparsity": 0.5, "tune_passes": 1, "include": [f"{fused(ours)[0]}.*"],
    }  # fmt: skip
    secateur.prune(ours, calibration=windows, **options)
    secateur.prune(
        source, output=tmp_path / "out", calibration=tmp_path / "windows.safetensors", **options
    )
    stored = loaded(family, tmp_path / "out")
    for name, parameter in stored.named_parameters():
        # Adam makes a step of its rate out of a gradient near 0, whatever its sign
        assert (ours.get_parameter(name) - parameter).abs().max() < 5e-3, name
        assert torch.equal(ours.get_parameter(name) == 0, parameter == 0), name


def test_distilled_views_keep_their_zeros() -> None:
    zeros = []
    for epochs in (0, 1):
        model: Any = tiny_model("gpt_oss")
        options = {"method": "wanda", "sparsity": 0.5, "distill_epochs": epochs}
        secateur.prune(model, calibration=tiny_windows(8, 16), **options)
        zeros.append(model.model.layers[1].mlp.experts.gate_up_proj == 0)
    assert zeros[0].float().mean() > 0.35  # some experts may receive nothing
    assert torch.equal(*zeros)
