"""Two processes give what one gives, and hold the zeros; so does one with its weights on the host.

Without a GPU the host is the device too, but FSDP2 takes the way that it takes beside a GPU.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from commands import launched
from safetensors.torch import load_file
from tiny import save_tiny
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from trained import source_text
from zoo import tiny_windows

import secateur
from secateur.errors import RecipeError
from secateur.models.architecture import describe
from secateur.models.sources import resolve
from secateur.progress import Silent
from secateur.recipes.train import TrainRecipe
from secateur.steps.train import Train
from secateur.training import setup
from secateur.training.process_group import ProcessGroup, load
from secateur.training.setup import TrainingSetup
from secateur.training.training_plan import NEED_ALL, optimizers, shared_batch
from steps.train.trainings import assert_same, stopped_at

COUNTING = Path(__file__).with_name("resident_run.py")

WIDE: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "steps": 4, "windows": 16, "batch": 2, "sequence_length": 16, "validation_windows": 2,
    "validations": 1, "fast_matmuls": False, "optimizer": "Adam", "learning_rate": 5e-3,
}  # fmt: skip
SLACK = 2**16
"""Bytes for buffers and what else is small."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student pruned from it, and a text."""
    place = tmp_path_factory.mktemp("sharded")
    save_tiny(place / "dense", **WIDE)
    secateur.prune(place / "dense", output=place / "pruned", method="magnitude", sparsity=0.5)
    (place / "text.txt").write_text(source_text()[:60_000])
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "rounded"), [("device", False), ("host", False), ("host", True)], ids=str
)
def test_no_process_has_more_than_its_part_and_one_layer(
    place: str, rounded: bool, places: Path, tmp_path: Path
) -> None:
    options = {
        **OPTIONS,
        "text": str(places / "text.txt"),
        "teacher": str(places / "dense"),
        "next_token": 0.5,
        "fast_matmuls": rounded,
    }
    words = place, places / "pruned", tmp_path / "two", json.dumps(options)
    ended = launched(2, COUNTING, *words)
    assert ended.code == 0, ended.err[-4000:]
    stored = load_file(places / "pruned" / "model.safetensors")
    sizes = {name: tensor.nbytes for name, tensor in stored.items()}
    layer = sum(size for name, size in sizes.items() if "layers.0." in name)
    half = sum(sizes.values()) // 2
    masks = sum(sizes[n] // 4 for n, x in stored.items() if x.ndim == 2 and not x.all()) // 2
    for rank in range(2):
        taken = json.loads(Path(f"{tmp_path / 'two'}.json.{rank}").read_text())
        assert taken["reading"] <= half + layer + SLACK
        # The teacher is in bfloat16 where that is faster; its embeddings and head stay gathered.
        assert taken["set_up"] <= half + masks + half + SLACK
        # Gradients and two moments; of a layer what FSDP2 gathers and sums.
        gathered = (5 if rounded else 6) * layer // 2
        assert taken["steps"] <= 4 * half + masks + half + gathered + taken["forward"] + SLACK
        assert taken["writing"] <= 4 * half + masks + half + max(sizes.values()) + SLACK
        assert taken["weights"] == half
        assert taken["timeout_seconds"] == 30 * 24 * 3600  # one process may write for hours
        parts = ("weights", "gathered", "optimizer", "teacher", "masks", "forward")
        planned = sum(taken[name] for name in parts)
        assert 0.6 * planned <= taken["steps"] <= planned
    secateur.train(places / "pruned", output=tmp_path / "one", **options)
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("one", "two"))
    resumed = secateur.train(places / "pruned", output=tmp_path / "two", resume=True, **options)
    assert resumed.manifest.processes == 2  # one process reads what two have written
    moved = 0
    for name, weight in one.items():
        if not rounded:
            torch.testing.assert_close(two[name], weight, rtol=2e-4, atol=2e-5)
        moved += int((weight != stored[name]).sum())
        assert not two[name][stored[name] == 0].any() or stored[name].ndim < 2
    assert moved > 1000
    losses = [losses_of(tmp_path / x) for x in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=3e-4 if rounded else 1e-5)


def losses_of(folder: Path) -> list[float]:
    """The loss of every step."""
    log = (folder / "secateur" / "training.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in log]


@pytest.fixture
def on_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients and moments are on the host, as beside a GPU that has no room for them."""
    setup = functools.partial(TrainingSetup, on_host=True)
    monkeypatch.setattr("secateur.steps.train.TrainingSetup", setup)


@pytest.fixture(scope="module")
def on_device(places: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training as it is where there is enough memory."""
    options = {**OPTIONS, "text": str(places / "text.txt"), "gradient_checkpointing": True}
    output = tmp_path_factory.mktemp("device") / "model"
    secateur.train(places / "pruned", output=output, **options)
    return output


@pytest.mark.usefixtures("on_host")
def test_on_the_host_one_process_writes_the_same_bits_also_after_a_stop(
    places: Path, on_device: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "text": str(places / "text.txt"), "gradient_checkpointing": True}
    with stopped_at(2):
        secateur.train(places / "pruned", output=tmp_path / "host", save_minutes=0.0, **options)
    resumed = secateur.train(places / "pruned", output=tmp_path / "host", resume=True, **options)
    assert resumed.manifest.planned["on_host"]
    assert resumed.manifest.result["decoder_sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert_same(tmp_path / "host", on_device)
    assert not torch.distributed.is_initialized()  # its group of one has gone


@pytest.mark.usefixtures("on_host")
def test_what_is_gathered_in_bfloat16_learns_as_what_is_rounded_by_autocast(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products are the same; a gradient is rounded in another order."""
    monkeypatch.setattr("secateur.machine._fast_bfloat16", lambda device: True)
    options = {**OPTIONS, "text": str(places / "text.txt"), "fast_matmuls": True, "steps": 12}
    secateur.train(places / "pruned", output=tmp_path / "gathered", **options)
    monkeypatch.setattr("secateur.steps.train.TrainingSetup", TrainingSetup)
    secateur.train(places / "pruned", output=tmp_path / "cast", **options)
    gathered, cast = (losses_of(tmp_path / x) for x in ("gathered", "cast"))
    assert gathered[0] == pytest.approx(cast[0], rel=1e-4)
    assert gathered == pytest.approx(cast, rel=3e-3)
    assert gathered[-1] < 0.9 * gathered[0]
    stored, learned = (
        load_file(x / "model.safetensors") for x in (places / "pruned", tmp_path / "gathered")
    )
    assert not any(learned[n][x == 0].any() for n, x in stored.items() if x.ndim == 2)


@pytest.mark.parametrize("family", ["llama", "qwen3_next", "mamba", "mixtral"])
def test_what_autocast_leaves_in_float32_is_gathered_so(family: str, tmp_path: Path) -> None:
    """A step changes a norm by less than bfloat16 can tell."""
    folder = save_tiny(tmp_path / family, family)
    group = ProcessGroup(torch.device("cpu")).holding(on_host=True)
    seen: dict[str, torch.dtype] = {}

    def look(module: nn.Module, inputs: object, *, path: str) -> None:
        own = module.named_parameters(recurse=False)
        seen.update({f"{path}.{name}": p.dtype for name, p in own if p.is_floating_point()})

    with group.connected():
        model = load(folder, group, dtype=torch.float32, gathered=torch.bfloat16)
        layers = describe(model).layers(model)
        for path, module in layers.named_modules():
            module.register_forward_pre_hook(functools.partial(look, path=path))
        with torch.no_grad():
            model(input_ids=tiny_windows(1, 12), use_cache=False)
    rounded = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert {n for n in seen if "norm" in n or n.endswith(("A_log", ".D", "dt_bias"))}
    assert not {n for n in rounded if "norm" in n or n.endswith(("A_log", ".D", "dt_bias"))}
    if family != "mamba":  # a mixer reads its matrices by itself, so it is gathered as it is
        assert {n for n in seen if "proj" in n and n.endswith("weight")} & rounded


@pytest.mark.parametrize(("given", "processes"), [(6, 8), (5, 2)])
def test_a_batch_that_does_not_divide_is_refused_before_the_model_is_named(
    given: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"WORLD_SIZE": processes, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RecipeError) as error:
        Train.check(TrainRecipe(model="nowhere", batch=given))
    assert [int(x) for x in error.value.what.split() if x.isdigit()] == [processes, given]
    Train.check(TrainRecipe(model="nowhere"))  # the default divides
    assert shared_batch(None, processes) == max(4, processes)


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_an_optimizer_that_needs_all_of_a_weight(name: str) -> None:
    group = ProcessGroup(torch.device("cpu")).holding(on_host=True)
    with group.connected():
        mesh = init_device_mesh("cpu", (1,))
        part = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        part.grad = part.detach().clone()
        optimizer: Any = optimizers()[name]([part], lr=0.1)
        works = True
        try:
            optimizer.step()
        except RuntimeError:
            works = False
    assert works == (name not in NEED_ALL)


@pytest.mark.parametrize("name", ["Adafactor", "rprop"])
def test_it_is_refused_in_several_processes_before_the_text_is_read(
    name: str, tmp_path: Path
) -> None:
    recipe = TrainRecipe(model="m", text=("nowhere.txt",), optimizer=name)
    processes = ProcessGroup(torch.device("cpu"), count=2)
    with pytest.raises(RecipeError) as error:
        TrainingSetup(recipe, resolve(save_tiny(tmp_path)), processes, Silent())
    assert error.value.what.split()[0] == name.lower()


def test_a_process_holds_its_part_of_a_teacher_and_two_whole_layers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "teacher", num_hidden_layers=6)
    teacher = resolve(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())  # tied ones once
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    alone, shared = (
        setup._teacher_bytes(teacher, SimpleNamespace(count=n, device=torch.device("cpu")))
        for n in (1, 3)
    )
    assert shared * count == alone * (count - 6 * layer + 2 * layer + 2 * layer)
