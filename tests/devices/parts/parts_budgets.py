"""What a verb asks of a GPU, at two sizes of everything: launches, waits, bytes across.

A run asks for a·(micro-batches · layers) + b·layers + …, or for a mixture of experts
c·(experts · micro-batches) + d·experts + … in each layer. Differences of runs give a, b, c and d,
and the tables bound them. A change that asks for less lowers its numbers here.

A wait takes about as long as four launches, because the host can launch nothing meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from pretended import Traffic, counted
from tiny import tiny_tokenizer
from zoo import SIZES

import secateur
from secateur.calibration.windows import save_windows

LENGTH, FEW, MANY = 16, 4, 8
"""Tokens of a micro-batch, and the two sizes."""
STATES = 4 * LENGTH * SIZES["hidden_size"]
"""Bytes of the hidden states of a micro-batch."""


class Dense(NamedTuple):
    """The most that a verb asks for in a dense model.

    Attributes:
        launches: of a micro-batch in a layer, in all passes together.
        waits: likewise.
        of_layer: launches for the rest of a layer: 7 linear layers, and the files.
        of_layer_waits: waits for that.
        weights_up: how often the weights of a layer go to the GPU.
        states_up: how often the hidden states of a layer go to the GPU.
        states_down: how often they come back.
    """

    launches: float
    waits: float
    of_layer: float
    of_layer_waits: float
    weights_up: float
    states_up: float = 0
    states_down: float = 1


class Mixture(NamedTuple):
    """The most that a verb asks for in a layer of a mixture of experts.

    Attributes:
        launches: of an expert in a micro-batch, in all passes together.
        waits: likewise.
        of_expert: launches for the rest of an expert: 3 linear layers.
        of_expert_waits: waits for that.
    """

    launches: float
    waits: float
    of_expert: float
    of_expert_waits: float


DENSE: dict[str, Dense] = {
    "wanda": Dense(60, 1, 300, 75, weights_up=1),
    "fast": Dense(70, 1, 1300, 95, weights_up=1),
    # the survey of the dense model passes forwards and backwards, with its states on disk
    "balanced": Dense(600, 8, 7500, 420, weights_up=3.1, states_up=4, states_down=4.1),
    "compress": Dense(145, 2, 23500, 125, weights_up=1.01, states_down=2),
    "structure": Dense(130, 2, 1200, 75, weights_up=1.03, states_down=2),
    # a micro-batch is a step, and the one validation of a run stores all weights
    "train": Dense(190, 4.6, 250, 40, weights_up=0, states_up=3.8, states_down=7.6),
    "evaluate": Dense(41, 0, 95, 0, weights_up=1, states_down=0),
    # two models, whose states are in memory of the host
    "diagnose": Dense(0, 0, 228, 16, weights_up=2, states_up=2, states_down=2),
}
MIXTURE: dict[str, Mixture] = {
    "wanda": Mixture(6, 0, 160, 35),
    "fast": Mixture(14, 0, 600, 45),
    "balanced": Mixture(170, 6.5, 2800, 135),
    "experts": Mixture(4.3, 0, 5.8, 0),
    # neurons adopted, the down projections and the router refitted, each of which waits to decide
    "tuned experts": Mixture(31.5, 0, 1100, 29),
    "evaluate": Mixture(0, 0, 0, 0),
}

SMALL = {"device": "cuda", "micro_batch_tokens": LENGTH}
RUNS: dict[str, Callable[..., Any]] = {
    "wanda": partial(secateur.prune, method="wanda", sparsity=0.5, **SMALL),
    "fast": partial(secateur.prune, effort="fast", sparsity=0.5, **SMALL),
    "balanced": partial(secateur.prune, effort="balanced", sparsity=0.5, **SMALL),
    "compress": partial(secateur.compress, values="int4", **SMALL),
    "structure": partial(secateur.structure, ffn=0.5, **SMALL),
    "experts": partial(secateur.structure, experts=0.5, effort="fast", **SMALL),
    "tuned experts": partial(secateur.structure, experts=0.5, **SMALL),
    "train": partial(secateur.train, batch=1, epochs=1, validations=1, device="cuda"),
    "evaluate": partial(secateur.evaluate, device="cuda"),
    "diagnose": partial(secateur.diagnose, device="cuda"),
}


def ran(verb: str, folder: Path, windows: int, layers: int, experts: int = 0) -> Traffic:
    """The launches, waits and bytes of a run."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(**sizes)
    if experts:
        config = transformers.Qwen3MoeConfig(
            **sizes, num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=16,
            head_dim=8, norm_topk_prob=True,
        )  # fmt: skip
    place = folder / f"{windows}-{layers}-{experts}"
    source, text = place / "source", place / "text.txt"
    with torch.utils._python_dispatch._disable_current_modes():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
        tiny_tokenizer().save_pretrained(source)
        ids = torch.randint(3, SIZES["vocab_size"], (windows, LENGTH))
        save_windows(ids, place / "windows.safetensors")
    text.write_text("a text of many characters " * 100)
    read: dict[str, Any] = {"calibration": place / "windows.safetensors", "output": place / "out"}
    if verb in ("evaluate", "train", "diagnose"):
        read = {"text": text, "windows": windows, "sequence_length": LENGTH}
        read |= {"train": {"output": place / "out"}, "diagnose": {"dense": source}}.get(verb, {})
    with counted() as traffic:
        RUNS[verb](source, **read)
    return traffic


def terms(found: dict[tuple[int, int], Traffic], what: str) -> tuple[float, float]:
    """a and b of a·x·y + b·y + c·x + d, from the counts of four runs by x and y."""
    (x1, y1), (x2, y2) = min(found), max(found)
    at = {size: getattr(traffic, what) for size, traffic in found.items()}
    a = (at[x2, y2] - at[x2, y1] - at[x1, y2] + at[x1, y1]) / ((x2 - x1) * (y2 - y1))
    return a, (at[x1, y2] - at[x1, y1]) / (y2 - y1) - a * x1


def within(found: dict[str, float], most: Any) -> None:
    """Compare with the budget, and show all that was found."""
    over = {name: value for name, value in found.items() if value > getattr(most, name) + 0.01}
    assert not over, (found, most)


@pytest.mark.parametrize("verb", DENSE)
def test_dense(verb: str, tmp_path: Path) -> None:
    layers = (2, 4)
    found = {(m, n): ran(verb, tmp_path, m, n) for m, n in product((FEW, MANY), layers)}
    launches, waits, up, down = (terms(found, x) for x in ("launches", "waits", "up", "down"))
    config = transformers.LlamaConfig(**SIZES)
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer(config, 0)
    weights = 4 * sum(parameter.numel() for parameter in layer.parameters())
    within(
        {
            "launches": launches[0],
            "waits": waits[0],
            "of_layer": launches[1],
            "of_layer_waits": waits[1],
            "weights_up": up[1] / weights,
            "states_up": up[0] / STATES,
            "states_down": down[0] / STATES,
        },
        DENSE[verb],
    )


@pytest.mark.parametrize("verb", MIXTURE)
def test_mixture(verb: str, tmp_path: Path) -> None:
    layers = 2
    found = {(m, n): ran(verb, tmp_path, m, layers, n) for m, n in product((FEW, MANY), repeat=2)}
    launches, waits = terms(found, "launches"), terms(found, "waits")
    within(
        {
            "launches": launches[0] / layers,
            "waits": waits[0] / layers,
            "of_expert": launches[1] / layers,
            "of_expert_waits": waits[1] / layers,
        },
        MIXTURE[verb],
    )
