"""Scores of experts from a GGUF file, beside those of transformers and loops from the papers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from benchmarks.gguf_files.importance import collected, means, write
from gguf_models import byte_level, save
from torch import Tensor, nn
from trained import source_text
from transformers import AutoModelForCausalLM

import secateur
from secateur.engine.search import experts as survey
from secateur.errors import ArchitectureError, CheckpointError
from secateur.exporting.gguf import expert_scores as scores_of_file
from secateur.exporting.gguf.expert_scores import ImportanceMatrix
from secateur.exporting.gguf.llama_cpp import LlamaCpp, Node
from secateur.models.experts import opened_experts
from secateur.models.gguf_file import GGUFSource
from secateur.models.opening import open_weights
from secateur.models.targets import CheckpointTarget
from secateur.progress import Silent
from secateur.recipes.shared import Calibration

LAYERS, EXPERTS = range(3), 5
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen2_moe": {"mlp_only_layers": []},
    "qwen3_moe": {"decoder_sparse_step": 1},
}
WINDOWS = torch.randint(5, 300, (4, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FAMILIES)
def mixture(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and its float32 file."""
    place = tmp_path_factory.mktemp("mixture")
    source = save(place / "model", byte_level(), request.param, **FAMILIES[request.param])
    secateur.export(source, output=place / "out", type="f32")
    (file,) = (place / "out").iterdir()
    return source, file


def target_of(folder: Path) -> CheckpointTarget:
    return CheckpointTarget(open_weights(folder), None, torch.device("cpu"))


def use_of(file: Path, store: Path, windows: Tensor = WINDOWS) -> dict[int, survey.ExpertUse]:
    with LlamaCpp(file) as engine:
        source = GGUFSource.read(file)
        return scores_of_file.expert_use(source, engine, windows, store, Silent())


def test_reap_by_llama_cpp_is_that_of_transformers(mixture: Any, tmp_path: Path) -> None:
    folder, file = mixture
    expected = survey.expert_use(target_of(folder), WINDOWS, 4096, Silent())
    found = use_of(file, tmp_path / "a.safetensors")
    assert found.keys() == expected.keys() == set(LAYERS)
    for layer, use in expected.items():
        assert found[layer].tokens.tolist() == use.tokens.tolist()
        torch.testing.assert_close(found[layer].outputs, use.outputs, rtol=1e-4, atol=1e-9)
    secateur.export(folder, output=tmp_path / "q8", type="q8_0")
    (small,) = (tmp_path / "q8").iterdir()
    for layer, use in use_of(small, tmp_path / "b.safetensors").items():
        relative = use.score("reap") / expected[layer].score("reap").clamp_min(1e-12) - 1
        assert relative[expected[layer].tokens > 0].abs().max() < 0.1


def test_a_killed_run_goes_on_to_the_same_sums(
    mixture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, store = mixture[1], tmp_path / "a.safetensors"
    whole = use_of(file, tmp_path / "b.safetensors")
    finished = scores_of_file._UseSums.step

    def killed(sums: Any, last: int) -> None:
        if sums.done == 2:
            raise KeyboardInterrupt
        finished(sums, last)

    monkeypatch.setattr(scores_of_file, "STORED_SECONDS", 0)

    with monkeypatch.context() as patch:
        patch.setattr(scores_of_file._UseSums, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            use_of(file, store)
    seen: list[int] = []
    add = scores_of_file._UseSums.add
    monkeypatch.setattr(
        scores_of_file._UseSums, "add", lambda *given: (seen.append(1), add(*given))
    )
    again = use_of(file, store)
    assert len(seen) == 2 * 2 * len(LAYERS)  # two windows, two nodes of each layer
    for layer, use in whole.items():
        assert torch.equal(again[layer].tokens, use.tokens)
        assert torch.equal(again[layer].outputs, use.outputs)


def aimer_by_a_loop(matrices: list[np.ndarray]) -> float:
    """As the released code of the paper computes it; there the largest are removed."""
    absolute = squares = 0.0
    count = 0
    for matrix in matrices:
        for value in matrix.ravel().tolist():
            absolute += abs(value)
            squares += value * value
            count += 1
    return (absolute / count) / (squares / count) ** 0.5


@pytest.mark.parametrize("type", ["f32", "q8_0", "f16"])
def test_aimer_is_that_of_the_paper(type: str, mixture: Any, tmp_path: Path) -> None:
    secateur.export(mixture[0], output=tmp_path / "out", type=type)
    (file,) = (tmp_path / "out").iterdir()
    found = scores_of_file.aimer_scores(GGUFSource.read(file), LAYERS, Silent())
    stored = {t.name: t for t in gguf.GGUFReader(file).tensors}
    for layer in LAYERS:
        for expert in range(EXPERTS):
            own = [stored[f"blk.{layer}.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]
            matrices = [gguf.quants.dequantize(t.data[expert], t.tensor_type) for t in own]
            loop = aimer_by_a_loop(matrices)
            assert float(found[layer][expert]) == pytest.approx(1 / loop, rel=1e-5)
    if type == "f32":
        folder = survey.aimer_scores(target_of(mixture[0]), Silent())
        for layer in LAYERS:
            torch.testing.assert_close(folder[layer], found[layer], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_scores_by_an_importance_matrix(form: str, mixture: Any, tmp_path: Path) -> None:
    """Against a loop over the inputs that transformers gives each expert."""
    folder, file = mixture
    with LlamaCpp(file) as engine:
        matrix = collected(engine, WINDOWS)
    write(matrix, tmp_path / "imatrix.gguf", WINDOWS.shape[1])
    matrix = ImportanceMatrix.read(tmp_path / "imatrix.gguf")
    if form == "dat":
        given = means(matrix).items()
        squares = {name: torch.from_numpy(x).double().view(1, -1) for name, x in given}
        ones = {name: torch.ones(1, dtype=torch.int64) for name in squares}
        matrix = ImportanceMatrix(squares, ones, has_counts=False)
    source = GGUFSource.read(file)
    found = scores_of_file.imatrix_scores(source, matrix, LAYERS, Silent())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    read: dict[nn.Module, Tensor] = {}
    with opened_experts(model), torch.no_grad():
        experts = [layer.mlp.experts for layer in model.model.layers]
        for linear in (x for each in experts for one in each for x in (one.up_proj, one.down_proj)):
            linear.register_forward_pre_hook(lambda m, args: read.update({m: args[0]}))
        model(input_ids=WINDOWS)
        for layer, each in enumerate(experts):
            router = model.model.layers[layer].mlp.gate.weight
            for expert, one in enumerate(each):
                x, h = (read.get(m, torch.zeros(0, 1)) for m in (one.up_proj, one.down_proj))
                norm = logit = 0.0
                down = one.down_proj.weight
                for j in range(down.shape[1] if len(h) else 0):
                    norm += float(h[:, j].square().mean() * down[:, j].square().sum())
                for i in range(router.shape[1] if len(x) else 0):
                    logit += float(x[:, i].square().mean() * router[expert, i].square())
                wanted = (norm * logit) ** 0.5 * (len(h) if form == "gguf" else 1)
                assert float(found[layer][expert]) == pytest.approx(wanted, rel=1e-4)


def options(tmp_path: Path, **more: Any) -> Calibration:
    """Two texts with weights."""
    for name, start in (("a", 0), ("b", 9000)):
        lines = [
            json.dumps({"text": source_text()[i : i + 900]})
            for i in range(start, start + 9000, 900)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    text = f"{tmp_path}/a.jsonl=2,{tmp_path}/b.jsonl=1"
    return Calibration(source=text, windows=6, sequence_length=32, **more)


@pytest.mark.parametrize("by", ["reap", "frequency", "random", "aimer", "imatrix"])
def test_every_score_has_every_layer(
    by: str, mixture: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, file = mixture
    source, matrix = GGUFSource.read(file), tmp_path / "imatrix.gguf"
    with LlamaCpp(file) as engine:
        write(collected(engine, WINDOWS), matrix, 40)
    given = options(tmp_path)
    with caplog.at_level(logging.WARNING):
        found, notes = scores_of_file.expert_scores(
            source, LAYERS, by, given, matrix, tmp_path, Silent()
        )
    assert [*found] == [*LAYERS]
    assert all(own.shape == (EXPERTS,) for own in found.values())
    assert json.loads(json.dumps(notes))["by"] == by
    if by == "reap":  # the windows are those of the folder's tokenizer
        record = notes["calibration"]
        assert record["samples"] == 6
        assert [text["samples"] for text in record["texts"]] == [4, 2]
        cut = secateur.structure(
            folder, output=tmp_path / "cut", experts=3, calibration=given.source, windows=6,
            sequence_length=32,
        )  # fmt: skip
        assert cut.manifest.calibration["sha256"] == record["sha256"]
        step, *_ = json.loads((tmp_path / "cut/secateur/steps.json").read_text())
        for layer, own in step["use"].items():
            assert own["reap"] == pytest.approx(notes["scores"][int(layer)], rel=1e-3)
            assert own["reap"] == pytest.approx(found[int(layer)].tolist(), rel=1e-4)


def test_layers_that_no_run_reaches_are_scored_by_their_weights(
    mixture: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = GGUFSource.read(mixture[1])
    use = use_of(mixture[1], tmp_path / "a.safetensors")
    use[0].tokens[3] = 0
    monkeypatch.setattr(scores_of_file, "expert_use", lambda *_: {n: use[n] for n in (0, 1)})
    with caplog.at_level(logging.WARNING):
        found, notes = scores_of_file.expert_scores(
            source, LAYERS, "reap", options(tmp_path), None, tmp_path, Silent()
        )
    assert notes["by_weights"] == [2]
    assert 3 in notes["unseen"][0]
    assert "layer 0" in caplog.text
    expected = scores_of_file.aimer_scores(source, [2], Silent())[2]
    assert torch.equal(found[2], expected)


def test_two_choices_of_experts_in_a_layer_are_refused(
    mixture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = Node.name.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Node, "name", property(lambda node: name(node).replace("weighted", "other"))
    )
    with pytest.raises(ArchitectureError, match="layer 0"):
        use_of(mixture[1], tmp_path / "a.safetensors")


def test_the_matrix_of_another_model_is_refused(mixture: Any) -> None:
    source = GGUFSource.read(mixture[1])
    name = "blk.1.ffn_down_exps.weight"
    other = ImportanceMatrix({name: torch.ones(4, 9).double()}, {name: torch.ones(4).long()})
    with pytest.raises(CheckpointError) as refusal:
        scores_of_file.imatrix_scores(source, other, LAYERS, Silent())
    assert refusal.value.where == name


def test_the_verb_keeps_the_best_of_a_file(mixture: Any, tmp_path: Path) -> None:
    given, made = options(tmp_path), tmp_path / "smaller.gguf"
    secateur.structure(
        mixture[1], output=made, experts=3, calibration=given.source, windows=6, sequence_length=32
    )
    scores, _ = scores_of_file.expert_scores(
        GGUFSource.read(mixture[1]), LAYERS, "reap", given, None, tmp_path, Silent()
    )
    [cut] = json.loads(GGUFSource.read(made).fields["secateur.cut"].value)
    assert cut["experts"]["text"] == "a.jsonl,b.jsonl"
    for layer, own in scores.items():
        best = own.argsort(descending=True)[:3].tolist()
        assert cut["experts"]["kept"][str(layer)] == sorted(best)
    with LlamaCpp(made) as engine:
        [logits] = engine.run(WINDOWS[:1], logits=True)
    assert logits is not None
    assert logits.isfinite().all()
