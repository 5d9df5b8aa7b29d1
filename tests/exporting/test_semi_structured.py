"""2:4 folders, decoded by torch's own reference on the CPU and by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from same_logits import assert_same_logits
from tiny import save_tiny
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUTLASS
from zoo import tiny_windows

import secateur
from secateur.errors import CheckpointError, KernelError, NumericalError, PatternError
from secateur.runtime.semi_structured import load as loading
from secateur.runtime.semi_structured.layout import StoredParts
from secateur.runtime.semi_structured.load import SparseLinear

SIZES = {"hidden_size": 64, "intermediate_size": 128}
UP = "model.layers.1.mlp.up_proj.weight"
FILE = "semi_structured.safetensors"


def sparse_model(folder: Path, family: str = "llama", pattern: str = "2:4", **options: Any) -> Path:
    save_tiny(folder / "dense", family, **{**SIZES, **options})
    secateur.prune(folder / "dense", output=folder / "pruned", method="magnitude", pattern=pattern)
    return folder / "pruned"


def changed(source: Path, name: str, place: Any, value: float = 1.0) -> Path:
    """The same folder with other values in a place of a tensor."""
    tensors = load_file(source / "model.safetensors")
    tensors[name][place] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def export(source: Path, output: Path, type: str = "bf16") -> Any:
    return secateur.export(source, output=output, to="semi-structured", type=type).exported


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tiny_windows(2, 12)).logits
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("type", ["bf16", "f16"])
def test_an_expanded_model_computes_like_the_source(family, type, tmp_path: Path) -> None:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[type]
    atol = 0.01 if family == "mixtral" else 0  # transformers adds up experts in another order
    made = export(sparse_model(tmp_path, family), tmp_path / "out", type)
    assert made.zeros == made.zeros_kept >= made.weights // 2
    found = secateur.load_semi_structured(tmp_path / "out", "cpu", expand=True)
    assert found.dtype == dtype
    source = secateur.load(tmp_path / "pruned", dtype=dtype)
    torch.testing.assert_close(logits(found), logits(source), rtol=0, atol=atol)
    assert made.types["2:4"] == len([n for n in load_file(tmp_path / "out" / FILE) if "meta" in n])


@pytest.mark.parametrize("pattern", ["4:8", "6:8"])
def test_milder_patterns_are_wider_and_the_same_model(pattern: str, tmp_path: Path) -> None:
    source = sparse_model(tmp_path, pattern=pattern)
    made = export(source, tmp_path / "out")
    assert made.zeros == made.zeros_kept
    assert made.types["6:8"] == 3 * 5  # k and v have 16 rows
    parts = load_file(tmp_path / "out" / FILE)
    name = "model.layers.0.mlp.down_proj"
    assert parts[f"{name}.packed"].shape == (64, 128 * 3 // 4)
    assert parts[f"{name}.columns"].tolist()[:4] == [0, 1, 2, 3]
    found = secateur.load_semi_structured(tmp_path / "out", "cpu", expand=True)
    assert_same_logits(logits(found), logits(secateur.load(source, dtype=torch.bfloat16)))
    parts[f"{name}.columns"][5] = 128
    save_file(parts, tmp_path / "out" / FILE)
    with pytest.raises(CheckpointError, match="down_proj"):
        secateur.load_semi_structured(tmp_path / "out", "cpu", expand=True)


def test_a_matrix_of_its_own_pattern_is_stored_in_it_or_refused(tmp_path: Path) -> None:
    source = changed(sparse_model(tmp_path), UP, (5, slice(3)))
    made = export(source, tmp_path / "out")
    assert (made.types["2:4"], made.types["6:8"]) == (11, 1)
    with pytest.raises(PatternError, match="1 of 21"):
        export(changed(source, UP, (5, slice(9))), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_model_on_sparse_tensor_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where the wide matrices themselves multiply."""
    export(sparse_model(tmp_path, pattern="6:8"), tmp_path / "out")
    monkeypatch.setattr(loading, "refuse_device", lambda device: None)
    monkeypatch.setattr(loading, "as_torch_multiplies", lambda parts: parts.wide)
    found = secateur.load_semi_structured(tmp_path / "out", "cpu")
    assert sum(isinstance(x, SparseLinear) for x in found.modules()) == 15
    plain = secateur.load_semi_structured(tmp_path / "out", "cpu", expand=True)
    torch.testing.assert_close(logits(found), logits(plain), rtol=0.05, atol=0.05)
    with pytest.raises(CheckpointError):
        found.save_pretrained(tmp_path / "again")


def test_torch_reads_the_parts_as_they_are(tmp_path: Path) -> None:
    source = sparse_model(tmp_path, dtype=torch.float16)
    export(source, tmp_path / "out", "f16")
    parts = load_file(tmp_path / "out" / FILE)
    dense = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    packed, meta = parts[f"{name}.packed"], parts[f"{name}.meta"]
    weight = dense[f"{name}.weight"]
    assert packed.nbytes + meta.nbytes == weight.nbytes * 9 / 16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)
    assert torch.equal(theirs.to_dense(), weight)


def test_sizes_that_torch_cannot_multiply_stay_dense(tmp_path: Path) -> None:
    source = sparse_model(tmp_path, intermediate_size=96, head_dim=24)
    made = export(source, tmp_path / "out")
    assert made.types["2:4"] == 3 * 3  # q, gate, up; k and v have 48 rows, o and down 96 columns
    assert any("12 matrices stay dense" in note for note in made.notes)
    found = secateur.load_semi_structured(tmp_path / "out", "cpu", expand=True)
    assert_same_logits(logits(found), logits(secateur.load(source, dtype=torch.bfloat16)))


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    source = changed(sparse_model(tmp_path), "model.norm.weight", 0, 1e6)
    with pytest.raises(NumericalError, match="float16"):
        export(source, tmp_path / "out", "f16")


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    export(sparse_model(tmp_path), tmp_path / "out")
    with pytest.raises(KernelError, match="cpu"):
        secateur.load_semi_structured(tmp_path / "out", "cpu")
    with pytest.raises(CheckpointError, match=FILE):
        secateur.load_semi_structured(tmp_path / "pruned", "cpu", expand=True)
    file = tmp_path / "out" / FILE
    whole = load_file(file)
    name = "model.layers.0.mlp.up_proj"
    for change, said in (
        ({f"{name}.meta": whole[f"{name}.meta"][:32].clone()}, "up_proj"),
        ({"model.norm.weight": torch.ones(3)}, "model.norm.weight"),
        ({"model.other.weight": torch.ones(3)}, "model.other.weight"),
    ):
        save_file({**whole, **change}, file)
        with pytest.raises(CheckpointError, match=said):
            secateur.load_semi_structured(tmp_path / "out", "cpu", expand=True)
    del whole["model.norm.weight"]
    save_file(whole, file)
    with pytest.raises(CheckpointError, match="norm"):
        secateur.load_semi_structured(tmp_path / "out", "cpu", expand=True)


@pytest.mark.parametrize(
    ("capability", "cusparselt", "shared", "refused"),
    [
        ((7, 5), True, False, "no sparse tensor cores"),
        ((8, 0), False, True, None),
        ((8, 9), False, True, None),
        ((9, 0), True, False, None),
        ((9, 0), False, False, "cuSPARSELt"),
        ((12, 0), True, False, None),
    ],
    ids=str,
)
def test_each_gpu_multiplies_by_what_torch_has_for_it(
    capability: tuple[int, int], cusparselt: bool, shared: bool, refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    assert loading.reads_parts(device) == shared
    if refused is None:
        loading.refuse_device(device)
    else:
        with pytest.raises(KernelError, match=refused):
            loading.refuse_device(device)


def test_without_cutlass_one_form_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 bits for each weight, though neither CUTLASS nor our kernel reads cuSPARSELt's form."""

    class Compressed:
        def __init__(self, dense: Tensor) -> None:
            self.dense, self.packed = dense, torch.empty(dense.nbytes * 9 // 16, dtype=torch.int8)

    theirs = torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    weight = torch.randn(32, 64).bfloat16()
    weight[:, 1::4] = weight[:, 2::4] = 0
    parts = StoredParts.of(weight, 64)
    for shared in (True, False):
        monkeypatch.setattr(loading, "reads_parts", lambda device, shared=shared: shared)
        monkeypatch.setattr(theirs, "from_dense", Compressed)
        found = SparseLinear(parts, None)
        assert found.nbytes == 9 * 32 * 64 // 8
        assert (found.few > 0) == shared
        if not shared:
            assert torch.equal(found.wide.dense, weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_like_the_dense_model(tmp_path: Path) -> None:
    export(sparse_model(tmp_path), tmp_path / "out")
    found = secateur.load_semi_structured(tmp_path / "out")
    dense = secateur.load_semi_structured(tmp_path / "out", expand=True)
    ids = tiny_windows(2, 12).cuda()
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, dense(ids).logits, rtol=0.05, atol=0.05)
