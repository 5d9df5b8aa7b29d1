"""Depth on tiny models, against models from which the layers are really gone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from slow import few_families
from torch import nn
from zoo import CONFIGS, tiny_model, tiny_windows

from oracles import depth as oracle
from secateur.engine.search.candidate_evaluator import DENSE, LEFT_OUT, CandidateEvaluator
from secateur.engine.search.depth import (
    Removal,
    angular_distances,
    choose_depth,
    influences,
)
from secateur.engine.stream import hidden_states as stream_ends
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.errors import NumericalError, RecipeError
from secateur.models.architecture import describe
from secateur.models.checkpoint import CheckpointReader
from secateur.models.targets import CheckpointTarget, ModelTarget
from secateur.progress import Silent

WINDOWS = tiny_windows()  # 6 of 20 tokens
QUICK: dict[str, Any] = {"method": "greedy", "stages": ((2, 40), (1, 120))}


pytestmark = pytest.mark.usefixtures("exact_matmuls")


def deep_model(family: str, layers: int) -> nn.Module:
    """A tiny model with more layers that do more."""
    config = CONFIGS[family]()
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % 2] for i in range(layers)]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(6.0)
    return model


def choose(
    model: nn.Module, count: int, method: str = "influence", work: Path | None = None,
    progress=None, **stages: Any,
) -> Removal:  # fmt: skip
    target = model if isinstance(model, CheckpointTarget) else ModelTarget(model)
    return choose_depth(target, WINDOWS, count, work, progress or Silent(), method=method, **stages)


@pytest.mark.parametrize("family", few_families(CONFIGS))
def test_a_candidate_is_worth_what_the_model_without_it_is(family: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model)
    path = describe(model).layers_path
    dense, gone = DENSE, LEFT_OUT
    candidates = {
        (dense, dense, dense): before,
        (dense, gone, dense): oracle.without_layers(before, path, [1]),
        (gone, dense, gone): oracle.without_layers(before, path, [0, 2]),
    }
    outer = EmbeddingAndHead(ModelTarget(model), WINDOWS)
    judge = CandidateEvaluator(outer, Silent())
    for rows in ([0, 1, 2, 3, 4, 5], [4, 5, 0]):
        found = judge.fitness(list(candidates), rows)
        for value, other in zip(found, candidates.values(), strict=True):
            expected = oracle.divergence(before, other, WINDOWS[rows])
            assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for name, parameter in model.named_parameters():  # looking leaves the model as it was
        assert torch.equal(parameter, before.get_parameter(name)), name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_influence_and_angular_distance(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        out = model(input_ids=WINDOWS, output_hidden_states=True).hidden_states[:-1]
        last = []
        layer = describe(model).layers(model)[-1]
        handle = layer.register_forward_hook(lambda m, args, out: last.append(out))
        model(input_ids=WINDOWS)
        handle.remove()
    last = last[0][0] if isinstance(last[0], tuple) else last[0]
    seen = [x.flatten(0, 1) for x in (*out, last)]
    outer = EmbeddingAndHead(ModelTarget(model), WINDOWS)
    expected = [oracle.influence(seen[i], seen[i + 1]) for i in range(3)]
    assert influences(outer, Silent()) == pytest.approx(expected, abs=1e-6)
    for length in (1, 2, 3):
        expected = [oracle.angle(seen[i], seen[i + length]) for i in range(4 - length)]
        assert angular_distances(outer, length, Silent()) == pytest.approx(expected, abs=1e-6)


def test_methods_of_one_pass_drop_what_scores_lowest() -> None:
    model = deep_model("llama", 6)
    found = choose(model, 2)
    two = sorted(found.scores, key=lambda name: found.scores[name])[:2]
    assert found.layers == tuple(sorted(map(int, two)))
    assert found.fitness is None
    found = choose(model, 3, "angular")
    first = min(range(4), key=lambda i: found.scores[str(i)])
    assert found.layers == (first, first + 1, first + 2)


@pytest.mark.parametrize("family", few_families(["llama", "gpt_neox", "gemma2"]))
def test_greedy_of_one_stage_is_greedy_by_brute_force(family: str) -> None:
    model = deep_model(family, 5)
    path = describe(model).layers_path
    dropped: list[int] = []
    for _ in range(3):
        worth = {}
        for layer in set(range(5)) - set(dropped):
            other = oracle.without_layers(model, path, [*dropped, layer])
            worth[layer] = oracle.divergence(model, other, WINDOWS)
        dropped.append(min(worth, key=lambda layer: worth[layer]))
        found = choose(model, len(dropped), "greedy", stages=((1, 120),))
        assert found.layers == tuple(sorted(dropped))
        assert found.fitness == pytest.approx(worth[dropped[-1]], rel=1e-3)


class Killer(Silent):
    """Stops the work at one of its steps."""

    def __init__(self, last: int) -> None:
        self.left = last

    def step(self, count: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


class Counter(Silent):
    """Counts the passes through the layers, and sees how many of them are in memory."""

    def __init__(self, target=None) -> None:
        self.steps, self.target, self.most = 0, target, 0

    def step(self, count: int = 1, note: str = "") -> None:
        self.steps += 1
        if self.target is not None:
            filled = [not next(x.parameters()).is_meta for x in self.target.layers]
            self.most = max(self.most, sum(filled))


def test_what_was_killed_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    model = deep_model("llama", 4)
    counter = Counter()
    expected = choose(model, 2, progress=counter, **QUICK)
    left = [counter.steps]
    for place in range(1, counter.steps, counter.steps // 4):
        work = tmp_path / str(place)
        work.mkdir()
        with pytest.raises(KeyboardInterrupt):
            choose(model, 2, work=work, progress=Killer(place), **QUICK)
        file = work / "depth.jsonl"
        with file.open("a") as stream:
            stream.write('{"windows": [0, 1], "drop')  # torn by the kill
        again = Counter()
        assert choose(model, 2, work=work, progress=again, **QUICK) == expected
        left.append(again.steps)
        silent = Counter()
        assert choose(model, 2, work=work, progress=silent, **QUICK) == expected
        assert silent.steps <= again.steps
    assert left == sorted(left, reverse=True)  # the later the kill, the less is measured again
    assert left[1] > silent.steps


def test_checkpoint_and_loaded_model_find_the_same(tmp_path: Path) -> None:
    model = deep_model("llama", 4)
    model.save_pretrained(tmp_path / "source")
    target = CheckpointTarget(CheckpointReader(tmp_path / "source"), None, torch.device("cpu"))
    counter = Counter(target)
    found = choose(target, 2, progress=counter, **QUICK)
    assert found == choose(model, 2, **QUICK)
    assert counter.most <= 1  # layers that have weights at once


def test_little_memory_changes_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_model("llama", 4)
    ways: list[dict[str, Any]] = [QUICK, {"method": "angular"}]
    expected = [choose(model, 2, **how).layers for how in ways]
    monkeypatch.setattr(stream_ends, "STATES_BYTES", 1)
    assert [choose(model, 2, **how).layers for how in ways] == expected


def test_a_work_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    choose(tiny_model("llama"), 1, "greedy", tmp_path)
    with pytest.raises(RecipeError, match="embedded"):
        choose(tiny_model("llama", seed=1), 1, "greedy", tmp_path)


def test_a_model_that_overflows_is_reported() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(NumericalError):
        choose(model, 1, **QUICK)
