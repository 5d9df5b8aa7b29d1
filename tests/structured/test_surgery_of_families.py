"""Families with a declaration and nothing unusual in their code: cut, against the same masked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cuts import CUTS, close
from slow import slow_but
from test_surgery import cut_quietly, greedy, logits, masked
from zoo import DENSE, WITH_BUFFERS, tiny_model, tiny_windows

from secateur.errors import ArchitectureError
from secateur.models.architecture import describe
from secateur.models.skeleton import build_skeleton, quiet_transformers
from secateur.structured.accounting import accounting
from secateur.structured.cut import Cut, sizes_of
from secateur.structured.surgery import VariedSizesWarning, cut_checkpoint

ALIKE = {"last layers", "queries", "neurons, differing", "hidden, odd"}
"""Cuts that walk the way of another one; `test_surgery` tries them with its families."""

CASES = [
    *((f, cut) for f in DENSE if f not in WITH_BUFFERS for cut in CUTS if cut not in ALIKE),
    *((family, "neurons, differing") for family in ("bloom", "falcon new")),
]
FEW = [
    *((family, "neurons, differing") for family in ("bloom", "falcon new")),
    *((family, "everything") for family in ("cohere", "exaone", "glm4", "granite_swa")),
    *((family, "everything") for family in ("nemotron", "phi", "gptj", "stablelm parallel")),
]


@pytest.mark.parametrize(("family", "name"), slow_but(FEW, CASES))
def test_cut_equals_masked_and_loads_and_generates(family: str, name: str, tmp_path: Path) -> None:
    model: Any = tiny_model(family)
    sizes, couplings = sizes_of(model), describe(model).couplings
    cut, windows = CUTS[name](sizes), tiny_windows(2)
    if any({"queries": "groups"}.get(kind, kind) in couplings.fixed for kind in cut.kinds):
        with pytest.raises(ArchitectureError, match=r"cannot be cut"):
            cut_quietly(model, cut)
        return
    smaller = cut_quietly(model, cut)
    assert close(logits(smaller, windows), masked(family, cut, windows))
    with quiet_transformers():
        model.save_pretrained(tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VariedSizesWarning)
        counted = cut_checkpoint(tmp_path / "source", cut, tmp_path / "out")
    assert counted == accounting(model, cut) == accounting(build_skeleton(tmp_path / "source"), cut)
    assert counted.after.parameters == sum(p.numel() for p in smaller.parameters())
    with quiet_transformers():
        loaded, found = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert close(logits(loaded.eval(), windows), logits(smaller, windows))
    prompt = windows[:, :9]  # longer than the sliding windows
    with_cache, without = (greedy(loaded, prompt, 4, use) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    assert close(torch.stack(with_cache.logits), torch.stack(without.logits))


def test_no_position_layers_keep_their_sort() -> None:
    smaller = cut_quietly(tiny_model("smollm3"), Cut(layers=(1, 2)))
    assert smaller.config.no_rope_layers == [1, 0]
    assert [layer.self_attn.use_rope for layer in smaller.model.layers] == [1, 0]
