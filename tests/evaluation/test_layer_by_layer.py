"""A model that does not fit in memory is judged with one layer in memory: the same numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from task_rows import write_task
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM
from zoo import CONFIGS, tiny_model, tiny_windows

import secateur
from secateur.engine import plan
from secateur.engine.stream import layerwise
from secateur.engine.stream.layerwise import LayerwiseReader, RememberingReader
from secateur.errors import MemoryBudgetError
from secateur.evaluation.divergence import divergence
from secateur.evaluation.perplexity import computed_by, perplexity
from secateur.evaluation.tasks import prepare_tasks, run_tasks
from secateur.models.checkpoint import CheckpointReader
from secateur.models.targets import CheckpointTarget
from secateur.runtime.load import PackedTarget, load
from secateur.runtime.packed import PackedCheckpoint

STATES = 5000.0
"""Bytes of hidden states at once: several passes through the layers of a tiny model."""

WINDOWS = tiny_windows(13, 24)


def by_layers(folder: Path, dtype: torch.dtype = torch.float32) -> LayerwiseReader:
    target = CheckpointTarget(CheckpointReader(folder), None, torch.device("cpu"), dtype=dtype)
    return LayerwiseReader(target, STATES)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_every_family_has_the_losses_of_the_whole_model(family: str, tmp_path: Path) -> None:
    tiny_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    for batch_size in (None, 5):
        found = perplexity(by_layers(tmp_path, whole.dtype), WINDOWS, batch_size=batch_size)
        assert found.losses == perplexity(whole, WINDOWS, batch_size=batch_size).losses


@pytest.mark.parametrize(
    "family",
    ["gemma3n_text shared", "gemma4_text shared", "mamba2", "nemotron_h", "mixtral", "gpt_oss"],
)
def test_layers_that_share_choose_or_remember(family: str, tmp_path: Path) -> None:
    """The experts of transformers are multiplied together, ours one after the other."""
    tiny_model(family).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = perplexity(by_layers(tmp_path), WINDOWS).losses
    assert found == pytest.approx(perplexity(whole, WINDOWS).losses, abs=1e-6)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_packed_layers_run_as_they_are_stored(tied: bool, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96}
    save_tiny(tmp_path / "dense", **sizes, tie_word_embeddings=tied)
    pruned = tmp_path / "pruned"
    secateur.prune(tmp_path / "dense", output=pruned, method="magnitude", sparsity=0.5)
    for values in ("keep", "int8", "int4"):
        folder = tmp_path / values
        secateur.compress(pruned, output=folder, values=values)
        target = PackedTarget(PackedCheckpoint(folder), torch.device("cpu"))
        reader, whole = LayerwiseReader(target, STATES), load(folder)
        assert perplexity(reader, WINDOWS).losses == perplexity(whole, WINDOWS).losses
        assert computed_by(reader) == computed_by(whole)
        # every layer is empty again
        assert all(p.is_meta for p in target.layers.parameters())
        assert not any(hasattr(module, "matrix") for module in target.layers.modules())


def test_two_models_pass_in_the_same_portions(dense: Path, pruned: Path) -> None:
    wholes = [AutoModelForCausalLM.from_pretrained(x) for x in (pruned, dense)]
    expected = divergence(*wholes, WINDOWS)
    for pair in (
        [by_layers(pruned), by_layers(dense)],
        [wholes[0], by_layers(dense)],
    ):
        found = divergence(*pair, WINDOWS)
        same = {"seconds": 0.0}
        for one, other in ((found.model, expected.model), (found.reference, expected.reference)):
            assert vars(one) | same == vars(other) | same
        assert (found.kl, found.acceptance) == (expected.kl, expected.acceptance)


def test_batches_are_remembered_and_others_are_read(
    dense: Path, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, walk = [], layerwise.walk_layers
    reader = RememberingReader(by_layers(dense).target, STATES * 100)
    monkeypatch.setattr(layerwise, "walk_layers", lambda x: read.append(x) or walk(x))
    first = perplexity(reader, WINDOWS).losses
    assert (first, len(read)) == (perplexity(load(dense), WINDOWS).losses, 1)
    expected = divergence(load(pruned), load(dense), WINDOWS)
    assert divergence(load(pruned), reader, WINDOWS).kl == expected.kl
    assert len(read) == 1
    assert perplexity(reader, WINDOWS.flip(1)).losses != first
    assert len(read) == 2


def test_answers_of_a_task(tmp_path: Path) -> None:
    write_task(tmp_path, "hellaswag", 6)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(model_max_length=512)
    model.config.max_position_embeddings = 512
    model.save_pretrained(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    answers = []
    for one in (whole, by_layers(tmp_path / "model")):
        (prepared,) = prepare_tasks(["hellaswag"], folder=str(tmp_path))
        scores = run_tasks(one, tokenizer, [prepared], None)
        answers.append((scores, [request.resps for request in prepared.task.instances]))
    assert answers[0] == answers[1]


@pytest.fixture
def small_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans in which the program takes nothing, so that models of this size decide."""
    monkeypatch.setattr(plan, "resident_bytes", lambda: 0)


@pytest.mark.usefixtures("small_program")
def test_the_plan_decides(dense, pruned, text, caplog) -> None:
    """A whole model is planned with 256 MiB of logits, a layer with those of its vocabulary."""
    common = {"dense": dense, "text": text, "sequence_length": 32}
    whole = secateur.evaluate(pruned, **common)
    assert not caplog.records
    small = secateur.evaluate(pruned, **common, max_memory="100MiB")
    assert [pruned.name in caplog.records[0].getMessage(), len(caplog.records)] == [True, 2]
    for kind in ("perplexity", "divergence"):
        ones = [getattr(result.record, kind)[0].to_json() for result in (whole, small)]
        for one in ones:
            one.pop("seconds", None)
        assert ones[0] == ones[1]


@pytest.mark.usefixtures("small_program")
@pytest.mark.parametrize(
    ("options", "room"), [({"generation": True}, "100MiB"), ({"text": "boolq-held-out"}, "1MiB")]
)
def test_what_does_not_fit_is_refused_before_it_is_read(dense, options, room) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        secateur.evaluate(dense, max_memory=room, **options)
    assert "max_memory" in str(caught.value.remedy)


LIMITED = """
import resource, sys, secateur
from secateur.runs.environment import resident_bytes
model, text, room = sys.argv[1], sys.argv[2], int(sys.argv[3])
secateur.load(sys.argv[4])  # whatever the program needs besides a model is there
data = int(next(x for x in open("/proc/self/status") if x.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + room, resource.RLIM_INFINITY))
options = {"max_memory": resident_bytes() + room} if len(sys.argv) > 5 else {}
found = secateur.evaluate(model, text=text, sequence_length=64, windows=4, device="cpu", **options)
print(found.record.perplexity[0].mean_loss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the data of a process")
def test_a_model_larger_than_the_memory_of_its_process(tmp_path: Path, text: Path) -> None:
    sizes = {"num_hidden_layers": 48, "hidden_size": 768, "intermediate_size": 2048}
    save_tiny(tmp_path / "tiny")
    large = save_tiny(tmp_path / "large", **sizes)
    model = AutoModelForCausalLM.from_pretrained(large)
    (large / "model.safetensors").unlink()
    # a mapped file counts whole, so embedding and head are in small ones
    model.save_pretrained(large, max_shard_size="30MB")
    room = 256 * 2**20
    assert 4 * model.num_parameters() > 3 * room
    del model
    words = [str(large), str(text), str(room), str(tmp_path / "tiny")]

    def limited(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LIMITED, *words, *more]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert limited().returncode != 0  # whole: memory ends
    done = limited("by layers")
    assert done.returncode == 0, done.stderr
    common = {"text": text, "sequence_length": 64, "windows": 4, "device": "cpu"}
    whole = secateur.evaluate(large, **common)
    assert float(done.stdout) == whole.record.perplexity[0].mean_loss
