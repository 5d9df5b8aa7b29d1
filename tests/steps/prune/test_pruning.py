"""The whole way on disk: prune, kill anywhere, resume, load with transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from same_logits import assert_same_logits
from slow import few_families
from stopped_stage import StopAt, StoppedError
from transformers import AutoModelForCausalLM, AutoTokenizer
from weight_files import digest
from zoo import CONFIGS, matrices, tiny_model, tiny_windows, weight_of

import secateur
from secateur.calibration.windows import save_windows
from secateur.errors import RecipeError, VerificationError
from secateur.progress import Silent
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.recipe_files import read_recipe_file
from secateur.runs.ledger import Ledger
from secateur.runs.records import Layer
from secateur.sparsity.methods import Method
from secateur.sparsity.solvers import Solution
from secateur.steps.prune import Prune
from secateur.steps.runner import carry_out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny Llama checkpoint in three shards."""
    folder = tmp_path / "source"
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.mark.parametrize("family", few_families(CONFIGS))
def test_a_checkpoint_is_pruned_as_a_loaded_model_is(
    family: str, tmp_path: Path, windows: Path
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "source")
    options = {"method": "sparsegpt", "sparsity": 0.5, "micro_batch_tokens": 40}
    report = secateur.prune(
        tmp_path / "source", output=tmp_path / "out", calibration=windows, **options
    )
    secateur.prune(model, calibration=tiny_windows(), **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, module in matrices(model).items():
        assert torch.equal(matrices(loaded)[name].weight, module.weight), name
    ids = tiny_windows(2)
    assert_same_logits(loaded(ids).logits, model(ids).logits)
    assert report.sparsity == 0.5
    assert report.output == tmp_path / "out"


def test_a_file_of_windows_needs_no_tokenizer_in_place_either(windows: Path) -> None:
    one, other = tiny_model("llama"), tiny_model("llama")
    options = {"method": "wanda", "sparsity": 0.5}
    secateur.prune(one, calibration=windows, **options)
    secateur.prune(other, calibration=tiny_windows(), **options)
    for name, module in matrices(one).items():
        assert torch.equal(matrices(other)[name].weight, module.weight), name
    with pytest.raises(RecipeError, match="needs its tokenizer"):
        secateur.prune(other, calibration="boolq-calibration", **options)


def test_disk_and_memory_give_the_same_weights(source: Path, windows: Path, tmp_path: Path) -> None:
    digests = set()
    for place in ("memory", "disk"):
        for sequential in ("group", "layer"):
            out = tmp_path / f"{place}-{sequential}"
            secateur.prune(
                source, output=out, method="wanda", sparsity=0.5, calibration=windows,
                activations=place, sequential=sequential, micro_batch_tokens=40,
            )  # fmt: skip
            digests.add((sequential, digest(out)))
    assert len(digests) == 2


def test_bfloat16_stays_bfloat16(windows: Path, tmp_path: Path) -> None:
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "source")
    secateur.prune(
        tmp_path / "source", output=tmp_path / "out", method="sparsegpt", pattern="2:4",
        calibration=windows,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for module in matrices(loaded).values():
        groups = weight_of(module).unflatten(1, (-1, 4))
        assert ((groups == 0).sum(-1) >= 2).all()


def test_what_is_not_pruned_is_untouched(source: Path, tmp_path: Path) -> None:
    secateur.prune(
        source, output=tmp_path / "out", method="magnitude", sparsity=0.5,
        include=("*.mlp.*",), exclude=("*.layers.1.*",), overrides={"*.layers.2.*": 0.25},
    )  # fmt: skip
    before, after = (AutoModelForCausalLM.from_pretrained(d) for d in (source, tmp_path / "out"))
    changed = {}
    for (name, old), (_, new) in zip(
        before.state_dict().items(), after.state_dict().items(), strict=True
    ):
        if not torch.equal(old, new):
            changed[name] = float((new == 0).float().mean())
    kinds = ("gate_proj", "up_proj", "down_proj")
    expected = {
        f"model.layers.{i}.mlp.{k}.weight": s for i, s in ((0, 0.5), (2, 0.25)) for k in kinds
    }
    assert changed == expected


@pytest.mark.parametrize("family", ["gemma3", "mixtral"])
def test_asymmetric_fitting_goes_on_wherever_it_stopped(
    family: str, windows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between layers, in a forward, and between the linears of a layer; norms and experts."""
    tiny_model(family).save_pretrained(tmp_path / "source")
    common = {"method": "sparsegpt", "sparsity": 0.5, "asymmetric": True, "calibration": windows,
              "micro_batch_tokens": 40}  # fmt: skip
    solve, left, announced = Method.solve, [0], []

    def solved(self: Method, *args: Any, **options: Any) -> Solution:
        left[0] -= 1
        if left[0] == 0:
            raise StoppedError
        return solve(self, *args, **options)

    class Announced(Silent):
        def start(self, label: str, steps: int) -> None:
            announced.extend([steps] * (label == "pruning"))

    monkeypatch.setattr(Method, "solve", solved)
    secateur.prune(tmp_path / "source", output=tmp_path / "whole", progress=Announced(), **common)
    linears, (steps,) = -left[0] // 3, announced
    stops = [(number, None) for number in (linears + linears // 2, 2 * linears + 1)]
    stops += [(0, StopAt("pruning", steps // 3 + more)) for more in (0, 1)]
    for number, (solves, progress) in enumerate(stops):
        out = tmp_path / f"out-{number}"
        left[0] = solves
        with pytest.raises(StoppedError):
            secateur.prune(tmp_path / "source", output=out, progress=progress, **common)
        left[0] = 0
        secateur.prune(tmp_path / "source", output=out, resume=True, **common)
        assert digest(out) == digest(tmp_path / "whole"), stops[number]


@pytest.mark.parametrize(("stopped", "again"), [(2, 0), (5, 4)])
def test_layers_that_are_cheaper_to_repeat_than_to_store_are_repeated(
    stopped: int, again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states four times as large as a layer are stored for every fourth layer."""
    tiny_model("llama", num_hidden_layers=6).save_pretrained(tmp_path / "source")
    save_windows(tiny_windows(200), tmp_path / "windows.safetensors")
    common: dict[str, Any] = {"method": "wanda", "sparsity": 0.5}
    common["calibration"] = tmp_path / "windows.safetensors"
    finish, finished, stop = Ledger.finish_layer, list[int](), [-1]

    def finishing(self: Ledger, layer: Layer) -> None:
        if layer.layer == stop[0]:
            raise StoppedError
        finish(self, layer)
        finished.append(layer.layer)

    monkeypatch.setattr(Ledger, "finish_layer", finishing)
    secateur.prune(tmp_path / "source", output=tmp_path / "whole", **common)
    stop[0], out = stopped, tmp_path / "out"
    with pytest.raises(StoppedError):
        secateur.prune(tmp_path / "source", output=out, **common)
    stored = (tmp_path / "out.partial" / "work").glob("inputs-*")
    assert [file.name[:11] for file in stored] == [f"inputs-{again:04d}"]
    stop[0] = -1
    finished.clear()
    secateur.prune(tmp_path / "source", output=out, resume=True, **common)
    assert finished == [*range(again, 6)]
    lines = (out / "secateur" / "layers.jsonl").read_text().splitlines()
    assert [json.loads(line)["layer"] for line in lines] == [*range(6)]
    assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.parametrize(("family", "failing"), [("llama", 2), ("mixtral", 4)])
def test_linears_that_a_gpu_has_no_room_for_are_solved_on_the_host(
    family: str, failing: int, windows: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    tiny_model(family).save_pretrained(tmp_path / "source")
    common = {"method": "sparsegpt", "sparsity": 0.5, "calibration": windows}
    secateur.prune(tmp_path / "source", output=tmp_path / "whole", **common)
    solve, calls = Method.solve, []

    def solved(self: Method, *args: Any, **options: Any) -> Solution:
        calls.append(self)
        if len(calls) == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return solve(self, *args, **options)

    monkeypatch.setattr(Method, "solve", solved)
    secateur.prune(tmp_path / "source", output=tmp_path / "out", **common)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    [said] = [x.message for x in caplog.records if "solved on the host" in x.message]
    assert "layers.0." in said


def test_the_run_folder_tells_everything(source: Path, windows: Path, tmp_path: Path) -> None:
    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(source)
    out = tmp_path / "out"
    secateur.prune(source, output=out, method="wanda", sparsity=0.5, calibration=windows)
    manifest = json.loads((out / "secateur" / "manifest.json").read_text())
    assert manifest["result"]["decoder_sparsity"] == 0.5
    assert manifest["calibration"]["samples"] == 6
    assert manifest["cost"]["seconds"] > 0
    assert manifest["cost"]["peak_resident_bytes"] > 2**26
    assert manifest["plan"]["peak_bytes"] > 2**26
    assert manifest["environment"]["torch"] == torch.__version__
    layers = [json.loads(x) for x in (out / "secateur" / "layers.jsonl").read_text().splitlines()]
    assert [x["layer"] for x in layers] == [0, 1, 2]
    card = (out / "README.md").read_text()
    assert "pruned to 50.00%" in card
    assert "secateur prune recipe.yaml" in card
    assert AutoTokenizer.from_pretrained(out).vocab_size == tokenizer.vocab_size
    # The recipe and the windows in the folder are enough to make it again.
    again = carry_out(
        Prune,
        build_recipe(
            PruneRecipe,
            {
                **read_recipe_file(out / "secateur" / "recipe.yaml"),
                "output": str(tmp_path / "again"),
                "calibration": {"source": str(out / "secateur" / "windows.safetensors")},
            },
        ),
        Silent(),
    )
    assert digest(tmp_path / "again") == digest(out)
    assert again.sparsity == 0.5


def test_the_manifest_tells_the_allocation(source: Path, windows: Path, tmp_path: Path) -> None:
    secateur.prune(
        source, output=tmp_path / "out", method="wanda", sparsity=0.5, allocation="search",
        calibration=windows,
    )  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "secateur" / "manifest.json").read_text())
    record = manifest["allocation"]
    assert record["name"] == "search"
    assert "generations 16" in record["parameters"]
    assert record["divergence"] < record["uniform_divergence"]
    assert 0.3 < record["lowest_sparsity"] < 0.5 < record["highest_sparsity"] < 0.7
    assert manifest["result"]["decoder_sparsity"] == 0.5
    with pytest.raises(RecipeError, match="allocation"):
        secateur.prune(
            source, output=tmp_path / "out", method="wanda", sparsity=0.5, allocation="best",
            calibration=windows, overwrite=True,
        )  # fmt: skip


def test_the_audit_finds_zeros_that_were_filled_in(source: Path, tmp_path: Path) -> None:
    from secateur.diagnostics.audit import audit_checkpoint, verify
    from secateur.models.checkpoint import CheckpointReader, PatchedCopy
    from secateur.sparsity.patterns import parse_pattern

    out = tmp_path / "out"
    secateur.prune(source, output=out, method="magnitude", pattern="2:4")
    name = "model.layers.1.mlp.up_proj"
    sparsities = {name: 0.5}
    verify(audit_checkpoint(out, lambda name: parse_pattern("2:4"), sparsities))
    reader = CheckpointReader(out)
    weight = reader.read(f"{name}.weight")
    place = tuple((weight == 0).nonzero()[0].tolist())
    weight[place] = 1.0
    PatchedCopy(reader, out).write(f"{name}.weight", weight)
    audit = audit_checkpoint(out, lambda name: parse_pattern("2:4"), sparsities)
    assert [x.misplaced for x in audit.misplaced] == [1]
    with pytest.raises(VerificationError, match=rf"(?s)1 of 1536.*{name}"):
        verify(audit)


def test_zeros_that_were_there_before_are_named(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half, less = tmp_path / "half", tmp_path / "less"
    secateur.prune(source, output=half, method="magnitude", sparsity=0.5)
    assert caplog.messages == []
    found = secateur.prune(half, output=less, method="magnitude", sparsity=0.3)
    assert found.sparsity == pytest.approx(0.5, abs=1e-3)
    [said] = caplog.messages
    assert "30.0 %" in said
