"""Neurons removed inside the experts of every family, against zeros in the uncut model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cuts import close, cut_on_disk, logits
from gguf_models import byte_level, save
from slow import slow_but
from stopped_stage import StopAt, StoppedError
from tiny import saved
from weight_files import digest
from zoo import WITH_EXPERTS, tiny_model, tiny_windows

import secateur
from oracles.fused_experts import TAKEN, standard
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.architecture import describe, text_config
from secateur.models.opening import load_whole
from secateur.structured.cut import Cut, consumers, sizes_of
from secateur.structured.surgery import cut_checkpoint, cut_model

FORMS = ("gpt_oss", "llama4", "deepseek_v3", "nemotron_h", "qwen2_moe", "minimax_m3")
IDS = tiny_windows(2, 9, seed=5)


def some(count: int, number: int, seed: int) -> tuple[int, ...]:
    """So many of the units, at random."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order[:number].tolist()))


def half_of(model: Any) -> Cut:
    """Half the neurons of all experts, others in each of them; and of shared experts."""
    sizes = sizes_of(model)
    return Cut(
        shared_neurons={i: some(n, n // 2, i) for i, n in enumerate(sizes.shared_neurons) if n},
        expert_neurons={
            i: tuple(some(n, n // 2, 10 * i + e) for e in range(sizes.experts[i]))
            for i, n in enumerate(sizes.expert_neurons)
            if n
        },
    )


@torch.no_grad()
def with_zeros(model: Any, family: str, cut: Cut) -> Any:
    """The uncut model, in which nothing reads the neurons that go."""
    layers, experts = describe(model).layers(model), describe(model).experts
    for i, each in cut.expert_neurons.items():
        fused = layers[i].get_submodule(experts.module)
        for e, kept in enumerate(each):
            down = TAKEN.get(family, standard)(fused, e)["down_proj"]
            down[:, [j for j in range(down.shape[1]) if j not in kept]] = 0
    for i, kept in cut.shared_neurons.items():
        down = layers[i].get_submodule(consumers(model)["shared_neurons"]).weight
        down[:, [j for j in range(down.shape[1]) if j not in kept]] = 0
    return model


@pytest.mark.parametrize("family", slow_but(FORMS, WITH_EXPERTS))
def test_neurons_are_removed_inside_each_expert(family: str, tmp_path: Path) -> None:
    """Plain transformers loads the result, which computes what the uncut one does without."""
    model: Any = tiny_model(family)
    cut = half_of(model)
    assert cut.expert_neurons
    counted, smaller = cut_on_disk(model, cut, tmp_path, varied="error")
    assert not counted.varied
    sizes, before = sizes_of(smaller), sizes_of(model)
    assert sizes.expert_neurons == tuple(n // 2 for n in before.expert_neurons)
    assert sizes.shared_neurons == tuple(n // 2 for n in before.shared_neurons)
    assert (sizes.experts, sizes.neurons) == (before.experts, before.neurons)
    config, experts = text_config(smaller.config), describe(model).experts
    assert getattr(config, experts.width) == max(sizes.expert_neurons)
    in_memory = logits(cut_model(model, cut), IDS)
    expected = logits(with_zeros(model, family, cut), IDS)
    assert close(in_memory, expected)
    assert close(logits(smaller.eval(), IDS), expected)


FAULTS = {
    "some experts keep 11 neurons, some 12": lambda each: (each[0][:-1], *each[1:]),
    "neurons of 4 of its 5 experts": lambda each: each[:-1],
    "expert 1 of layer 1: there is no 24": lambda each: (each[0], (*each[1][:-1], 24), *each[2:]),
    "expert 0 of layer 1: the cut keeps none": lambda each: ((),) * len(each),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_impossible_neurons_are_named(fault: str) -> None:
    model: Any = tiny_model("qwen3_moe")
    each = FAULTS[fault](half_of(model).expert_neurons[1])
    with pytest.raises(RecipeError, match=fault):
        cut_model(model, Cut(expert_neurons={1: each}))


IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"ffn": 25}, "24"),
    ({"ffn": 0.5, "multiple": 7}, "multiple of 7"),
    ({"ffn": 0.9, "multiple": 24}, "would stay"),
    ({"experts": 4, "keep_parameters": 0.99}, "cannot be met"),
]


@pytest.mark.parametrize(("options", "word"), IMPOSSIBLE)
def test_what_a_mixture_cannot_keep_is_refused(
    options: dict[str, Any], word: str, tmp_path: Path
) -> None:
    source = saved(tiny_model("qwen3_moe"), tmp_path / "source")
    with pytest.raises(RecipeError, match=word):
        secateur.structure(source, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def structured(source: Path, output: Path, **options: Any) -> list[dict[str, Any]]:
    """The steps of a cut."""
    file = source.parent / "windows.safetensors"
    save_windows(tiny_windows(), file)
    secateur.structure(source, output=output, calibration=file, effort="fast", **options)
    return json.loads((output / "secateur" / "steps.json").read_text())


def test_an_expert_without_tokens_is_chosen_by_its_weights(tmp_path: Path) -> None:
    """The neurons with the largest product of norms stay, and the notes name the expert."""
    model: Any = tiny_model("qwen2_moe")
    router = model.model.layers[0].mlp.gate.weight
    with torch.no_grad():  # two of the others always have a larger logit than expert 3
        router.copy_(router[:1] * torch.tensor([1.0, -1, 2, 0, -2])[:, None])
    (step,) = structured(saved(model, tmp_path / "source"), tmp_path / "out", ffn=0.67)
    assert step["by_weights"]["0"] == [3]
    own = standard(model.model.layers[0].mlp.experts, 3)
    size = own["gate_proj"].norm(dim=1) * own["up_proj"].norm(dim=1) * own["down_proj"].norm(dim=0)
    assert step["cut"]["expert_neurons"]["0"][3] == sorted(size.topk(16).indices.tolist())


def test_neurons_go_with_experts_layers_and_channels(tmp_path: Path) -> None:
    """To one target; experts keep a multiple of 8, and the others the same share."""
    source = saved(tiny_model("deepseek_v3"), tmp_path / "source")
    steps = structured(
        source, tmp_path / "out", experts=4, keep_layers=2, hidden_size=24, keep_parameters=0.25
    )
    assert [step["step"] for step in steps] == ["depth", "experts", "hidden", "width"]
    loaded = load_whole(tmp_path / "out", torch.device("cpu"))
    sizes = sizes_of(loaded)
    assert (sizes.layers, sizes.hidden, max(sizes.experts)) == (2, 24, 4)
    assert {n for n in (*sizes.expert_neurons, *sizes.shared_neurons) if n} == {8}
    assert steps[-1]["after"]["decoder"] <= 0.25 * steps[0]["before"]["decoder"]
    assert logits(loaded, IDS).isfinite().all()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    source, stops = saved(tiny_model("qwen3_moe"), tmp_path / "source"), 0
    structured(source, tmp_path / "whole", experts=4, ffn=0.67)
    while not (tmp_path / "out").exists():
        stop = StopAt(None, 12 + 12 * stops)
        try:
            structured(
                source, tmp_path / "out", experts=4, ffn=0.67, resume=bool(stops), progress=stop
            )
        except StoppedError:
            stops += 1
    assert stops >= 2
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_llama_cpp_runs_the_result(tmp_path: Path) -> None:
    """Its logits are ours."""
    tokenizer = byte_level()
    source = save(
        tmp_path / "source", tokenizer, "qwen3_moe", decoder_sparse_step=1, num_hidden_layers=2,
        layer_types=["full_attention"] * 2, head_dim=16, hidden_size=64, num_experts=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    cut_checkpoint(source, half_of(model), tmp_path / "cut")
    secateur.export(tmp_path / "cut", output=tmp_path / "gguf", to="gguf", type="f32")
    cut = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    with LlamaCpp(next((tmp_path / "gguf").glob("*.gguf"))) as engine:
        found = torch.stack([x for x in engine.run(ids, logits=True) if x is not None])
    torch.testing.assert_close(found, logits(cut.eval(), ids), rtol=0, atol=1e-4)
