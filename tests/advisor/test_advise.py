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
from secateur.advisor.facts import read_facts
from secateur.advisor.options import options_for
from secateur.errors import RecipeError, SecateurError
from secateur.models.counting import counted
from secateur.models.skeleton import build_skeleton, without_weights
from secateur.recipes.options import options_of, run_options_of
from secateur.recipes.verbs import VERBS, imported

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
    found = secateur.advise(tmp_path / "model", prompt_tokens=10, new_tokens=10)
    record = json.loads(json.dumps(found.to_json()))
    names = {row["option"] for row in record["options"]}
    assert {"as it is", "int8", "int4", "50% zeros", "50% zeros + int4"} <= names
    assert record["chosen"] == "as it is"
    assert "measured here" in record["basis"]["times"]
    assert record["options"][0]["served"]["usd"] is None
    assert (tmp_path / "home" / "times.json").exists()


def test_the_command_advises_on_a_known_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runner(monkeypatch, capsys)
    words = ("llama-3.1-8b", "--hardware", "a100-80gb", "--quality-loss", "0.03")
    record = json.loads(run("advise", *words, "--json").out)
    assert record["chosen"] == "int8"
    (command,) = record["commands"]
    assert "--values int8" in command
    chosen = next(row for row in record["options"] if row["option"] == "int8")
    low, typical, high = chosen["served"]["usd"]
    assert 0 < low < typical < high
    assert chosen["bits"] == 8
    assert "2411.02355" in chosen["sources"][0]
    shown = run("advise", *words).out
    for word in ("published", "estimated", "USD/1M", command):
        assert word in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hardware": "a100"}, "a100-80gb"),
        ({"new_tokens": 10**40}, "new_tokens"),
        ({"hardware": "this-machine"}, "config.json"),
        ({"quality_loss": 1.0}, "quality_loss"),
        ({"batch": 0}, "batch"),
        ({"model": "llama-2-7c", "hardware": "h200"}, "'llama-2-7b'"),
    ],
)
def test_nonsense_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(SecateurError) as caught:
        secateur.advise(**{"model": "llama-2-7b", **options})  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_a_model_without_attention_has_a_state_that_does_not_grow(tmp_path: Path) -> None:
    """Published sizes of Mamba-2.8B."""
    transformers.MambaConfig(
        vocab_size=50280, hidden_size=2560, num_hidden_layers=64, state_size=16
    ).save_pretrained(tmp_path)

    def memory(tokens: int) -> int:
        options = {"hardware": "h100-80gb", "prompt_tokens": tokens, "quality_loss": 0.0}
        found = secateur.advise(tmp_path, **options)  # type: ignore[arg-type]
        assert "64 keep a state" in str(found)
        works = found.to_json()["options"][0]["served"]
        return int(works["memory"]["cache"] / works["batch"])

    assert memory(100) == memory(100_000) == 64 * 5120 * (4 * 16 + 2 * 4)


def test_all_experts_of_a_layer_are_never_allocated(tmp_path: Path) -> None:
    """One tensor of DeepSeek-V3's experts has 30 GB."""
    transformers.DeepseekV3Config(num_hidden_layers=4).save_pretrained(tmp_path)
    found = secateur.advise(tmp_path, hardware="h200")
    assert found.question.model.experts == 256
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


def test_the_model_as_it_is_has_a_row_or_a_reason() -> None:
    found = secateur.advise("qwen3-30b-a3b", hardware="h100-80gb", quality_loss=0.5)
    names = [row.option.name for row in found.shown()]
    assert len(names) == 8
    assert "as it is" in names
    small = secateur.advise("qwen3-30b-a3b", hardware="rtx-4060-ti-16gb")
    whole = next(row for row in small.considered if not row.option.changes)
    assert f"as it is: {whole.refused}" in str(small)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("macbook", "m4-24gb"),
        ("4090", "rtx-4090"),
        ("raspberry", "raspberry-pi-5-16gb"),
        ("h20", "h200"),
        ("", "a100-80gb"),
    ],
)
def test_near_names_of_hardware(name: str, near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        secateur.advise("llama-2-7b", hardware=name)
    assert near in str(caught.value)


def test_an_impossible_bound_has_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runner(monkeypatch, capsys)
    ran = run("advise", "llama-2-7b", "--hardware", "h200", "--token-ms", "0.1")
    assert ran.code == 3
    assert "0.1 allowed" in ran.out


def test_files_of_facts_and_prices_can_be_given_as_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = tmp_path / "mine.yaml"
    facts.write_text(
        "hardware:\n  mine: {name: My GPU, kind: cuda, memory_gib: 40, bandwidth_gb_s: 1000,\n"
        "    tflops: {bf16: 100}}\n"
    )
    run = runner(monkeypatch, capsys)
    given = ("--hardware", "mine", "--facts", str(facts))
    assert "My GPU" in run("advise", "llama-2-7b", *given).out
    priced = json.loads(run("advise", "llama-2-7b", *given, "--usd-per-hour", "2", "--json").out)
    found = priced["options"][0]["served"]
    assert found["usd"][1] == pytest.approx(2 * found["busy"][1] / 3600 / 500 * 1e6)


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
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SecateurError, match=said):
        secateur.advise(tmp_path, hardware="h200")


def test_names_may_be_spelled_as_people_do(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    found = secateur.advise(tmp_path / "model" / "config.json", hardware="M4 Max 64GB")
    assert found.hardware == "m4-max-64gb"


def test_a_configuration_that_asks_for_the_impossible_is_refused(tmp_path: Path) -> None:
    transformers.LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"num_hidden_layers": 10**9}
    file.write_text(json.dumps(config))
    with pytest.raises(SecateurError, match="num_hidden_layers is 1000000000"):
        secateur.advise(tmp_path, hardware="h200")
