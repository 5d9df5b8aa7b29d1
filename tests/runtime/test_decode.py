"""One call into C for each token gives the logits of transformers."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from slow import slow
from with_kernels import needs_kernels

import secateur
from runtime.kernel_examples import TIERS, using
from runtime.packed_models import packed_model, pruned_folder, python, settled
from secateur.errors import ArchitectureError, KernelError, ShapeError
from secateur.models.skeleton import quiet_transformers
from secateur.recipes.deploy import Sampling
from secateur.runtime.decode import Decoder, SlotDecoder, Token, continued
from secateur.runtime.kernels import library as lib
from secateur.runtime.kernels.linear import PackedLinear
from secateur.runtime.layer_forms import why_not

pytestmark = [needs_kernels, pytest.mark.usefixtures("settled")]
__all__ = ["settled"]

PROMPT = torch.tensor([5, 17, 80, 33, 4])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied, biases": ("llama", {"head_dim": 16}),
    "llama, untied": ("llama", {"head_dim": 16, "tie_word_embeddings": False}),
    "groups of one": ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
    "one group": ("llama", {"head_dim": 32, "num_key_value_heads": 1}),
    "odd widths": ("llama", {"head_dim": 16, "hidden_size": 100, "intermediate_size": 150}),
    "wide": ("llama", {"head_dim": 32, "hidden_size": 320, "intermediate_size": 576}),
    "llama3 positions": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": 20}),
    "qwen2": ("qwen2", {"hidden_size": 64}),
    "narrow heads": ("llama", {"head_dim": 8}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


def reference(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of transformers after every token [tokens, vocabulary]."""
    with torch.inference_mode():
        return model(input_ids=tokens[None], use_cache=False).logits[0].float()


def decoded(decoder: Decoder, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """Ours, from the last of the prompt on."""
    found = [decoder.prefill(tokens[:prompt])]
    return torch.stack(found + [decoder.step(int(token)) for token in tokens[prompt:]])


def some_tokens(count: int = 35, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (count,), generator=torch.Generator().manual_seed(seed))


def both(model: Any, count: int = 35) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and those of transformers, from the last of a prompt of five tokens on."""
    tokens = some_tokens(count)
    return decoded(Decoder(model, count), tokens, 5), reference(model, tokens)[4:]


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To the rounding of activations, which differs a little between the two ways."""
    assert float((found - expected).norm() / expected.norm()) < 0.05


def model_of(folder: Path, shape: str, dtype: torch.dtype, **stored: Any) -> Any:
    family, sizes = SHAPES[shape]
    return secateur.load(packed_model(folder, family, **stored, **sizes), dtype=dtype)


@pytest.mark.parametrize("shape", [*SHAPES])
def test_float32_logits_are_those_of_transformers(tmp_path: Path, shape: str) -> None:
    found, expected = both(model_of(tmp_path, shape, torch.float32))
    assert found.shape == (31, 96)
    largest = float(expected.abs().max())
    assert largest > 0.01
    for steps in (0, 1, 2, 30):
        torch.testing.assert_close(found[steps], expected[steps], rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", ["llama, tied, biases", "odd widths", "qwen3"])
def test_bfloat16_logits_are_as_near_as_those_of_transformers(
    tmp_path: Path, shape: str, tier: str
) -> None:
    best = lib.kernel_info().tier
    try:
        lib.use_tier(tier)
    except KernelError:
        pytest.skip(f"this processor has no {tier}")
    try:
        exact = model_of(tmp_path, shape, torch.float32, values="bfloat16")
        model = secateur.load(tmp_path / "packed")
        assert model.dtype == torch.bfloat16
        wanted = reference(exact, some_tokens())[4:]
        ours, theirs = both(model)
    finally:
        lib.use_tier(best)
    usual = float((theirs[1:] - wanted[1:]).norm())
    assert usual > 0
    assert float((ours[1:] - wanted[1:]).norm()) < 1.5 * usual


@pytest.mark.parametrize(
    ("values", "embeddings", "shape"),
    [
        *product(["int8"], ["auto", "int8"], ["llama, tied, biases", "wide"]),
        *product(["int4", "int3", "int2"], ["int4"], ["llama, tied, biases", "odd widths", "wide"]),
    ],
)
def test_logits_of_integers(tmp_path: Path, values: str, embeddings: str, shape: str) -> None:
    group = {} if values == "int8" else {"group_size": 32}
    stored = {"values": values, "embeddings": embeddings, **group}
    model = model_of(tmp_path, shape, torch.float32, **stored)
    groups = {x.matrix.group for x in model.modules() if isinstance(x, PackedLinear)}
    assert groups == {group.get("group_size")}
    assert_near(*both(model))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", [*SHAPES])
@pytest.mark.parametrize("stored", ["int8", "int4", "bfloat16", "float32"])
def test_a_prompt_in_one_call(tmp_path: Path, shape: str, stored: str, tier: str) -> None:
    """In pieces, the last longer than a tile of keys: what transformers computes, and the steps."""
    group = {"group_size": 32, "embeddings": "int4"} if stored == "int4" else {}
    length = 150
    tokens = some_tokens(length)
    with using(tier):
        model = model_of(tmp_path, shape, torch.float32, values=stored, **group)
        decoder, stepped = SlotDecoder(model, length, slots=2), SlotDecoder(model, length)
        pieces = [decoder.read(1, part, every=True) for part in tokens.split([3, 37, length - 40])]
        expected = reference(model, tokens)
        steps = [stepped.step([Token(0, n, int(t))]) for n, t in enumerate(tokens[:60])]
        decoder.rewind(1, 40)
        last = decoder.read(1, tokens[40:])
    found = torch.cat(pieces)
    assert found.shape == expected.shape
    for other in (expected, torch.cat(steps)):
        mine = found[: len(other)]
        assert float((mine - other).norm() / other.norm()) < 0.02
    torch.testing.assert_close(last[0], found[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("shape", ["llama, untied", "mistral", "odd widths"])
@pytest.mark.parametrize("stored", ["int8", "int4", "bfloat16"])
def test_a_token_of_each_of_many_slots(tmp_path: Path, shape: str, stored: str, tier: str) -> None:
    """Slots of all lengths, of which some are left out, against prompts of one slot alone."""
    with using(tier):
        model = model_of(tmp_path, shape, torch.float32, values=stored)
        many, alone = SlotDecoder(model, 40, 20), SlotDecoder(model, 40)
        texts = [some_tokens(15 + slot, seed=slot) for slot in range(18)]
        for slot, text in enumerate(texts):
            many.read(slot, text[:-3])
        for late in (3, 2, 1):
            ids = torch.stack([text[-late] for text in texts])
            found = many.advance(ids, answered=late != 2)
            assert found.shape == (0 if late == 2 else 18, 96)
            for slot, text in enumerate(texts):
                if late == 2:
                    continue
                alone.rewind(0)
                expected = alone.read(0, text[: len(text) - late + 1])[0]
                torch.testing.assert_close(found[slot], expected, rtol=1e-3, atol=1e-4)
        assert many.lengths == [15 + slot for slot in range(18)] + [0, 0]


def test_many_slots_that_do_not_fit(tmp_path: Path) -> None:
    decoder = SlotDecoder(model_of(tmp_path, "qwen3", torch.float32), 3, 2)
    with pytest.raises(ShapeError, match="3 tokens for 2 slots"):
        decoder.advance(torch.tensor([4, 4, 4]))
    with pytest.raises(ShapeError, match="token 96"):
        decoder.advance(torch.tensor([4, 96]))
    for _ in range(3):
        decoder.advance(torch.tensor([4, 5]))
    with pytest.raises(ShapeError, match="of 3"):
        decoder.advance(torch.tensor([4]))


def test_matrices_of_all_kinds_in_one_layer(tmp_path: Path) -> None:
    """Gate and up share activations only where their layouts agree."""
    kinds: dict[str, dict[str, Any]] = {
        "gate_proj": {"values": "int4", "group_size": 32},
        "up_proj": {"values": "int4", "group_size": 64},
        "down_proj": {"values": "int8"},
        "q_proj": {"values": "int3", "group_size": 128},
        "k_proj": {"values": "bfloat16"},
    }
    family, sizes = SHAPES["wide"]
    sizes = {**sizes, "num_hidden_layers": 1}
    model = secateur.load(packed_model(tmp_path / "float32", family, **sizes))
    for name, stored in kinds.items():
        folder = packed_model(tmp_path / name, family, **stored, **sizes)
        other = dict(secateur.load(folder, dtype=torch.float32).named_modules())
        for path, module in model.named_modules():
            if path.endswith(name):
                module.matrix = other[path].matrix
    assert_near(*both(model))


def test_dense_and_float16_models(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path / "dense", head_dim=16)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 3e-2)):
        found, expected = both(secateur.load(folder, dtype=dtype), 12)
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("shape", ["llama, tied, biases", "mistral", "qwen2", "qwen3"])
def test_greedy_text_is_that_of_generate(tmp_path: Path, shape: str) -> None:
    model = model_of(tmp_path, shape, torch.float32)
    with quiet_transformers():
        expected = model.generate(
            PROMPT[None], max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert [*continued(Decoder(model, 35), PROMPT, 30)] == expected[0, 5:].tolist()


def test_threads_do_not_change_the_logits(tmp_path: Path) -> None:
    model = model_of(tmp_path, "odd widths", torch.float32)
    kernels = lib.library()
    assert kernels is not None
    usual = kernels.sct_threads()
    tokens = some_tokens(15)
    try:
        found = []
        for threads in (1, 2, 3, 5):
            assert kernels.sct_set_threads(threads) == threads
            found.append(decoded(Decoder(model, 15), tokens, 1))
    finally:
        kernels.sct_set_threads(usual)
    # the prompt went through transformers; its one token is compared as well
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_two_decoders_of_one_model(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama, tied, biases", torch.float32)
    texts = some_tokens(20, seed=1), some_tokens(20, seed=2)
    alone = [decoded(Decoder(model, 20), text, 3) for text in texts]
    first, second = Decoder(model, 20), Decoder(model, 40)
    assert torch.equal(first.prefill(texts[0][:3]), alone[0][0])
    assert torch.equal(second.prefill(texts[1][:3]), alone[1][0])
    for number in range(17):
        assert torch.equal(first.step(int(texts[0][3 + number])), alone[0][1 + number])
        assert torch.equal(second.step(int(texts[1][3 + number])), alone[1][1 + number])
    assert torch.equal(decoded(first, texts[1], 3), alone[1])


def test_a_decoder_outlives_the_model(tmp_path: Path) -> None:
    tokens = some_tokens(10)
    model = model_of(tmp_path, "llama, tied, biases", torch.float32)
    expected = decoded(Decoder(model, 10), tokens, 3)
    decoder = Decoder(secateur.load(tmp_path / "packed", dtype=torch.float32), 10)
    del model
    torch.testing.assert_close(decoded(decoder, tokens, 3), expected)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama, tied, biases", torch.float32)
    decoder = Decoder(model, 6)
    for prompt, message in (
        (torch.zeros(0, dtype=torch.long), "a prompt of 0 tokens"),
        (some_tokens(7), "a prompt of 7 tokens, for a cache of 6"),
        (torch.tensor([3, 96]), "token 96"),
        (torch.tensor([-1]), "token -1"),
    ):
        with pytest.raises(ShapeError, match=message):
            decoder.prefill(prompt)
    decoder.prefill(PROMPT)
    for token in (96, -1):
        with pytest.raises(ShapeError, match=f"token {token}"):
            decoder.step(token)
    decoder.step(3)
    with pytest.raises(ShapeError, match="of 6"):
        decoder.step(3)
    assert len([*continued(decoder, PROMPT, 2)]) == 2
    with pytest.raises(ShapeError, match="of 6"):
        [*continued(decoder, PROMPT, 3)]


UNFIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("gpt2", {}, "gpt2"),
    "activation": ("llama", {"head_dim": 16, "hidden_act": "gelu"}, "its activation is gelu"),
    "positions": (
        "llama",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        },
        "of the kind dynamic",
    ),
}


@pytest.mark.parametrize("case", [*UNFIT])
def test_models_of_another_shape_are_refused(tmp_path: Path, case: str) -> None:
    family, changes, message = UNFIT[case]
    model = secateur.load(pruned_folder(tmp_path, family, **changes))
    assert message in (why_not(model) or "")
    with pytest.raises(ArchitectureError, match=r"model.generate"):
        Decoder(model, 9)


def test_a_window(tmp_path: Path) -> None:
    folder = packed_model(tmp_path, "mistral", head_dim=16, sliding_window=8)
    model = secateur.load(folder, dtype=torch.float32)
    tokens = some_tokens(30)
    for prompt in (3, 8, 9, 20):
        found = decoded(Decoder(model, 30), tokens, prompt)
        expected = reference(model, tokens)[prompt - 1 :]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_stop_tokens_and_seeds(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama, tied, biases", torch.float32)
    decoder = Decoder(model, 40)
    text = [*continued(decoder, PROMPT, 30)]
    assert len(text) == 30
    ended = [*continued(decoder, PROMPT, 30, stop=[text[4], 95])]
    assert ended == text[: text.index(text[4])]

    def drawn(temperature: float, seed: int) -> list[int]:
        return [
            *continued(decoder, PROMPT, 30, sampling=Sampling(temperature=temperature, seed=seed))
        ]

    assert drawn(1.0, 1) == drawn(1.0, 1)
    assert drawn(1.0, 1) != drawn(1.0, 2)
    assert drawn(1e-6, 1) == text
    assert [*continued(decoder, PROMPT, 0)] == []


FORK = """
import os, sys, threading, torch
from secateur.runtime.kernels import library as lib
from secateur.runtime.kernels.matrix import KernelMatrix

lib.library().sct_set_threads(3)
matrix, x = KernelMatrix(torch.randn(256, 256)), torch.randn(1, 256)
expected = matrix.multiply(x)
done = threading.Event()

def work():
    while not done.is_set():
        matrix.multiply(x)

if sys.argv[1] == "busy":  # somebody else is within a call when the process is forked
    other = threading.Thread(target=work)
    other.start()
for _ in range(10):
    child = os.fork()
    if not child:
        same = all(torch.equal(matrix.multiply(x), expected) for _ in range(20))
        os._exit(0 if same and lib.library().sct_threads() == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(matrix.multiply(x), expected)
if sys.argv[1] == "busy":
    done.set()
    other.join()
"""


@pytest.mark.parametrize("other", [slow("idle"), "busy"])
def test_a_forked_child_has_threads_of_its_own(other: str) -> None:
    done = python(FORK, other, timeout=60)
    assert done.returncode == 0, done.stderr
