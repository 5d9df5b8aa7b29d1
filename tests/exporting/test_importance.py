"""Importance matrices of llama.cpp: collected, written, read in both forms, damaged."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from benchmarks.gguf_files.importance import collected as collect
from benchmarks.gguf_files.importance import means, write
from gguf_models import byte_level, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import CheckpointError, SourceError
from secateur.exporting.gguf.expert_scores import ImportanceMatrix
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.experts import opened_experts

LENGTH = 40
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImportanceMatrix, dict[str, Any]]:
    """That of a mixture, and the inputs of its matrices by transformers."""
    place = tmp_path_factory.mktemp("mixture")
    source = save(place / "model", byte_level(), "qwen3_moe", decoder_sparse_step=1)
    secateur.export(source, output=place / "out", type="f32")
    (file,) = (place / "out").iterdir()
    windows = torch.randint(5, 300, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    with LlamaCpp(file) as engine:
        found = collect(engine, windows, head=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    inputs: dict[str, list[Tensor]] = {}
    with opened_experts(model), torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or name.endswith("mlp.gate"):

                def hook(_: Any, args: Any, name: str = name) -> None:
                    inputs.setdefault(name, []).append(args[0].flatten(0, -2))

                module.register_forward_pre_hook(hook)
        model(input_ids=windows)
    return found, {name: torch.cat(parts) for name, parts in inputs.items()}


def test_sums_and_counts_are_those_of_transformers(collected: Any) -> None:
    found, inputs = collected
    expected: dict[str, Any] = {
        f"blk.{layer}.{short}.weight": inputs[f"model.layers.{layer}.{name}"][None]
        for layer in range(3)
        for name, short in NAMES.items()
    } | {"output.weight": inputs["lm_head"][None]}
    for layer in range(3):
        for part in ("gate", "up", "down"):
            own = f"model.layers.{layer}.mlp.experts"
            rows = [inputs.get(f"{own}.{e}.{part}_proj", torch.zeros(0, 1)) for e in range(5)]
            expected[f"blk.{layer}.ffn_{part}_exps.weight"] = rows
    assert found.sums.keys() == found.counts.keys() == expected.keys()
    for name, each in expected.items():
        assert found.counts[name].tolist() == [len(x) for x in each], name
        for sums, x in zip(found.sums[name], each, strict=True):
            own = x.double().square().sum(0) if len(x) else torch.zeros_like(sums)
            torch.testing.assert_close(sums, own, rtol=1e-4, atol=1e-6, msg=name)


def test_it_comes_back_from_a_file(collected: Any, tmp_path: Path) -> None:
    found, file = collected[0], tmp_path / "imatrix.gguf"
    write(found, file, LENGTH, ["code.jsonl"])
    again = ImportanceMatrix.read(file)
    assert again.has_counts
    assert again.sums.keys() == found.sums.keys()
    for name, sums in found.sums.items():
        assert again.counts[name].tolist() == found.counts[name].tolist()
        assert torch.equal(again.sums[name], sums.float().double())
    stored = {k: x.contents() for k, x in gguf.GGUFReader(file).fields.items()}
    assert stored["general.type"] == "imatrix"
    assert "general.architecture" not in stored
    assert stored["imatrix.datasets"] == ["code.jsonl"]
    assert (stored["imatrix.chunk_count"], stored["imatrix.chunk_size"]) == (3, LENGTH)


def old_form(found: ImportanceMatrix, calls: int) -> bytes:
    """As `save_imatrix_legacy` of llama.cpp writes it, in a loop."""
    whole = struct.pack("<i", len(found.sums))
    for name, sums in found.sums.items():
        whole += struct.pack("<i", len(name)) + name.encode()
        whole += struct.pack("<ii", calls, sums.numel())
        for row, count in zip(sums, found.counts[name].tolist(), strict=True):
            for value in row.tolist():
                mean = value / count if count else 1.0
                whole += struct.pack("<f", mean * calls)
    return whole + struct.pack("<ii", calls, 4) + b"text"


def test_the_old_form_has_the_means_of_every_expert(collected: Any, tmp_path: Path) -> None:
    found, file = collected[0], tmp_path / "imatrix.dat"
    file.write_bytes(old_form(found, 7))
    again = ImportanceMatrix.read(file)
    assert not again.has_counts
    expected = means(found)
    for name, theirs in means(again).items():
        np.testing.assert_allclose(theirs.ravel(), expected[name].ravel(), rtol=1e-5)


@pytest.mark.parametrize("case", ["cut", "empty", "text", "huge", "negative", "model", "lone"])
def test_damaged_files_are_refused(case: str, collected: Any, tmp_path: Path) -> None:
    found, file = collected[0], tmp_path / "imatrix"
    whole = old_form(found, 7)
    if case in ("model", "lone"):
        writer = gguf.GGUFWriter(file, "llama")
        name = {"model": "x.weight", "lone": "x.weight.in_sum2"}[case]
        writer.add_tensor(name, np.ones((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        file.write_bytes({
            "cut": whole[: len(whole) // 2], "empty": b"", "text": b"An imatrix? No: text.\n" * 9,
            "huge": struct.pack("<ii", 1, 2**31 - 1), "negative": struct.pack("<ii", -1, -1) * 9,
        }[case])  # fmt: skip
    with pytest.raises(CheckpointError) as refusal:
        ImportanceMatrix.read(file)
    assert str(file) in str(refusal.value.where)
    with pytest.raises(SourceError):
        ImportanceMatrix.read(tmp_path / "none.gguf")
