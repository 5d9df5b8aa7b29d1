from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import save_tiny, tiny_tokenizer
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.run_windows import load_calibration
from secateur.calibration.windows import (
    PIECE_CHARACTERS,
    WindowPlan,
    cut_pieces,
    load_windows,
    make_windows,
    save_windows,
)
from secateur.errors import CheckpointError, RecipeError, SourceError

EOS = 2
WORDS = [f"w{i}" for i in range(40)]


def documents(count: int = 30, words: int = 25, seed: int = 3) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(count)]


def test_one_long_file_is_sampled_all_over():
    lines = [f"w{i // 2000} " * 4 + "\n" for i in range(80_000)]  # w0 first, w39 last
    windows = make_windows(["".join(lines)], tiny_tokenizer(WORDS), WindowPlan(64, 16))
    tenths = {(int(i) - 4) // 4 for i in windows.flatten() if i != EOS}
    assert len(tenths) >= 5


def test_pieces_lose_nothing():
    text = "some words in a line\n" * 9_000 + "x" * 200_000
    pieces = cut_pieces([text, "  \n ", "short"], PIECE_CHARACTERS)
    assert "".join(text[a:b] for n, a, b in pieces if n == 0) == text
    assert [n for n, _, _ in pieces if n] == [2]
    assert all(0 < b - a <= PIECE_CHARACTERS for _, a, b in pieces)
    assert text[: pieces[0][2]].endswith("\n")


def test_long_texts_give_no_warning(caplog, capfd):
    tokenizer = tiny_tokenizer(WORDS, model_max_length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_windows(documents(), tokenizer, WindowPlan(2, 20))
        make_windows(documents(), tokenizer, WindowPlan(2, 20, packing="random-crop"))
    assert not caplog.records
    assert "longer" not in capfd.readouterr().err


@pytest.mark.parametrize("packing", ["concatenate", "random-crop"])
def test_too_little_text(packing):
    tokenizer = tiny_tokenizer(WORDS)
    with pytest.raises(SourceError, match="4000 tokens, 3"):
        make_windows(documents(), tokenizer, WindowPlan(3, 4000, packing=packing))
    with pytest.raises(SourceError, match=r"0 windows of 4 tokens"):
        make_windows([], tokenizer, WindowPlan(3, 4, packing=packing))


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(SourceError, match="--windows 7"):
        make_windows(documents(), tiny_tokenizer(WORDS), WindowPlan(8, 100))


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({"ids": torch.ones(2, 3, dtype=torch.int64)}, "no tensor 'input_ids'; the file has: ids"),
        ({"input_ids": torch.ones(2, 3)}, r"torch.float32 of shape \(2, 3\)"),
        ({"input_ids": torch.ones(6, dtype=torch.int64)}, r"of shape \(6,\)"),
        ({"input_ids": torch.ones(0, 3, dtype=torch.int64)}, r"of shape \(0, 3\)"),
        ({"input_ids": torch.tensor([[1, 96]])}, "from 1 to 96, but the vocabulary has 96"),
        ({"input_ids": torch.tensor([[-1, 5]])}, "from -1 to 5"),
    ],
)
def test_bad_window_files(tmp_path, tensors, fault):
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(SourceError, match=fault):
        load_windows(tmp_path / "w.safetensors", vocab_size=96)


def test_damaged_or_absent_window_files(tmp_path):
    with pytest.raises(SourceError, match=r"w\.safetensors"):
        load_windows(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        load_windows(tmp_path / "w.safetensors")


def test_calibration_from_text_and_from_windows_are_the_same(tmp_path):
    tokenizer = tiny_tokenizer(WORDS)
    source = str(tmp_path / "t.txt")
    Path(source).write_text("\n".join(documents()), encoding="utf-8")
    plan = WindowPlan(6, 10, seed=4)
    windows, record = load_calibration(source, tokenizer, plan, vocab_size=44)
    assert record["samples"] == 6
    assert record["tokens"] == 60
    assert record["seed"] == 4
    assert record["documents"] == 1
    ready = str(tmp_path / "w.safetensors")
    save_windows(windows, Path(ready))
    again, from_file = load_calibration(ready, None, WindowPlan(), vocab_size=44)
    assert torch.equal(again, windows)
    assert from_file["sha256"] == record["sha256"]
    assert from_file["sequence_length"] == 10
    assert "seed" not in from_file
    for given in (source, ready):
        with pytest.raises(SourceError, match="the vocabulary has 20"):
            load_calibration(given, tokenizer, plan, vocab_size=20)
    with pytest.raises(RecipeError, match="needs a tokenizer"):
        load_calibration(source, None, plan, vocab_size=44)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_window_files_longer_than_the_model(family, tmp_path):
    """Refused wherever windows are read, whatever a model would make of such positions."""
    model, file = save_tiny(tmp_path / "m", family), tmp_path / "w.safetensors"
    save_windows(torch.randint(4, 96, (6, 70)), file)
    verbs = {
        "prune": {"method": "wanda", "sparsity": 0.5, "calibration": file},
        "compress": {"values": "int8", "calibration": file},
        "train": {"teacher": model, "text": [str(file)], "steps": 1},
    }
    if family == "llama":
        verbs["structure"] = {"keep_layers": 1, "calibration": file}
    for verb, options in verbs.items():
        with pytest.raises(RecipeError, match="70 tokens"):
            getattr(secateur, verb)(model, output=tmp_path / verb, **options)
        assert not (tmp_path / verb).exists()
    with pytest.raises(RecipeError, match="70 tokens"):
        secateur.diagnose(model, dense=model, text=file)


def test_window_tensors_longer_than_the_model():
    for family in ("llama", "gpt2"):
        with pytest.raises(RecipeError, match="70 tokens"):
            secateur.prune(
                tiny_model(family), method="wanda", sparsity=0.5, calibration=tiny_windows(3, 70)
            )
    with pytest.raises(SourceError, match="the vocabulary has 96"):
        secateur.prune(
            tiny_model("llama"), method="wanda", sparsity=0.5,
            calibration=torch.full((2, 8), 96),
        )  # fmt: skip
    for bad in (torch.ones(2, 8), torch.ones(8, dtype=torch.int64), tiny_windows(0, 8)):
        with pytest.raises(SourceError, match="token ids"):
            secateur.prune(tiny_model("llama"), method="wanda", sparsity=0.5, calibration=bad)
