"""A fit to the types of a file: the same bytes and metadata, other codes, and less divergence."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf_models import byte_level, fields, of_quince, rewritten, save
from torch import Tensor
from torch.nn.functional import kl_div
from trained import source_text, train
from transformers import AutoModelForCausalLM

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError, VerificationError
from secateur.models.skeleton import quiet_transformers
from secateur.reporting.fit import FitResult

TYPES = ("q2_k", "q4_k_m", "iq4_xs")
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
HEAD = 8
THEIRS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned a little, its text, and files of llama.cpp's quantizer."""
    place, tokenizer = tmp_path_factory.mktemp("like"), byte_level()
    save(place / "dense", tokenizer, "llama", tie_word_embeddings=False, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    with torch.no_grad():  # as it is before it learns
        for parameter in model.parameters():
            parameter.div_(3)
    ids = torch.tensor(tokenizer(source_text()[:60_000])["input_ids"])
    train(model, ids, steps=40)
    with quiet_transformers():
        model.save_pretrained(place / "dense")
    save_windows(ids[: 24 * 64].view(24, 64), place / "windows.safetensors")
    for type in TYPES:
        secateur.export(place / "dense", output=place / type, type=type)
    return place


def file_in(folder: Path) -> Path:
    (file,) = folder.glob("*.gguf")
    return file


def like(place: Path, file: Path, output: str, **options: object) -> FitResult:
    found: FitResult = secateur.fit(
        place / "dense", output=place / output, like=str(file), effort="fast",
        calibration=place / "windows.safetensors", **options,
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def fits(place: Path) -> dict[str, FitResult]:
    """A fit to each file; the first one is healed."""
    more = {"q2_k": {"heal_tokens": 128}}
    return {x: like(place, file_in(place / x), f"out-{x}", **more.get(x, {})) for x in TYPES}


@pytest.mark.parametrize("type", TYPES)
def test_the_file_is_the_same_but_for_its_codes(
    place: Path, fits: dict[str, FitResult], type: str
) -> None:
    theirs, ours = file_in(place / type), file_in(fits[type].output)
    assert (ours.name, ours.stat().st_size) == (theirs.name, theirs.stat().st_size)
    assert fields(ours) == fields(theirs)
    pairs = zip(*(gguf.GGUFReader(file).tensors for file in (theirs, ours)), strict=True)
    for before, after in pairs:
        assert (before.name, before.tensor_type) == (after.name, after.tensor_type)
        assert (before.data.tobytes() == after.data.tobytes()) == (len(before.shape) == 1)
    assert fits[type].winner.file_bytes == ours.stat().st_size


@torch.no_grad()
def divergence(place: Path, file: Path) -> float:
    """Of a file, by transformers with the numbers that the package gguf reads."""
    tensors = {x.name: x for x in gguf.GGUFReader(file).tensors}

    def read(name: str) -> Tensor:
        one = tensors[f"{name}.weight"]
        return torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type))

    windows = torch.tensor(byte_level()(source_text()[:60_000])["input_ids"][: 24 * 64]).view(
        24, 64
    )[20:]  # that judge
    model = AutoModelForCausalLM.from_pretrained(place / "dense", dtype=torch.float32)
    dense = model(windows).logits.double().log_softmax(-1)
    model.model.embed_tokens.weight.copy_(read("token_embd"))
    model.lm_head.weight.copy_(read("output"))
    for ours, name in THEIRS.items():
        weight = read(f"blk.0.{name}")
        if ours[-6:] in ("q_proj", "k_proj"):  # back from neighbours to halves of heads
            weight = weight.view(-1, HEAD // 2, 2, 256).swapaxes(1, 2).reshape(weight.shape)
        model.get_parameter(f"model.layers.0.{ours}.weight").copy_(weight)
    other = model(windows).logits.double().log_softmax(-1)
    return float(kl_div(other, dense, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("type", TYPES)
def test_both_files_are_judged_by_their_own_weights(
    place: Path, fits: dict[str, FitResult], type: str
) -> None:
    found = fits[type].like
    assert found is not None
    ours, theirs = (divergence(place, file_in(x)) for x in (fits[type].output, place / type))
    assert (found.ours, found.theirs) == pytest.approx((ours, theirs), rel=1e-3, abs=2e-7)
    assert found.ours < found.theirs
    assert (found.kept, found.unchecked) == ((), ())


def test_codes_that_are_not_better_are_refused_with_both_numbers(
    place: Path, fits: dict[str, FitResult]
) -> None:
    """A fit to a file of ours makes the same codes again."""
    found = fits["iq4_xs"]
    assert found.like is not None
    with pytest.raises(VerificationError) as caught:
        like(place, file_in(found.output), "again")
    assert str(caught.value).count(f"{found.like.ours:.5f}") == 2
    assert caught.value.exit_code == 3
    assert not (place / "again").exists()


def test_a_file_of_an_unknown_family_in_parts(place: Path, tmp_path: Path) -> None:
    """Its layout comes from the file; the order of inputs of one matrix keeps it as it was."""
    tensors = of_quince(place / "dense")
    type = gguf.GGMLQuantizationType.Q4_0
    source = rewritten(tmp_path / "quince.gguf", tensors, type, tensors_of_part=3)
    found = like(place, source.file, "quince").like
    assert found is not None
    assert found.ours < found.theirs
    assert found.kept == ("blk.0.last.weight",)
    assert found.unchecked == ("blk.0.norm.weight",)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    made = [place / "quince" / part.name for part in parts]
    assert [x.stat().st_size for x in made] == [x.stat().st_size for x in parts]


@pytest.mark.parametrize("other", [{"max_size": "1MiB"}, {"target": "llama.cpp"}])
def test_a_file_decides_the_size(place: Path, other: dict[str, str]) -> None:
    with pytest.raises(RecipeError) as caught:
        like(place, file_in(place / "q2_k"), "no", **other)
    assert "--like" in str(caught.value) or "like" in str(caught.value)
