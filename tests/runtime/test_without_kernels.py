"""Where kernels cannot be had everything still works, expanded, and with the same numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateur
from runtime.packed_models import IDS, packed_model, python
from secateur.errors import KernelError
from secateur.runtime.kernels import library as lib

ROOT = Path(__file__).parents[2]

EXPANDED = """
import json, sys
import secateur
import torch
import transformers

ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    loaded = {
        "load": secateur.load(folder, dtype=torch.float32),
        "from_pretrained": transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ),
    }
    for loader, model in loaded.items():
        torch.save(model(input_ids=ids).logits.detach(), f"{folder}/{loader}.pt")
    kinds = {type(module).__name__ for module in loaded["load"].modules()}
    assert not any(kind.startswith("Packed") for kind in kinds), kinds
made = secateur.generate(folder, "abc", max_new_tokens=4)
report = secateur.bench(
    folder, contenders=["packed", "packed in transformers"], prompt_tokens=4, new_tokens=3, rounds=1
)
print(json.dumps({
    "loop": made.loop, "tokens": made.tokens, "info": vars(secateur.kernel_info()),
    "bench": report.to_json(),
}))
"""


@pytest.mark.slow
def test_everything_works_expanded(tmp_path: Path) -> None:
    torch.save(IDS, tmp_path / "ids.pt")
    folders = [
        packed_model(tmp_path / "a", "gemma3", values="int8", embeddings="int8"),
        packed_model(tmp_path / "b", "gpt2", values="int8", embeddings="int4"),
        packed_model(tmp_path / "c", pattern=(2, 4), tie_word_embeddings=False, head_dim=16),
    ]
    done = python(EXPANDED, tmp_path / "ids.pt", *folders, SECATEUR_KERNELS="none")
    assert done.returncode == 0, done.stderr
    for folder in folders:
        packed = secateur.load(folder, dtype=torch.float32)
        with torch.inference_mode():
            expected = packed(input_ids=IDS).logits
        atol = 1e-5 * float(expected.abs().max())
        for loader in ("load", "from_pretrained"):
            found = torch.load(folder / f"{loader}.pt")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)
    record = json.loads(done.stdout)
    assert record["info"]["tier"] == "none"
    assert record["info"]["threads"] == 0
    assert "SECATEUR_KERNELS=none" in record["info"]["reason"]
    assert record["loop"] == f"transformers: {record['info']['reason']}"
    packed, plain = record["bench"]["contenders"]
    assert "SECATEUR_KERNELS=none" in packed["failure"]
    assert plain["tokens_per_second"] > 0
    assert record["bench"]["protocol"]["kernels"] == "none"


def test_what_was_not_built_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SECATEUR_KERNELS", raising=False)
    monkeypatch.setattr(lib, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(lib, "library", lib.library.__wrapped__)
    info = lib.kernel_info()
    assert (info.tier, info.threads) == ("none", 0)
    assert "compiler" in info.reason
    with pytest.raises(KernelError, match="avx2"):
        lib.use_tier("avx2")


def refusal(library: Path, monkeypatch: pytest.MonkeyPatch) -> KernelError:
    monkeypatch.setenv("SECATEUR_KERNELS", str(library))
    with pytest.raises(KernelError, match="install again") as refused:
        lib.library.__wrapped__()
    assert str(library) in str(refused.value)
    return refused.value


def test_libraries_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken.so").write_bytes(b"not a library")
    broken = refusal(tmp_path / "broken.so", monkeypatch)
    assert "SECATEUR_KERNELS=none" in str(broken)
    assert "cannot be loaded" in refusal(tmp_path / "missing.so", monkeypatch).what
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler for the rest of this test")
    for name, code in (("other", "int sct_abi(void) { return 99; }"), ("empty", "int x;")):
        (tmp_path / f"{name}.c").write_text(code)
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-o", f"{name}.so", f"{name}.c"],
            cwd=tmp_path,
            check=True,
        )
    other = refusal(tmp_path / "other.so", monkeypatch)
    assert "version 99" in other.what
    assert str(lib.ABI) in other.what
    assert "sct_abi" in refusal(tmp_path / "empty.so", monkeypatch).what


def test_installing_without_a_compiler(tmp_path: Path) -> None:
    """The extension is optional: building goes on without it."""
    pytest.importorskip("setuptools")
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("these tests do not run in the source tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    csrc = Path("src/secateur/runtime/kernels/csrc")
    shutil.copytree(ROOT / csrc, tmp_path / csrc)
    done = subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "build_ext"],
        cwd=tmp_path,
        env={**os.environ, "CC": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "_native" in done.stdout + done.stderr
    assert "failed" in done.stdout + done.stderr
    assert not [*tmp_path.rglob("*.so")]
