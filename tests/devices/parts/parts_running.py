"""Verbs that run a model, and the GPU that was named: all of a run happens there."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended import counted, forget_peak, memory
from tiny import tiny_tokenizer
from zoo import tiny_model

import secateur
from secateur.errors import RecipeError
from secateur.evaluation.speed import load_backend
from secateur.recipes.deploy import ChatRecipe, GenerateRecipe, Sampling, ServeRecipe
from secateur.recipes.measure import BenchRecipe
from secateur.recipes.verbs import VERBS
from secateur.runtime.kernels.linear import InferenceLinear
from secateur.serving import serve
from secateur.serving.scheduler import Request, ServingJob
from secateur.steps.bench import _contenders as contenders_of
from secateur.steps.generate import Conversation


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model of the CPU with its tokenizer."""
    tiny_model("llama").save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("a text of many characters " * 200)
    return tmp_path / "source"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_generate(source: Path, device: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "chat": False}
    here = secateur.generate(source, "abc", device="cpu", **options)
    there = secateur.generate(source, "abc", device=device, **options)
    assert there.text == here.text
    assert device in there.loop


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_chat(
    source: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    recipe = ChatRecipe(model=str(source), device=device, max_new_tokens=3)
    VERBS["chat"].run(recipe, {"as_json": True}, nullcontext)
    assert f"cuda:{int(device != 'auto')}" in json.loads(capsys.readouterr().out)["loop"]


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_serve(source: Path, device: str) -> None:
    service, lines = serve._serving(ServeRecipe(model=str(source), device=device))
    assert f"cuda:{int(device != 'auto')}" in lines[0]
    tokens: list[int] = []
    job = ServingJob(
        Request([4, 5, 6], 3, Sampling()), lambda token, _: not tokens.append(token), print
    )
    scheduler = service.worker.scheduler
    scheduler.submit(job)
    while not scheduler.idle:
        scheduler.step()
    assert len(tokens) == 3


@pytest.mark.parametrize("name", ["torch bf16", "packed in transformers"])
def test_bench(name: str, source: Path, tmp_path: Path, waited: list[str]) -> None:
    """The clock stops when the GPU has finished."""
    if name.startswith("packed"):
        secateur.compress(source, output=tmp_path / "small")
        source = tmp_path / "small"
    run = load_backend(name, source, 8, 1, torch.device("cuda", 1))
    waited.clear()
    assert run(torch.tensor([4, 5, 6]), 3)["each_token"] > 0
    assert len(waited) >= 3


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_what_only_the_cpu_does(source: Path, device: str) -> None:
    """auto takes the CPU then, and a GPU that was named is refused."""
    generating = GenerateRecipe(model=str(source), device=device, kv_cache="int8")
    timing = BenchRecipe(model=str(source), device=device, contenders=("dense int8",))
    if device == "auto":
        assert Conversation(generating).device == torch.device("cpu")
        assert contenders_of(timing, source) == (("dense int8",), torch.device("cpu"))
        return
    for run in (lambda: Conversation(generating), lambda: contenders_of(timing, source)):
        with pytest.raises(RecipeError) as refused:
            run()
        assert refused.value.where in ("--kv-cache", "dense int8")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_compressed_model_is_on_the_cpu_unless_a_gpu_is_named(
    device: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU torch multiplies if Triton is not there."""
    monkeypatch.setattr("secateur.runtime.load.find_spec", lambda name: None)
    small = str(tmp_path / "small")
    secateur.compress(source, output=small, values="int8")
    there = torch.device("cuda" if device == "cuda" else "cpu")
    talk = Conversation(GenerateRecipe(model=small, device=device, max_new_tokens=3))
    assert talk.device == there
    assert contenders_of(BenchRecipe(model=small, device=device), Path(small))[1] == there
    _, lines = serve._serving(ServeRecipe(model=small, device=device))
    assert ("cuda:0" in lines[0]) == (device == "cuda")
    assert secateur.generate(small, "abc", device=device, max_new_tokens=3).text


def test_there_is_no_such_gpu(source: Path) -> None:
    with pytest.raises(RecipeError, match="cuda:2"):
        secateur.generate(source, "abc", device="cuda:2")


RUNS: dict[str, Callable[..., Any]] = {
    "wanda": partial(secateur.prune, method="wanda", sparsity=0.5),
    "balanced": partial(secateur.prune, effort="balanced", sparsity=0.5),
    "taylor": partial(secateur.prune, method="taylor", sparsity=0.5),
    "structure": partial(secateur.structure, keep_layers=2),
    "train": partial(secateur.train, steps=2, batch=2),
    "evaluate": secateur.evaluate,
    "compress": partial(secateur.compress, values="int4"),
}
"""Verbs that compute on the device of their recipe, and write what they made."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_on_the_gpu_that_was_named(name: str, source: Path, tmp_path: Path) -> None:
    """Nothing is placed on the other one, though that is the current one; and its peak is real."""
    before = memory[0].live
    for gpu in range(2):
        forget_peak(gpu)
    text = "text" if name in ("train", "evaluate") else "calibration"
    made = RUNS[name](
        source, output=tmp_path / "out", device="cuda:1", windows=8, sequence_length=16,
        **{text: tmp_path / "text.txt"},
    )  # fmt: skip
    assert memory[0].peak == before
    assert memory[1].peak > 0
    assert made.to_json().get("cost", {}).get("peak_cuda_bytes", memory[1].peak) == memory[1].peak
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("values", ["dense", "bfloat16", "int8", "int4"])
def test_a_model_that_does_not_fit_is_read_layer_by_layer(
    values: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole is planned with 256 MiB of logits, a layer with those of its vocabulary."""
    model, common = source, {"text": tmp_path / "text.txt", "windows": 8, "sequence_length": 16}
    if values != "dense":
        model = tmp_path / "small"
        secateur.compress(source, output=model, values=values)
    monkeypatch.setattr("secateur.runtime.load.find_spec", lambda name: None)
    device = {"dense": model, "device": "cuda:1"}
    whole = secateur.evaluate(model, **common, **device)
    for gpu in range(2):
        forget_peak(gpu)
    before = memory[0].live
    found = secateur.evaluate(model, **common, **device, max_memory="60MiB")
    assert memory[0].peak == before
    (one,), (other,) = found.record.perplexity, whole.record.perplexity
    assert one.mean_loss == pytest.approx(other.mean_loss, rel=1e-5)
    (one_kl,), (other_kl,) = found.record.divergence, whole.record.divergence
    assert one_kl.kl == pytest.approx(other_kl.kl, abs=1e-6)


@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4"])
def test_a_compressed_model(values: str, source: Path, tmp_path: Path) -> None:
    """Triton has no GPU here, so every kernel is left out, and torch multiplies in few launches."""
    sparse, small, ids = tmp_path / "sparse", tmp_path / "small", torch.arange(3, 9)[None]
    secateur.prune(source, method="magnitude", sparsity=0.5, output=sparse, device="cpu")
    secateur.compress(sparse, output=small, values=values)
    here = secateur.load(small, dtype=torch.float32, kernels=False)
    counts = []
    for kernels in (True, False):
        there = secateur.load(small, dtype=torch.float32, device="cuda:1", kernels=kernels)
        packed = [x for x in there.modules() if isinstance(x, InferenceLinear)]
        assert bool(packed) == (values != "bfloat16")
        with counted() as traffic:
            logits = there(ids.to("cuda:1")).logits
        torch.testing.assert_close(logits.cpu(), here(ids).logits, rtol=1e-4, atol=1e-5)
        counts.append(traffic.launches - 20 * len(packed))
    assert max(counts) < 200  # of everything else
