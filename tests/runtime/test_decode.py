"""One call for each token gives what transformers gives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import secateur
from secateur.errors import ArchitectureError, KernelError, ShapeError
from secateur.runtime.decode import Decoder, why_not
from secateur.runtime.kernels.library import kernel_info
from tiny import save_tiny

needs_kernels = pytest.mark.skipif(
    kernel_info().tier == "none", reason=f"no kernels here: {kernel_info().reason}"
)
WIDE = {"hidden_size": 72, "head_dim": 16, "intermediate_size": 100}


def model_of(tmp_path, family: str, **overrides):
    """A tiny dense model in float32, read back from files."""
    save_tiny(tmp_path / family, family, **{**WIDE, **overrides})
    return secateur.load(tmp_path / family, dtype=torch.float32)


def reference(model, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].float()


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_are_those_of_transformers(tmp_path, family, kv_heads):
    options = {"sliding_window": None} if family == "mistral" else {}
    model = model_of(tmp_path, family, num_key_value_heads=kv_heads, **options)
    decoder = Decoder(model, 40)
    ids = [5, 17, 60]
    torch.testing.assert_close(decoder.prefill(torch.tensor(ids)), reference(model, ids))
    for token in range(20, 50):
        ids.append(token)
        torch.testing.assert_close(decoder.step(token), reference(model, ids), rtol=1e-4, atol=2e-5)


@needs_kernels
@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_packed_models_decode_as_they_are_stored(tmp_path, values):
    save_tiny(tmp_path / "dense", "llama", **WIDE)
    secateur.compress(
        tmp_path / "dense", values=values, format="bitmask", output=tmp_path / "small"
    )
    model = secateur.load(tmp_path / "small", dtype=torch.float32)
    dense = secateur.load(tmp_path / "small", dtype=torch.float32, expand=True)
    decoder = Decoder(model, 20)
    decoder.prefill(torch.tensor([5, 17, 60]))
    got, wanted = decoder.step(9), reference(dense, [5, 17, 60, 9])
    apart = float((got - wanted).norm() / wanted.norm())
    assert apart < (1e-5 if values == "bfloat16" else 0.05)


@needs_kernels
def test_greedy_text_is_that_of_generate(tmp_path):
    model = model_of(tmp_path, "llama")
    ids = torch.tensor([[7, 8, 9]])
    wanted = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        eos_token_id=None,
    )[0, 3:].tolist()  # fmt: skip
    decoder = Decoder(model, 15)
    assert list(decoder.continued(ids[0], 12)) == wanted
    assert (
        list(decoder.continued(ids[0], 12, stop=[wanted[4]])) == wanted[: wanted.index(wanted[4])]
    )
    drawn = [list(decoder.continued(ids[0], 12, temperature=1.0, seed=s)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@needs_kernels
def test_what_does_not_fit_is_refused(tmp_path):
    model = model_of(tmp_path, "llama")
    decoder = Decoder(model, 4)
    with pytest.raises(ShapeError, match="a prompt of 0 tokens"):
        decoder.prefill(torch.tensor([], dtype=torch.int64))
    decoder.prefill(torch.tensor([1, 2, 3]))
    with pytest.raises(ShapeError, match="not in the vocabulary"):
        decoder.step(96)
    decoder.step(4)
    with pytest.raises(ShapeError, match="is full"):
        decoder.step(5)
    with pytest.raises(ShapeError, match="3 \\+ 2 tokens"):
        next(decoder.continued(torch.tensor([1, 2, 3]), 2))
    save_tiny(tmp_path / "opt", "opt")
    other = secateur.load(tmp_path / "opt")
    assert "opt" in str(why_not(other))
    with pytest.raises(ArchitectureError, match="its type is opt"):
        Decoder(other, 4)
    windowed = model_of(tmp_path, "mistral", sliding_window=8)
    with pytest.raises(ArchitectureError, match="sliding window of 8"):
        Decoder(windowed, 9)


def run_without_kernels(code: str, library: str = "none") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SECATEUR_KERNELS": library}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


def test_without_kernels_everything_is_expanded(tmp_path):
    save_tiny(tmp_path / "dense", "llama", **WIDE)
    secateur.compress(
        tmp_path / "dense", values="bfloat16", format="bitmask", output=tmp_path / "small"
    )
    done = run_without_kernels(
        "import secateur, torch\n"
        f"model = secateur.load({str(tmp_path / 'small')!r})\n"
        "assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear\n"
        f"made = secateur.generate({str(tmp_path / 'small')!r}, 'abc', max_new_tokens=4)\n"
        "print(secateur.kernel_info().reason, '|', made.loop)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "install a C compiler" in done.stdout
    assert "| transformers" in done.stdout


def test_a_damaged_library_is_an_error(tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    done = run_without_kernels("import secateur; secateur.kernel_info()", str(broken))
    assert done.returncode == 1
    assert KernelError.__name__ in done.stderr
    assert "SECATEUR_KERNELS=none" in done.stderr
