"""The residual streams that a decoder writes out are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from with_kernels import needs_kernels

import secateur
from runtime.packed_models import packed_model, settled
from secateur.errors import ShapeError
from secateur.runtime.decode import SlotDecoder, Token

pytestmark = [needs_kernels, pytest.mark.usefixtures("settled")]
__all__ = ["settled"]

TEXT = torch.randint(3, 96, (14,), generator=torch.Generator().manual_seed(4))


def model_of(folder: Path, family: str = "llama") -> Any:
    return secateur.load(packed_model(folder, family, head_dim=16), dtype=torch.float32)


def expected(model: Any, taps: tuple[int, ...]) -> torch.Tensor:
    """What enters the layers, and what leaves the last one, by hooks [tokens, taps, hidden]."""
    layers, found = model.model.layers, dict[int, torch.Tensor]()
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, n=n: found.__setitem__(n, given[0][0]))
        for n, layer in enumerate([*layers, model.model.norm])
    ]
    with torch.inference_mode():
        model(input_ids=TEXT[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([found[tap] for tap in taps], 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "olmo2"])
def test_states_are_the_inputs_of_layers(tmp_path: Path, family: str) -> None:
    """Read at once, by tokens of several slots in any order, and by one token of each slot."""
    model = model_of(tmp_path, family)
    taps = (0, 1, len(model.model.layers))
    wanted = expected(model, taps)
    decoder = SlotDecoder(model, len(TEXT), slots=3, taps=taps)
    decoder.read(0, TEXT[:9])
    decoder.step([Token(0, 9 + n, int(id), n == 2) for n, id in enumerate(TEXT[9:12])])
    decoder.step([Token(2, 0, 5), Token(0, 12, int(TEXT[12])), Token(2, 1, 6)])
    decoder.read(1, TEXT[:13], every=True)
    decoder.advance(TEXT[[13, 13, 13]][:2], answered=False)
    for slot in (0, 1):
        unchanged, states = decoder.take_states(slot)
        assert unchanged == 0
        torch.testing.assert_close(states, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert len(decoder.take_states(2)[1]) == 2


def test_states_follow_rewinds_and_copies(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    decoder = SlotDecoder(model, len(TEXT), taps=(1,))
    decoder.read(0, TEXT)
    whole = decoder.take_states(0)[1]
    known = decoder.copy_out(0, 0, 4)
    assert known is not None
    unchanged, none = decoder.take_states(0)
    assert (unchanged, len(none)) == (14, 0)
    decoder.rewind(0, 6)
    decoder.read(0, TEXT[6:10])
    decoder.rewind(0, 8)
    decoder.step([Token(0, 8, int(TEXT[8]))])
    unchanged, states = decoder.take_states(0)
    assert unchanged == 6
    torch.testing.assert_close(states, whole[6:9], rtol=1e-4, atol=1e-4)
    decoder.rewind(0, 2)
    decoder.rewind(0, 0)
    decoder.copy_in(0, known)
    decoder.read(0, TEXT[4:9])
    unchanged, states = decoder.take_states(0)
    assert (unchanged, len(states)) == (0, 5)
    torch.testing.assert_close(states, whole[4:9], rtol=1e-4, atol=1e-4)
    for taps in ((9,), (-1,)):
        with pytest.raises(ShapeError, match="layers of a model"):
            SlotDecoder(model, 8, taps=taps)
