"""Compressed folders are loaded and run packed: the same logits as their dense weights give."""

from __future__ import annotations

import copy
import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from same_logits import assert_same_logits
from slow import FEW_FAMILIES, every_pair, few_families, slow_but
from torch import nn
from with_kernels import needs_kernels
from zoo import CONFIGS

import secateur
from oracles.kernels import rounded_to_bytes
from runtime.packed_examples import Forgery, index_again
from runtime.packed_models import IDS, packed_model, python, settled
from secateur.errors import CheckpointError, KernelError, ShapeError
from secateur.models.skeleton import quiet_transformers
from secateur.runtime.formats import Layout, formats
from secateur.runtime.kernels.dispatch import KernelChoice
from secateur.runtime.kernels.linear import PackedEmbedding, PackedLinear
from secateur.runtime.packed import PackedCheckpoint, activations_for

pytestmark = [needs_kernels, pytest.mark.usefixtures("settled")]
__all__ = ["settled"]

STORED: dict[str, dict[str, Any]] = {
    "bitmask": {"format": "bitmask", "values": "bfloat16"},
    "n-of-m": {"format": "n-of-m", "values": "float32", "pattern": (2, 4)},
    "archive": {"values": "bfloat16", "archive": True},
    "int8": {"values": "int8"},
    "int4": {"values": "int4", "group_size": 32},
    "int3": {"values": "int3", "format": "bitmask"},
    "int8 embeddings": {"values": "int8", "embeddings": "int8"},
}
INT4_EMBEDDINGS = {"values": "int8", "embeddings": "int4", "group_size": 32}
LOADED = [
    (family, stored)
    for family in CONFIGS
    for stored in STORED
    if stored != "archive" or family in ("llama", "gpt2")
]


@torch.inference_mode()
def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def generated(model: Any) -> torch.Tensor:
    with quiet_transformers():
        return model.generate(IDS[:1], max_new_tokens=8, do_sample=False, pad_token_id=0)


def packed_parts(model: Any) -> dict[str, Any]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (PackedLinear, PackedEmbedding))
    }


def matrices_of(model: Any) -> dict[int, Any]:
    """The packed matrices, each once, though embedding and head may share it."""
    return {id(part.matrix): part.matrix for part in packed_parts(model).values()}


def check_linears(packed: Any, dense: Any, ids: torch.Tensor = IDS) -> None:
    """Every linear gives the product of the weights it stands for and rounded activations."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: nn.Module, given: Any, result: torch.Tensor) -> None:
        name = next(n for n, m in packed.named_modules() if m is module)
        seen[name] = (given[0].flatten(0, -2), result.flatten(0, -2))

    linears = {n: m for n, m in packed_parts(packed).items() if isinstance(m, PackedLinear)}
    handles = [module.register_forward_hook(keep) for module in linears.values()]
    logits_of(packed, ids)
    for handle in handles:
        handle.remove()
    assert seen.keys() == linears.keys()
    for name, (given, result) in seen.items():
        plain = dense.get_submodule(name)
        weight = plain.weight if isinstance(plain, nn.Linear) else plain.weight.T
        shares = "spread" if linears[name].matrix.group is None else "consecutive"
        wanted = rounded_to_bytes(given.float(), shares) @ weight.double().T
        bias = getattr(plain, "bias", None)
        wanted = wanted if bias is None else wanted + bias
        largest = float(wanted.abs().max())
        torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("family", "stored"),
    slow_but([x for x in LOADED if x[0] in FEW_FAMILIES or x[1] == "bitmask"], LOADED),
)
def test_logits_are_those_of_the_dense_weights(tmp_path: Path, family: str, stored: str) -> None:
    folder = packed_model(tmp_path, family, **STORED[stored])
    packed = secateur.load(folder, dtype=torch.float32)
    dense = secateur.load(folder, dtype=torch.float32, expand=True)
    assert not packed_parts(dense)
    assert len(matrices_of(packed)) == len(PackedCheckpoint(folder).layouts)
    found, expected = logits_of(packed), logits_of(dense)
    largest = float(expected.abs().max())
    assert largest > 1e-2
    if "int" in stored:
        check_linears(packed, dense)
        assert float((found - expected).norm() / expected.norm()) < 0.05
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)
        assert torch.equal(generated(packed), generated(dense))


@pytest.mark.parametrize("stored", ["bitmask", "int8 embeddings"])
@pytest.mark.parametrize("family", few_families(CONFIGS))
def test_from_pretrained_gives_the_same_model(tmp_path: Path, family: str, stored: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = packed_model(tmp_path, family, **STORED[stored])
    ours = secateur.load(folder)
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == ours.dtype == torch.bfloat16
    assert packed_parts(theirs).keys() == packed_parts(ours).keys()
    assert len(matrices_of(theirs)) == len(matrices_of(ours))
    assert_same_logits(logits_of(theirs), logits_of(ours))
    assert torch.equal(generated(theirs), generated(ours))


PLAIN = """
import sys
import secateur
import transformers
import torch

for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(input_ids=torch.load(sys.argv[1])).logits
    torch.save(logits.detach(), folder + "/logits.pt")
    assert any(type(m).__name__ == "PackedLinear" for m in model.modules()) or sys.argv[1] == ""
"""


@pytest.mark.slow
def test_from_pretrained_in_a_fresh_process(tmp_path: Path) -> None:
    """After nothing but `import secateur`; matrices are packed or dense, as its timings say."""
    torch.save(IDS, tmp_path / "ids.pt")
    folders = {
        "float": packed_model(tmp_path / "a", shards=3, **STORED["bitmask"]),
        "int8": packed_model(tmp_path / "b", "gpt2", **STORED["int8 embeddings"]),
    }
    done = python(PLAIN, tmp_path / "ids.pt", *folders.values())
    assert done.returncode == 0, done.stderr
    for kind, folder in folders.items():
        found = torch.load(folder / "logits.pt")
        expected = logits_of(secateur.load(folder, dtype=torch.float32, expand=True))
        error = float((found - expected).norm() / expected.norm())
        assert error < (1e-5 if kind == "float" else 0.05)


@pytest.mark.parametrize(
    ("stored", "tied", "shards"),
    every_pair(
        ["bitmask", "int8 embeddings", "int4 embeddings", "int3 embeddings"], [False, True], [1, 3]
    ),
)
def test_heads_and_shards(tmp_path: Path, stored: str, tied: bool, shards: int) -> None:
    """The rows of 40 weights end with a group of 8, and the last of 99 rows has no partner."""
    how = STORED.get(stored) or INT4_EMBEDDINGS | {"embeddings": stored[:4]}
    sizes = {"hidden_size": 40, "vocab_size": 99}
    folder = packed_model(tmp_path, shards=shards, tie_word_embeddings=tied, **sizes, **how)
    assert len([*folder.glob("*.safetensors")]) == shards
    model = secateur.load(folder, dtype=torch.float32)
    dense = secateur.load(folder, dtype=torch.float32, expand=True)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if "embeddings" in stored:
        assert isinstance(embedding, PackedEmbedding)
        assert isinstance(head, PackedLinear)
        assert (embedding.matrix is head.matrix) is tied
        check_linears(model, dense)
        ids = torch.cat([IDS, torch.tensor([[98, 0, 98, 1, 2, 3, 97]])])
        assert torch.equal(embedding(ids), dense.get_input_embeddings()(ids))
        assert torch.equal(embedding(ids.int()[0, 0]), embedding(ids)[0, 0])
    else:
        assert (embedding.weight is head.weight) is tied
        torch.testing.assert_close(logits_of(model), logits_of(dense), rtol=1e-4, atol=1e-5)


def test_a_bfloat16_checkpoint_in_float32(tmp_path: Path) -> None:
    """Buffers are made in float32 too: Gemma's embedding factor would be rounded otherwise."""
    from transformers import AutoModelForCausalLM

    folder = packed_model(tmp_path, "gemma3", dtype=torch.bfloat16)
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    expected = logits_of(plain.eval())
    found = logits_of(secateur.load(folder, dtype=torch.float32, expand=True))
    assert torch.equal(found, expected)


def test_float16_models(tmp_path: Path) -> None:
    folder = packed_model(tmp_path, "llama", values="float16")
    model = secateur.load(folder)
    assert model.dtype == torch.float16
    dense = secateur.load(folder, expand=True)
    found, expected = logits_of(model), logits_of(dense)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.max()))
    exact = logits_of(secateur.load(folder, dtype=torch.float32, expand=True))
    error, usual = (float((x - exact).norm()) for x in (found, expected))
    assert error < 1.5 * usual


def test_int8_in_bfloat16_is_as_near_as_its_rounding(tmp_path: Path) -> None:
    """By the kernel and by blocks: activations are rounded as the folder says, and no scale is."""
    folder = packed_model(tmp_path, "llama", values="int8", num_hidden_layers=1)
    model = secateur.load(folder)
    weight = secateur.load(folder, dtype=torch.float32, expand=True).model.layers[0].mlp.up_proj
    up = model.model.layers[0].mlp.up_proj
    x = torch.randn(9, 32).bfloat16()
    expected = rounded_to_bytes(x.float(), "spread") @ weight.weight.double().T
    for up_to in (1, 16):
        up.kernel_up_to = up_to
        torch.testing.assert_close(up(x).double(), expected, rtol=1.02 * 2**-8, atol=1e-5)


@pytest.mark.parametrize("stored", [STORED["int8 embeddings"], INT4_EMBEDDINGS])
def test_packed_modules_compile_in_one_graph(tmp_path: Path, stored: dict[str, Any]) -> None:
    model = secateur.load(packed_model(tmp_path, **stored), dtype=torch.float32)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = model.get_input_embeddings(), model.model.layers[0]

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            return self.layer.mlp(self.layer.self_attn.q_proj(x)) + x

    block = Block()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    with torch.inference_mode():
        assert torch.equal(compiled(IDS), block(IDS))
        assert torch.equal(compiled(IDS[:1, :3]), block(IDS[:1, :3]))


def test_copies_outlive_their_original(tmp_path: Path) -> None:
    model = secateur.load(packed_model(tmp_path, **INT4_EMBEDDINGS))
    expected, held = logits_of(model), {*matrices_of(model)}
    copied = copy.deepcopy(model)
    del model
    gc.collect()
    assert {*matrices_of(copied)} == held
    assert torch.equal(logits_of(copied), expected)


def test_forward_with_gradients_switched_on(tmp_path: Path) -> None:
    model = secateur.load(packed_model(tmp_path, **STORED["bitmask"]), dtype=torch.float32)
    model.model.norm.weight.requires_grad_()
    out = model(input_ids=IDS).logits
    assert torch.equal(out.detach(), logits_of(model))


def test_memory_is_that_of_the_files(tmp_path: Path) -> None:
    """But for the offsets of rows, which take 8 bytes a row: matrices are wide here."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "head_dim": 256}
    folder = packed_model(
        tmp_path, values="bfloat16", embeddings="int8", num_hidden_layers=1, **sizes
    )
    model = secateur.load(folder)
    held = sum(matrix.nbytes for matrix in matrices_of(model).values())
    held += sum(p.nbytes for p in model.parameters())
    stored = sum(entry.size_bytes for entry in PackedCheckpoint(folder).entries.values())
    assert 0.99 * stored < held < 1.01 * stored
    assert all(isinstance(m, PackedLinear) for n, m in model.named_modules() if "proj" in n)


def test_matrices_that_do_not_pay_are_made_dense(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("secateur.runtime.install.choose", lambda *_: KernelChoice(1, 0.5))
    folder = packed_model(tmp_path, **STORED["bitmask"])
    model = secateur.load(folder, dtype=torch.float32)
    parts = packed_parts(model)
    assert parts
    assert all(p.matrix.mask is None and p.matrix.dtype == torch.float32 for p in parts.values())
    dense = secateur.load(folder, dtype=torch.float32, expand=True)
    assert torch.equal(logits_of(model), logits_of(dense))


def from_pretrained(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_what_from_pretrained_refuses(tmp_path: Path) -> None:
    archive = packed_model(tmp_path / "a", archive=True)
    with pytest.raises(CheckpointError, match=r"archive"):
        from_pretrained(archive)
    assert packed_parts(secateur.load(archive))
    folder = packed_model(tmp_path / "b")
    for device_map in ("cuda", {"": 0}):
        with pytest.raises(KernelError, match=r"secateur\.load"):
            from_pretrained(folder, device_map=device_map)
    assert packed_parts(from_pretrained(folder, device_map="cpu"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_files_that_do_not_fit_the_configuration(tmp_path: Path) -> None:
    folder = packed_model(tmp_path / "a")
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    change_config(broken, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"config"):
        secateur.load(broken)
    with pytest.raises(CheckpointError, match=r"config"):
        from_pretrained(broken)
    shutil.copytree(folder, broken, dirs_exist_ok=True)
    change_config(broken, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"3 layers"):
        secateur.load(broken)
    with pytest.raises(CheckpointError, match=r"layers.3"):
        from_pretrained(broken)
    with pytest.raises(CheckpointError, match="config"):
        secateur.load(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj"])
def test_a_tensor_that_is_missing(tmp_path: Path, name: str) -> None:
    folder = packed_model(tmp_path)
    forgery = Forgery(folder / "secateur.safetensors")
    for full in [n for n in forgery.header if n.startswith(name)]:
        for table in (forgery.header, forgery.data, forgery.description["checksums"]):
            table.pop(full)
    forgery.description["layouts"].pop(name, None)
    forgery.write()
    index_again(folder)
    with pytest.raises(CheckpointError, match="does not contain"):
        secateur.load(folder)
    with pytest.raises(CheckpointError, match="does not contain"):
        from_pretrained(folder)


def test_a_damaged_tensor(tmp_path: Path) -> None:
    folder = packed_model(tmp_path)
    raw = bytearray((folder / "secateur.safetensors").read_bytes())
    raw[-100] ^= 1
    (folder / "secateur.safetensors").write_bytes(raw)
    for load in (secateur.load, from_pretrained):
        with pytest.raises(CheckpointError, match="the checksum is"):
            load(folder)


def pack_by_hand(folder: Path, name: str, layout: Layout) -> None:
    """Store one more matrix packed, as `secateur compress` would not."""
    weight = load_file(folder / "secateur.safetensors")[f"{name}.weight"]
    forgery = Forgery(folder / "secateur.safetensors")
    tables = (forgery.header, forgery.data, forgery.description["checksums"])
    for table in tables:
        table.pop(f"{name}.weight")
    kinds = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}
    for suffix, part in formats[layout.format].pack(weight, layout).items():
        entry_of = {"dtype": kinds[part.dtype], "shape": [*part.shape]}
        for table, entry in zip(
            tables, (entry_of, bytearray(part.numpy().tobytes()), ""), strict=True
        ):
            table[f"{name}.{suffix}"] = entry
    forgery.description["layouts"][name] = layout.to_json()
    forgery.description["activations"] = activations_for([layout])
    forgery.write()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activations"] = activations_for([layout])
    (folder / "config.json").write_text(json.dumps(config))
    index_again(folder)


@pytest.mark.parametrize(
    ("format", "values"), [("bitmask", "float32"), ("dense", "float32"), ("dense", "int4")]
)
def test_an_embedding_that_somebody_else_has_packed(
    tmp_path: Path, format: str, values: str
) -> None:
    folder = packed_model(tmp_path)
    group = 32 if values == "int4" else None
    layout = Layout(format, values, (96, 32), group=group)
    pack_by_hand(folder, "model.embed_tokens", layout)
    options = {"expand": True} if not layout.integers else {"kernels": False}
    expected = logits_of(secateur.load(folder, dtype=torch.float32, **options))
    found = logits_of(secateur.load(folder, dtype=torch.float32))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_packed_matrices_where_no_linear_is(tmp_path: Path) -> None:
    folder = packed_model(tmp_path, "gpt2")
    expected = logits_of(secateur.load(folder, dtype=torch.float32, expand=True))
    pack_by_hand(folder, "transformer.wpe", Layout("bitmask", "float32", (64, 32)))
    with pytest.raises(CheckpointError, match="wpe"):
        secateur.load(folder)
    found = logits_of(secateur.load(folder, dtype=torch.float32, expand=True))
    assert torch.equal(found, expected)


def test_activations_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    linear = secateur.load(packed_model(tmp_path)).model.layers[0].mlp.up_proj
    for x in (torch.zeros(1, 31), torch.zeros(32, dtype=torch.float64)):
        with pytest.raises(ShapeError):
            linear(x)
    assert linear(torch.zeros(0, 32, dtype=torch.bfloat16)).shape == (0, 48)
    assert "in_features=32, out_features=48, bias=False, float32, sparsity=0.5" in str(linear)
