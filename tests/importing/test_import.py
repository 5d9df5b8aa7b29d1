"""Folders of other tools become ordinary ones: the same values, every zero counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from slow import slow_but
from tiny import save_tiny
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM
from zoo import matrices, weight_of

import secateur
from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.models.skeleton import quiet_transformers
from secateur.runs.records import Import, Manifest, read_record

FEW = {"num_hidden_layers": 2}


def load(folder: Path) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def half(weight: torch.Tensor) -> torch.Tensor:
    """wanda's way to half: the smallest weights of each row."""
    limit = weight.abs().float().kthvalue(weight.shape[1] // 2, dim=1, keepdim=True).values
    return weight.abs().float() > limit


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    four = weight.abs().float().view(-1, 4)
    kept = torch.zeros_like(four, dtype=torch.bool)
    return kept.scatter_(1, four.topk(2, 1).indices, True).view(weight.shape)


def with_zeros(place: Path, shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """As wanda, sparsegpt and llm-compressor save: 2:4 in attention, half of each row in FFNs."""
    save_tiny(place, dtype=dtype, shards=shards, **FEW)
    for file in place.glob("*.safetensors"):
        tensors = load_file(file)
        for name, x in tensors.items():
            if name.endswith("proj.weight") and "down" not in name:
                tensors[name] = x * (two_of_four(x) if "self_attn" in name else half(x))
        save_file(tensors, file, metadata={"format": "pt"})
    (place / "README.md").write_text("---\nlicense: mit\nbase_model: org/dense\n---\n# A card\n")
    return place


@pytest.mark.parametrize("shards", slow_but({3}, [1, 3]))
def test_plain_folders_keep_every_byte_and_say_their_patterns(shards: int, tmp_path: Path) -> None:
    source = with_zeros(tmp_path / "wanda", shards, torch.bfloat16)
    result = secateur.import_model(source, output=tmp_path / "out")
    for file in source.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "out" / file.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
    assert result.patterns == {"2:4": 8, "unstructured": 4, "dense": 2}
    dense = [x.name for x in result.record.matrices if x.pattern == "dense"]
    assert [name.rpartition(".")[2] for name in dense] == ["down_proj"] * 2
    found = {x.name: x for x in result.record.matrices}
    queries = found["model.layers.1.self_attn.q_proj"]
    assert (queries.pattern, queries.zeros) == ("2:4", queries.shape[0] * queries.shape[1] // 2)
    notes = tmp_path / "out" / "secateur"
    assert read_record(Import, notes / "import.json") == result.record
    manifest = read_record(Manifest, notes / "manifest.json")
    assert manifest.source.name == str(source)
    assert manifest.result.decoder_sparsity == pytest.approx(result.sparsity)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert "base_model: org/dense" in card
    assert str(tmp_path) not in card
    assert "8 2:4, 4 unstructured, 2 dense" in str(result)


def test_later_verbs_take_an_imported_folder(tmp_path: Path) -> None:
    source = with_zeros(tmp_path / "wanda")
    result = secateur.import_model(source, output=tmp_path / "out")
    packed = secateur.compress(tmp_path / "out", output=tmp_path / "small")
    assert packed.formats.keys() >= {"nm float32"} or len(packed.formats) >= 2
    assert secateur.diagnose(tmp_path / "out").count("error") == 0
    secateur.report([tmp_path / "out"], output=tmp_path / "page.html")
    again = secateur.import_model(tmp_path / "out", output=tmp_path / "again")
    assert again.record.matrices == result.record.matrices
    with pytest.raises(CheckpointError, match="compressed already"):
        secateur.import_model(tmp_path / "small", output=tmp_path / "never")


def pruned_by_torch(place: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder whose state dict has masks beside the weights, and what the weights are."""
    save_tiny(place, **FEW)
    model = load(place)
    for name, module in matrices(model).items():
        if "mlp" in name:
            prune.l1_unstructured(module, "weight", 0.4)
            prune.random_unstructured(module, "weight", 0.1)
    meant = {n: weight_of(m).detach().clone() for n, m in matrices(model).items()}
    state = {n: x.contiguous().clone() for n, x in model.state_dict().items() if "lm_head" not in n}
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    return place, meant


def test_masks_of_torch_are_applied(tmp_path: Path) -> None:
    source, meant = pruned_by_torch(tmp_path / "torch")
    assert any(n.endswith("weight_mask") for n in load_file(source / "model.safetensors"))
    result = secateur.import_model(source, output=tmp_path / "out")
    assert result.record.kind == "torch-prune"
    assert result.patterns == {"dense": 8, "unstructured": 6}
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in meant.items():
        assert torch.equal(after[f"{name}.weight"], weight), name
    load(tmp_path / "out")


def test_weights_of_torch_ao_without_their_masks_are_refused(tmp_path: Path) -> None:
    from torch.ao.pruning import WeightNormSparsifier

    source = save_tiny(tmp_path / "ao", **FEW)
    model = load(source)
    sparsifier = WeightNormSparsifier(sparsity_level=0.5)
    names = [f"{name}.weight" for name in matrices(model) if "mlp" in name]
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in names])
    sparsifier.step()
    state = {n: x.clone() for n, x in model.state_dict().items() if "lm_head" not in n}
    save_file(state, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"torch\.ao\.pruning") as raised:
        secateur.import_model(source, output=tmp_path / "out")
    assert "squash_mask" in str(raised.value.remedy)
    sparsifier.squash_mask()
    state = {n: x.clone() for n, x in model.state_dict().items() if "lm_head" not in n}
    save_file(state, source / "model.safetensors")
    assert secateur.import_model(source, output=tmp_path / "out").sparsity > 0.2


def test_a_pair_without_its_half_is_refused(tmp_path: Path) -> None:
    source = pruned_by_torch(tmp_path / "torch")[0]
    stored = load_file(source / "model.safetensors")
    name = next(n for n in stored if n.endswith("weight_mask"))
    rest = {n: x for n, x in stored.items() if n != name}
    save_file(rest, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"no {name}"):
        secateur.import_model(source, output=tmp_path / "out")
    save_file({**rest, name: stored[name][:2].contiguous()}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="the mask is"):
        secateur.import_model(source, output=tmp_path / "out")
    save_file({**rest, name: stored[name] * 0.5}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="0 and 1"):
        secateur.import_model(source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("ending", slow_but({".weight"}, ["", ".weight", ".weight_mask", ".mask"]))
def test_masks_of_a_file_are_applied_to_a_dense_model(ending: str, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", dtype=torch.bfloat16, **FEW)
    before = load_file(dense / "model.safetensors")
    masks = {n: two_of_four(x) for n, x in before.items() if n.endswith("proj.weight")}
    named = {n.removesuffix(".weight") + ending: x for n, x in masks.items()}
    save_file(named, tmp_path / "masks.safetensors")
    result = secateur.import_model(
        dense, masks=tmp_path / "masks.safetensors", output=tmp_path / "out"
    )
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, x in before.items():
        assert torch.equal(after[name], x * masks[name] if name in masks else x)
    assert result.patterns == {"2:4": 14}
    assert result.record.masks is not None
    assert len(result.record.masks["sha256"]) == 64


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", **FEW)
    file, name = tmp_path / "masks.safetensors", "model.layers.0.mlp.up_proj.weight"
    shape = load_file(dense / "model.safetensors")[name].shape

    def tried(masks: dict[str, torch.Tensor]) -> None:
        save_file(masks, file)
        secateur.import_model(dense, masks=file, output=tmp_path / "out")

    with pytest.raises(RecipeError, match="no such tensor"):
        tried({"model.layers.9.mlp.up_proj.weight": torch.ones(shape, dtype=torch.bool)})
    with pytest.raises(RecipeError, match="the mask is"):
        tried({name: torch.ones(3, dtype=torch.bool)})
    with pytest.raises(CheckpointError, match="0 and 1"):
        tried({name: torch.full(shape, 2.0)})
    with pytest.raises(CheckpointError, match="two masks"):
        tried({n: torch.ones(shape, dtype=torch.bool) for n in (name, name + "_mask")})
    with pytest.raises(CheckpointError, match="empty"):
        tried({})
    torch.save({}, tmp_path / "masks.pt")
    with pytest.raises(CheckpointError, match="pickled"):
        secateur.import_model(dense, masks=tmp_path / "masks.pt", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def adapter_for(model: Any, place: Path, **options: Any) -> Path:
    """An ordinary adapter with random weights."""
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options
    )
    with quiet_transformers():
        adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(place)
    return place


@pytest.mark.parametrize("dtype", slow_but({torch.bfloat16}, [torch.float32, torch.bfloat16]))
def test_an_adapter_of_peft_is_merged_and_no_zero_is_filled(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    source = with_zeros(tmp_path / "pruned", shards=2, dtype=dtype)
    adapter = adapter_for(load(source).float(), tmp_path / "adapter")
    result = secateur.import_model(source, adapter=adapter, output=tmp_path / "out")
    before = {n: x for f in source.glob("*.safetensors") for n, x in load_file(f).items()}
    after = {
        n: x for f in (tmp_path / "out").glob("*.safetensors") for n, x in load_file(f).items()
    }
    with quiet_transformers():
        oracle = peft.PeftModel.from_pretrained(load(source).float(), adapter).merge_and_unload()
    plain = dict(oracle.named_parameters())
    for name, x in before.items():
        changed = name.endswith(("q_proj.weight", "up_proj.weight"))
        expected = plain[name].masked_fill(x == 0, 0).to(dtype) if changed else x
        assert torch.equal(after[name], expected), name
        assert torch.equal(after[name], x) != changed
        assert not changed or plain[name][x == 0].all()
    assert result.patterns == {"2:4": 8, "unstructured": 4, "dense": 2}
    assert result.record.adapter is not None
    assert result.record.adapter["kind"] == "LORA"


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = with_zeros(tmp_path / "pruned")
    adapter = adapter_for(load(source), tmp_path / "adapter")
    other = save_tiny(tmp_path / "other", hidden_size=48, intermediate_size=80, **FEW)
    deeper = adapter_for(load(save_tiny(tmp_path / "deep", num_hidden_layers=3)), tmp_path / "far")

    def tried(model: Path, adapter: Path, **more: Any) -> None:
        secateur.import_model(model, adapter=adapter, output=tmp_path / "out", **more)

    with pytest.raises(CheckpointError, match="adapter"):
        tried(other, adapter)
    with pytest.raises(CheckpointError, match="adapter"):
        tried(source, deeper)
    with pytest.raises(SourceError, match=r"no adapter_config\.json"):
        tried(source, source)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        tried(source, adapter)
    assert not (tmp_path / "out").exists()


def test_pickles_and_masks_that_were_not_applied_are_refused(tmp_path: Path) -> None:
    def tried(source: Path, said: str) -> None:
        with pytest.raises(CheckpointError, match=said):
            secateur.import_model(source, output=tmp_path / "out")

    torch.save({"a": torch.ones(1)}, tmp_path / "pruned.pt")
    tried(tmp_path / "pruned.pt", "pickled")
    folder = save_tiny(tmp_path / "folder", **FEW)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    tried(folder, r"pytorch_model\.bin")
    masked = save_tiny(tmp_path / "modelopt", **FEW)
    tensors = load_file(masked / "model.safetensors")
    name = "model.layers.0.mlp.up_proj._weight_mask"
    save_file({**tensors, name: torch.ones(2, dtype=torch.bool)}, masked / "model.safetensors")
    tried(masked, "Model-Optimizer")


def test_other_quantizations_and_missing_tensors_are_refused(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "gptq", **FEW)
    config = json.loads((source / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "hqq", "bits": 4}}
    (source / "config.json").write_text(json.dumps(quantized))
    with pytest.raises(CheckpointError, match=r"quantized \(hqq\)"):
        secateur.import_model(source, output=tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj"):
        secateur.import_model(source, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
