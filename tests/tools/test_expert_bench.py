"""The mixtures on which cuts of experts are measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.models import smollm2_mixture
from mixtures import CHOSEN, EXPERTS, LAYERS, save_mixture, untrained_mixture
from safetensors.torch import save_file
from trained import source_ids, source_text, untrained

import secateur
from secateur.models.tokenizer import load_tokenizer


def test_with_all_experts_a_mixture_of_neurons_is_the_dense_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"EXPERTS": 5, "CHOSEN": 5, "CORE": 10, "WIDTH": 44}
    for name, value in {**sizes, "SPREAD": 0.0}.items():  # equal weights
        monkeypatch.setattr(smollm2_mixture, name, value)
    dense = untrained().eval()
    windows = source_ids()[:512].view(8, 64)
    expected = dense(windows).logits
    made = smollm2_mixture.clustered(dense, windows)
    tensors = {name: tensor.contiguous() for name, tensor in made.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    smollm2_mixture.configuration(dense.config).save_pretrained(tmp_path)
    found = secateur.load(tmp_path, dtype=torch.float32)(windows).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_clusters_are_equally_large_and_find_what_belongs_together() -> None:
    directions = torch.eye(3, 8).repeat_interleave(4, 0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    found = smollm2_mixture.clusters(directions[order], 3)
    assert sorted(found.flatten().tolist()) == list(range(12))
    assert all(len(set((order[own] // 4).tolist())) == 1 for own in found)


def test_a_trained_mixture_reads_its_letters_from_a_folder(tmp_path: Path) -> None:
    folder = save_mixture(untrained_mixture(0), tmp_path / "mixture")
    text, ids = source_text()[:500], source_ids()[:500]
    assert load_tokenizer(folder)(text)["input_ids"] == ids.tolist()
    config = secateur.load(folder).config
    sizes = (config.num_hidden_layers, config.num_experts, config.num_experts_per_tok)
    assert sizes == (LAYERS, EXPERTS, CHOSEN)
