"""Taylor, OBD and the global scope against autograd and one big sort over the whole model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from zoo import matrices, tiny_model, tiny_windows, weight_of

import secateur


def gradients_by_hand(model: torch.nn.Module, windows: torch.Tensor) -> dict:
    """Mean gradient and mean squared gradient over windows, by plain autograd."""
    modules = matrices(model)
    found = {name: [] for name in modules}
    for ids in windows:
        model.zero_grad()
        logits = model(input_ids=ids[None], use_cache=False).logits
        cross_entropy(logits[0, :-1].float(), ids[1:]).backward()
        for name, module in modules.items():
            gradient = module.weight.grad
            linear = isinstance(module, torch.nn.Linear)
            found[name].append((gradient if linear else gradient.t()).clone())
    model.zero_grad()
    stacked = {name: torch.stack(g) for name, g in found.items()}
    return {n: (g.mean(0), g.square().mean(0)) for n, g in stacked.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("method", ["taylor", "obd"])
def test_gradient_methods_equal_autograd(family: str, method: str) -> None:
    windows = tiny_windows(4)
    ours, plain = tiny_model(family), tiny_model(family)
    flags = [p.requires_grad for p in ours.parameters()]
    secateur.prune(ours, method=method, sparsity=0.4, calibration=windows)
    assert [p.requires_grad for p in ours.parameters()] == flags
    gradients = gradients_by_hand(plain, windows)
    for name, module in matrices(plain).items():
        weight, (mean, square) = weight_of(module), gradients[name]
        score = (weight * mean).abs() if method == "taylor" else 0.5 * square * weight.square()
        pruned = weight_of(matrices(ours)[name]) == 0
        assert int(pruned.sum()) == round(0.4 * weight.numel())
        # The order of two nearly equal scores may differ by rounding; the sum pruned may not.
        lost, least = score[pruned].sum(), score.flatten().sort().values[: pruned.sum()].sum()
        assert torch.allclose(lost, least, rtol=1e-3), name


@pytest.mark.parametrize("pattern", ["unstructured", "4x4"])
def test_global_magnitude_is_one_sort_over_the_model(pattern: str) -> None:
    ours, plain = tiny_model("llama"), tiny_model("llama")
    secateur.prune(ours, method="magnitude", sparsity=0.5, pattern=pattern, scope="global")
    side = 4 if pattern == "4x4" else 1
    scores = {
        name: weight_of(m).abs().unflatten(1, (-1, side)).unflatten(0, (-1, side)).sum((1, 3))
        for name, m in matrices(plain).items()
    }
    everything = torch.cat([s.flatten() for s in scores.values()])
    threshold = everything.sort().values[everything.numel() // 2]
    for name, score in scores.items():
        keep = (score >= threshold).repeat_interleave(side, 0).repeat_interleave(side, 1)
        assert torch.equal(weight_of(matrices(ours)[name]) != 0, keep), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "taylor"])
def test_global_scope_prunes_exactly_what_was_asked_overall(method: str) -> None:
    model = tiny_model("qwen2")
    report = secateur.prune(
        model, method=method, sparsity=0.6, scope="global", calibration=tiny_windows(4)
    )
    weights = [weight_of(m) for m in matrices(model).values()]
    total = sum(w.numel() for w in weights)
    assert sum(int((w == 0).sum()) for w in weights) == round(0.6 * total)
    shares = {r.asked for layer in report.layers for r in layer.linears}
    assert len(shares) > 5


def test_linears_with_a_sparsity_of_their_own_do_not_compete() -> None:
    model = tiny_model("llama")
    secateur.prune(
        model,
        method="magnitude",
        sparsity=0.5,
        scope="global",
        overrides={"*.q_proj": 0.25, "*.layers.1.mlp.*": 0},
    )
    found = matrices(model)
    rest = []
    for name, module in found.items():
        sparsity = float((weight_of(module) == 0).float().mean())
        if name.endswith("q_proj"):
            assert sparsity == 0.25
        elif "layers.1.mlp" in name:
            assert sparsity == 0.0
        else:
            rest.append(weight_of(module))
    assert sum(int((w == 0).sum()) for w in rest) == round(0.5 * sum(w.numel() for w in rest))
