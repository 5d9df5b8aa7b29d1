"""NaN and infinite weights are refused before any work, and the tensor is named."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from runtime.packed_models import packed_model
from secateur.errors import CheckpointError, NumericalError
from secateur.models import checkpoint
from secateur.models.checkpoint import BLOCK_VALUES, not_finite, refuse_not_finite
from secateur.models.sources import resolve
from secateur.parallel.ranks import Ranks
from secateur.runtime.packed import PackedCheckpoint

NAME = "model.layers.1.mlp.up_proj.weight"
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BYTES = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


def damaged(folder: Path, name: str = NAME, value: float = math.nan) -> Path:
    """The same folder with one such value."""
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[7] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


VERBS = {
    "prune": ["--method", "magnitude", "--sparsity", 0.5],
    "prune with text": ["--method", "wanda", "--sparsity", 0.5, "--calibration", "WINDOWS"],
    "prune --dry-run": ["--method", "magnitude", "--sparsity", 0.5, "--dry-run"],
    "structure": ["--keep-layers", 2, "--calibration", "WINDOWS"],
    "compress": ["--values", "int4"],
    "fit": ["--max-size", "1MiB", "--calibration", "WINDOWS"],
    "draft": ["--calibration", "WINDOWS"],
    "export": [],
    "import": [],
    "generate": ["--prompt", "a b"],
    "chat": [],
    "serve": ["--port", 0],
    "evaluate": ["--text", "WINDOWS"],
    "bench": [],
    "train": ["--text", "WINDOWS", "--steps", 1],
    "sweep": ["--methods", "magnitude", "--sparsities", 0.5, "--text", "WINDOWS"],
    "push": ["owner/name", "--dry-run"],
}
WRITING = {"prune", "structure", "compress", "fit", "draft", "export", "import", "train", "sweep"}


@pytest.mark.parametrize("case", VERBS)
def test_every_verb_names_the_tensor_before_any_work(
    refused, model: Path, windows: Path, tmp_path: Path, case: str
) -> None:
    verb = case.partition(" ")[0]
    if verb == "push":
        (model / "README.md").write_text("A model.")
    damaged(model)
    words = [windows if word == "WINDOWS" else word for word in VERBS[case]]
    output = ["--output", tmp_path / "out"] if verb in WRITING else []
    before = sorted(tmp_path.iterdir())
    message = refused(verb, model, *words, *output)
    assert "1 of 1536 weights" in message
    assert f"where: {NAME} in {model}" in message
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_every_tensor_counts(model: Path, name: str, value: float) -> None:
    damaged(model, name, value)
    with pytest.raises(NumericalError, match=rf"1 of \d+ weights.*\n.*{name}"):
        secateur.prune(model, output=model.with_name("o"), method="magnitude", sparsity=0.5)


def test_the_other_model_of_a_call_counts_too(refused, model: Path, windows: Path) -> None:
    other = damaged(save_tiny(model.with_name("other"), seed=1))
    for words in (
        ["evaluate", model, "--dense", other, "--text", windows],
        ["train", model, "--teacher", other, "--text", windows, "-o", model.with_name("out")],
    ):
        message = refused(*words)
        assert f"{NAME} in {other}" in message
    assert not list(model.parent.glob("out*"))


def test_what_reports_them_still_does(run, model: Path) -> None:
    damaged(model)
    assert run("inspect", model).code == 0
    done = run("diagnose", model)
    assert done.code == 3
    assert "NaN" in done.out


@pytest.mark.parametrize("form", ["dense", "opened"])
def test_a_loaded_model(form: str) -> None:
    from transformers import AutoModelForCausalLM
    from zoo import config_of

    model = AutoModelForCausalLM.from_config(config_of("llama" if form == "dense" else "mixtral"))
    with torch.no_grad():
        model.model.norm.weight[2] = math.inf
    with pytest.raises(NumericalError, match=r"model\.norm\.weight"):
        secateur.prune(model, method="wanda", sparsity=0.5, calibration=tiny_windows())


@pytest.mark.parametrize("values", ["int8", "bfloat16"])
@pytest.mark.parametrize("archive", [False, True])
def test_packed_folders(tmp_path: Path, values: str, archive: bool) -> None:
    folder = packed_model(tmp_path, values=values, archive=archive)
    refuse_not_finite(folder.glob("*.safetensors"))
    [file] = folder.glob("*.safetensors")
    packed = PackedCheckpoint(folder)
    floats = [n for n, spec in packed.specs.items() if spec.dtype.is_floating_point]
    assert {n.rpartition(".")[2] for n in floats} >= {
        "weight_scale" if values == "int8" else "compressed"
    }
    for name in floats:
        entry = packed.entries[name]
        if entry.dtype.is_floating_point:
            raw = bytearray(file.read_bytes())
            width = entry.dtype.itemsize
            raw[entry.offset : entry.offset + width] = b"\xff" * width
            copy = tmp_path / "copy.safetensors"
            copy.write_bytes(raw)
            with pytest.raises(NumericalError, match=name):
                refuse_not_finite([copy])


def test_an_archive_is_checked_where_it_is_decoded(tmp_path: Path, monkeypatch) -> None:
    folder = packed_model(tmp_path, values="bfloat16", archive=True)
    packed = PackedCheckpoint(folder)
    name = next(n for n in packed._archived if packed.specs[n].dtype.is_floating_point)
    bad = torch.full((3,), math.nan)
    monkeypatch.setattr("secateur.runtime.packed.from_archive", lambda *_: bad)
    with pytest.raises(CheckpointError, match="3 of 3 values"):
        packed.read(name)


@pytest.mark.parametrize("dtype", [*FLOATS, *BYTES], ids=str)
def test_every_dtype_of_floats(dtype: torch.dtype) -> None:
    if dtype in BYTES:
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        assert not_finite(every) == int((~torch.isfinite(every.float())).sum()) > 0
        return
    values = torch.ones(100, dtype=dtype)
    assert not_finite(values) == 0
    values[[3, 50, 99]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    assert not_finite(values) == 3
    assert not_finite(torch.full((9,), torch.finfo(dtype).max, dtype=dtype)) == 0
    assert not_finite(torch.zeros(3, dtype=torch.int64)) == 0


def test_large_files_are_read_in_small_blocks(tmp_path: Path, monkeypatch) -> None:
    count = 3 * BLOCK_VALUES + 17
    tensor = torch.zeros(count, dtype=torch.bfloat16)
    tensor[[0, BLOCK_VALUES, count - 1]] = math.nan
    save_file({"a": torch.zeros(5), "b": tensor, "n": torch.arange(4)}, tmp_path / "x.safetensors")
    asked = []
    plain = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *s, **k: asked.append(s[0]) or plain(*s, **k))
    with pytest.raises(NumericalError, match=rf"3 of {count} weights"):
        refuse_not_finite([tmp_path / "x.safetensors"])
    assert max(asked) == BLOCK_VALUES


class Gathering(Ranks):
    """The place of a process on one machine; what all others have gathered is given."""

    def __init__(self, place: int, here: int, others: list[list[str]]) -> None:
        super().__init__(place, here, here, place)
        self.others, self.own = others, None

    def gather(self, value):
        self.own = value
        return [*self.others, value]


@pytest.mark.parametrize("bad", [None, 0, 1, 2, 3])
def test_processes_of_a_machine_read_each_block_once(tmp_path: Path, monkeypatch, bad) -> None:
    count, read = 3 * BLOCK_VALUES + 17, []
    tensor = torch.zeros(count, dtype=torch.bfloat16)
    if bad is not None:
        tensor[bad * BLOCK_VALUES + 16] = math.inf
    file = tmp_path / "x.safetensors"
    save_file({"b": tensor}, file)
    fill = checkpoint.read_all

    def reading(stream, values) -> None:
        read.append(len(values))
        fill(stream, values)

    monkeypatch.setattr(checkpoint, "read_all", reading)
    found: list[list[str]] = []
    for place in range(3):
        ranks = Gathering(place, 3, found)
        heard = bad is not None and place >= bad % 3  # by this process, or from one before it
        with pytest.raises(NumericalError, match="1 of") if heard else nullcontext():
            refuse_not_finite([file], ranks)
        found.append(ranks.own)
    assert found == [[file.name] if bad is not None and n == bad % 3 else [] for n in range(3)]
    if bad is None:
        assert sorted(read) == [17, *[BLOCK_VALUES] * 3]


def test_a_file_is_read_once_while_it_stays(model: Path, monkeypatch) -> None:
    resolve(model)
    monkeypatch.setattr("secateur.models.checkpoint.not_finite", lambda tensor: 1)
    resolve(model)
    damaged(model, value=0.0)
    with pytest.raises(NumericalError, match="values of"):
        resolve(model)
