"""The sizes that are promised, on a real pruned model."""

from __future__ import annotations

from pathlib import Path

import pytest

import secateur


@pytest.mark.slow
@pytest.mark.real_model
def test_sizes_of_a_real_model(tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    secateur.prune(
        "smollm2-135m", method="magnitude", sparsity=0.5, dtype="bfloat16", output=pruned
    )
    packed = secateur.compress(pruned, output=tmp_path / "bfloat16")
    assert packed.linears.ratio <= 0.5625 * 1.005
    int8 = secateur.compress(pruned, output=tmp_path / "int8", values="int8", embeddings="int8")
    # the narrowest linear has 576 inputs: its scales are 32 bits in 576 · 16
    assert int8.linears.ratio <= 0.3125 + 32 / (576 * 16)
    assert int8.ratio < 0.36
    archive = secateur.compress(pruned, output=tmp_path / "archive", archive=True)
    assert archive.linears.ratio <= 0.45
    # all that is neither linear nor embedding: norms, and headers
    assert int8.file_bytes - int8.linears.bytes - int8.embeddings.bytes < 250_000
    secateur.decompress(tmp_path / "archive", output=tmp_path / "dense")
    for file in ("model.safetensors", "README.md", "secateur/manifest.json"):
        assert (tmp_path / "dense" / file).read_bytes() == (pruned / file).read_bytes()
