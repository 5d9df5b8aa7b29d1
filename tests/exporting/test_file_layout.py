"""Where a GGUF file has the matrices of a model, compared with what was put there by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf_models import byte_level, of_quince, rewritten, save
from safetensors.torch import save_file
from tiny import save_tiny
from torch import Tensor

import secateur
from secateur.errors import RecipeError
from secateur.exporting.gguf.like import FileLayout, layout_of, sheet_of
from secateur.models.checkpoint import CheckpointReader
from secateur.models.gguf_file import GGUFSource
from secateur.progress import Silent
from secateur.runtime.storage_plan import MixedReader, PackableCheckpoint

Q = gguf.GGMLQuantizationType
WIDE = {"hidden_size": 256, "num_hidden_layers": 1}
MIXTURE = {**WIDE, "moe_intermediate_size": 256, "mlp_only_layers": [], "decoder_sparse_step": 1}
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama, another one, and a mixture; all of one layer."""
    place = tmp_path_factory.mktemp("like")
    save(place / "llama", byte_level(), "llama", intermediate_size=512, **WIDE)
    save(place / "mixture", byte_level(), "qwen3_moe", **MIXTURE)
    return place


def exported(place: Path, name: str, type: str) -> GGUFSource:
    """A file of a model by our writer, quantized by llama.cpp."""
    output = place / f"{name}-{type}"
    if not output.exists():
        secateur.export(place / name, output=output, type=type)
    (file,) = output.glob("*.gguf")
    return GGUFSource.read(file)


def compared(file: GGUFSource, folder: Path) -> FileLayout:
    return layout_of(file, PackableCheckpoint.open(folder), Silent())


@pytest.mark.parametrize("type", ["q2_k", "q4_k_m", "iq4_xs", "q8_0"])
@pytest.mark.parametrize("name", ["llama", "mixture"])
def test_every_matrix_is_found_in_files_of_llama_cpp(place: Path, name: str, type: str) -> None:
    file = exported(place, name, type)
    layout = compared(file, place / name)
    assert layout.unchecked == ()
    known = FileLayout.written(file, layout.model)
    own, written = layout.weights(), known.weights()
    for matrix in layout.model.matrices:
        assert torch.equal(own.read(matrix), written.read(matrix)), matrix
    two = {n for n, x in file.tensors.items() if len(x.shape) > 1 and x.type != Q.F32}
    assert {*layout.replaced} == two


def test_rows_of_queries_are_those_that_llama_cpp_interleaves(place: Path) -> None:
    file = exported(place, "llama", "q8_0")
    layout = compared(file, place / "llama")
    (sheet,) = layout.sheets["blk.0.attn_q.weight"]
    head = 8
    halves = torch.arange(32).view(-1, 2, head // 2).swapaxes(1, 2).flatten()
    assert sheet.rows is not None
    assert torch.equal(sheet.rows, halves)


def test_rows_that_are_equal_are_found_in_the_usual_order(place: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(shutil.copytree(place / "llama", tmp_path / "twice"))
    tensors = {name: reader.read(name) for name in reader.entries}
    queries = tensors["model.layers.0.self_attn.q_proj.weight"]
    queries[8:16] = queries[:8]  # a head is there twice
    save_file(tensors, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    file = exported(tmp_path, "twice", "q4_k_m")
    (sheet,) = compared(file, tmp_path / "twice").sheets["blk.0.attn_q.weight"]
    halves = torch.arange(32).view(-1, 2, 4).swapaxes(1, 2).flatten()
    assert sheet.rows is not None
    assert torch.equal(sheet.rows, halves)


def test_the_layout_of_an_unknown_family_comes_from_the_file(place: Path, tmp_path: Path) -> None:
    tensors = of_quince(place / "llama")
    file = rewritten(tmp_path / "quince.gguf", tensors, Q.Q4_0)
    layout = compared(file, place / "llama")
    assert layout.unchecked == ("blk.0.norm.weight",)
    assert set(tensors) - {*layout.replaced, *layout.unchecked} == {"blk.0.last.weight"}
    weights = layout.weights()
    for name in layout.model.matrices:
        weight = layout.model.reader.read(name)
        error = (weights.read(name) - weight).norm() / weight.norm()
        assert 0 < float(error) < 0.12, name
    # back from the matrices, as if they were blocks: the rows of every tensor are where they were
    for name in layout.replaced:
        values = torch.from_numpy(layout.encoded(name, layout.model.reader.read))
        assert torch.equal(values[0], tensors[name])


def swap_rows(tensors: dict[str, Tensor]) -> None:
    rows = tensors["blk.0.attn_out.weight"]
    tensors["blk.0.attn_out.weight"] = torch.cat([rows[1:2], rows[:1], rows[2:]])


def shuffled(tensors: dict[str, Tensor]) -> None:
    rows = tensors["blk.0.both.weight"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    tensors["blk.0.both.weight"] = rows[order]


def negate(tensors: dict[str, Tensor]) -> None:
    tensors["blk.0.both.weight"] = -tensors["blk.0.both.weight"]


def one_row(tensors: dict[str, Tensor]) -> None:
    rows = tensors["blk.0.mixed_in.weight"].clone()
    rows[3] = rows[3].roll(1)
    tensors["blk.0.mixed_in.weight"] = rows


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (swap_rows, "blk.0.attn_out.weight"),
        (shuffled, "blk.0.both.weight"),
        (negate, "blk.0.both.weight"),
        (one_row, "blk.0.mixed_in.weight"),
        (lambda tensors: tensors.pop("blk.0.last.weight"), "model.layers.0.mlp.down_proj.weight"),
        (
            lambda tensors: tensors.update({"blk.0.more.weight": tensors["blk.0.attn_out.weight"]}),
            "model.layers.0.self_attn.o_proj.weight",
        ),
        (
            lambda tensors: tensors.update({"blk.0.odd.weight": torch.randn(64, 256)}),
            "blk.0.odd.weight",
        ),
    ],
)
def test_other_numbers_are_refused_by_name(
    place: Path, tmp_path: Path, change: Change, name: str
) -> None:
    tensors = of_quince(place / "llama")
    change(tensors)
    file = rewritten(tmp_path / "quince.gguf", tensors, Q.Q4_0)
    with pytest.raises(RecipeError) as caught:
        compared(file, place / "llama")
    assert str(caught.value.where).startswith(f"{name}, ")


def test_another_model_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    """Another model of the same shapes, and one that differs in one norm."""
    file = exported(place, "llama", "q2_k")
    own = CheckpointReader(place / "llama")
    for odd in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        other = {name: own.read(name) for name in own.entries}
        other[odd] = other[odd].flip(0)
        folder = tmp_path / odd
        folder.mkdir()
        for beside in (place / "llama").glob("*.json"):
            (folder / beside.name).write_bytes(beside.read_bytes())
        save_file(other, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(RecipeError) as caught:
            compared(file, folder)
        names = {"model.norm.weight": "output_norm.weight"}
        assert str(caught.value.where).startswith(names.get(odd, "blk.0.ffn_up.weight"))


def test_a_mixed_reader_shows_fused_experts_apart(tmp_path: Path) -> None:
    model = PackableCheckpoint.open(save_tiny(tmp_path / "fused", "gpt_oss"))
    name = next(name for name in model.matrices if ".experts.1." in name)
    mixed = MixedReader.of(model.reader, {})
    assert torch.equal(mixed.read(name), model.reader.read(name))


def test_experts_in_another_order_are_refused(place: Path, tmp_path: Path) -> None:
    file = exported(place, "mixture", "q8_0")
    name = "blk.0.ffn_down_exps.weight"
    tensors = {
        n: sheet_of(x) if len(x.shape) == 2 else torch.stack(
            [sheet_of(x, number) for number in range(x.shape[0])]
        )
        for n, x in file.tensors.items()
        if len(x.shape) > 1
    }  # fmt: skip
    tensors[name] = tensors[name].flip(0)
    other = rewritten(tmp_path / "other.gguf", tensors, Q.Q8_0, "qwen3moe")
    with pytest.raises(RecipeError) as caught:
        compared(other, place / "mixture")
    assert str(caught.value.where).startswith(name)
