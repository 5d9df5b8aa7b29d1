"""Decoding with a model's own MTP layer: the same text, whatever the cache of its family is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from at_rest import save_in, stored_tensors
from further import FORMS, Predictor, save_foreseen, save_further
from safetensors.torch import save_file
from same_logits import assert_same_logits
from slow import slow_but
from with_kernels import needs_kernels

from secateur.errors import CheckpointError
from secateur.models.opening import load_whole
from secateur.recipes.deploy import Sampling
from secateur.runtime.decode import Decoder, Token, continued
from secateur.runtime.mtp import ModuleDecoder, ModuleSlots, MTPDecoder, mtp_of, write_mtp
from secateur.runtime.speculative import DraftedText, HeadDrafter, open_drafter, speculated

GREEDY = Sampling(temperature=0)
QUICK = ("glm4_moe", "qwen3_5_moe fused")


def opened(folder: Path) -> Any:
    return load_whole(folder, torch.device("cpu"), dtype=torch.float32)


def drafter_of(slots: Any, folder: Path) -> HeadDrafter:
    """It proposes as many tokens as fit, however long they take."""
    mtp, ids = mtp_of(slots.model, folder)
    drafter = HeadDrafter(MTPDecoder(mtp, slots), slots, ids)
    pace: Any = drafter.pace
    pace.awake, pace.accepts, pace.value = lambda: True, lambda sure: 1.0, lambda texts: 1.0
    return drafter


@pytest.mark.parametrize("name", slow_but(QUICK, FORMS))
def test_the_text_is_the_same(name: str, tmp_path: Path) -> None:
    """Twice, the second prompt going on from the first text; and each place is the oracle's."""
    folder = save_further(tmp_path / "m", name)
    model, proposed = opened(folder), list[tuple[list[int], Any]]()
    decoder, alone = ModuleDecoder(model, 200), Predictor(folder, name)
    drafter: Any = drafter_of(decoder.slots, folder)
    step = drafter.step

    def seen(texts: list[tuple[int, list[int]]]) -> torch.Tensor:
        found = step(texts)
        proposed.append((texts[0][1], found))
        return found

    drafter.step = seen
    text = torch.randint(3, 96, (9,), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        new = [*speculated(decoder, drafter, text, 24, sampling=GREEDY)]
        assert new == [*continued(ModuleDecoder(model, 200), text, 24, sampling=GREEDY)]
        text = torch.cat([text, torch.tensor(new)])
    assert drafter.proposed > 50
    # the first chain: the text so far is the prompt and its first new token
    states = model.model(text[None, :9]).last_hidden_state
    read = torch.cat([text[1:10], torch.tensor([ids[-1] for ids, _ in proposed[1:3]])])
    for place, logits in enumerate(alone.chain(states, read[None], 3)):
        assert_same_logits(proposed[place][1][0], logits)


@needs_kernels
def test_a_parent_that_one_call_decodes(tmp_path: Path) -> None:
    folder = save_foreseen(tmp_path / "m", "minimax_m2")
    model, prompt = opened(folder), torch.arange(5, 20)
    decoder = Decoder(model, 200)
    drafter = drafter_of(decoder.slots, folder)
    found = [*speculated(decoder, drafter, prompt, 40, sampling=GREEDY)]
    assert found == [*continued(Decoder(model, 200), prompt, 40, sampling=GREEDY)]
    assert drafter.accepted == drafter.proposed > 20


@pytest.mark.parametrize("name", QUICK)
def test_what_the_layer_knows_is_taken(name: str, tmp_path: Path) -> None:
    folder = save_foreseen(tmp_path / "m", name)
    model, prompt = opened(folder), torch.arange(5, 20)
    decoder = ModuleDecoder(model, 200)
    drafter = drafter_of(decoder.slots, folder)
    found = [*speculated(decoder, drafter, prompt, 40, sampling=GREEDY)]
    assert found == [*continued(ModuleDecoder(model, 200), prompt, 40, sampling=GREEDY)]
    assert drafter.accepted == drafter.proposed > 20


@pytest.mark.parametrize("name", QUICK)
def test_a_text_that_goes_back(name: str, tmp_path: Path) -> None:
    """Logits and states as of a text that was read at once, after any rejected tokens."""
    model = opened(save_further(tmp_path / "m", name))
    slots, ids = ModuleSlots(model, 50), torch.arange(5, 25).tolist()
    slots.read(0, torch.tensor(ids[:8]))
    for length, rejected in ((8, 3), (10, 1), (15, 7), (15, 2)):
        more = ids[len(slots.text) : length] + [40 + n for n in range(rejected)]
        slots.step([Token(0, len(slots.text) + n, x) for n, x in enumerate(more)])
        assert slots.kept(0, length) == length
        slots.rewind(0, length)
        assert slots.lengths == [length]
    logits = slots.step([Token(0, 15 + n, x) for n, x in enumerate(ids[15:])])
    with torch.inference_mode():
        whole = model(torch.tensor([ids]))
        states = model.model(torch.tensor([ids])).last_hidden_state[0]
    assert_same_logits(logits, whole.logits[0, 15:])
    unchanged, found = slots.take_states(0)
    assert unchanged == 0
    assert_same_logits(found, states)
    assert slots.take_states(0)[1].shape == (0, 32)
    recurrent = "qwen" in name
    assert slots.kept(0, 4) == (0 if recurrent else 4)


def test_states_that_are_missing_begin_the_layer_anew(tmp_path: Path) -> None:
    """As after keys that another text has left: what it reads first is after them."""
    folder = save_further(tmp_path / "m", "glm4_moe")
    model = opened(folder)
    slots = ModuleSlots(model, 50)
    drafter = drafter_of(slots, folder)
    slots.read(0, torch.arange(5, 12))
    slots.take_states(0)
    slots.read(0, torch.arange(12, 15))
    text: Any = DraftedText(0, [*range(5, 16)], None, 3)
    assert drafter.unread(text) == [13, 14, 15]
    drafter.step([(0, [13, 14, 15])])
    assert (drafter.begins, drafter.decoder.lengths) == ([7], [3])


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Path, Any]:
    """A model, and a draft of some of its tokens."""
    folder, made = save_further(tmp_path / "m", "glm4_moe"), tmp_path / "d"
    model = opened(folder)
    made.mkdir()
    write_mtp(made, mtp_of(model, folder)[0].head, torch.tensor([2, 5, 7]), "m", 3)
    return folder, made, model


def test_a_list_of_tokens_comes_back(written: tuple[Path, Path, Any]) -> None:
    folder, made, model = written
    found: Any = open_drafter(made, folder, ModuleSlots(model, 20), None)
    assert found.ids.tolist() == [2, 5, 7]
    whole: Any = mtp_of(model, folder)[0].head
    assert torch.equal(found.decoder.head.weight, whole.weight[[2, 5, 7]])


@pytest.mark.parametrize("fault", ["ids", "rows", "file"])
def test_a_damaged_draft_is_refused(fault: str, written: tuple[Path, Path, Any]) -> None:
    folder, made, model = written
    tensors = {"ids": torch.tensor([2, 5, 7]), "lm_head.weight": torch.zeros(3, 32)}
    if fault == "ids":
        tensors["ids"][2] = 96
    if fault == "rows":
        tensors["lm_head.weight"] = torch.zeros(3, 31)
    save_file(tensors, made / "model.safetensors")
    if fault == "file":
        (made / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_drafter(made, folder, ModuleSlots(model, 20), None)


def test_of_several_layers_the_first_proposes(tmp_path: Path) -> None:
    source = save_foreseen(tmp_path / "m", "glm4_moe")
    tensors = stored_tensors(source)
    more = {
        n.replace(".3.", ".4.", 1): torch.randn_like(x) for n, x in tensors.items()
        if ".layers.3." in n
    }  # fmt: skip
    save_in(source, tensors | more, 1)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 2}))
    decoder, prompt = ModuleDecoder(opened(source), 200), torch.arange(5, 20)
    drafter = drafter_of(decoder.slots, source)
    assert len([*speculated(decoder, drafter, prompt, 40, sampling=GREEDY)]) == 40
    assert drafter.accepted == drafter.proposed > 20
