"""A fit that may remove experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from gguf_models import byte_level, save
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.checkpoint import shard_files
from secateur.recipes.options import bytes_of

MIXTURE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
SIZE = "130KiB"
"""All experts in the fewest bits need more."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture, a dense model and windows."""
    place = tmp_path_factory.mktemp("experts")
    save(place / "mixture", byte_level(), "qwen3_moe", **MIXTURE)
    save(place / "dense", byte_level(), "llama")
    save_windows(tiny_windows(18, 48), place / "windows.safetensors")
    return place


def test_experts_go_where_the_fewest_bits_do_not_fit(place: Path, tmp_path: Path) -> None:
    options = {"effort": "fast", "target": "llama.cpp", "max_size": SIZE}
    text = {"calibration": place / "windows.safetensors"}
    with pytest.raises(RecipeError, match="no model fits"):
        secateur.fit(place / "mixture", output=tmp_path / "out", **options, **text)
    found = secateur.fit(
        place / "mixture", output=tmp_path / "out", structure=True, **options, **text
    )
    (made,) = found.finalists
    (file,) = found.output.glob("*.gguf")
    assert file.stat().st_size == made.file_bytes <= bytes_of(SIZE)
    config = secateur.load(found.output).config
    assert made.name == f"the mix, {config.num_experts} experts"
    assert 4 <= config.num_experts < 8
    experts = {name for name in found.kind_of if ".layers.0.mlp.experts." in name}
    assert len(experts) == 3 * config.num_experts
    recipe = found.output / "secateur" / "recipe.yaml"
    again = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    secateur.chain(again.pop("model"), **{**again, "output": tmp_path / "again"})
    for one in shard_files(found.output):
        assert (tmp_path / "again" / one.name).read_bytes() == one.read_bytes()


def test_all_experts_stay_where_that_is_predicted_to_lose_less(place: Path, tmp_path: Path) -> None:
    found = secateur.fit(
        place / "mixture", output=tmp_path / "out", structure=True, effort="fast",
        max_size="700KiB", calibration=place / "windows.safetensors",
    )  # fmt: skip
    assert secateur.load(found.output).config.num_experts == 8


def test_a_dense_model_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="no experts") as caught:
        secateur.fit(
            place / "dense", output=tmp_path / "out", structure=True, max_size="60KiB",
            calibration=place / "windows.safetensors",
        )  # fmt: skip
    assert caught.value.where == "structure"
