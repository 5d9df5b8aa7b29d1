"""A checkpoint that sees, pruned on windows with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from page_blocks import ROOT, blocks
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from torch import Tensor
from zoo import class_of, config_of, tiny_model, tiny_windows

import secateur
from secateur.engine.prune.run import CalibratedLayerPass
from secateur.engine.search.allocation import ChangedAlone
from secateur.errors import RecipeError, SourceError
from secateur.models.skeleton import quiet_transformers

PLACE = "model.language_model.layers"


def inputs(count: int = 4, length: int = 14) -> dict[str, Tensor]:
    """Windows for Gemma 3 with one picture each, whose tokens see each other."""
    windows = tiny_windows(count, length)
    windows[windows >= 90] = 3
    for row in range(count):
        windows[row, 2 + row : 6 + row] = 90
    pixels = torch.randn(count, 1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    kinds = (windows == 90).long()[:, None]
    return {"input_ids": windows, "pixel_values": pixels, "token_type_ids": kinds}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    with quiet_transformers():
        tiny_model("gemma3 vision").save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.safetensors"
    save_file({**inputs(), "attention_mask": torch.ones(4, 1, 14, dtype=torch.int64)}, path)
    return path


def by_hand(model: Any, matrix: str, given: dict[str, Tensor]) -> Tensor:
    """Where Wanda's zeros are: half of each row, by inputs that a hook of the whole model hears."""
    heard: list[Tensor] = []
    linear = model.get_submodule(matrix)
    handle = linear.register_forward_pre_hook(lambda m, args: heard.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for row in range(len(given["input_ids"])):
            more = {n: x[row] for n, x in given.items() if n != "input_ids"}
            model(input_ids=given["input_ids"][row : row + 1], use_cache=False, **more)
    handle.remove()
    norms = torch.cat(heard).double().square().sum(0).sqrt()
    score = linear.weight.detach().double().abs() * norms
    lowest = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)


OPTIONS: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "include": ["*.0.*"]}


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_statistics_are_those_of_hooks_on_the_whole_model(
    place: str, source: Path, file: Path, tmp_path: Path
) -> None:
    """Of the first linears, which see the merged embeddings, and behind attention of pictures."""
    report = secateur.prune(
        source, output=tmp_path / "out", calibration=file, sequential="layer", activations=place,
        **OPTIONS,
    )  # fmt: skip
    after, model = load_file(tmp_path / "out" / "model.safetensors"), tiny_model("gemma3 vision")
    text = inputs()
    text.pop("pixel_values")
    differ = 0
    for leaf in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"{PLACE}.0.{leaf}"
        stored = next(x for n, x in after.items() if n.endswith(f"layers.0.{leaf}.weight")
                      and "vision" not in n)  # fmt: skip
        expected = by_hand(model, name, inputs())
        assert torch.equal(stored == 0, expected), leaf
        differ += int((by_hand(model, name, text) != expected).sum())
    assert differ > 20  # pictures matter
    linears = [linear for layer in report.layers for linear in layer.linears]
    assert {linear.tokens for linear in linears} == {4 * 14}
    assert report.manifest.calibration["beside"] == {
        "pixel_values": [4, 1, 3, 16, 16], "token_type_ids": [4, 1, 14],
    }  # fmt: skip


@pytest.mark.usefixtures("exact_matmuls")
def test_the_divergence_of_a_linear_is_that_with_pictures(
    source: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, dict[str, float]] = {}
    measure = ChangedAlone.divergences

    def recorded(self: ChangedAlone, label: str) -> dict[str, dict[str, float]]:
        found.update(measure(self, label))
        return found

    monkeypatch.setattr(ChangedAlone, "divergences", recorded)
    secateur.prune(
        source, output=tmp_path / "out", calibration=file, method="wanda", sparsity=0.5,
        allocation="divergence",
    )  # fmt: skip
    name, model, given = f"{PLACE}.0.mlp.up_proj", tiny_model("gemma3 vision"), inputs()
    linear, total = model.get_submodule(name), 0.0
    change = -(linear.weight * by_hand(model, name, given)).detach()
    heard: dict[str, Tensor] = {}

    def hear(module: Any, args: tuple[Tensor], output: Tensor) -> None:
        output.retain_grad()
        heard.update(change=(args[0] @ change.t()).detach(), output=output)

    linear.register_forward_hook(hear)
    for row in range(4):
        more = {n: x[row] for n, x in given.items() if n != "input_ids"}
        ids = given["input_ids"][row : row + 1]
        log_p = model(input_ids=ids, use_cache=False, **more).logits[0].log_softmax(-1)
        draw = torch.Generator().manual_seed(row)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
        (-log_p.gather(1, labels).sum()).backward()
        each = (heard["output"].grad * heard["change"]).sum(-1)
        total += float(each.double().square().sum())
    expected = 0.5 * total / (4 * 14)
    measured = next(ways for name, ways in found.items() if name.endswith("0.mlp.up_proj"))
    assert measured == {"1": pytest.approx(expected, rel=1e-3)}


def test_a_stopped_run_has_its_pictures_again(
    source: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "sparsegpt", "sparsity": 0.5, "activations": "disk", "calibration": file}
    secateur.prune(source, output=tmp_path / "whole", **options)
    prune = CalibratedLayerPass.prune

    def stops(self: CalibratedLayerPass, groups: Any) -> Any:
        if self.index == 1:
            raise KeyboardInterrupt
        return prune(self, groups)

    monkeypatch.setattr(CalibratedLayerPass, "prune", stops)
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(source, output=tmp_path / "out", **options)
    monkeypatch.undo()
    other = {**inputs(), "pixel_values": torch.zeros(4, 1, 3, 16, 16)}
    save_file(other, file)  # the run has kept its own
    again = secateur.prune(source, output=tmp_path / "out", resume=True, **options)
    assert again.manifest.cost.resumed
    made, expected = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert all(torch.equal(made[n], x) for n, x in expected.items())
    assert not list((tmp_path / "out").rglob("beside*"))


def test_the_plan_reads_no_pictures(source: Path, file: Path) -> None:
    planned = secateur.prune(source, dry_run=True, calibration=file, **OPTIONS)
    assert planned.plan.calibration_tokens == 4 * 14


@pytest.mark.parametrize(("options", "reader"), [
    ({"method": "taylor"}, "gradients of this method"),
    ({"allocation": "owl"}, "allocation owl"),
    ({"distill_epochs": 1}, "distillation"),
    ({"generated_windows": 2}, "generated_windows"),
])  # fmt: skip
def test_what_would_read_no_pictures_is_refused(
    options: dict[str, Any], reader: str, source: Path, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=rf"{reader} would read the windows without pixel_values"):
        secateur.prune(source, output=tmp_path / "out", calibration=file, **{**OPTIONS, **options})
    assert not (tmp_path / "out").exists()


def test_other_verbs_and_loaded_models_refuse_pictures(
    source: Path, file: Path, tmp_path: Path
) -> None:
    message = "pixel_values, token_type_ids beside their tokens"
    with pytest.raises(SourceError, match=message):
        secateur.prune(tiny_model("gemma3 vision"), calibration=file, **OPTIONS)
    with pytest.raises(SourceError, match=message):
        secateur.structure(source, output=tmp_path / "out", keep_layers=2, calibration=file)


@pytest.mark.parametrize(("change", "fault"), [
    ({"pixel_values": torch.zeros(3, 1, 3, 16, 16)}, r"shape \(3, 1, 3, 16, 16\), and there are 4"),
    ({"attention_mask": torch.zeros(4, 1, 14)}, "56 tokens are padding"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    change: dict[str, Tensor], fault: str, source: Path, file: Path, tmp_path: Path
) -> None:
    save_file({**inputs(), **change}, file)
    with pytest.raises(SourceError, match=fault):
        secateur.prune(source, output=tmp_path / "out", calibration=file, **OPTIONS)


def test_a_line_with_a_picture_names_the_way(source: Path, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(source)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a cat", "image": "cat.png"}\n', encoding="utf-8")
    with pytest.raises(SourceError, match="lines are read as text alone") as caught:
        secateur.prune(source, output=tmp_path / "out", calibration=lines, **OPTIONS)
    assert "docs/seeing.md" in str(caught.value)


def tiny_processor() -> Any:
    """Of a LLaVA whose pictures take four tokens; its tokenizer knows letters and `<image>`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    pictures = transformers.CLIPImageProcessorPil(**sizes)
    return transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip


def test_the_page_makes_windows_with_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_of("llava")
    config.image_token_index = config.image_token_id = 96
    config.text_config.vocab_size = 97
    torch.manual_seed(0)
    model = class_of(config).from_config(config, dtype=torch.float32)
    with quiet_transformers():
        model.save_pretrained("MODEL")
        tiny_processor().save_pretrained("MODEL")
    made = next(b for b in blocks(ROOT / "docs" / "seeing.md") if b.language == "python")
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)]
    texts = ["a <image> red one", "<image> is green", "it is blue <image>", "<image>"]
    pairs = [(Image.new("RGB", (20, 16), c), t) for c, t in zip(colours, texts, strict=True)]
    exec(made.text.replace("512", "12"), {"pairs": pairs})
    report = secateur.prune(
        "MODEL", output="SPARSE", calibration="pairs.safetensors", method="wanda", sparsity=0.5
    )
    # of the third text the picture is cut, and the last text is shorter than a window
    assert report.manifest.calibration["beside"] == {"pixel_values": [2, 1, 3, 16, 16]}
    assert report.manifest.calibration["tokens"] == 2 * 12
    assert report.sparsity == 0.5
