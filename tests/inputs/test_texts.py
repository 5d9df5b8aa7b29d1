"""Calibration texts and prompts that are none."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import secateur
from secateur.calibration.documents import read_documents
from secateur.errors import RecipeError, SourceError
from secateur.steps.generate import generate

LINE = '{"text": "one two three"}\n'
ZIPPED = gzip.compress(LINE.encode() * 99, mtime=0)  # named after its bytes, so without the time

FILES: list[tuple[str, bytes, str]] = [
    ("t.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "recursion"),
    ("t.jsonl", b'{"text": "a\\ud800b"}', r"half of a surrogate pair \(\\ud800\) at character 1"),
    ("t.jsonl", b"\xff\xfe", "cannot be read as UTF-8"),
    ("t.jsonl.gz", LINE.encode(), "cannot be read as UTF-8 text: Not a gzipped file"),
    ("t.jsonl.gz", ZIPPED[:-9], "cannot be read"),
    ("t.jsonl.gz", ZIPPED[:20] + b"\xff" * 40, "cannot be read"),
    ("t.txt.gz", b"", "contains no text"),
    ("t.jsonl", b"9" * 5000, "no JSON"),
    ("t.parquet", b"words", r"t\.parquet cannot be read: Parquet file size is 5 bytes"),
    ("t.parquet", b"PAR1" + bytes(40) + b"PAR1", r"t\.parquet cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "what"), FILES)
def test_files_that_are_no_texts(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=what):
        read_documents(str(tmp_path / name))


def test_both_halves_of_a_surrogate_pair_are_one_character(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read_documents(str(tmp_path / "t.jsonl")) == ["\U0001f600"]


@pytest.mark.parametrize(
    "words",
    [
        ["--max-new-tokens", 1_000_000_000],
        ["--max-new-tokens", 62],
        ["--max-new-tokens", 0],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--seed", "1" * 23],
        ["--prompt", "a\udcffb"],
        ["--prompt", ""],
    ],
)
def test_what_generate_refuses(refused, model: Path, words: list[object]) -> None:
    refused("generate", model, "--prompt", "abc", *words)


def test_all_positions_can_be_used(model: Path) -> None:
    assert generate(str(model), "abc", max_new_tokens=61).tokens <= 61
    with pytest.raises(RecipeError, match="64 positions"):
        generate(str(model), "abc", max_new_tokens=62)
    with pytest.raises(RecipeError, match="temperature"):
        generate(str(model), "abc", temperature=math.nan)


def test_a_layer_that_is_not_there(refused, run, model: Path) -> None:
    for layer in (99, 3):
        message = refused("inspect", model, "--layer", layer)
        assert f"layer {layer}:" in message
        assert "from 0 to 2" in message
    assert "--layer -1:" in refused("inspect", model, "--layer", -1)
    assert run("inspect", model, "--layer", 2).code == 0
    assert run("inspect", model).code == 0


def zeroed(folder: Path, kept: str = "nothing") -> Path:
    """A model whose decoder matrices are zero, but for those with a word in their names."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "layers" in name and kept not in name:
            tensor.zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_decoder_of_zeros_is_refused(refused, run, model: Path, tmp_path: Path) -> None:
    zeroed(model)
    words = ["prune", model, "--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "out"]
    assert "21 matrices" in refused(*words)
    assert not (tmp_path / "out.partial").exists()
    loaded = secateur.models.opening.load_whole(model, torch.device("cpu"))
    with pytest.raises(secateur.errors.NumericalError, match="all 21 matrices"):
        secateur.prune(loaded, method="magnitude", sparsity=0.5)


def test_a_matrix_of_zeros_is_named(model: Path, tmp_path: Path, caplog) -> None:
    zeroed(model, kept="layers.2.mlp")
    secateur.prune(model, output=tmp_path / "out", method="magnitude", sparsity=0.5)
    named = [r.getMessage() for r in caplog.records if "all zero before it is pruned" in r.message]
    assert len(named) == 18
    assert named[0].startswith("model.layers.0.")


def test_a_tensor_in_two_shards(refused, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", shards=2)
    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor + 1}, second, metadata={"format": "pt"})
    message = refused("inspect", folder)
    assert name in message
    assert first.name in message
    assert second.name in message
    assert "two files" in refused("generate", folder, "--prompt", "a", "--max-new-tokens", 1)
