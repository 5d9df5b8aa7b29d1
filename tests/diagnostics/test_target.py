"""What a machine can speed up, on machines that this one is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.diagnostics.target import (
    check_speed,
    cpu_features,
    look_at_target,
    own_kernels,
    sparse_cores,
)
from secateur.runs.records.measured import Machine
from secateur.runtime.kernels.library import KernelInfo, kernel_info


def test_this_machine() -> None:
    target = look_at_target("a processor")
    assert target.cpu == "a processor"
    assert target.engines["torch"] == torch.__version__ or target.engines["torch"] is not None
    assert all(s.reason for s in target.supports)
    assert bool(target.faster("unstructured")) is (kernel_info().tier != "none")
    assert [s.engine for s in target.faster("structured")] == ["any"]
    by_engine = {s.engine: s for s in target.supports if s.kind == "unstructured"}
    assert by_engine["transformers"].reason.startswith("version ")
    if target.engines["vllm"] is None:
        assert by_engine["vllm"].reason.startswith("not installed; ")


def test_features_of_processors(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma avx512f sse\n")
    assert cpu_features(info) == ("avx2", "fma", "avx512f")
    info.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert cpu_features(info) == ("asimd", "asimddp", "i8mm")
    info.write_text("nothing\n")
    assert cpu_features(info) == cpu_features(tmp_path / "none") == ()


def test_without_kernels_nothing_of_ours_gains() -> None:
    for support in own_kernels(KernelInfo("none", 0, "install a compiler")):
        assert support.faster is False
        assert support.reason == "install a compiler"
    assert all(s.faster for s in own_kernels(KernelInfo("avx2", 4)))
    for support in own_kernels(KernelInfo("neon", 4)):
        assert not support.faster
        assert "speed is not known" in support.reason


@pytest.mark.parametrize(
    ("capability", "faster", "reason"),
    [
        (None, False, "no CUDA device"),
        ((7, 5), False, "capability 7.5"),
        ((8, 0), None, "large batches"),
        ((9, 0), None, "large batches"),
    ],
)
def test_sparse_tensor_cores(capability, faster, reason: str) -> None:
    support = sparse_cores(capability)
    assert support.faster is faster
    assert reason in support.reason


def test_a_pattern_that_nothing_gains_from(tmp_path: Path) -> None:
    bare = Machine("P", (), None, {}, [*own_kernels(KernelInfo("none", 0, "no compiler"))])
    for pattern in ("unstructured", "2:4", "4:8", "16x1"):
        found = {x.id: x for x in check_speed(tmp_path, pattern, 0.5, bare)}
        assert set(found) == {"pattern-without-gain", "speed-not-measured"}
        assert "no compiler" in found["pattern-without-gain"].evidence
        assert found["speed-not-measured"].remedy == f"measure it: secateur bench {tmp_path}"
    able = Machine("P", (), None, {}, own_kernels(KernelInfo("avx2", 4)))
    assert [x.id for x in check_speed(tmp_path, "2:4", 0.5, able)] == ["speed-not-measured"]
