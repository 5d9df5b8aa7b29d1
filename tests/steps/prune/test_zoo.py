"""Every model of the zoo: pruned to 2:4, some to one half, saved, loaded, and it generates.

Zeros are counted in the loaded model's own modules, which transformers builds.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from slow import FEW_FAMILIES, slow, slow_but
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import (
    DENSE,
    NOT_RUN,
    WITH_EXPERTS,
    ZOO,
    class_of,
    config_of,
    tiny_model,
    tiny_windows,
    weight_of,
)

import secateur
from secateur.models.skeleton import quiet_transformers

TRANSPOSED = ("GptOssExperts", "Llama4TextExperts")
"""Experts that are stored as [experts, in, out]."""

DECODER = re.compile(r"^(?!.*(?:vision|visual|audio)).*\b(?:layers|h)\.\d+\.")
"""The names of what is in decoder layers."""


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "windows.safetensors"
    save_file({"input_ids": tiny_windows(8, 12)}, file)
    return file


def saved(name: str, folder: Path) -> Path:
    """A checkpoint of a tiny model."""
    try:
        with quiet_transformers():
            tiny_model(name).save_pretrained(folder)
    except ImportError as missing:
        pytest.skip(f"{name}: {str(missing).strip().splitlines()[0]}")
    return folder


def loaded(name: str, folder: Path) -> Any:
    """The model in a folder, as plain transformers loads it; nothing is missing, nothing left."""
    with quiet_transformers():
        model, info = class_of(config_of(name)).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model.eval()


def decoder_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The matrices of the decoder layers as [out, in]; of experts all in one, [..., in]."""
    found = {}
    for name, module in model.named_modules():
        grouped = "Grouped" in type(module).__name__  # block-diagonal
        if isinstance(module, (nn.Linear, Conv1D)) and DECODER.match(name) and not grouped:
            found[f"{name}.weight"] = weight_of(module)
        elif name.endswith("experts") and not isinstance(module, nn.ModuleList):
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    turned = type(module).__name__ in TRANSPOSED
                    weight = parameter.detach()
                    found[f"{name}.{leaf}"] = weight.transpose(1, 2) if turned else weight
    return {n: w for n, w in found.items() if w.shape[-2] > 1 and "router" not in n}


def generates(model: Any) -> None:
    """With and without a cache the same tokens come."""
    prompt = tiny_windows(2, 9)
    with quiet_transformers():
        outputs = [
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5,
                do_sample=False, use_cache=use, output_logits=True, return_dict_in_generate=True,
            )
            for use in (True, False)
        ]  # fmt: skip
    with_cache, without = (torch.stack(one.logits) for one in outputs)
    scale = float(without.abs().max())
    assert float((with_cache - without).abs().max()) <= 1e-3 * scale
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)


ODD = ("bloom", "cohere2", "falcon new", "gptj", "stablelm parallel", "starcoder2")
ALIKE = {*DENSE} - {*ODD} | {
    "gemma3n_text", "gemma4_text", "gemma4_text small", "gemma4_text shared", "gemma4 vision",
}  # fmt: skip
"""Families whose layers are all alike and as those of others, and parts of others: slow tests."""


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *slow_but([(n, "2:4") for n in ZOO if n not in ALIKE], product(ZOO, ["2:4"])),
        *(slow((n, "unstructured")) for n in (*sorted(FEW_FAMILIES), "gpt_oss", "llama4")),
    ],
)
def test_pruned_saved_loaded_and_generating(
    name: str, pattern: str, tmp_path: Path, windows: Path
) -> None:
    source, out = saved(name, tmp_path / "source"), tmp_path / "out"
    # In so little text some experts see no token, and would stay dense.
    method = "magnitude" if name in (*WITH_EXPERTS, "llama4 vision") else "wanda"
    options: dict[str, Any] = {"method": method, "pattern": pattern, "calibration": str(windows)}
    if pattern == "unstructured":
        options["sparsity"] = 0.5
    report = secateur.prune(source, output=out, **options)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    pruned = {linear.name for layer in report.layers for linear in layer.linears}
    model = loaded(name, out)
    left = [one.names for one in report.manifest.left]
    for matrix, weight in decoder_weights(model).items():
        if any(fnmatchcase(matrix, glob) for glob in left):
            continue
        assert (weight == 0).sum() * 2 == weight.numel(), matrix
        if pattern == "2:4":
            assert (weight.unflatten(-1, (-1, 4)) != 0).sum(-1).eq(2).all(), matrix
    assert len(pruned) >= 4
    for stored, tensor in before.items():
        if tensor.ndim < 2 or any(
            fnmatchcase(stored, g) or stored.startswith(f"{g}.") for g in left
        ):
            assert torch.equal(tensor, after[stored]), stored
    if name not in NOT_RUN:
        generates(model)
