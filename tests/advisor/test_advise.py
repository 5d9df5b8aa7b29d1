"""Advice from a configuration alone: sizes, times, refusals, and the tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from commands import runner
from tiny import save_tiny

import secateur
from secateur.advisor.capacity import Capacity
from secateur.advisor.facts import read_facts
from secateur.advisor.options import options_for
from secateur.errors import RecipeError, SecateurError, SourceError
from secateur.models.counting import counted
from secateur.models.skeleton import build_skeleton, without_weights
from secateur.recipes.options import options_of, run_options_of
from secateur.recipes.verbs import VERBS, imported
from secateur.reporting.tables import Table

RECURRENT = ("mamba", "falcon_h1")
MIXTURES = ("mixtral", "qwen3_moe", "gemma4", "deepseek_v3", "llama4", "qwen3_next")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", *RECURRENT, *MIXTURES])
def test_every_weight_is_counted_once(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    shape = counted(family, build_skeleton(folder))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.active <= shape.linears
    assert (shape.experts > 0) == (family in MIXTURES)
    assert (shape.active < shape.linears) == (shape.experts > 0)


def test_a_configuration_is_enough_and_this_machine_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "home"))
    transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    found = secateur.advise(tmp_path / "model", requests_per_day=10, tokens_per_request=20)
    record = json.loads(json.dumps(found.to_json()))
    names = {row["option"] for row in record["options"]}
    assert {"as it is", "int8", "int4", "50% zeros", "50% zeros + int4"} <= names
    assert record["chosen"] == "as it is"
    assert record["basis"]["times"].startswith("decoded on this machine with random weights, 20")
    assert "measured here" in str(found)
    assert (tmp_path / "home" / "times.json").exists()


def test_the_command_advises_on_a_known_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runner(monkeypatch, capsys)
    words = ("llama-3.1-8b", "--hardware", "a100-80gb", "--requests-per-day", "1e6")
    record = json.loads(run("advise", *words, "--quality-loss", "0.03", "--json").out)
    assert record["verdict"].startswith("Only quantize: int8")
    assert record["commands"] == [
        "secateur compress llama-3.1-8b --values int8 --calibration TEXT --output SMALL"
    ]
    chosen = next(row for row in record["options"] if row["option"] == "int8")
    assert chosen["cost_usd"]["month"]["low"] < chosen["cost_usd"]["month"]["high"]
    assert "2411.02355" in chosen["accuracy_sources"][0]
    shown = run("advise", *words, "--quality-loss", "0.03").out
    assert "published" in shown
    assert "estimated" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hardware": "a100"}, "no hardware is called 'a100'"),
        ({"requests_per_day": 1e300}, "requests_per_day"),
        ({"tokens_per_request": 10**40}, "tokens_per_request"),
        ({"hardware": "h200", "spot": True, "usd_per_hour": 1.0}, "both say the price"),
        ({"hardware": "this-machine"}, "well-known shape"),
        ({"tokens_per_request": 10, "new_tokens": 10}, "tokens_per_request"),
        ({"quality_loss": 1.0}, "quality_loss"),
        ({"requests_per_day": 0}, "requests_per_day"),
    ],
)
def test_nonsense_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        secateur.advise("llama-2-7b", **options)  # type: ignore[arg-type]


def test_a_model_without_attention_has_a_state_that_does_not_grow(tmp_path: Path) -> None:
    """On 91843e48 this was a TypeError. Published sizes of Mamba-2.8B."""
    transformers.MambaConfig(
        vocab_size=50280, hidden_size=2560, num_hidden_layers=64, state_size=16
    ).save_pretrained(tmp_path)

    def memory(tokens: int) -> int:
        options = {"hardware": "h100-80gb", "tokens_per_request": tokens, "quality_loss": 0.0}
        found = secateur.advise(tmp_path, **options)  # type: ignore[arg-type]
        assert "64 keep a state" in str(found)
        capacity = found.to_json()["options"][0]["capacity"]
        return int(capacity["memory"]["cache"] / capacity["batch"])

    assert memory(100) == memory(100_000) == 64 * 5120 * (4 * 16 + 2 * 4)


def test_all_experts_of_a_layer_are_never_allocated(tmp_path: Path) -> None:
    """One tensor of DeepSeek-V3's experts has 30 GB; on 91843e48 memory ran out."""
    transformers.DeepseekV3Config(num_hidden_layers=4).save_pretrained(tmp_path)
    found = secateur.advise(tmp_path, hardware="h200", requests_per_day=1e7)
    assert found.advice.model.experts == 256
    assert "4 keep all tokens" in str(found)
    with without_weights():
        assert torch.empty(2**25).is_meta
        assert torch.empty((2**10, 2**15)).is_meta
        assert not torch.empty(2**10).is_meta


def test_every_command_that_is_advised_can_be_given() -> None:
    """Verbs and flags exist, nothing required is missing, and each step reads the one before."""
    facts = read_facts()
    shape = facts.shapes["qwen3-30b-a3b"].shape("qwen3-30b-a3b")  # with experts
    seen = set()
    for device in facts.hardware.values():
        for option in options_for(shape, device):
            source = "org/model"
            for line in option.commands("org/model"):
                assert f" {source} " in line
                source = line.partition("--output ")[2] or source
                if line.startswith("secateur "):
                    verb, given = VERBS[line.split()[1]], line.split()[3:]
                    of = [
                        *options_of(imported(verb.recipe)),
                        *run_options_of(imported(verb.recipe)),
                    ]
                    flags = {"--" + one.name.replace("_", "-"): one for one in of}
                    used = {word for word in given if word.startswith("--")}
                    assert used <= flags.keys(), line
                    required = {name for name, one in flags.items() if one.required}
                    assert required - {"--model"} <= used, line
                    seen.add(line.split()[1])
    assert seen == {"structure", "train", "prune", "compress", "export"}


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
    "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
"""As in its published config.json."""


def test_the_model_as_it_is_has_a_row_or_a_reason(tmp_path: Path) -> None:
    """On 0d9766ca an H100 had eight rows for this load, none of them the model itself."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    served = secateur.advise(tmp_path, hardware="h100-80gb", requests_per_day=1e6)
    names = [row.option.name for row in served.shown()]
    assert len(names) == 8
    assert names[0] == "fp8"
    assert "as it is" in names
    small = secateur.advise(tmp_path, hardware="rtx-4060-ti-16gb", latency_p99_ms=1.0)
    assert any(line.startswith("as it is: ") for line in small.refused())


def test_quantizing_takes_time_and_money(tmp_path: Path) -> None:
    """On 0d9766ca FP8 took "0.0 GPU hours, 0 USD (nothing to make)"."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    found = secateur.advise(tmp_path, hardware="h100-80gb", requests_per_day=1e6)
    fp8 = next(row for row in found.advice.considered if row.option.name == "fp8")
    assert fp8.making.gpu_hours.typical == pytest.approx(25 / 3600 * 30.53 / 7, rel=1e-3)
    assert "takes about 1.8 GPU minutes, 0.05 (0.02 to 0.09) USD" in str(found)
    assert "paid back within a day" in str(found)
    whole = next(row for row in found.advice.considered if not row.option.changed)
    assert (whole.making.gpu_hours.high, whole.making.formula) == (0, "nothing to make")


def test_serving_oneself_stands_beside_hosted_models_with_cost_and_latency() -> None:
    found = secateur.advise("llama-3.1-8b", hardware="a40", requests_per_day=1e6)
    (table, _) = found.hosted()
    assert isinstance(table, Table)
    rows = {str(row[0]): row for row in table.rows}
    assert {"as it is", "int4", "2:4 zeros", "2:4 zeros + int4", "gpt-4o (API)"} <= rows.keys()
    assert (
        rows["gpt-4o (API)"][3] == f"{0.45 + 250 / 131:.2g}"
    )  # first token, then 250 at 131 a second
    assert rows["llama-3.1-8b (API)"][3] == "not known"
    whole = next(row for row in found.advice.considered if not row.option.changed).capacity
    assert isinstance(whole, Capacity)
    expected = whole.first_token.typical + 250 * whole.step.typical
    assert rows["as it is"][3] == f"{expected:.2g}"


def test_spot_prices_are_apart() -> None:
    asked = {"hardware": "a100-80gb", "requests_per_day": 1e6}
    for spot, price in ((False, 1.5), (True, 0.86)):
        found = secateur.advise("llama-2-7b", spot=spot, **asked)  # type: ignore[arg-type]
        assert found.advice.device.usd_per_hour[1] == price
    with pytest.raises(RecipeError, match="nobody publishes a spot price"):
        secateur.advise("llama-2-7b", hardware="rtx-3090", spot=True)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("macbook", "m4-16gb/24gb/32gb"),
        ("Mac mini", "m4-pro-24gb/48gb/64gb"),
        ("4090", "name one of: rtx-4090;"),
        ("raspberry", "raspberry-pi-5, raspberry-pi-5-16gb;"),
        ("a100", "a100-80gb;"),
        ("h20", "h200"),
        ("", "a100-80gb"),
    ],
)
def test_near_names_of_hardware(name: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        secateur.advise("llama-2-7b", hardware=name)
    assert near in str(caught.value)


def test_a_name_that_is_nothing_names_a_near_shape() -> None:
    with pytest.raises(SourceError, match="no well-known shape") as caught:
        secateur.advise("llama-2-7c", hardware="h200")
    assert "'llama-2-7b'" in str(caught.value)


def test_an_impossible_latency_has_exit_code_3_and_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runner(monkeypatch, capsys)
    words = (
        "llama-2-7b",
        "--hardware",
        "h200",
        "--latency-p99-ms",
        "0.1",
        "--quality-loss",
        "0.03",
    )
    ran = run("advise", *words)
    assert ran.code == 3
    assert "No option is certain to serve this load within your limits." in ran.out
    assert "nearest: int4 has 1.3 ms between two tokens: --latency-p99-ms 1.3" in ran.out


def test_files_of_facts_and_prices_can_be_given_as_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At bbf4874, --facts refused every file: "Input should be an instance of Path"."""
    facts = tmp_path / "mine.yaml"
    facts.write_text(
        "hardware:\n  mine: {name: My GPU, kind: cuda, memory_gib: 40, bandwidth_gb_s: 1000,\n"
        "    tflops: {bf16: 100}, usd_per_hour: [1, 1, 1]}\n"
    )
    run = runner(monkeypatch, capsys)
    given = ("--hardware", "mine", "--facts", str(facts))
    assert "My GPU" in run("advise", "llama-2-7b", *given).out
    priced = json.loads(run("advise", "llama-2-7b", *given, "--usd-per-hour", "2", "--json").out)
    assert priced["basis"]["prices"] == "given by the user"
    assert priced["options"][0]["cost_usd"]["month"]["typical"] == 2 * 730


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "llama"}, "does not say num_hidden_layers"),
        ({"model_type": "gpt2", "n_embd": 4}, "does not say num_hidden_layers"),
        ({}, "has no 'model_type'"),
        (None, "has no config.json"),
    ],
)
def test_a_configuration_without_sizes_is_refused(
    tmp_path: Path, config: dict[str, object] | None, said: str
) -> None:
    """On 0d9766ca transformers filled them in: {"model_type": "llama"} was a model of 6.74 B."""
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SecateurError, match=said):
        secateur.advise(tmp_path, hardware="h200")


def test_names_may_be_spelled_as_people_do(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(QWEN3_30B_A3B))
    found = secateur.advise(file, hardware="M4 Max 64GB")
    assert found.hardware == "m4-max-64gb"
    assert found.advice.model.experts == 128


def test_a_configuration_that_asks_for_the_impossible_is_refused(tmp_path: Path) -> None:
    transformers.LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": 10**9}
    file.write_text(json.dumps(config))
    with pytest.raises(SecateurError, match="num_hidden_layers is 1000000000"):
        secateur.advise(tmp_path, hardware="h200")
