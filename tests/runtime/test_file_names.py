"""Who finds the weights of a compressed folder: secateur, and nobody else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from same_logits import assert_same_logits
from tiny import save_tiny

import secateur
from runtime.packed_models import IDS, packed_model, pruned_folder, python, settled  # noqa: F401
from secateur.errors import CheckpointError
from secateur.runtime.packed import PackedCheckpoint

PLAIN = """
import sys
from transformers import AutoModelForCausalLM
assert not any(name.startswith("secateur") for name in sys.modules)
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except OSError as error:
        print("refused:", error)
"""

REGISTERED = """
import json, sys, secateur, torch
import secateur.runtime.install as install
from secateur.runtime.kernels.dispatch import KernelChoice
install.choose = lambda *_: KernelChoice(64, 10.0)
from transformers import AutoModelForCausalLM
ids, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    print(json.dumps(model(torch.tensor(json.loads(ids))).logits.tolist()))
"""


def test_plain_transformers_finds_no_weights(tmp_path: Path) -> None:
    folders = [
        packed_model(tmp_path / f"{shards} {archive}", shards=shards, archive=archive)
        for shards in (1, 2)
        for archive in (False, True)
    ]
    done = python(PLAIN, *folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("refused: Error no file named model.safetensors") == len(folders)


@pytest.mark.slow
@pytest.mark.usefixtures("settled")
def test_transformers_with_secateur_computes_the_same(tmp_path: Path) -> None:
    folders = [packed_model(tmp_path / str(shards), shards=shards) for shards in (1, 3)]
    done = python(REGISTERED, json.dumps(IDS.tolist()), *folders)
    assert done.returncode == 0, done.stderr
    for folder, found in zip(folders, done.stdout.splitlines(), strict=True):
        with torch.no_grad():
            expected = secateur.load(folder, dtype=torch.float32)(IDS).logits
        assert torch.equal(torch.tensor(json.loads(found)), expected)


def test_a_packed_model_is_not_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = packed_model(tmp_path)
    for model in (secateur.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(CheckpointError, match=r"decompress"):
            model.save_pretrained(tmp_path / "saved")
        assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_an_expanded_model_is_saved_as_a_dense_one(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = packed_model(tmp_path)
    expanded = secateur.load(folder, expand=True)
    expanded.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(IDS).logits
        assert_same_logits(found, expanded(IDS).logits)


def test_opened_experts_are_not_saved(tmp_path: Path) -> None:
    secateur.compress(save_tiny(tmp_path / "m", "mixtral"), output=tmp_path / "c", values="int8")
    with pytest.raises(CheckpointError, match="cannot be saved"):
        secateur.load(tmp_path / "c", expand=True).save_pretrained(tmp_path / "saved")


def test_a_folder_without_its_index(tmp_path: Path) -> None:
    folder = packed_model(tmp_path)
    (folder / "secateur.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"index.json"):
        PackedCheckpoint(folder)
    (folder / "secateur.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"secateur.safetensors.* model.safetensors"):
        PackedCheckpoint(folder)


def test_a_folder_of_two_checkpoints(tmp_path: Path) -> None:
    folder = packed_model(tmp_path)
    (folder / "model.safetensors").write_bytes(
        (tmp_path / "dense" / "model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="contains two checkpoints"):
        secateur.load(folder)


def test_a_decompressed_folder_has_the_names_that_transformers_knows(tmp_path: Path) -> None:
    source = pruned_folder(tmp_path / "m", shards=2)
    secateur.compress(source, output=tmp_path / "c", values="keep")
    secateur.decompress(tmp_path / "c", output=tmp_path / "d")
    assert sorted(x.name for x in (tmp_path / "d").glob("*safetensors*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
