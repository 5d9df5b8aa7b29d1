"""Several sequences in one call: every one is computed as if it were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from with_kernels import needs_kernels

import secateur
from runtime.kernel_examples import TIERS
from runtime.packed_models import packed_model, settled
from secateur.errors import KernelError, ShapeError
from secateur.runtime.decode import SlotDecoder, Token
from secateur.runtime.kernels import library as lib

pytestmark = [needs_kernels, pytest.mark.usefixtures("settled")]
__all__ = ["settled"]

LENGTH = 12
CACHES = (None, "bf16", "int8")


def texts_of(count: int) -> torch.Tensor:
    return torch.randint(3, 96, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def model_of(folder: Path, family: str = "llama", **options: Any) -> Any:
    options.setdefault("head_dim", 16)
    dtype = options.get("dtype", torch.float32)
    return secateur.load(packed_model(folder, family, **options), dtype=dtype)


def alone(model: Any, texts: torch.Tensor, cache: str | None = None) -> torch.Tensor:
    """Logits after every token of each text, one token a call [texts, tokens, vocabulary]."""
    decoder = SlotDecoder(model, LENGTH, cache=cache)
    found = []
    for text in texts.tolist():
        decoder.rewind(0)
        found.append([decoder.step([Token(0, at, id)])[0] for at, id in enumerate(text)])
    return torch.stack([torch.stack(rows) for rows in found])


def together(decoder: SlotDecoder, texts: torch.Tensor, seed: int) -> torch.Tensor:
    """The same in calls of random tokens, in any order and with several tokens of one text."""
    random = torch.Generator().manual_seed(seed)
    texts_left = [[*enumerate(text)] for text in texts.tolist()]
    found = torch.zeros(*texts.shape, decoder.vocabulary)
    while any(texts_left):
        tokens: list[Token] = []
        room = int(torch.randint(1, 9, (1,), generator=random))
        for slot in torch.randperm(len(texts_left), generator=random).tolist():
            share = int(torch.randint(0, 4, (1,), generator=random))
            for _ in range(min(share, room - len(tokens), len(texts_left[slot]))):
                at, id = texts_left[slot].pop(0)
                tokens.append(Token(slot, at, id))
        if tokens:
            logits = decoder.step(tokens)
            for token, row in zip(tokens, logits, strict=True):
                found[token.slot, token.position] = row
    return found


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    "stored",
    [
        {"values": "int8"},
        {"values": "int8", "embeddings": "int8", "dtype": torch.bfloat16},
        {"values": "int4", "group_size": 32, "embeddings": "int4"},
        {"values": "float16"},
        {"values": "keep"},
        {"values": "int8", "sparsity": 0.02},
        {"values": "bfloat16", "dtype": torch.bfloat16},
        {"values": "bfloat16"},
        {"values": "bfloat16", "sparsity": 0.02, "dtype": torch.bfloat16},
    ],
    ids=lambda stored: ", ".join(map(str, stored.values())),
)
def test_neighbours_change_nothing(tmp_path: Path, stored: dict[str, Any], tier: str) -> None:
    """Bit for bit, whatever else is in the call."""
    best = lib.kernel_info().tier
    try:
        lib.use_tier(tier)
    except KernelError:
        pytest.skip(f"this processor has no {tier}")
    try:
        sizes = {"hidden_size": 100, "intermediate_size": 150}
        model = model_of(tmp_path, "qwen3", **sizes, **stored)
        texts = texts_of(5)
        expected = alone(model, texts)
        for seed in range(3):
            found = together(SlotDecoder(model, LENGTH + 3, slots=5), texts, seed)
            assert torch.equal(found, expected)
    finally:
        lib.use_tier(best)
    assert len({tuple(row) for row in expected[:, -1].tolist()}) == 5


def test_threads_change_nothing(tmp_path: Path) -> None:
    model = model_of(tmp_path, values="int8", hidden_size=100, intermediate_size=150)
    kernels = lib.library()
    assert kernels is not None
    usual, texts, found = kernels.sct_threads(), texts_of(4), []
    try:
        for threads in (1, 2, 3, 5):
            assert kernels.sct_set_threads(threads) == threads
            found.append(together(SlotDecoder(model, LENGTH, slots=4), texts, 1))
    finally:
        kernels.sct_set_threads(usual)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_prompts_in_pieces(tmp_path: Path, family: str) -> None:
    """Pieces through transformers, tokens through our loop: the logits of transformers."""
    options: dict[str, Any] = {"hidden_size": 64} if family == "qwen2" else {"head_dim": 16}
    if family == "mistral":
        options["sliding_window"] = LENGTH
    model = secateur.load(packed_model(tmp_path, family, **options), dtype=torch.float32)
    text = texts_of(1)[0]
    with torch.inference_mode():
        expected = model(input_ids=text[None], use_cache=False).logits[0]
    decoder = SlotDecoder(model, LENGTH, slots=2)
    decoder.read(1, text[:4])
    other = decoder.read(0, text[:7], every=True)
    decoder.step([Token(1, 4, int(text[4]), answered=False)])
    third = decoder.read(1, text[5:9])
    last = decoder.step([Token(1, 9 + n, int(text[9 + n]), n == 2) for n in range(3)])
    largest = float(expected.abs().max())
    for found, at in ((other, slice(7)), (third[0], 8), (last[0], 11)):
        torch.testing.assert_close(found, expected[at], rtol=1e-4, atol=1e-5 * largest)
    assert decoder.lengths == [7, 12]


@pytest.mark.parametrize("cache", CACHES)
def test_copied_keys_and_values_are_the_same_beginning(tmp_path: Path, cache: str | None) -> None:
    model = model_of(tmp_path, values="int8")
    text = texts_of(1)[0].tolist()
    expected = alone(model, torch.tensor([text]), cache)[0]
    decoder = SlotDecoder(model, LENGTH, slots=3, cache=cache)
    decoder.step([Token(2, at, id) for at, id in enumerate(text[:8])])
    parts = [decoder.copy_out(2, 0, 5), decoder.copy_out(2, 5, 8)]
    decoder.rewind(2)
    decoder.step([Token(2, at, 7) for at in range(8)])  # copies stay as they were
    for part in parts:
        decoder.copy_in(0, part)
    rest = decoder.step([Token(0, 8 + n, id) for n, id in enumerate(text[8:])])
    assert torch.equal(rest, expected[8:])


@pytest.mark.parametrize("cache", CACHES)
def test_a_slot_can_go_back(tmp_path: Path, cache: str | None) -> None:
    model = model_of(tmp_path, values="int8")
    text = texts_of(1)[0].tolist()
    expected = alone(model, torch.tensor([text]), cache)[0]
    decoder = SlotDecoder(model, LENGTH, cache=cache)
    decoder.step([Token(0, at, id) for at, id in enumerate(text[:6])])
    decoder.step([Token(0, 6 + n, 9) for n in range(4)])
    decoder.rewind(0, 6)
    assert torch.equal(decoder.step([Token(0, 6, text[6])])[0], expected[6])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    decoder = SlotDecoder(model_of(tmp_path, values="int8"), 4, slots=2)
    for tokens, message in (
        ([], "0 tokens in one call"),
        ([Token(0, n, 5) for n in range(9)], "9 tokens in one call, which takes 1 to 8"),
        ([Token(0, 1, 5)], "position 1"),
        ([Token(0, 0, 5), Token(0, 0, 6)], "position 0 of slot 0, which has 1 of 4"),
        ([Token(1, n, 5) for n in range(5)], "position 4 of slot 1, which has 4 of 4"),
        ([Token(0, 0, 96)], "token 96 is not in the vocabulary of 96"),
    ):
        with pytest.raises(ShapeError, match=message):
            decoder.step(tokens)
        assert decoder.lengths == [0, 0]
    decoder.step([Token(0, 0, 5)])
    with pytest.raises(ShapeError, match="5 tokens"):
        decoder.read(0, torch.tensor([5] * 5))
    with pytest.raises(ShapeError, match="not 2"):
        decoder.rewind(0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("embeddings", ["keep", "int8", "int4"])
@pytest.mark.parametrize("factor", [None, "Gemma", 7.3])
def test_embeddings_have_the_bits_of_the_module(
    tmp_path: Path, factor: Any, embeddings: str, dtype: torch.dtype
) -> None:
    """Rounded to bfloat16 after each product, as torch does."""
    options = {"values": "int4", "embeddings": embeddings, "group_size": 32, "dtype": dtype}
    options["hidden_size"] = 64  # rows of whole words
    model = model_of(tmp_path, "gemma3" if factor == "Gemma" else "llama", **options)
    if isinstance(factor, float):
        model.model.embedding_multiplier = factor  # of Granite
    decoder = SlotDecoder(model, LENGTH)
    # dense embeddings of Gemma are of a class of its own, which has the factor
    assert (decoder._rows is None) == (factor == "Gemma" and embeddings == "keep")
    tokens = [Token(0, place, id) for place, id in enumerate([0, 95, 7, 8, 41, 7])]
    found, decoder._rows = decoder._embedded(tokens), None
    assert found.dtype == torch.float32
    assert torch.equal(found, decoder._embedded(tokens))
