"""Structured cuts on disk: what is asked is what is left, and what is impossible is refused."""

from __future__ import annotations

import json
import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from slow import few_families, slow_but
from stopped_stage import StopAt, StoppedError
from tiny import save_tiny
from transformers import AutoModelForCausalLM
from weight_files import digest
from zoo import CONFIGS, tiny_model, tiny_windows

import secateur
from oracles.depth import divergence
from secateur.calibration.run_windows import WindowReader
from secateur.calibration.windows import load_windows
from secateur.errors import ArchitectureError, RecipeError, SourceError
from secateur.reporting.tables import percent
from secateur.structured.cut import sizes_of

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
DENSE = [family for family in CONFIGS if family not in (*MIXTURES, "generic")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "source"
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    return folder


def decoder_parameters(folder: Path) -> int:
    """Counted without the library's own accounting."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)


@pytest.mark.parametrize("family", few_families(DENSE))
def test_neurons_and_heads_of_every_family(family: str, tmp_path: Path, windows: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    before = sizes_of(model)
    report = secateur.structure(
        tmp_path / "source", output=tmp_path / "out", calibration=windows, ffn=0.75, kv_groups=0.5,
        effort="fast",
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    after = sizes_of(loaded)
    assert [2 * g for g in after.groups] == list(before.groups)
    assert [n * 3 // 4 for n in before.neurons] == list(after.neurons)
    counted = report.manifest.structure.after
    assert counted.parameters == sum(p.numel() for p in loaded.parameters())
    ids = tiny_windows(2)
    cached = loaded.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    plain = loaded.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(("hidden", "plain"), [(48, True), (32, False)])
def test_as_many_query_heads_in_every_group(
    hidden: int, plain: bool, tmp_path: Path, windows: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "source")
    report = secateur.structure(
        tmp_path / "source", output=tmp_path / "out", calibration=windows, query_heads=3,
        score="activation",
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "secateur" / "steps.json").read_text())
    kept = {int(layer): heads for layer, heads in record[0]["cut"]["queries"].items()}
    ids = tiny_windows(2)
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(tiny_windows())
    energy = inputs[0].unflatten(-1, (8, hidden // 8)).square().sum((0, 1, 3))
    for group in (0, 4):  # the first layer sees what the dense model does
        weakest = group + int(energy[group : group + 4].argmin())
        assert [h for h in kept[0] if group <= h < group + 4] == [
            h for h in range(group, group + 4) if h != weakest
        ]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sizes_of(loaded).heads_per_group == 3  # a Llama's 6 heads have to divide its channels
    assert (loaded.config.model_type, loaded.config.num_attention_heads) == (
        ("llama", 6) if plain else ("secateur_varied", 8)
    )
    with torch.no_grad():
        for layer, heads in kept.items():
            columns = model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (8, -1))
            columns[:, [h for h in range(8) if h not in heads]] = 0
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    structure = report.manifest.structure
    for size in ("kv_cache_bytes_per_token", "ffn"):
        assert getattr(structure.after, size) == getattr(structure.before, size)


GROUPED = [family for family in DENSE if family not in ("gpt2", "opt", "gpt_neox")]


@pytest.mark.parametrize("family", few_families(GROUPED))
def test_query_heads_of_every_family(family: str, tmp_path: Path, windows: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    secateur.structure(
        tmp_path / "source", output=tmp_path / "out", calibration=windows, query_heads=0.5,
        keep_parameters=0.7, effort="fast",
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before, after = sizes_of(model), sizes_of(loaded)
    assert (before.heads_per_group, after.heads_per_group) == (2, 1)
    assert after.groups == before.groups
    left = decoder_parameters(tmp_path / "out") / decoder_parameters(tmp_path / "source")
    assert left == pytest.approx(0.7, abs=0.01)
    ids = tiny_windows(2)
    cached = loaded.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    assert torch.equal(
        cached, loaded.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    )


def test_query_heads_that_share_nothing_are_refused(tmp_path: Path, windows: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "source")
    with pytest.raises(RecipeError, match="value of its own"):
        secateur.structure(
            tmp_path / "source", output=tmp_path / "out", calibration=windows, query_heads=1
        )


def test_all_kinds_in_one_cut(source: Path, tmp_path: Path, windows: Path) -> None:
    report = secateur.structure(
        source, output=tmp_path / "out", calibration=windows, keep_layers=2, hidden_size=24, ffn=36,
        kv_groups=1, effort="fast",
    )  # fmt: skip
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 24)
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (36, 1, 8)
    steps = json.loads((tmp_path / "out" / "secateur" / "steps.json").read_text())
    assert [step["step"] for step in steps] == ["depth", "hidden", "width"]
    assert steps[-1]["after"]["decoder"] == decoder_parameters(tmp_path / "out")
    for one, other in pairwise(steps):
        assert one["after"]["decoder"] == other["before"]["decoder"]
    assert not report.manifest.structure.varied


@pytest.mark.parametrize("allocation", ["uniform", "global", "search"])
def test_a_fraction_of_the_parameters(
    allocation: str, source: Path, tmp_path: Path, windows: Path
) -> None:
    report = secateur.structure(
        source, output=tmp_path / "out", calibration=windows, keep_parameters=0.7,
        allocation=allocation, effort="fast",
    )  # fmt: skip
    record = report.manifest.structure
    neuron = 3 * 32  # gate, up and down of a hidden size of 32
    most = 3 * neuron if allocation == "uniform" else 6 * neuron
    assert abs(record.after.decoder - 0.7 * record.before.decoder) <= most
    assert record.after.decoder == decoder_parameters(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "groups", "neurons"),
    [
        ({"ffn": 0.5, "whole_first": 1}, (2, 2, 2), (48, 24, 24)),
        ({"kv_groups": 1, "ffn": 0.75, "whole_last": 1}, (1, 1, 2), (36, 36, 48)),
        (
            {"keep_layers": 2, "ffn": 0.5, "whole_last": 1, "depth_by": "influence"},
            (2, 2),
            (24, 48),
        ),
    ],
)
def test_layers_at_the_ends_stay_whole(
    options: dict[str, Any], groups: tuple[int, ...], neurons: tuple[int, ...],
    source: Path, tmp_path: Path, windows: Path,
) -> None:  # fmt: skip
    secateur.structure(
        source, output=tmp_path / "out", calibration=windows, effort="fast", **options
    )
    sizes = sizes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (sizes.groups, sizes.neurons) == (groups, neurons)


def test_a_target_is_reached_by_the_layers_between_the_ends(
    source: Path, tmp_path: Path, windows: Path
) -> None:
    record = secateur.structure(
        source, output=tmp_path / "out", calibration=windows, keep_parameters=0.8, whole_first=1,
        effort="fast",
    ).manifest.structure  # fmt: skip
    sizes = sizes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (sizes.groups[0], sizes.neurons[0]) == (2, 48)
    assert sizes.neurons[1] == sizes.neurons[2] < 48
    neuron = 3 * 32
    assert abs(record.after.decoder - 0.8 * record.before.decoder) <= 2 * neuron


def test_a_report_and_a_diagnosis_of_a_cut_model(
    source: Path, tmp_path: Path, windows: Path
) -> None:
    record = secateur.structure(
        source, output=tmp_path / "out", calibration=windows, ffn=0.5, effort="fast"
    ).manifest.structure
    secateur.report([tmp_path / "out"], output=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(rf"cut out of the decoder.*?{percent(record.decoder_removed)}", page, re.S)
    found = secateur.diagnose(tmp_path / "out")
    assert [f.id for f in found.findings if f.severity != "note"] == []


@pytest.mark.parametrize(
    ("options", "score"),
    [({"solver": "osscar"}, "obs"), ({"score": "fluctuation"}, "fluctuation")],
)
def test_parts_of_ones_own(
    options: dict[str, Any], score: str, source: Path, tmp_path: Path, windows: Path
) -> None:
    secateur.structure(source, output=tmp_path / "out", calibration=windows, ffn=0.5, **options)
    steps = json.loads((tmp_path / "out" / "secateur" / "steps.json").read_text())
    assert steps[0]["score"] == score
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.intermediate_size == 24


def test_experts(tmp_path: Path, windows: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    secateur.structure(
        tmp_path / "source", output=tmp_path / "out", calibration=windows, experts=2, effort="fast"
    )
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.num_local_experts == 2
    (step,) = json.loads((tmp_path / "out" / "secateur" / "steps.json").read_text())
    assert [*step["use"]] == ["0", "1", "2"]
    for layer, use in step["use"].items():
        assert sum(use["tokens"]) == 2 * load_windows(windows).numel()
        best = sorted(range(5), key=lambda e, scores=use["reap"]: -scores[e])[:2]
        assert step["cut"]["experts"][layer] == sorted(best)


def test_experts_by_their_weights_need_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path / "source")
    monkeypatch.setattr(WindowReader, "read", lambda *given: pytest.fail("a text is read"))
    found = secateur.structure(
        tmp_path / "source", output=tmp_path / "out", experts=2, experts_by="aimer"
    )
    assert found.manifest.calibration is None
    [step] = json.loads((tmp_path / "out/secateur/steps.json").read_text())
    for layer, own in step["use"].items():
        best = torch.tensor(own["aimer"]).argsort(descending=True)[:2].tolist()
        assert step["cut"]["experts"][layer] == sorted(best)
        assert min(own["aimer"]) >= 1


def test_distillation_by_the_uncut_model(source: Path, tmp_path: Path, windows: Path) -> None:
    plain = secateur.structure(
        source, output=tmp_path / "a", calibration=windows, ffn=0.5, effort="balanced"
    )
    taught = secateur.structure(
        source, output=tmp_path / "b", calibration=windows, ffn=0.5, effort="balanced",
        distill_epochs=8, distill_learning_rate=1e-4,
    )  # fmt: skip
    assert plain.manifest.distillation is None
    record = taught.manifest.distillation
    assert record["loss_after"] < record["loss_before"]
    dense, ids = AutoModelForCausalLM.from_pretrained(source), tiny_windows()
    wanted = dense(ids).logits.detach().log_softmax(-1)

    def divergence(folder: Path) -> float:
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    assert divergence(tmp_path / "b") < divergence(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the recipe cuts nothing"),
        ({"keep_layers": 4}, "keeps 4 decoder layers, but the model has 3"),
        ({"ffn": 0}, "no FFN neurons would stay"),
        ({"ffn": 49}, "49 FFN neurons"),
        ({"kv_groups": 0.1}, "KV groups of a layer, but the model has"),
        ({"kv_groups": 3}, "3 KV groups"),
        ({"query_heads": 3}, "3 query heads of a KV group, but the model has 2"),
        ({"query_heads": 0.1}, "query heads of a KV group"),
        ({"query_heads": 2}, "the recipe cuts nothing"),
        ({"keep_layers": 3}, "the recipe cuts nothing"),
        (
            {"ffn": 0.5, "whole_first": 2, "whole_last": 1},
            "2 layers at the start and 1 at the end keep everything",
        ),
        ({"keep_layers": 2, "whole_first": 1}, "whole_first: changes nothing without"),
        ({"query_heads": 1, "whole_last": 1}, "no layer can keep all"),
        ({"keep_parameters": 0.03}, "of the FFN neurons would have to go"),
        ({"ffn": 0.4, "multiple": 48}, "none of the 48 FFN neurons of a layer would stay"),
        ({"ffn": 0.6, "multiple": 48}, "all 48 FFN neurons of a layer would stay"),
        ({"hidden_size": 33}, "33 channels"),
        ({"hidden_size": 2.5}, "hidden_size=2.5"),
        ({"experts": 2}, "no experts"),
        ({"ffn": 0.5, "multiple": 7}, "no multiple of 7"),
        ({"keep_parameters": 0.5, "ffn": 0.5}, "keep_parameters with ffn: both set"),
        ({"keep_parameters": 0.001}, "would have to go|cannot be met"),
        ({"max_size": "900MiB"}, "max_size is 900.0 MiB; the weights take"),
        ({"ffm": 0.5}, "did you mean 'ffn'"),
    ],
)
def test_what_is_impossible_is_refused_before_any_work(
    options: dict[str, Any], said: str, source: Path, tmp_path: Path, windows: Path
) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        secateur.structure(
            source, output=tmp_path / "out", calibration=windows, effort="fast", **options
        )
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_text_that_is_not_there_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        secateur.structure(
            source, output=tmp_path / "out", calibration=tmp_path / "nowhere.safetensors", ffn=0.5
        )
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_a_stopped_cut_goes_on_to_the_same_model(
    source: Path, tmp_path: Path, windows: Path
) -> None:
    options: dict[str, Any] = {
        "calibration": windows, "keep_layers": 2, "query_heads": 1, "ffn": 0.5, "effort": "fast",
        "asymmetric": True, "distill_epochs": 1,
    }  # fmt: skip
    secateur.structure(source, output=tmp_path / "whole", **options)
    stops = 0
    while not (tmp_path / "out").exists():
        stop = StopAt(None, 30 + 10 * stops if stops else 8)
        try:
            secateur.structure(
                source, output=tmp_path / "out", resume=True, progress=stop, **options
            )
        except StoppedError:
            stops += 1
        assert stops < 20
    assert stops >= 2
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


CUTS = ({"keep_layers": 2}, {"hidden_size": 24}, {"keep_layers": 2, "hidden_size": 28, "ffn": 0.9})


@pytest.mark.parametrize(
    ("family", "options"),
    slow_but(
        [*product(["phi3"], CUTS), ("qwen2_moe", CUTS[2])],
        product(["qwen2", "mistral", "phi3", "qwen2_moe"], CUTS),
    ),
)
def test_what_stayed_is_refitted_beside_the_uncut_model(
    family: str, options: dict[str, Any], tmp_path: Path, windows: Path
) -> None:
    dense = tiny_model(family)
    dense.save_pretrained(tmp_path / "source")
    both = {}
    for name, asymmetric in (("plain", False), ("refit", True)):
        both[name] = secateur.structure(
            tmp_path / "source", output=tmp_path / name, calibration=windows,
            effort="fast", asymmetric=asymmetric, **options,
        )  # fmt: skip
    steps = {n: [s["step"] for s in r.manifest.structure.steps] for n, r in both.items()}
    assert [step for step in steps["refit"] if step != "refit"] == steps["plain"]
    assert steps["refit"].index("refit") == len([o for o in options if o != "ffn"])
    sizes = [r.manifest.structure.after for r in both.values()]
    assert sizes[0] == sizes[1]
    losses = {
        n: divergence(dense, AutoModelForCausalLM.from_pretrained(tmp_path / n), tiny_windows())
        for n in both
    }
    assert losses["refit"] < 0.8 * losses["plain"]


def test_a_family_whose_writers_are_not_known_is_cut_without_a_refit(
    tmp_path: Path, windows: Path
) -> None:
    tiny_model("gemma2").save_pretrained(tmp_path / "source")
    report = secateur.structure(
        tmp_path / "source", output=tmp_path / "out", calibration=windows, keep_layers=2
    )
    assert [s["step"] for s in report.manifest.structure.steps] == ["depth"]


@pytest.mark.parametrize("unit", ["ffn", "kv_groups", "hidden_size", "keep_parameters"])
def test_units_of_an_undeclared_family_are_not_said_to_be_absent(
    unit: str, tmp_path: Path, windows: Path
) -> None:
    """It has neurons and heads; only nobody has declared which parameters they are."""
    source = save_tiny(tmp_path / "source", "generic")
    with pytest.raises(ArchitectureError, match="declare which parameters") as caught:
        secateur.structure(source, output=tmp_path / "out", calibration=windows, **{unit: 0.5})
    assert "CONTRIBUTING.md" in str(caught.value)
    assert not (tmp_path / "out").exists()
