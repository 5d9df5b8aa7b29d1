"""Times of tokens, by a clock that counts weights: what is added up is what a whole model reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from zoo import CONFIGS, PLAIN_MIXTURES, config_of

from secateur.models.skeleton import parameters_of, skeleton_of
from secateur.progress import Silent
from secateur.structured.cut import Cut
from secateur.structured.design import design
from secateur.structured.latency import fill, time_steps

CPU = torch.device("cpu")


class WeightClock:
    """Goes on by the weights of each linear that is called for one token."""

    def __init__(self) -> None:
        self.now = 0.0
        self.prompts: set[int] = set()

    def hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(module, nn.Linear | Conv1D):
            return
        if inputs[0].shape[-2] == 1:
            self.now += module.weight.numel()
        else:
            self.prompts.add(inputs[0].shape[-2])

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[WeightClock]:
    clock = WeightClock()
    handle = register_module_forward_hook(clock.hook)
    yield clock
    handle.remove()


def skeleton(family: str, **changed: Any) -> Any:
    config = config_of(family)
    for name, value in changed.items():
        setattr(config, name, value)
    built = AutoModelForCausalLM.from_config(config)
    return skeleton_of(type(built), config, torch.float32)


def weights_read(model: Any) -> int:
    """Of all linears of a model, counted without the library."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))


@pytest.mark.parametrize("layer_bytes", [0, 2**30], ids=["two layers", "all layers"])
@pytest.mark.parametrize("family", [*CONFIGS])
def test_what_is_not_timed_is_added(family: str, layer_bytes: int, clock: WeightClock) -> None:
    model = skeleton(family)
    found = time_steps([model], CPU, Silent(), layer_bytes=layer_bytes, clock=clock)
    assert found.seconds == (weights_read(model),)
    # 64 positions of the tiny models, less 5 turns of 6 steps, and one
    assert found.context_tokens == 33
    assert clock.prompts - {33} == set()


def test_many_layers_of_which_two_are_run(clock: WeightClock) -> None:
    model = skeleton("qwen2", num_hidden_layers=11, layer_types=["full_attention"] * 11)
    ran: list[int] = []

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__ == "Qwen2DecoderLayer":
            ran.append(1)

    handle = register_module_forward_hook(count)
    try:
        found = time_steps([model], CPU, Silent(), layer_bytes=0, clock=clock)
    finally:
        handle.remove()
    assert found.seconds == (weights_read(model),)
    assert len(ran) == 2 * (1 + 5 * 6)  # the context, and 5 turns of 6 steps with the layers


def test_sizes_are_timed_in_turns_and_distinguished(clock: WeightClock) -> None:
    uncut = skeleton("llama")
    cuts = [
        Cut(neurons={i: tuple(range(12)) for i in range(3)}),
        Cut(groups=dict.fromkeys(range(3), (0,))),
        Cut(layers=(0, 2)),
    ]
    models = [uncut, *(design(uncut, cut).skeleton for cut in cuts)]
    order: list[int] = []

    def shape(module: nn.Module, inputs: Any, output: Any) -> None:
        if type(module).__name__ == "LlamaForCausalLM" and inputs == ():
            order.append(sum(p.numel() for p in module.parameters()))

    handle = register_module_forward_hook(shape)
    try:
        found = time_steps(models, CPU, Silent(), clock=clock)
    finally:
        handle.remove()
    assert found.seconds == tuple(weights_read(model) for model in models)
    assert len(set(found.seconds)) == 4
    contexts, turns = order[:4], order[4:]
    assert len(set(contexts)) == 4
    # six steps with the layers, and six without
    sizes = {contexts[0]: 0}
    for number, size in enumerate(contexts):
        own = turns[12 * number : 12 * number + 12]
        assert own[:6] == [size] * 6
        assert len(set(own[6:])) == 1
        assert own[6] < size
        sizes[size] = own[6]
    assert turns == [
        x for _ in range(5) for size in contexts for x in [size] * 6 + [sizes[size]] * 6
    ]
    assert all(p.is_meta for model in models for p in model.parameters())


@pytest.mark.parametrize("family", [*PLAIN_MIXTURES])
def test_mixtures_take_a_step(family: str, clock: WeightClock) -> None:
    found = time_steps([skeleton(family)], CPU, Silent(), clock=clock)
    assert found.seconds[0] > 0


def test_models_share_their_memory() -> None:
    uncut = design(skeleton("llama"), Cut()).skeleton
    small = design(uncut, Cut(neurons={i: tuple(range(12)) for i in range(3)})).skeleton
    fill([small, uncut], CPU)

    def memory(model: Any) -> dict[int, int]:
        stored = [p.untyped_storage() for p in parameters_of(model).values()]
        return {s.data_ptr(): s.nbytes() for s in stored}

    assert memory(small) == memory(uncut)
    assert sum(memory(uncut).values()) == sum(p.nbytes for p in parameters_of(uncut).values())
    assert small.model.layers[0].mlp.down_proj.weight.is_contiguous()
    assert not any(p.is_meta for p in small.parameters())
