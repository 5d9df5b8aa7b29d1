"""Reports which sparsity this machine can speed up with the installed software, and why.

It uses processor features, CUDA capability and versions. Only `secateur bench` measures the real
speed of a model (`check_speed`).
"""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from secateur.diagnostics.findings import finding
from secateur.runs.records.measured import Finding, Machine, Support
from secateur.runtime.kernels.library import KernelInfo, kernel_info

FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_bf16", "avx512_vnni",
    "avx_vnni", "amx_bf16", "amx_int8", "asimd", "asimddp", "sve", "i8mm", "bf16",
)  # fmt: skip
"""Processor features for matrix products, by their names on Linux."""

SPARSE_CORES = (8, 0)
"""The CUDA capability from which tensor cores multiply 2:4 sparse matrices."""

ENGINES = {
    "transformers": "it multiplies by stored zeros like by any other weight",
    "vllm": "it multiplies by stored zeros like by any other weight; releases since spring 2026 "
    "have no 2:4 kernels any more",
    "xllamacpp": "llama.cpp has no sparse format; zeros are stored and multiplied",
    "llama-cpp-python": "llama.cpp has no sparse format; zeros are stored and multiplied",
    "onnxruntime": "its matrix products are dense",
    "openvino": "its matrix products are dense, unless compiled with its sparsity option for int8",
}
"""Distributions of engines that run dense models, and how they treat unstructured zeros."""

STRUCTURED = Support(
    "structured",
    "any",
    True,
    "cutting whole heads, neurons or layers leaves smaller dense matrices, which every engine "
    "gains from",
)


def look_at_target(cpu: str) -> Machine:
    """Describe this machine.

    Args:
        cpu: the name of its processor.
    """
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    engines = {name: _installed(name) for name in ("torch", *ENGINES)}
    supports = [*own_kernels(kernel_info()), sparse_cores(capability), STRUCTURED]
    for name, reason in ENGINES.items():
        there = engines[name]
        text = "not installed" if there is None else f"version {there}"
        supports.append(Support("unstructured", name, False, f"{text}; {reason}"))
    shown = None if capability is None else f"{capability[0]}.{capability[1]}"
    return Machine(cpu, cpu_features(), shown, engines, supports)


def _installed(distribution: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """The relevant features of the processor; empty if the system does not list them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    for line in lines:
        name, _, text = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            has = set(text.split())
            return tuple(feature for feature in FEATURES if feature in has)
    return ()


def own_kernels(info: KernelInfo) -> list[Support]:
    """The gains of this library's kernels on the CPU; those for ARM were never measured."""
    measured = info.tier != "none" and not info.tier.startswith("neon")
    by = f"the kernels ({info.tier}, {info.threads} threads) multiply"
    why = {
        "unstructured": f"{by} packed matrices without their zeros, from about half of them on "
        "faster than dense ones; after `secateur compress`",
        "n:m": f"{by} packed N:M matrices like any others, by their mask",
        "2:4": f"{by} packed 2:4 matrices like any others, by their mask",
        "int8": f"{by} int8 values: half the bytes of bfloat16, zeros or not",
    }
    if not measured:
        neon = f"the kernels ({info.tier}) were checked in an emulator; their speed is not known"
        why = dict.fromkeys(why, info.reason if info.tier == "none" else neon)
    return [Support(kind, "secateur, CPU", measured, reason) for kind, reason in why.items()]


def sparse_cores(capability: tuple[int, int] | None) -> Support:
    """Whether a GPU has sparse tensor cores for 2:4 matrices."""
    gains: bool | None = False
    if capability is None:
        reason = "torch sees no CUDA device here"
    elif capability < SPARSE_CORES:
        reason = f"capability {capability[0]}.{capability[1]}; sparse tensor cores begin at 8.0"
    else:
        gains = None
        reason = (
            "this GPU has sparse tensor cores; they pay for large batches and large matrices, not "
            "when one token is generated at a time. Not measured here"
        )
    return Support("2:4", "torch, CUDA", gains, reason)


def check_speed(folder: Path, pattern: str, sparsity: float, target: Machine) -> list[Finding]:
    """Check whether a speed-up was measured, and whether this machine can gain from the pattern.

    Args:
        folder: of the model.
        pattern: of its zeros: unstructured, N:M or a block.
        sparsity: of the stored weights.
        target: this machine.
    """
    found = []
    kind = pattern if pattern == "2:4" else "n:m" if ":" in pattern else "unstructured"
    if not target.faster(kind):
        reasons = "; ".join(s.reason for s in target.supports if s.kind == kind)
        zeros = f"{sparsity:.0%} zeros of pattern {pattern}"
        evidence = f"nothing installed here gains from {zeros}: {reasons}"
        found.append(finding("pattern-without-gain", target.cpu, evidence))
    return [*found, _measured_speed(folder)]


def _measured_speed(folder: Path) -> Finding:
    """The finding of the stored measurement, if there is one."""
    file = folder / "secateur" / "bench.json"
    command = shlex.join(["secateur", "bench", str(folder)])
    try:
        text = json.loads(file.read_text(encoding="utf-8"))
        verdict, where = str(text["verdict"]), str(text["protocol"]["cpu"])
    except OSError:
        said, remedy = "its speed on this machine was not measured", f"measure it: {command}"
        return finding("speed-not-measured", str(folder), said, remedy=remedy)
    except (ValueError, KeyError, TypeError):
        said = "the record of the measured speed cannot be read"
        remedy = f"measure again: {command}"
        return finding("records-unreadable", str(file), said, remedy=remedy)
    kind = "no-speed-up" if verdict.startswith("no gain") else "speed-measured"
    return finding(kind, str(file), f"measured on {where}: {verdict}")
