"""Experts pruned with the tokens routed to them, against token-by-token loops."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from slow import slow_but
from tiny import save_tiny
from torch import Tensor, nn
from zoo import CONFIGS, DENSE, HYBRIDS, MIXTURES, PLAIN_MIXTURES, tiny_model, tiny_windows

import secateur
from oracles.mixtures import between, inputs_of, matrices_of, prune_experts, reap, route
from oracles.sparsegpt import sparsegpt
from secateur.engine.prune import run
from secateur.engine.search.experts import best_experts, expert_use, scores_of
from secateur.engine.stream.calls import call_layer, first_inputs, layer_calls
from secateur.engine.stream.halted_forwards import HaltingForwards, put_together
from secateur.errors import ArchitectureError, RecipeError
from secateur.models.architecture import describe
from secateur.models.checkpoint import CheckpointReader
from secateur.models.experts import opened_experts
from secateur.models.targets import CheckpointTarget, ModelTarget
from secateur.progress import Silent

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
SHARED = (("gate_proj", "up_proj"), ("down_proj",))


def wanda(weight: Tensor, x: Tensor) -> Tensor:
    norm, pruned = x.square().sum(0).sqrt(), weight.clone()
    for row in pruned:
        order = torch.argsort(row.double().abs() * norm, stable=True)
        row[order[: weight.shape[1] // 2]] = 0
    return pruned


def by_sparsegpt(weight: Tensor, x: Tensor) -> Tensor:
    return sparsegpt(weight, x.T @ x, "unstructured", "row", 0.5)[0].to(weight.dtype)


METHODS = {"wanda": wanda, "sparsegpt": by_sparsegpt}


def normalises(family: str) -> bool:
    return family != "qwen2_moe"


def prune_plainly(model: nn.Module, windows: Tensor, method: str, by_group: bool) -> dict[str, int]:
    """All layers, a whole-model forward for every step; how many tokens each expert saw."""
    prune, family, seen = METHODS[method], model.config.model_type, {}

    def step(block: str, groups: tuple[tuple[str, ...], ...]) -> None:
        for group in groups if by_group else [[n for g in groups for n in g]]:
            names = [f"{block}.{n}" for n in group]
            for name, x in inputs_of(model, names, windows).items():
                weight = model.get_submodule(name).weight.data
                changes[name] = prune(weight, x.double())
            if by_group:
                apply()

    def apply() -> None:
        for name, weight in changes.items():
            model.get_submodule(name).weight.data.copy_(weight)
        changes.clear()

    changes: dict[str, Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}"
        step(f"{prefix}.self_attn", GROUPS)
        if not hasattr(layer.mlp, "experts"):
            step(f"{prefix}.mlp", SHARED)
        else:
            x = inputs_of(model, [f"{prefix}.mlp"], windows)[f"{prefix}.mlp"]
            if hasattr(layer.mlp, "shared_expert"):
                step(f"{prefix}.mlp.shared_expert", SHARED)
            found = prune_experts(layer.mlp, x, 2, normalises(family), prune, by_group)
            seen |= {f"{prefix}.mlp.experts.{j}": count for j, count in found.items()}
        apply()
    return seen


@pytest.mark.parametrize(
    ("method", "sequential", "family"),
    slow_but(
        [("wanda", "layer", "mixtral"), ("sparsegpt", "group", "mixtral")],
        product(METHODS, ["group", "layer"], PLAIN_MIXTURES),
    ),
)
def test_pruned_as_by_plain_loops(method: str, sequential: str, family: str) -> None:
    windows = tiny_windows(24, 4)
    ours, plain = tiny_model(family), tiny_model(family)
    # one window at a time: 8 choices among 5 experts, so some get nothing of a micro-batch
    report = secateur.prune(
        ours, method=method, scope="row", sparsity=0.5, calibration=windows,
        sequential=sequential, micro_batch_tokens=4,
    )  # fmt: skip
    seen = prune_plainly(plain, windows, method, sequential == "group")
    expected = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if method == "wanda":
            assert torch.equal(parameter, expected[name]), name
        else:
            assert torch.equal(parameter == 0, expected[name] == 0), name
            torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=1e-4)
    counts = {r.name: r.tokens for layer in report.layers for r in layer.linears}
    assert {n: counts[f"{n}.down_proj"] for n in seen} == seen
    assert all(counts[n] == 24 * 4 for n in counts if ".experts." not in n)


@pytest.mark.parametrize(
    "options",
    [{"method": "wanda"}, {"method": "sparsegpt", "asymmetric": True}, {"sequential": "layer"}],
)
def test_the_number_of_experts_at_once_changes_no_bit(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, halts = [], []
    for at_once in (1, 2, 5):
        monkeypatch.setattr(run, "put_together", lambda model, _, n=at_once: put_together(model, n))
        model, seen = tiny_model("mixtral"), list[int]()
        advance = HaltingForwards.advance

        def counting(halting: HaltingForwards, index: int, seen=seen, advance=advance) -> Any:
            seen.append(index)
            return advance(halting, index)

        with monkeypatch.context() as context:
            context.setattr(HaltingForwards, "advance", counting)
            # one window at a time: some experts get nothing of a micro-batch
            secateur.prune(
                model, sparsity=0.5, calibration=tiny_windows(24, 4), micro_batch_tokens=4,
                **{"method": "wanda", **options},
            )  # fmt: skip
        found.append(dict(model.named_parameters()))
        halts.append(len(seen))
    for other in found[1:]:
        for name, parameter in other.items():
            assert torch.equal(parameter, found[0][name]), name
    assert halts[0] > halts[1] > halts[2] or options == {"sequential": "layer"}


@pytest.mark.parametrize("family", PLAIN_MIXTURES)
def test_opened_experts_are_the_fused_ones(family: str) -> None:
    model, windows = tiny_model(family), tiny_windows()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(windows).logits
        with opened_experts(model):
            experts = model.model.layers[2 if family != "qwen3_moe" else 1].mlp.experts
            for idle in (True, False):
                experts.call_idle = idle
                torch.testing.assert_close(model(windows).logits, expected)
            experts[3].up_proj.weight[1, 2] = 7.0
            experts[4].down_proj.weight = nn.Parameter(
                torch.ones(32, experts[4].up_proj.out_features)
            )
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    changed = {n: int((p != before[n]).sum()) for n, p in after.items() if not p.equal(before[n])}
    neurons = experts[4].up_proj.out_features
    assert sorted(changed.values()) == [1, 32 * neurons]
    gate_up = next(n for n in changed if n.endswith("gate_up_proj"))
    assert after[gate_up][3, neurons + 1, 2] == 7.0


def lonely(family: str = "mixtral") -> nn.Module:
    """A model whose last expert is never among the two best: |a·x| and |b·x| are above 0."""
    model = tiny_model(family)
    with torch.no_grad():
        for layer in model.model.layers:
            if hasattr(layer.mlp, "experts"):
                router = layer.mlp.gate.weight
                router[1], router[3], router[4] = -router[0], -router[2], 0.0
    return model


@pytest.mark.parametrize("options", [
    {"method": "wanda"},
    {"method": "wanda", "sequential": "layer"},
    {"method": "sparsegpt"},
    {"method": "taylor"},
    {"method": "sparsegpt", "asymmetric": True},
    {"method": "wanda", "tune_passes": 1},
])  # fmt: skip
def test_an_expert_without_tokens_is_left(options: dict, caplog: pytest.LogCaptureFixture) -> None:
    model, before = lonely(), lonely()
    report = secateur.prune(model, sparsity=0.5, calibration=tiny_windows(), **options)
    unseen = [n for layer in report.layers for n in layer.unseen]
    assert sorted(unseen) == sorted(
        f"model.layers.{i}.mlp.experts.4.{p}" for i in range(3)
        for p in ("gate_proj", "up_proj", "down_proj")
    )  # fmt: skip
    for now, was in zip(model.model.layers, before.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            a, b = (getattr(x.mlp.experts, name) for x in (now, was))
            assert torch.equal(a[4], b[4])
            assert (a[:4] == 0).float().mean() == 0.5
    assert 0.4 < report.sparsity < 0.5
    assert "9 expert matrices" in caplog.text


def test_tuned_weights_come_back_into_the_fused_tensors() -> None:
    """In bfloat16 tuning moves them to other memory."""
    model, before = tiny_model("qwen3_moe").bfloat16(), tiny_model("qwen3_moe").bfloat16()
    options = {"method": "wanda", "sparsity": 0.5, "distill_epochs": 1}
    secateur.prune(model, calibration=tiny_windows(), **options)
    ours, theirs = (m.model.layers[1].mlp.experts.gate_up_proj for m in (model, before))
    assert ours.dtype == torch.bfloat16
    assert 0.5 <= (ours == 0).float().mean() < 0.51
    kept = ours != 0
    assert (ours[kept] != theirs[kept]).float().mean() > 0.1


def test_magnitude_needs_no_tokens() -> None:
    model = lonely()
    assert secateur.prune(model, method="magnitude", sparsity=0.5).sparsity == 0.5


def test_an_allocation_knows_nothing_of_unseen_experts() -> None:
    options = {"method": "wanda", "sparsity": 0.5, "allocation": "owl"}
    with pytest.raises(RecipeError, match="3 expert matrices"):
        secateur.prune(lonely(), calibration=tiny_windows(), **options)
    model = lonely()
    secateur.prune(model, calibration=tiny_windows(), exclude=["*.experts.4.*"], **options)


def test_few_tokens_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    secateur.prune(tiny_model("mixtral"), method="wanda", sparsity=0.5, calibration=tiny_windows(2))
    assert "fewer tokens" in caplog.text


def test_asymmetric_fitting_goes_on_past_experts() -> None:
    """Attention of the first layer does not depend on experts; that of the second does."""
    options = {"method": "sparsegpt", "sparsity": 0.5, "asymmetric": True}
    whole, attention = tiny_model("mixtral"), tiny_model("mixtral")
    secateur.prune(whole, calibration=tiny_windows(), **options)
    secateur.prune(attention, calibration=tiny_windows(), include=["*.self_attn.*"], **options)
    for index in (0, 1):
        a, b = (m.model.layers[index].self_attn.o_proj.weight for m in (whole, attention))
        assert torch.equal(a, b) == (index == 0)
    symmetric = tiny_model("mixtral")
    secateur.prune(symmetric, calibration=tiny_windows(), **options | {"asymmetric": False})
    a, b = (m.model.layers[0].self_attn.o_proj.weight for m in (whole, symmetric))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", "qwen3_next"])
@torch.no_grad()
def test_experts_correct_the_stream_as_the_slow_formula_says(family: str) -> None:
    """Token by token; the shared experts stay out of it."""
    windows, model, dense = tiny_windows(24), tiny_model(family), tiny_model(family)
    secateur.prune(
        model, score="wanda", solver="zero", scope="row", sparsity=0.5, calibration=windows,
        asymmetric=True, asymmetric_damping=0.1, micro_batch_tokens=2 * windows.shape[1],
    )  # fmt: skip
    layer = 2 if family == "qwen2_moe" else 1  # its second layer is dense
    paths = [f"model.layers.{layer}.{name}" for name in ("post_attention_layernorm", "mlp")]
    (stream, x), (wanted, before) = (
        [seen[path].double() for path in paths]
        for seen in (inputs_of(one, paths, windows) for one in (model, dense))
    )
    block, first = (one.model.layers[layer].mlp for one in (model, dense))
    normalised = family in ("mixtral", "qwen3_next")

    def written(inputs: Tensor) -> Tensor:
        total = torch.zeros_like(inputs)
        for token, best in enumerate(route(first, inputs.float(), 2, normalised)):
            for expert, weight in best:
                gate, up, down = matrices_of(first, expert)
                total[token] += weight * (between(gate, up, inputs[token]) @ down.double().T)
        return total

    missing = wanted + written(before) - stream - written(x)
    chosen = route(block, x.float(), 2, normalised)
    for expert in range(len(block.experts.down_proj)):
        mine = [(t, dict(best)) for t, best in enumerate(chosen) if expert in dict(best)]
        tokens = [token for token, _ in mine]
        weight = torch.tensor([[best[expert]] for _, best in mine], dtype=torch.float64)
        total = torch.tensor([[sum(best.values())] for _, best in mine], dtype=torch.float64)
        gate, up, down = matrices_of(block, expert)
        old = matrices_of(first, expert)
        assert torch.equal(gate, wanda(old[0], x[tokens] * weight))
        inputs = between(gate, up, x[tokens])
        target = between(old[0], old[1], x[tokens]) @ old[2].double().T + missing[tokens] / total
        inputs, target = inputs * weight, target * weight
        eye = (0.1 * inputs.square().sum(0).mean()).sqrt() * torch.eye(inputs.shape[1]).double()
        left, right = torch.cat([inputs, eye]), torch.cat([target, eye @ old[2].double().T])
        fitted = torch.linalg.lstsq(left, right).solution.T
        kept = down != 0
        assert kept.double().mean() == 0.5
        torch.testing.assert_close(down[kept].double(), fitted[kept], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(down[kept], old[2][kept], rtol=1e-3, atol=1e-4)


WRITING = ("llama", "gpt2", "gemma3", "mixtral", "qwen3_next", "lfm2_moe", "deepseek_v3")


@pytest.mark.parametrize("family", slow_but(WRITING, [*CONFIGS, *DENSE, *HYBRIDS, *MIXTURES]))
@torch.no_grad()
def test_what_is_declared_to_write_is_all_that_the_stream_gets(family: str) -> None:
    """In every layer, with its experts and shared experts; nothing is declared of some families."""
    model, windows = tiny_model(family), tiny_windows(2)
    architecture = describe(model)
    layers, experts = architecture.layers(model), architecture.experts
    names = {*architecture.writers, *dict(architecture.normed_writers).values()}
    if not names:
        pytest.skip("no writers are declared")
    mixed = experts.module.rpartition(".")[0] if experts else None
    stream = first_inputs(model, layers, windows)
    for layer, call in zip(layers, layer_calls(model, layers, [windows]), strict=True):
        modules, written = dict(layer.named_modules()), list[Tensor]()

        def add(*call: Any, to: list[Tensor] = written) -> None:
            out = call[2][0] if isinstance(call[2], tuple) else call[2]
            to.append(out.clone())  # Falcon adds to it in place

        mixes = experts is not None and experts.module in modules
        handles = [
            modules[name].register_forward_hook(add)
            for name in [*names, *([mixed] if mixes else [])]
            if name in modules and not (mixes and name.startswith(f"{mixed}."))
        ]
        after = call_layer(layer, stream, call)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(
            sum(x.view_as(stream) for x in written), after - stream, rtol=1e-3, atol=1e-3
        )
        stream = after


def test_experts_that_cannot_be_opened_are_refused() -> None:
    config = transformers.JetMoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ArchitectureError, match="JetMoeParallelExperts"):
        secateur.prune(model, method="magnitude", sparsity=0.5)


def test_the_plan_counts_the_experts_of_a_token(tmp_path: Path) -> None:
    plans = {}
    for family in ("mistral", "mixtral"):
        source = save_tiny(tmp_path / family, family)
        plans[family] = secateur.prune(
            str(source), dry_run=True, method="wanda", sparsity=0.5, windows=6, sequence_length=20
        ).plan
    feed_forward = 3 * 3 * 32 * 48
    assert plans["mixtral"].prunable_weights - plans["mistral"].prunable_weights == 4 * feed_forward
    tokens = 6 * 20
    assert plans["mixtral"].flops - plans["mistral"].flops == 2 * feed_forward * tokens
    assert plans["mixtral"].sizes["forward"] >= plans["mistral"].sizes["forward"]


# -- which experts to keep --------------------------------------------------------------------


@pytest.mark.parametrize("family", PLAIN_MIXTURES)
@pytest.mark.parametrize("stored", [False, True])
def test_reap_is_the_mean_weighted_norm(family: str, stored: bool, tmp_path: Path) -> None:
    windows, model = tiny_windows(), tiny_model(family)
    if stored:
        model.save_pretrained(tmp_path)
        reader = CheckpointReader(tmp_path)
        target = CheckpointTarget(reader, None, torch.device("cpu"))
        use = expert_use(target, windows, 40, Silent())
    else:
        with opened_experts(model):
            use = expert_use(ModelTarget(model), windows, 40, Silent())
    layers = [i for i, x in enumerate(model.model.layers) if hasattr(x.mlp, "experts")]
    assert [*use] == layers
    for index in layers:
        path = f"model.layers.{index}.mlp"
        x = inputs_of(model, [path], windows)[path]
        expected = [*reap(model.get_submodule(path), x, 2, normalises(family))]
        assert use[index].tokens.tolist() == [count for count, _ in expected]
        assert use[index].score("frequency").tolist() == [count for count, _ in expected]
        assert use[index].score("reap").tolist() == pytest.approx(
            [s for _, s in expected], rel=1e-4
        )
        kept = best_experts(scores_of(use), 3, 2)[index]
        lowest = sorted(range(5), key=lambda j: expected[j][1])[:2]
        assert [*kept] == sorted(set(range(5)) - set(lowest))


def test_an_unseen_expert_goes_first() -> None:
    model = lonely()
    with opened_experts(model):
        use = expert_use(ModelTarget(model), tiny_windows(), 40, Silent())
    for score in ("reap", "frequency"):
        assert best_experts(scores_of(use, score), 4, 2) == dict.fromkeys(range(3), (0, 1, 2, 3))


def test_impossible_numbers_of_experts_are_refused() -> None:
    model = tiny_model("mixtral")
    with opened_experts(model):
        use = expert_use(ModelTarget(model), tiny_windows(), 40, Silent())
    for keep in (1, 6):
        with pytest.raises(RecipeError, match=f"{keep} experts"):
            best_experts(scores_of(use), keep, 2)
    dense = tiny_model("llama")
    with pytest.raises(ArchitectureError, match="no decoder layer"):
        expert_use(ModelTarget(dense), tiny_windows(), 40, Silent())
