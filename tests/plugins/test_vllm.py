"""The plug-in of vLLM. What runs vLLM is slow, and skipped where it is not installed.

SECATEUR_VLLM_PYTHON=VENV/bin/python pytest -m slow tests/plugins     # docs/vllm.md has the recipe
"""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from trained import source_text
from zoo import tiny_windows

import secateur
from secateur.errors import ArchitectureError
from secateur.plugins.vllm import LOAD_FORMAT
from secateur.plugins.vllm.reading import four_bits, tensors_of
from secateur.plugins.vllm.sizes import ARCHITECTURE, VariedSizes
from secateur.runtime.packed import PackedCheckpoint

RUNNER = Path(__file__).parents[2] / "benchmarks" / "speed" / "engines_vllm.py"
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2,
    "attention_bias": False,
}  # fmt: skip
"""vLLM's kernels for CPUs need multiples of 32, also as the width of a head."""


def varied_config(**changes: Any) -> dict[str, Any]:
    layer = "model.layers"
    cut = {
        "shapes": {
            f"{layer}.0.self_attn.q_proj": [64, 64],
            f"{layer}.0.self_attn.k_proj": [16, 64],
            f"{layer}.1.mlp.gate_proj": [96, 64],
        },
        "attributes": {},
        "absent": {f"{layer}.1.self_attn": "attention", f"{layer}.2.mlp": "ffn"},
    }
    return {
        "model_type": "secateur_varied", "base_model_type": "llama", "hidden_size": 64,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 128, "auto_map": {"AutoConfig": "x"}, "secateur_cut": cut, **changes,
    }  # fmt: skip


def described(sizes: Any) -> tuple[int, int, int]:
    return sizes.attention.heads, sizes.attention.kv_heads, sizes.ffn.intermediate_size


def test_every_layer_has_its_sizes() -> None:
    config = VariedSizes.from_dict(varied_config())
    assert [described(one) for one in config.block_configs] == [(4, 1, 128), (0, 2, 96), (8, 2, 0)]
    first, second, third = config.block_configs
    assert (first.attention.no_op, first.attention.n_heads_in_group, first.ffn.no_op) == (0, 4, 0)
    assert second.attention.no_op
    assert third.ffn.no_op
    assert config.architectures == [ARCHITECTURE]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model_type": "gemma2"}, "gemma2"),
        ({"sliding_window": 64}, "sliding"),
        ({"secateur_cut": {"shapes": {"model.norm": [3]}}}, r"model\.norm"),
    ],
)
def test_what_vllm_cannot_resize_is_refused(changes, said) -> None:
    with pytest.raises(ArchitectureError, match=said):
        VariedSizes.from_dict(varied_config(**changes))


def test_four_bits_stay_what_they_are(tmp_path: Path) -> None:
    """vLLM gets the words of compressed-tensors, equal to those of an export; others are dense."""
    save_tiny(tmp_path / "dense", **SIZES, tie_word_embeddings=False)
    packed = secateur.compress(
        tmp_path / "dense", output=tmp_path / "packed", values="int4", embeddings="int4",
        group_size=32, archive=True,
    ).output  # fmt: skip
    found = dict(tensors_of(packed, torch.float16))
    secateur.export(packed, output=tmp_path / "out", to="compressed-tensors", type="w4a16")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(exported)
    words = [name for name in found if name.endswith("weight_packed")]
    assert len(words) == 21
    assert all(torch.equal(found[name], exported[name]) for name in words)
    dense = secateur.load(packed, expand=True, dtype=torch.float32).state_dict()
    everything = dict(tensors_of(packed, torch.float32))
    assert all(torch.equal(everything[name], dense[name]) for name in everything)


def test_mixed_values_become_dense(tmp_path: Path) -> None:
    packed = secateur.compress(pruned(tmp_path), output=tmp_path / "packed", values="int8").output
    assert four_bits(PackedCheckpoint(packed), torch.float16, ()) is None
    dense = secateur.load(packed, expand=True, dtype=torch.float16).state_dict()
    found = dict(tensors_of(packed, torch.float16))
    assert all(torch.equal(found[name].half(), dense[name]) for name in found)


def test_vllm_finds_the_plug_in() -> None:
    names = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    if "secateur" not in names:
        pytest.skip("the installed secateur is older than its plug-in: pip install -e .")
    assert names["secateur"] == "secateur.plugins.vllm:register"


@pytest.fixture(scope="module")
def vllm_python() -> str:
    found = os.environ.get("SECATEUR_VLLM_PYTHON")
    if not found:
        pytest.skip("SECATEUR_VLLM_PYTHON does not name the Python of an environment with vLLM")
    return found


def run(python: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    asked = {"model": str(folder), "prompts": tiny_windows(4, 12).tolist(), "tokens": 8, **options}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [python, str(RUNNER)], input=json.dumps(asked), capture_output=True, text=True,
        env=environment, check=False,
    )  # fmt: skip


def answer(python: str, folder: Path, **options: Any) -> list[list[int]]:
    done = run(python, folder, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens: list[list[int]] = json.loads(done.stdout.splitlines()[-1])["tokens"]
    return tokens


def greedy(folder: Path) -> list[list[int]]:
    """By transformers, in float32."""
    model = secateur.load(folder, dtype=torch.float32, expand=True)
    model.generation_config.eos_token_id = None
    ids = tiny_windows(4, 12)
    found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    tokens: list[list[int]] = found[:, 12:].tolist()
    return tokens


def pruned(folder: Path) -> Path:
    save_tiny(folder / "dense", **SIZES)
    secateur.prune(folder / "dense", output=folder / "pruned", method="magnitude", pattern="2:4")
    return folder / "pruned"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "float32"),
        ({"format": "n-of-m"}, "float32"),
        ({"values": "int8", "embeddings": "int8"}, "float32"),
        ({"values": "int4", "group_size": 32}, "float32"),
        ({"values": "int4", "group_size": 32, "archive": True}, "float16"),
    ],
)
def test_a_compressed_folder_gives_the_text_of_transformers(
    options, dtype, vllm_python, tmp_path: Path
) -> None:
    packed = secateur.compress(pruned(tmp_path), output=tmp_path / "packed", **options).output
    found = answer(vllm_python, packed, dtype=dtype, load_format=LOAD_FORMAT)
    assert found == greedy(packed)


@pytest.mark.slow
def test_layers_of_different_sizes_give_the_text_of_transformers(
    vllm_python, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "dense", **SIZES)
    (tmp_path / "text.txt").write_text(source_text()[:6000])
    cut = secateur.structure(
        tmp_path / "dense", output=tmp_path / "cut", calibration=tmp_path / "text.txt",
        sequence_length=32, windows=8, keep_parameters=0.7, effort="fast",
        allocation="global",
    )  # fmt: skip
    assert json.loads((cut.output / "config.json").read_text())["model_type"] == "secateur_varied"
    assert answer(vllm_python, cut.output, load_format=LOAD_FORMAT) == greedy(cut.output)


@pytest.mark.slow
def test_exports_run_without_the_plug_in_s_loader(vllm_python, tmp_path: Path) -> None:
    """4 bits give the same text. With 8 bits activations are rounded too, so it only has to run."""
    packed = secateur.compress(
        pruned(tmp_path), output=tmp_path / "packed", values="int4", group_size=32
    ).output
    for type, dtype in (("w4a16", "float16"), ("w8a8", "bfloat16")):
        secateur.export(packed, output=tmp_path / type, to="compressed-tensors", type=type)
        found = answer(vllm_python, tmp_path / type, dtype=dtype)
        assert [len(tokens) for tokens in found] == [8] * 4
        assert type != "w4a16" or found == greedy(packed)


@pytest.mark.slow
def test_a_damaged_folder_is_refused(vllm_python, tmp_path: Path) -> None:
    packed = secateur.compress(pruned(tmp_path), output=tmp_path / "packed").output
    file = packed / "secateur.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = run(vllm_python, packed, load_format=LOAD_FORMAT)
    assert done.returncode == 1
    assert "the checksum is" in done.stderr
