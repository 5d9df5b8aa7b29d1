"""Checkpoints are compressed to the size of theory and come back bit for bit."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow import every_pair, few_families, slow
from tiny import save_tiny
from transformers import AutoModelForCausalLM
from zoo import CONFIGS

import secateur
from secateur.cli import main
from secateur.engine.prune import run as prune_run
from secateur.errors import (
    CheckpointError,
    RecipeError,
    SecateurError,
)
from secateur.models.skeleton import quiet_transformers
from secateur.quantization.groups import GroupGrid
from secateur.quantization.int8 import dequantize_rows, quantize_rows
from secateur.reporting.tables import binary_size
from secateur.runtime.formats import Layout
from secateur.runtime.packed import PackedCheckpoint

WEIGHTS = "model.safetensors"
PACKED = "secateur.safetensors"


def zero_out(folder: Path, sparsity: float = 0.5, pattern: tuple[int, int] | None = None) -> None:
    """Set weights of the decoder's matrices to zero, in the files."""
    generator = torch.Generator().manual_seed(1)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.ndim != 2 or not any(part.isdigit() for part in name.split(".")):
                continue
            if pattern is None:
                tensor[torch.rand(tensor.shape, generator=generator) < sparsity] = 0
            else:
                groups = tensor.view(-1, pattern[1])
                places = torch.rand(groups.shape, generator=generator).argsort(1)
                groups.masked_fill_(places >= pattern[0], 0)
        save_file(tensors, file, metadata={"format": "pt"})


def pruned_model(
    folder: Path, family: str = "llama", shards: int = 1, pattern: tuple[int, int] | None = None,
    sparsity: float = 0.5, **options: object,
) -> Path:  # fmt: skip
    """A tiny model with zeros, and the records and card of a run."""
    save_tiny(folder, family, shards, **options)  # type: ignore[arg-type]
    zero_out(folder, sparsity, pattern)
    (folder / "secateur").mkdir()
    (folder / "secateur" / "recipe.yaml").write_text("method: wanda\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# a pruned model\n")
    return folder


def test_the_size_with_the_zeros_is_known(tmp_path: Path) -> None:
    source = pruned_model(tmp_path / "m", hidden_size=96)
    found = secateur.compress(source, output=tmp_path / "packed", values="int8")
    without_linears = found.file_bytes - found.linears.bytes
    for values in ("int8", "int4"):
        dense = secateur.compress(
            source, output=tmp_path / f"dense-{values}", values=values, format="dense"
        )
        assert found.dense_file_bytes[values] == without_linears + dense.linears.bytes
    assert found.dense_file_bytes["as here"] == found.dense_file_bytes["int8"] > found.file_bytes


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()
    }


def assert_same(found: Path, expected: Path) -> None:
    """The same tensors, bit for bit."""
    ours, theirs = tensors_of(found), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.shape == theirs[name].shape
        assert tensor.view(torch.uint8).equal(theirs[name].view(torch.uint8)), name


@pytest.mark.parametrize("family", few_families(CONFIGS))
def test_every_family_comes_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    source = pruned_model(tmp_path / "m", family)
    report = secateur.compress(source, output=tmp_path / "c", values="keep")
    assert report.linears.matrices == sum(x.matrices for x in report.formats.values())
    assert "bitmask float32" in report.formats
    assert report.file_bytes < 0.75 * report.source_bytes
    packed = PackedCheckpoint(tmp_path / "c")
    assert any(x.transposed for x in packed.layouts.values()) == (family == "gpt2")
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    assert_same(tmp_path / "d", source)
    assert json.loads((tmp_path / "d" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    assert secateur.inspect(str(tmp_path / "c")).audit.sparsity == report.sparsity


@pytest.mark.parametrize(
    ("dtype", "shards", "archive", "format"),
    every_pair(
        [torch.bfloat16, torch.float16, torch.float32],
        [1, 3],
        [False, True],
        ["auto", "bitmask", "n-of-m", "dense"],
    ),
)
def test_formats_shards_and_archives_come_back(
    tmp_path: Path, dtype: torch.dtype, shards: int, archive: bool, format: str
) -> None:
    source = pruned_model(tmp_path / "m", shards=shards, pattern=(2, 4), dtype=dtype)
    secateur.compress(source, output=tmp_path / "c", format=format, archive=archive, values="keep")
    packed = PackedCheckpoint(tmp_path / "c")
    assert [f.name for f in packed.files] == [
        f.name.replace("model", "secateur") for f in sorted(source.glob("*.safetensors"))
    ]
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "secateur",
        "version": 5,
        "archive": archive,
        "activations": None,
    }
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert "sparsity_config" not in config
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    assert_same(tmp_path / "d", source)


def theory(out: int, columns: int, nonzeros: int, value_bytes: int) -> int:
    return out * -(-columns // 8) + value_bytes * nonzeros


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_sizes_are_those_of_theory(tmp_path: Path, sparsity: float) -> None:
    large = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    source = pruned_model(tmp_path / "m", sparsity=sparsity, dtype=torch.bfloat16, **large)
    linears = [t for n, t in tensors_of(source).items() if t.ndim == 2 and "layers" in n]
    zeros = sum(int((t == 0).sum()) for t in linears)
    weights = sum(t.numel() for t in linears)
    report = secateur.compress(source, output=tmp_path / "c", values="keep")
    expected = sum(theory(*t.shape, int((t != 0).sum()), 2) for t in linears)
    assert report.linears.bytes == expected
    assert report.linears.weights == weights
    assert report.sparsity == pytest.approx(zeros / weights)
    assert report.linears.ratio == pytest.approx(1 - sparsity + 1 / 16, rel=0.02)
    int8 = secateur.compress(source, output=tmp_path / "i", values="int8", embeddings="int8")
    rows = sum(t.shape[0] for t in linears)
    assert int8.linears.bytes == expected - (weights - zeros) + 4 * rows
    assert int8.embeddings.matrices == 1  # tied: stored once
    assert int8.embeddings.bytes == 96 * 128 + 4 * 96
    archive = secateur.compress(source, output=tmp_path / "a", archive=True, values="keep")
    assert archive.linears.bytes < 0.85 * report.linears.bytes


def test_auto_takes_the_smallest(tmp_path: Path) -> None:
    source = pruned_model(tmp_path / "m", pattern=(2, 4), dtype=torch.bfloat16)
    tensors = tensors_of(source)
    layer = "model.layers.0."
    tensors[layer + "self_attn.k_proj.weight"].fill_(1.0)  # no zero at all
    tensors[layer + "self_attn.v_proj.weight"].zero_()  # nothing else
    weight = tensors[layer + "mlp.up_proj.weight"]
    weight[0, :3] = 1.0  # one group keeps three of four
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    secateur.compress(source, output=tmp_path / "c", values="keep")
    layouts = PackedCheckpoint(tmp_path / "c").layouts
    assert layer + "self_attn.k_proj" not in layouts
    assert layouts[layer + "self_attn.v_proj"] == Layout("n-of-m", "bfloat16", (16, 32), "1:32")
    assert layouts[layer + "self_attn.q_proj"] == Layout("n-of-m", "bfloat16", (32, 32), "2:4")
    assert layouts[layer + "mlp.up_proj"].format == "bitmask"
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    assert_same(tmp_path / "d", source)
    report = secateur.compress(source, output=tmp_path / "i", values="int8", format="n-of-m")
    assert report.formats["dense int8"].matrices == 1  # the one without a zero
    assert {"2:4 int8", "1:32 int8"} < set(report.formats)
    assert "bitmask int8" not in report.formats


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("archive", [False, True])
def test_int8_comes_back_as_what_it_stands_for(tmp_path: Path, family: str, archive: bool) -> None:
    source = pruned_model(tmp_path / "m", family, dtype=torch.bfloat16, sparsity=0.7)
    secateur.compress(
        source, output=tmp_path / "c", values="int8", embeddings="int8", archive=archive
    )
    packed = PackedCheckpoint(tmp_path / "c")
    quantized = {f"{name}.weight": layout for name, layout in packed.layouts.items()}
    assert any("emb" in name or "wte" in name for name in quantized)
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    before, after = tensors_of(source), tensors_of(tmp_path / "d")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name in quantized:
            assert quantized[name].values == "int8"
            weight = tensor.t() if quantized[name].transposed else tensor
            expected = dequantize_rows(*quantize_rows(weight)).bfloat16()
            tensor = expected.t() if quantized[name].transposed else expected
            assert bool(((after[name] == 0) | (before[name] != 0)).all())  # zeros stay zeros
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize(
    ("family", "values", "group", "archive"),
    every_pair(
        ["llama", "gpt2"],
        [("int4", None), ("int4", 32), ("int3", 128), ("int2", 32)],
        [False, True],
    ),
)
def test_grids_come_back_as_what_they_stand_for_and_are_found_again(
    tmp_path: Path, family: str, values: str, group: int | None, archive: bool
) -> None:
    source = pruned_model(tmp_path / "m", family, dtype=torch.bfloat16, sparsity=0.5)
    chosen = {"values": values, "archive": archive} | ({"group_size": group} if group else {})
    chosen |= {"embeddings": "keep"}
    report = secateur.compress(source, output=tmp_path / "c", **chosen)
    packed = PackedCheckpoint(tmp_path / "c")
    assert {layout.values for layout in packed.layouts.values()} == {values}
    assert {layout.group for layout in packed.layouts.values()} == {group or 64}
    assert f"bitmask {values} g{group or 64}" in report.formats
    assert 0.02 < report.value_error < 0.4
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    before, after = tensors_of(source), tensors_of(tmp_path / "d")
    for name, tensor in before.items():
        layout = packed.layouts.get(name.removesuffix(".weight"))
        if layout is not None and name.endswith(".weight"):
            weight = tensor.t() if layout.transposed else tensor
            expected = layout.grid.dequantize(*layout.grid.quantize(weight)).bfloat16()
            tensor = expected.t() if layout.transposed else expected
            assert bool(((after[name] == 0) | (before[name] != 0)).all())  # zeros stay zeros
        assert torch.equal(after[name], tensor), name
    again = secateur.compress(tmp_path / "d", output=tmp_path / "again", **chosen)
    assert again.value_error == 0
    secateur.decompress(tmp_path / "again", output=tmp_path / "same")
    assert_same(tmp_path / "same", tmp_path / "d")


@pytest.mark.parametrize("tied", [True, False])
def test_large_embeddings_are_int8_beside_linears_of_integers(tmp_path: Path, tied: bool) -> None:
    """From a tenth of the bytes on. One row of the vocabulary more makes the difference."""
    sizes = {"tie_word_embeddings": tied, "dtype": torch.bfloat16}
    model = tensors_of(pruned_model(tmp_path / "m", vocab_size=96, **sizes))
    rest = sum(t.numel() for n, t in model.items() if "embed" not in n and "head" not in n)
    row = 32 * (1 if tied else 2)
    rows = -(-rest // (9 * row))  # rows · row is a tenth of it and the rest
    for vocabulary, stored in ((rows, "int8"), (rows - 1, "bfloat16")):
        source = pruned_model(tmp_path / stored, vocab_size=vocabulary, **sizes)
        report = secateur.compress(source, output=tmp_path / f"{stored}-4", values="int4")
        assert (report.embedding_values, report.embeddings.weights) == (stored, vocabulary * row)
        assert f"embeddings {stored}" in str(report)
    for options in ({"values": "int4", "embeddings": "keep"}, {"values": "keep"}, {}):
        report = secateur.compress(
            tmp_path / "int8", output=tmp_path / "same", overwrite=True, **options
        )
        assert report.embedding_values == "bfloat16"
        file = tensors_of(tmp_path / "same")
        assert file["model.embed_tokens.weight"].equal(
            tensors_of(tmp_path / "int8")["model.embed_tokens.weight"]
        )


@pytest.mark.parametrize(
    ("bits", "tied", "group"), [(4, True, 32), (4, False, None), (3, True, None), (3, False, 32)]
)
def test_embeddings_of_few_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, tied: bool, group: int | None
) -> None:
    """Tied, one matrix is stored; untied, two. Rows of 40 end with a shorter group."""
    source = pruned_model(
        tmp_path / "m", hidden_size=40, vocab_size=99, tie_word_embeddings=tied,
        dtype=torch.bfloat16,
    )  # fmt: skip
    options = {"values": "keep", "embeddings": f"int{bits}", "group_size": group}
    report = secateur.compress(source, output=tmp_path / "c", **options)
    count = 1 if tied else 2
    scales = 2 if group == 32 else 1
    assert report.embeddings.matrices == count
    assert report.embeddings.bytes == count * 99 * (5 * bits + scales + 1)
    assert report.embedding_values == f"int{bits} g{group or 64}"
    card = (tmp_path / "c/README.md").read_text()
    assert f"| embeddings {report.embedding_values} | {count} |" in card
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    before, after = tensors_of(source), tensors_of(tmp_path / "d")
    grid = GroupGrid(bits, group or 64)
    for name, tensor in before.items():
        if "embed" in name or "head" in name:
            tensor = grid.dequantize(*grid.quantize(tensor)).bfloat16()
        assert torch.equal(after[name], tensor), name
    # on the grid already nothing is rounded, so what was measured stays true
    found = []
    monkeypatch.setattr(
        "secateur.steps.runner.RunContext.carry_over",
        lambda *_, same_weights: found.append(same_weights),
    )
    for number, folder in enumerate((source, tmp_path / "d")):
        with contextlib.suppress(CheckpointError):  # without a configuration
            secateur.compress(folder, output=tmp_path / f"again{number}", **options)
    assert found == [False, True]


def zeros_in(folder: Path) -> dict[str, torch.Tensor]:
    """Where the decoder's matrices of a dense folder are zero."""
    tensors = load_file(folder / WEIGHTS)
    return {n: t == 0 for n, t in tensors.items() if t.ndim == 2 and "embed" not in n}


def output_error(found: Path, expected: Path, windows: torch.Tensor) -> float:
    """How far the logits of two dense folders are apart, relative and squared."""
    with quiet_transformers(), torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(x) for x in (found, expected))
        wanted = other(windows).logits
        return float((one(windows).logits - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(
    ("family", "dense", "values", "largest_error"),
    [
        *every_pair(["llama", "gpt2"], [False, True], [("int8", 1e-3), ("int4", 0.02)]),
        *(slow((family, False, "int4", 0.02)) for family in ("opt", "phi3")),
    ],
)
def test_calibration_makes_integers_closer_and_keeps_zeros(
    tmp_path: Path, family: str, dense: bool, values: str, largest_error: float
) -> None:
    source = pruned_model(tmp_path / "m", family, sparsity=0.0 if dense else 0.5)
    windows = torch.randint(0, 90, (8, 32), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": windows}, tmp_path / "w.safetensors")
    secateur.compress(source, output=tmp_path / "near", values=values)
    report = secateur.compress(
        source, output=tmp_path / "fit", values=values, calibration=tmp_path / "w.safetensors"
    )
    assert not (tmp_path / "fit.rounded").exists()
    record = json.loads((tmp_path / "fit" / "secateur" / "compression.json").read_text())
    assert record["rounding"] == report.to_json()["rounding"]
    assert f"bits {values[3:]}" in record["rounding"]["solver"]
    assert 0 < record["rounding"]["mean_error"] < largest_error
    assert report.value_error == 0 or values == "int8"
    assert (tmp_path / "fit" / "secateur" / "recipe.yaml").read_text() == "method: wanda\n"
    for name in ("near", "fit"):
        secateur.decompress(tmp_path / name, output=tmp_path / f"{name}-dense")
    before, after = zeros_in(source), zeros_in(tmp_path / "fit-dense")
    assert all(bool(after[name][zeros].all()) for name, zeros in before.items())
    errors = [output_error(tmp_path / f"{name}-dense", source, windows) for name in ("fit", "near")]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("tied", [True, False])
def test_calibration_makes_a_head_of_4_bits_closer(tmp_path: Path, tied: bool) -> None:
    """By the errors that it makes on the inputs of the head; the other linears stay as they are."""
    sizes = {"hidden_size": 48, "vocab_size": 99, "tie_word_embeddings": tied}
    source = pruned_model(tmp_path / "m", **sizes)
    tensors = load_file(source / WEIGHTS)
    tensors["model.norm.weight"][3] = 20  # a large input
    save_file(tensors, source / WEIGHTS, {"format": "pt"})
    windows = torch.randint(0, 90, (8, 32), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": windows}, tmp_path / "w.safetensors")
    options = {"values": "keep", "embeddings": "int4", "group_size": 32}
    secateur.compress(source, output=tmp_path / "near", **options)
    text = tmp_path / "w.safetensors"
    report = secateur.compress(source, output=tmp_path / "fit", calibration=text, **options)
    assert report.rounding["head"] == "calibrated"
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    states: list[torch.Tensor] = []
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source)
        model.lm_head.register_forward_pre_hook(lambda _, x: states.append(x[0].flatten(0, 1)))
        model(windows)
    errors = []
    for name in ("near", "fit"):
        secateur.decompress(tmp_path / name, output=tmp_path / f"{name}-dense")
        found = tensors_of(tmp_path / f"{name}-dense")
        assert all(torch.equal(found[n], x) for n, x in tensors.items() if "layers" in n)
        errors.append(float((states[0] @ (found[head] - tensors[head]).T).norm()))
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"calibration": "x.txt"}, "the values are 'auto'"),
        ({"calibration": "x.txt", "values": "float16"}, "help to round|helps to round"),
        ({"values": "int8", "windows": 4}, "windows: changes nothing without calibration"),
        ({"values": "int8", "calibration": "x.txt", "colour": 4}, "colour: unknown key"),
        ({"values": "int8", "calibration": "none.txt"}, "none.txt"),
    ],
)
def test_calibration_that_makes_no_sense(tmp_path: Path, options, why: str) -> None:
    source = pruned_model(tmp_path / "m")
    with pytest.raises(SecateurError, match=why):
        secateur.compress(source, output=tmp_path / "out", **options)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["m"]


def test_rounding_can_be_stopped_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pruned_model(tmp_path / "m")
    windows = torch.randint(0, 90, (8, 32), generator=torch.Generator().manual_seed(3))
    save_file({"input_ids": windows}, tmp_path / "w.safetensors")
    options = {
        "values": "int8", "embeddings": "int4", "calibration": tmp_path / "w.safetensors",
    }  # fmt: skip
    secateur.compress(source, output=tmp_path / "whole", **options)

    def stop(*layer: object) -> None:
        finish(*layer)
        raise KeyboardInterrupt

    finish = prune_run.finish_layer
    monkeypatch.setattr(prune_run, "finish_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        secateur.compress(source, output=tmp_path / "out", **options)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="stopped"):
        secateur.compress(source, output=tmp_path / "out", **options)
    with pytest.raises(RecipeError, match="different"):
        secateur.compress(
            source, output=tmp_path / "out", resume=True, micro_batch_tokens=64, **options
        )

    # and stopped once more, after the rounding of the linears and of the head
    monkeypatch.setattr("secateur.steps.compress.PackedCheckpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        secateur.compress(source, output=tmp_path / "out", resume=True, **options)
    monkeypatch.undo()
    monkeypatch.setattr("secateur.steps.prune.Prune.work", interrupted)
    monkeypatch.setattr("secateur.steps.compress.head_gram", interrupted)
    secateur.compress(source, output=tmp_path / "out", resume=True, **options)
    assert_same(tmp_path / "out", tmp_path / "whole")

    monkeypatch.undo()
    secateur.compress(source, output=tmp_path / "out", restart=True, overwrite=True, **options)
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["m", "out", "w.safetensors", "whole"]


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_values_that_are_asked_for(tmp_path: Path) -> None:
    source = pruned_model(tmp_path / "m")
    report = secateur.compress(source, output=tmp_path / "c", values="bfloat16")
    assert set(report.formats) == {"bitmask bfloat16"}
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    found = tensors_of(tmp_path / "d")
    for name, tensor in tensors_of(source).items():
        assert torch.equal(found[name], tensor.bfloat16())
    with quiet_transformers():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "d", dtype="auto")
    assert model.dtype == torch.bfloat16


def test_negative_zeros_are_not_kept(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "m")
    tensors = tensors_of(source)
    name = "model.layers.1.mlp.down_proj.weight"
    mask = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(2)) < 0.5
    tensors[name] *= mask
    negative = int((tensors[name].view(torch.int32) == -(2**31)).sum())
    assert negative > 100
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    report = secateur.compress(source, output=tmp_path / "c", values="keep")
    assert report.negative_zeros == negative
    packed = PackedCheckpoint(tmp_path / "c")
    kept = packed.specs["model.layers.1.mlp.down_proj.compressed"].shape[0]
    assert kept == int((tensors[name] != 0).sum())
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    found = tensors_of(tmp_path / "d")[name]
    assert torch.equal(found, tensors[name])
    assert not bool((found.view(torch.int32) == -(2**31)).any())


def test_records_and_card_are_carried_over(tmp_path: Path) -> None:
    source = pruned_model(tmp_path / "m")
    report = secateur.compress(source, output=tmp_path / "c", values="keep")
    card = (tmp_path / "c" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# m, compressed")
    assert card.endswith("# a pruned model\n")
    assert f"| weight files now | {binary_size(report.file_bytes)}, " in card
    assert (tmp_path / "c" / "secateur" / "recipe.yaml").read_text() == "method: wanda\n"
    record = json.loads((tmp_path / "c" / "secateur" / "compression.json").read_text())
    assert record["file_bytes"] == report.file_bytes == (tmp_path / "c" / PACKED).stat().st_size
    assert (tmp_path / "c" / "tokenizer.json").exists()
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    assert {p.relative_to(source) for p in source.rglob("*")} == {
        p.relative_to(tmp_path / "d") for p in (tmp_path / "d").rglob("*")
    }
    for name in ("README.md", "tokenizer.json", "secateur/recipe.yaml"):
        assert (tmp_path / "d" / name).read_bytes() == (source / name).read_bytes()


def test_what_is_compressed_cannot_be_again(tmp_path: Path) -> None:
    source = pruned_model(tmp_path / "m")
    secateur.compress(source, output=tmp_path / "c", values="keep")
    with pytest.raises(CheckpointError, match="compressed already"):
        secateur.compress(tmp_path / "c", output=tmp_path / "e", values="keep")
    with pytest.raises(CheckpointError, match="compressed already"):
        secateur.prune(tmp_path / "c", method="magnitude", sparsity=0.5, output=tmp_path / "e")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(CheckpointError, match=r"quantized \(gptq\)"):
        secateur.compress(source, output=tmp_path / "e", values="keep")
    with pytest.raises(CheckpointError, match="configuration"):
        secateur.decompress(source, output=tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"format": "bitmaks"}, "did you mean 'bitmask'"),
        ({"values": "int1"}, "values='int1':"),
        ({"values": "int8", "group_size": 64}, "group size of 64 is for int4, int3, int2"),
        ({"group_size": 32}, "but the values are 'auto'"),
        ({"values": "int4", "group_size": 16}, "group.* 16"),
        ({"embeddings": "int4", "group_size": 16}, "group.* 16"),
        ({"embeddings": "int2"}, "embeddings='int2':"),
        ({"format": "n-of-m"}, "none of the 21 matrices can be stored as 'n-of-m'"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, options, why: str) -> None:
    source = pruned_model(tmp_path / "m", sparsity=0.0)
    with pytest.raises(RecipeError, match=why):
        secateur.compress(source, output=tmp_path / "c", **options)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "c.partial").exists()


def run(monkeypatch, capsys, *words: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["secateur", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0), capsys.readouterr().out


def test_the_verbs(tmp_path: Path, monkeypatch, capsys) -> None:
    source, output = pruned_model(tmp_path / "m", dtype=torch.bfloat16), tmp_path / "c"
    code, out = run(
        monkeypatch, capsys, "compress", source, "-o", output, "--values", "int8",
        "--embeddings", "int8", "--archive", "--json",
    )  # fmt: skip
    record = json.loads(out)
    assert code == 0
    assert record["file_bytes"] == (output / PACKED).stat().st_size
    assert record["ratio"] == record["file_bytes"] / record["bfloat16_bytes"]
    assert record["formats"]["bitmask int8"]["matrices"] == 21
    assert record["archive"] is True
    code, out = run(monkeypatch, capsys, "compress", source, "-o", output, "--overwrite")
    assert code == 0
    assert "bits per weight" in out
    code, out = run(monkeypatch, capsys, "inspect", output, "--json")
    audit = json.loads(out)
    assert audit["compressed"] == "packed"
    assert audit["linears"][0]["layout"]["format"] == "bitmask"
    assert audit["decoder_sparsity"] == pytest.approx(0.5, abs=0.02)
    code, out = run(monkeypatch, capsys, "inspect", output, "--layer", 0)
    assert code == 0
    assert "bitmask bfloat16" in out
    code, out = run(monkeypatch, capsys, "decompress", output, "-o", tmp_path / "d", "--json")
    assert code == 0
    assert json.loads(out)["matrices"] == 21
    assert_same(tmp_path / "d", source)
    code, out = run(monkeypatch, capsys, "compress", output, "-o", tmp_path / "e", "--json")
    assert code == 1
    assert json.loads(out)["error"]["kind"] == "CheckpointError"
