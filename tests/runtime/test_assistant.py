"""A draft as `assistant_model` of transformers: the parent's text with fewer of its calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import save_trained, source_ids
from transformers import AutoModelForCausalLM
from with_kernels import needs_kernels

import secateur
from secateur.models.skeleton import quiet_transformers

pytestmark = needs_kernels
TOKENS = 48
PROMPTS = [source_ids(held_out=True)[begin : begin + 24][None] for begin in (0, 700, 9000)]


def plainly(folder: Path) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained parent, and three drafts of it: rounded, pruned and rounded, with half the layers.

    The last one is not compressed.
    """
    place = tmp_path_factory.mktemp("drafts")
    save_trained(place / "parent", steps=80)
    secateur.compress(place / "parent", output=place / "parent8", values="int8")
    secateur.compress(place / "parent", output=place / "int4", values="int4", group_size=32)
    secateur.prune(place / "parent", output=place / "half", method="magnitude", sparsity=0.5)
    secateur.compress(place / "half", output=place / "zeros", values="int4", embeddings="int8")
    secateur.structure(
        place / "parent",
        output=place / "shallow",
        keep_layers=1,
        effort="fast",
        distill_epochs=0,
        calibration="boolq-calibration",
        windows=4,
        sequence_length=32,
    )
    return place


@pytest.mark.parametrize("load", [secateur.load, plainly])
@pytest.mark.parametrize(
    ("parent", "draft"),
    [("parent", "int4"), ("parent", "zeros"), ("parent", "shallow"), ("parent8", "int4")],
)
def test_the_text_is_the_parents(
    place: Path, load: Callable[[Path], Any], parent: str, draft: str
) -> None:
    model, assistant = load(place / parent), load(place / draft)
    assert assistant.config.vocab_size == model.config.vocab_size
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda _, __, options: calls.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    how = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drafted = 0
    for prompt in PROMPTS:
        with quiet_transformers():
            alone = model.generate(prompt, **how)
            calls.clear()
            helped = model.generate(prompt, assistant_model=assistant, **how)
        assert torch.equal(helped, alone)
        assert alone.shape[1] == prompt.shape[1] + TOKENS
        drafted += TOKENS - len(calls)
    assert drafted > TOKENS  # of three texts, more than a third is the draft's
