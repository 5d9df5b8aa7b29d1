"""A fit for llama.cpp: types that a GGUF file holds, its exact bytes, and the file itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf_models import assert_alike, byte_level, save
from tiny import save_tiny
from transformers import AutoModelForCausalLM
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError
from secateur.recipes.options import bytes_of
from secateur.reporting.fit import FitResult
from secateur.runtime.formats import WeightFormat
from secateur.runtime.storage_plan import PackableCheckpoint
from secateur.steps.fitting.problem import GGUF_FILE, OF_32, OF_256, CostKind, Costs

ENDS = {"tie_word_embeddings": False}
MIXTURE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 256}
MODELS = {
    "tied": ("llama", {"hidden_size": 256, "intermediate_size": 96}),
    "mixture": ("qwen3_moe", {"hidden_size": 256, "num_hidden_layers": 1, **MIXTURE, **ENDS}),
}
LARGE = ("tied", 700_000)
SIZES = [("tied", 340_000), pytest.param(LARGE, marks=pytest.mark.slow), ("mixture", 640_000)]
Fits = Callable[[tuple[str, int]], FitResult]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and windows."""
    place = tmp_path_factory.mktemp("llama-cpp")
    for name, (family, changes) in MODELS.items():
        save(place / name, byte_level(), family, **changes)
    save_windows(tiny_windows(12, 24), place / "windows.safetensors")
    return place


@pytest.fixture(scope="module")
def fits(place: Path) -> Fits:
    """A fit of a model and size."""

    @functools.cache
    def made(case: tuple[str, int]) -> FitResult:
        name, size = case
        found: FitResult = secateur.fit(
            place / name, output=place / f"{name}-{size}", max_size=str(size), effort="fast",
            target="llama.cpp", calibration=place / "windows.safetensors",
        )  # fmt: skip
        return found

    return made


@pytest.mark.parametrize("case", SIZES)
def test_the_file_has_the_bytes_that_were_counted(
    place: Path, fits: Fits, case: tuple[str, int]
) -> None:
    found, (name, size) = fits(case), case
    (file,) = found.output.glob("*.gguf")
    assert found.winner.file_bytes == file.stat().st_size == found.checks[0].measured <= size
    model = PackableCheckpoint.open(place / name)
    kinds = CostKind("size", GGUF_FILE.rest(model), size, exact=True)
    costs = Costs((kinds,), model.shapes, model.ends, files=GGUF_FILE)
    of_ends = dict(zip(costs.outer, found.embeddings.split(", "), strict=True))
    counted = GGUF_FILE.rest(model)
    for unit, (member, *_) in costs.members.items():
        values = {**found.kind_of, **of_ends}[member]
        counted += costs.of(unit, WeightFormat(values, 0.0))[0]
    assert counted == file.stat().st_size


@pytest.mark.parametrize("case", SIZES)
def test_the_result_names_the_types_of_the_file(fits: Fits, case: tuple[str, int]) -> None:
    """And no tensor has one that llama.cpp's blocks do not allow."""
    found = fits(case)
    (file,) = found.output.glob("*.gguf")
    tensors = [x for x in gguf.GGUFReader(file).tensors if len(x.shape) > 1]
    assert found.types == {x.name: x.tensor_type.name for x in tensors}
    for tensor in tensors:
        of = OF_256 if tensor.shape[0] % 256 == 0 else OF_32
        assert tensor.tensor_type.name.lower() in ("bf16", "f32", *of)
    assert len({*found.types.values()} - {"F32"}) > 1


def test_experts_of_a_layer_share_their_type(fits: Fits, place: Path) -> None:
    kinds = fits(("mixture", 640_000)).kind_of
    stacks: dict[str, set[str]] = {}
    for name, kind in kinds.items():
        if ".experts." in name:
            stacks.setdefault(name.rpartition(".")[2], set()).add(kind)
    assert len(stacks) == 3
    assert all(len(own) == 1 for own in stacks.values())


@pytest.mark.parametrize("case", SIZES[:1])
def test_llama_cpp_computes_with_the_weights_that_were_judged(
    place: Path, fits: Fits, case: tuple[str, int]
) -> None:
    """Its tokens are those of transformers with the weights that are read back from the file."""
    found, (name, _) = fits(case), case
    (file,) = found.output.glob("*.gguf")
    source = PackableCheckpoint.open(place / name)
    back = GGUF_FILE.read_back(found.output, source)
    assert back is not None
    model = AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32)
    for matrix in source.matrices:
        model.get_parameter(matrix).data.copy_(back.read(matrix))
    assert_alike(file, model, byte_level())


@pytest.mark.slow
def test_more_bytes_lose_less(fits: Fits) -> None:
    small, large = fits(("tied", 340_000)), fits(LARGE)
    assert large.winner.divergence < small.winner.divergence / 4
    assert large.winner.file_bytes > 1.5 * small.winner.file_bytes


def test_pruned_rows_get_types_with_an_exact_zero() -> None:
    values = {one.values for one in GGUF_FILE.offered(512, zeros=True)}
    assert values == {"bfloat16", "q8_0", "q6_k", "q3_k"}
    values = {one.values for one in GGUF_FILE.offered(64, zeros=True)}
    assert values == {"bfloat16", "q8_0", "q5_0", "q4_0"}
    assert [one.values for one in GGUF_FILE.offered(40, zeros=False)] == ["bfloat16"]


def test_a_size_that_nothing_fits_names_the_smallest_one(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        secateur.fit(
            place / "tied", output=tmp_path / "no", max_size="100KiB", target="llama.cpp",
            calibration=place / "windows.safetensors",
        )  # fmt: skip
    least = str(caught.value.remedy).split(";")[0].rpartition(" ")[2]
    assert 100 * 2**10 < bytes_of(least) < 340_000


def test_a_model_that_llama_cpp_does_not_know_is_refused_before_work(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "gpt2")
    with pytest.raises(secateur.SecateurError):
        secateur.fit(tmp_path / "dense", output=tmp_path / "no", max_size="1MB", target="llama.cpp")
    assert not (tmp_path / "no.partial").exists()
