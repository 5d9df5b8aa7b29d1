"""Depth on tiny models, against models from which the layers are really gone."""

from __future__ import annotations

import copy
import math
from itertools import combinations
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from slow import few_families, slow
from torch import nn
from zoo import CONFIGS, tiny_model, tiny_windows

from oracles import depth as oracle
from secateur.engine.search.candidate_evaluator import CandidateEvaluator
from secateur.engine.search.depth import (
    DepthSettings,
    DepthUnit,
    Dropped,
    DropSpace,
    SubBlocks,
    angular_distances,
    choose_depth,
    greedy,
    influences,
    lowest,
    space_of,
)
from secateur.engine.stream import hidden_states as stream_ends
from secateur.engine.stream.hidden_states import EmbeddingAndHead
from secateur.engine.stream.targets import CheckpointTarget, ModelTarget
from secateur.errors import ArchitectureError, NumericalError, RecipeError
from secateur.models.architecture import describe
from secateur.models.checkpoint import CheckpointReader
from secateur.progress import Silent

WINDOWS = tiny_windows()  # 6 of 20 tokens
QUICK = {"method": "search", "stages": ((2, 40), (1, 120)), "generations": 3, "offspring": 3}
WRITERS = {
    "phi3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


pytestmark = pytest.mark.usefixtures("exact_matmuls")


def writers(family: str, layer: int) -> tuple[str, str]:
    """The last linear of attention and of feed-forward, by their full names."""
    path = describe(tiny_model(family)).layer_name(layer)
    names = WRITERS.get(family, ("self_attn.o_proj", "mlp.down_proj"))
    return f"{path}.{names[0]}", f"{path}.{names[1]}"


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
    model: nn.Module, how: DepthSettings, work: Path | None = None, progress=None
) -> Dropped:
    target = model if isinstance(model, CheckpointTarget) else ModelTarget(model)
    return choose_depth(target, WINDOWS, how, work, progress or Silent())


def brute_force(model: nn.Module, family: str, dropped: Dropped) -> float:
    """The divergence of a model from which everything that was dropped is gone."""
    silent = [writers(family, i)[0] for i in dropped.attention]
    silent += [writers(family, i)[1] for i in dropped.ffn]
    rest = oracle.without_blocks(model, silent)
    rest = oracle.without_layers(rest, describe(model).layers_path, dropped.layers)
    return oracle.divergence(model, rest, WINDOWS)


@pytest.mark.parametrize("family", few_families(CONFIGS))
def test_a_candidate_is_worth_what_the_model_without_it_is(family: str) -> None:
    model = tiny_model(family)
    before = copy.deepcopy(model)
    path = describe(model).layers_path
    # The sub-blocks that are kept, and the same by brute force.
    candidates = {
        (3, 3, 3): before,
        (3, 0, 3): oracle.without_layers(before, path, [1]),
        (0, 3, 0): oracle.without_layers(before, path, [0, 2]),
        (3, 2, 3): oracle.without_blocks(before, [writers(family, 1)[0]]),
        (1, 3, 2): oracle.without_blocks(before, [writers(family, 0)[1], writers(family, 2)[0]]),
        (0, 0, 0): oracle.without_blocks(before, [n for i in range(3) for n in writers(family, i)]),
    }
    for objective in ("divergence", "loss"):
        outer = EmbeddingAndHead(ModelTarget(model), WINDOWS)
        judge = CandidateEvaluator(outer, SubBlocks(outer), objective, Silent())
        for rows in ([0, 1, 2, 3, 4, 5], [4, 5, 0]):
            found = judge.fitness(list(candidates), rows)
            for value, other in zip(found, candidates.values(), strict=True):
                if objective == "loss":
                    expected = oracle.loss(other, WINDOWS[rows])
                else:
                    expected = oracle.divergence(before, other, WINDOWS[rows])
                assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
    for name, parameter in model.named_parameters():  # looking leaves the model as it was
        assert torch.equal(parameter, before.get_parameter(name)), name
    assert torch.equal(model(input_ids=WINDOWS).logits, before(input_ids=WINDOWS).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_sub_block_that_is_left_out_adds_exactly_nothing(family: str) -> None:
    target = ModelTarget(tiny_model(family))
    outer = EmbeddingAndHead(target, WINDOWS)
    blocks = SubBlocks(outer)
    (hidden,) = outer.embedded([0])
    layer = target.layers[1]
    with torch.no_grad():
        blocks.learn(1, layer, hidden)
        with blocks.silenced(1, layer, 3):
            assert torch.equal(outer.run(1, layer, hidden), hidden)
        assert not torch.equal(outer.run(1, layer, hidden), hidden)


def states(model: nn.Module, family: str) -> list[list[torch.Tensor]]:
    """For each layer x, x + attention(x) and its output, [tokens, hidden], by hooks."""
    described = describe(model)
    found = []
    for index, layer in enumerate(described.layers(model)):
        seen = {}
        into = {"gemma2": "post_attention_layernorm"}.get(family)
        name = f"{described.layer_name(index)}.{into}" if into else writers(family, index)[0]
        handles = [
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, s=seen: s.update(x=args[0] if args else
                                                         kwargs["hidden_states"]),
                with_kwargs=True,
            ),
            layer.register_forward_hook(
                lambda m, args, out, s=seen: s.update(y=out[0] if isinstance(out, tuple) else out)
            ),
            model.get_submodule(name).register_forward_hook(
                lambda m, args, out, s=seen: s.update(a=out)
            ),
        ]  # fmt: skip
        with torch.no_grad():
            model(input_ids=WINDOWS)
        for handle in handles:
            handle.remove()
        x, a, y = (seen[k].flatten(0, 1) for k in "xay")
        found.append([x, x + a, y])
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2"])
def test_influence_and_angular_distance(family: str) -> None:
    model = tiny_model(family)
    target = ModelTarget(model)
    seen = states(model, family)
    outer = EmbeddingAndHead(target, WINDOWS)
    found = influences(outer, space_of(target, DepthSettings(count=1)).units, Silent())
    assert found == pytest.approx([oracle.influence(x, y) for x, _, y in seen], abs=1e-6)
    found = influences(
        outer, space_of(target, DepthSettings(units="blocks", share=0.3)).units, Silent()
    )
    expected = [oracle.influence(*pair) for x, m, y in seen for pair in ((x, m), (m, y))]
    assert found == pytest.approx(expected, abs=1e-6)
    for length in (1, 2, 3):
        expected = [oracle.angle(seen[i][0], seen[i + length - 1][2]) for i in range(4 - length)]
        assert angular_distances(outer, length, Silent()) == pytest.approx(expected, abs=1e-6)


def test_methods_of_one_pass_drop_what_scores_lowest() -> None:
    model = deep_model("llama", 6)
    found = choose(model, DepthSettings(count=2, method="influence"))
    two = sorted(found.scores, key=lambda name: found.scores[name])[:2]
    assert found.layers == tuple(sorted(map(int, two)))
    assert found.share == pytest.approx(1 / 3)
    assert found.fitness is None
    found = choose(model, DepthSettings(count=3, method="angular"))
    first = min(range(4), key=lambda i: found.scores[str(i)])
    assert found.layers == (first, first + 1, first + 2)
    assert choose(model, DepthSettings(share=0.4, method="angular")).share == 0.5


@pytest.mark.parametrize("family", few_families(["llama", "gpt_neox", "gemma2"]))
@pytest.mark.parametrize("objective", ["loss", "divergence"])
def test_greedy_of_one_stage_is_greedy_by_brute_force(family: str, objective: str) -> None:
    model = deep_model(family, 5)
    path = describe(model).layers_path
    dropped: list[int] = []
    steps = []
    for _ in range(3):
        worth = {}
        for layer in set(range(5)) - set(dropped):
            other = oracle.without_layers(model, path, [*dropped, layer])
            worth[layer] = (
                oracle.loss(other, WINDOWS)
                if objective == "loss"
                else oracle.divergence(model, other, WINDOWS)
            )
        dropped.append(min(worth, key=lambda layer: worth[layer]))
        steps.append((sorted(map(str, dropped)), worth[dropped[-1]]))
    how = DepthSettings(count=3, method="greedy", objective=objective, stages=((1, 120),))
    found = choose(model, how)
    assert found.layers == tuple(sorted(dropped))
    assert [entry["dropped"] for entry in found.history] == [names for names, _ in steps]
    assert [entry["fitness"] for entry in found.history] == pytest.approx(
        [value for _, value in steps], rel=1e-3
    )


def test_a_long_search_finds_the_best_of_all_sets() -> None:
    model = deep_model("llama", 6)
    worth = {
        dropped: oracle.divergence(
            model, oracle.without_layers(model, "model.layers", dropped), WINDOWS
        )
        for dropped in combinations(range(6), 3)
    }
    how = DepthSettings(count=3, method="search", stages=((1, 120),), generations=12, offspring=4)
    found = choose(model, how)
    assert found.layers == min(worth, key=lambda dropped: worth[dropped])
    assert found.fitness == pytest.approx(worth[found.layers], rel=1e-3)
    fitnesses = [entry["fitness"] for entry in found.history if entry["stage"] != "greedy"]
    assert fitnesses == sorted(fitnesses, reverse=True)


@pytest.mark.parametrize("family", few_families(["llama", "gpt_neox", "gemma2", "opt", "generic"]))
@pytest.mark.parametrize("units", ["blocks", "attention", "ffn"])
@pytest.mark.parametrize("method", ["influence", "search"])
def test_sub_blocks_reach_the_budget_and_are_worth_what_is_said(
    family: str, units: str, method: str
) -> None:
    model = tiny_model(family)
    amount = {"share": 0.5} if units == "blocks" else {"count": 2}
    found = choose(model, DepthSettings(units=units, **amount, **{**QUICK, "method": method}))
    gone = len(found.layers) + len(found.attention), len(found.layers) + len(found.ffn)
    if units == "blocks":
        assert found.share >= 0.5 - 1e-6
    else:
        assert gone == ((2, 0) if units == "attention" else (0, 2))
    if method != "influence":
        assert found.fitness == pytest.approx(brute_force(model, family, found), rel=1e-3, abs=1e-6)


def random_space(random: Random) -> DropSpace:
    units = [DepthUnit(i, part, size, size) for i in range(8) for part, size in ((1, 10), (2, 30))]
    return DropSpace(tuple(units), random.choice([40, 70, 75, 160, 290]), 8)


def test_mutants_and_least_scores_drop_enough_and_no_more() -> None:
    random = Random(0)
    for _ in range(300):
        space = random_space(random)
        scores = [random.random() for _ in space.units]
        start = lowest(space, scores)
        for candidate in (start.candidate, space.mutate(start.candidate, random, start.order)):
            assert space.cost(candidate) >= space.budget
            assert space.spare(candidate) == []
            assert candidate == tuple(sorted(set(candidate)))


def test_greedy_counts_what_a_unit_is_worth_per_parameter() -> None:
    harm = {0: 3.0, 1: 5.8, 2: 1.9, 3: 9.0}  # attention and feed-forward of two layers

    def fitness(candidates, tokens, draw):
        return [sum(harm[i] for i in candidate) for candidate in candidates]

    units = tuple(DepthUnit(i // 2, 1 + i % 2, 1 + 2 * (i % 2), 1 + 2 * (i % 2)) for i in range(4))
    steps = [s.candidate for s in greedy(DropSpace(units, 3, 2), ((1, 1),), fitness)]
    # 1.9 for 1; then 5.8 for the 2 that are missing, not 3 for 1; then the first can come back.
    assert steps == [(2,), (1, 2), (1,)]


class Stop(BaseException):
    """A kill."""


class Killer(Silent):
    """Stops the work at one of its steps."""

    def __init__(self, last: int) -> None:
        self.left = last

    def step(self, count: int = 1, note: str = "") -> None:
        self.left -= 1
        if self.left < 0:
            raise Stop


class Counter(Silent):
    """Counts the passes through the layers, and sees how many of them are in memory."""

    def __init__(self, target=None) -> None:
        self.steps, self.target, self.most = 0, target, 0

    def step(self, count: int = 1, note: str = "") -> None:
        self.steps += 1
        if self.target is not None:
            filled = [not next(x.parameters()).is_meta for x in self.target.layers]
            self.most = max(self.most, sum(filled))


@pytest.mark.parametrize("amount", [slow({"count": 2}), {"units": "blocks", "share": 0.4}])
def test_what_was_killed_goes_on_and_ends_the_same(amount: dict, tmp_path: Path) -> None:
    model = deep_model("llama", 4)
    how = DepthSettings(**amount, **QUICK)
    counter = Counter()
    expected = choose(model, how, None, counter)
    left = [counter.steps]
    for place in range(1, counter.steps, counter.steps // 4):
        work = tmp_path / str(place)
        work.mkdir()
        with pytest.raises(Stop):
            choose(model, how, work, Killer(place))
        file = work / "depth.jsonl"
        with file.open("a") as stream:
            stream.write('{"windows": [0, 1], "drop')  # torn by the kill
        again = Counter()
        assert choose(model, how, work, again) == expected
        left.append(again.steps)
        silent = Counter()
        assert choose(model, how, work, silent) == expected
        assert silent.steps <= again.steps
    assert left == sorted(left, reverse=True)  # the later the kill, the less is measured again
    assert left[1] > silent.steps
    # A longer search goes on from what is there, and so does another amount.
    assert choose(model, DepthSettings(**amount, **{**QUICK, "generations": 6}), work).fitness <= (
        expected.fitness
    )


def test_checkpoint_and_loaded_model_find_the_same(tmp_path: Path) -> None:
    model = deep_model("llama", 4)
    model.save_pretrained(tmp_path / "source")
    how = DepthSettings(units="blocks", share=0.4, **QUICK)
    target = CheckpointTarget(CheckpointReader(tmp_path / "source"), None, torch.device("cpu"))
    counter = Counter(target)
    assert choose(target, how, None, counter) == choose(model, how)
    assert counter.most <= 1  # layers that have weights at once


def test_little_memory_changes_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_model("llama", 4)
    expected = choose(model, DepthSettings(count=2, **QUICK))
    monkeypatch.setattr(stream_ends, "STATES_BYTES", 1)
    assert choose(model, DepthSettings(count=2, **QUICK)) == expected
    angular = choose(model, DepthSettings(count=2, method="angular"))
    monkeypatch.undo()
    assert angular.layers == choose(model, DepthSettings(count=2, method="angular")).layers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"count": 1, "units": "heads"}, "units is 'heads'"),
        ({"count": 1, "method": "random"}, "method is 'random'"),
        ({"count": 1, "objective": "accuracy"}, "objective is 'accuracy'"),
        ({}, "count is None and share is None"),
        ({"count": 1, "share": 0.2}, "count is 1 and share is 0.2"),
        ({"count": 0}, "cannot be dropped"),
        ({"share": 1.0}, "cannot be dropped"),
        ({"count": 2, "units": "blocks"}, "differ in size"),
        ({"share": 0.2, "units": "blocks", "method": "angular"}, "defined for whole layers"),
        ({"count": 1, "generations": -1}, "cannot be made"),
        ({"count": 1, "offspring": 0}, "cannot be made"),
        ({"count": 1, "stages": ((2, 512),)}, "stages are"),
        ({"count": 1, "stages": ((2, 512), (1, 256))}, "stages are"),
        ({"count": 3}, r"3 of them cannot be dropped: there are 3 layers"),
        ({"count": 4, "units": "ffn"}, r"there are 3 ffn"),
        ({"share": 0.9, "units": "attention"}, r"0.9 of all parameters cannot be dropped"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        choose(tiny_model("llama"), DepthSettings(**options))


def test_norms_on_the_stream_are_reported() -> None:
    config = CONFIGS["opt"]()
    config.do_layer_norm_before = False
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with pytest.raises(ArchitectureError, match="still changes its input"):
        choose(model, DepthSettings(units="attention", count=1, method="search"))
    assert len(choose(model, DepthSettings(count=1, **QUICK)).layers) == 1


def test_a_work_folder_of_another_choice_is_refused(tmp_path: Path) -> None:
    choose(tiny_model("llama"), DepthSettings(count=1, method="influence"), tmp_path)
    with pytest.raises(RecipeError, match="objective: 'divergence' then, 'loss' now"):
        choose(
            tiny_model("llama"), DepthSettings(count=1, method="search", objective="loss"), tmp_path
        )
    with pytest.raises(RecipeError, match="embedded"):
        choose(tiny_model("llama", seed=1), DepthSettings(count=1, method="search"), tmp_path)


def test_a_model_that_overflows_is_reported() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(NumericalError, match="not a number"):
        choose(model, DepthSettings(count=1, **QUICK))
