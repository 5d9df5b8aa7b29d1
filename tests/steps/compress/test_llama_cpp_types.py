"""Types of llama.cpp: from the solver's codes to the bytes of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import byte_level, save
from torch import Tensor
from trained import source_text
from zoo import config_of

import secateur
from secateur.calibration.windows import load_windows, save_windows
from secateur.errors import RecipeError
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.block_files import FOLDER, BlockFiles, StoredBlocks
from secateur.models.checkpoint import CheckpointReader
from secateur.runtime.install import open_checkpoint

WIDE = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 64}
"""Rows of 256 weights, but for those of the down projection."""
VALUES = {"values": "q4_k", "overrides": {"*.layers.1.self_attn.*": "q6_k", "*.o_proj": "iq4_xs"}}
TYPES = {
    "token_embd": "Q4_K", "output": "Q6_K", "blk.0.attn_q": "Q4_K", "blk.0.ffn_down": "Q5_0",
    "blk.1.attn_k": "Q6_K", "blk.1.attn_output": "IQ4_XS", "blk.1.ffn_up": "Q4_K",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its head apart, in bfloat16; one with a tied head; and windows."""
    place, tokenizer = tmp_path_factory.mktemp("types"), byte_level()
    ids = tokenizer(source_text()[:20_000], return_tensors="pt")["input_ids"]
    windows = ids[0, : 44 * 32].view(44, 32)
    save_windows(windows[:40], place / "windows.safetensors")
    save_windows(windows[40:], place / "others.safetensors")
    save(place / "tied", tokenizer, "llama", **WIDE)
    folder = save(place / "apart", tokenizer, "llama", **WIDE, tie_word_embeddings=False)
    loaded = secateur.load(folder, dtype=torch.float32)
    loaded.to(torch.bfloat16).save_pretrained(folder)
    return place


def compressed(place: Path, source: str, output: Path, **options: Any) -> Any:
    given = {"calibration": place / "windows.safetensors", **options}
    return secateur.compress(place / source, output=output, **given)


def tensors(folder: Path) -> dict[str, Any]:
    """The tensors of the only GGUF file of a folder."""
    (file,) = folder.glob("*.gguf")
    return {tensor.name.removesuffix(".weight"): tensor for tensor in gguf.GGUFReader(file).tensors}


def numbers(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def divergence(logits: Tensor, others: Tensor) -> float:
    """The mean KL divergence in nats."""
    p, q = logits.log_softmax(-1), others.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def test_a_packed_folder_and_a_file_have_the_same_blocks(place: Path, tmp_path: Path) -> None:
    """And llama.cpp computes with them as transformers does with their numbers."""
    packed = compressed(place, "apart", tmp_path / "packed", **VALUES)
    found = compressed(place, "apart", tmp_path / "file", **VALUES, to="gguf")
    secateur.export(tmp_path / "packed", output=tmp_path / "exported", type="stored")
    written, exported = tensors(tmp_path / "file"), tensors(tmp_path / "exported")
    assert {name: written[name].tensor_type.name for name in TYPES} == TYPES
    assert written.keys() == exported.keys()
    for name, tensor in written.items():
        assert tensor.tensor_type == exported[name].tensor_type
        assert (tensor.data == exported[name].data).all()
    kinds = {"dense q4_k", "dense q6_k", "dense q5_0", "dense iq4_xs"}
    assert found.formats.keys() == packed.formats.keys() == kinds
    assert found.file_bytes == next((tmp_path / "file").glob("*.gguf")).stat().st_size
    assert found.rounding["mean_error"] == packed.rounding["mean_error"] > 0
    assert not (tmp_path / "packed" / FOLDER).exists()
    # the numbers of the file are those with which a loaded folder computes
    rounded = secateur.load(tmp_path / "packed", dtype=torch.float32)
    dense = secateur.load(place / "apart", dtype=torch.float32)
    view = open_checkpoint(tmp_path / "packed")
    assert view.entries["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    expanded = secateur.load(tmp_path / "packed", expand=True, dtype=torch.float32)
    up = expanded.model.layers[0].mlp.up_proj.weight
    assert torch.equal(up, numbers(written["blk.0.ffn_up"]))
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with LlamaCpp(next((tmp_path / "file").glob("*.gguf"))) as engine:
        theirs = torch.stack([x for x in engine.run(ids, logits=True) if x is not None])
    assert theirs.shape == rounded(ids).logits.shape
    # llama.cpp also rounds what enters a matrix, to 8 bits
    near, far = divergence(rounded(ids).logits, theirs), divergence(dense(ids).logits, theirs)
    assert near < 0.1 * far


def test_a_text_lowers_the_error_of_a_tied_head_and_of_the_layers(
    place: Path, tmp_path: Path
) -> None:
    nearest = compressed(place, "tied", tmp_path / "nearest", values="q3_k", calibration=None)
    learnt = compressed(place, "tied", tmp_path / "learnt", values="q3_k")
    assert nearest.embedding_values == learnt.embedding_values == "q6_k"
    assert learnt.rounding["head"] == "calibrated"
    loss, windows = {}, load_windows(place / "others.safetensors")
    with torch.no_grad():
        dense = secateur.load(place / "tied", dtype=torch.float32)(windows).logits
        for name in ("nearest", "learnt"):
            model = secateur.load(tmp_path / name, dtype=torch.float32)
            loss[name] = divergence(dense, model(windows).logits)
    assert loss["learnt"] < loss["nearest"]


def test_healed_weights_keep_their_scales(place: Path, tmp_path: Path) -> None:
    options = {"values": "q4_k", "overrides": {"*.o_proj": "bfloat16"}}
    compressed(place, "apart", tmp_path / "rounded", **options)
    healed = compressed(
        place, "apart", tmp_path / "healed", **options, distill_epochs=2,
        distill_learning_rate=2e-3,
    )  # fmt: skip
    assert healed.rounding["distillation"]["loss_after"] > 0
    changed = 0
    before, after = (open_checkpoint(tmp_path / name) for name in ("rounded", "healed"))
    for name in before.entries:
        own, new = before.blocks(name), after.blocks(name)
        assert (own is None) == (new is None)
        if own is not None:
            assert torch.equal(own.blocks.scale, new.blocks.scale)
            changed += int((own.blocks.codes != new.blocks.codes).sum())
    assert changed > 100
    secateur.export(tmp_path / "healed", output=tmp_path / "file", type="stored")
    assert tensors(tmp_path / "file")["blk.0.attn_output"].tensor_type.name == "BF16"


def test_a_pruned_model_keeps_its_zeros_or_is_refused(place: Path, tmp_path: Path) -> None:
    secateur.prune(place / "tied", output=place / "pruned", method="magnitude", sparsity=0.5)
    with pytest.raises(RecipeError, match="q3_k, q6_k, q4_0, q5_0, q8_0"):
        compressed(place, "pruned", tmp_path / "refused", values="q4_k")
    with pytest.raises(RecipeError, match="down_proj"):
        compressed(
            place, "pruned", tmp_path / "refused", values="q3_k", overrides={"*down_proj": "iq4_nl"}
        )
    assert not (tmp_path / "refused").exists()
    learnt = compressed(place, "pruned", tmp_path / "file", values="q3_k", to="gguf")
    compressed(place, "pruned", tmp_path / "healed", values="q3_k", distill_epochs=1)
    file, healed = tensors(tmp_path / "file"), open_checkpoint(tmp_path / "healed")
    source = CheckpointReader(place / "pruned")
    for name, tensor in (("up_proj", "ffn_up"), ("down_proj", "ffn_down")):
        stored = f"model.layers.1.mlp.{name}.weight"
        zero = source.read(stored) == 0
        assert zero.float().mean() > 0.4
        assert not numbers(file[f"blk.1.{tensor}"])[zero].any()
        assert not healed.read(stored)[zero].any()
    assert learnt.sparsity > 0.49


def test_experts_of_a_stack_are_copied_together(place: Path, tmp_path: Path) -> None:
    config = config_of("mixtral")
    save(place / "mixture", byte_level(), config, **WIDE)
    options = {"values": "q4_k", "overrides": {"*.down_proj": "q5_0"}}
    compressed(place, "mixture", tmp_path / "packed", **options)
    secateur.export(tmp_path / "packed", output=tmp_path / "file", type="stored")
    file, view = tensors(tmp_path / "file"), open_checkpoint(tmp_path / "packed")
    for kind, stored in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        names = [
            f"model.layers.1.block_sparse_moe.experts.{number}.{stored}.weight"
            for number in range(config.num_local_experts)
        ]
        stack = torch.stack([view.blocks(name).packed for name in names])
        assert torch.equal(torch.from_numpy(file[f"blk.1.ffn_{kind}_exps"].data.copy()), stack)


def test_blocks_count_only_while_they_give_the_numbers(place: Path, tmp_path: Path) -> None:
    """A later run that changes a matrix leaves the blocks of an earlier one behind."""
    name = "model.layers.0.mlp.up_proj.weight"
    secateur.prune(
        place / "tied", output=tmp_path / "rounded", score="kept", solver="obs", sparsity=0.0,
        method_parameters={"bits": "q4_0"}, calibration=place / "windows.safetensors",
    )  # fmt: skip
    assert {*BlockFiles(tmp_path / "rounded").places} >= {name}
    stored = CheckpointReader(tmp_path / "rounded").blocks(name)
    assert isinstance(stored, StoredBlocks)
    assert stored.type == "q4_0"
    assert torch.equal(stored.stored, CheckpointReader(tmp_path / "rounded").read(name))
    secateur.prune(
        tmp_path / "rounded", output=tmp_path / "pruned", method="magnitude", sparsity=0.5
    )
    assert CheckpointReader(tmp_path / "pruned").blocks(name) is None


def test_a_gguf_file_takes_no_other_values(place: Path, tmp_path: Path) -> None:
    for options in ({"values": "int4"}, {"values": "q4_k", "embeddings": "int8"}):
        with pytest.raises(RecipeError, match="int"):
            secateur.compress(place / "tied", output=tmp_path / "out", to="gguf", **options)
    for options in ({"archive": True}, {"format": "bitmask"}):
        with pytest.raises(RecipeError, match="to"):
            secateur.compress(
                place / "tied", output=tmp_path / "out", to="gguf", values="q4_k", **options
            )
    assert not (tmp_path / "out").exists()
