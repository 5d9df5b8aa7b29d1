"""lm-eval asks the server, and finds what it finds when the model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import secateur
from evaluation.task_rows import write_rows
from runtime.packed_models import packed_model
from secateur.evaluation.tasks import prepare_tasks, quiet_harness, run_tasks
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.serve import ServeRecipe
from secateur.workflows.serve import prepare
from serving.conftest import Running

NAMES = ["piqa", "arc_easy", "lambada"]


@pytest.fixture(scope="module", params=["learned", "int8"])
def running(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, Path]]:
    """A server of a dense model in float32, and one of a packed model."""
    folder = model
    if request.param == "int8":
        folder = packed_model(
            tmp_path_factory.mktemp("packed"), values="int8", head_dim=16,
            max_position_embeddings=256,
        )  # fmt: skip
    server = Running(prepare(ServeRecipe(model=str(folder), port=0, slots=3)))
    yield server, folder
    server.stop()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 5},
        {"batch_size": 2, "num_concurrent": 8},
        {"batch_size": 3, "tokenized_requests": False},
    ],
    ids=["one", "batches", "clients", "texts"],
)
def test_lm_eval_finds_our_numbers(
    running: tuple[Running, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    server, folder = running
    for name in NAMES:
        write_rows(tmp_path, name, 6)
    prepared = prepare_tasks(NAMES, source=str(tmp_path))
    tokenizer = load_tokenizer(folder)
    scores = run_tasks(secateur.load(folder), tokenizer, prepared, None)
    ours = {one.name: [r.resps[0] for r in one.task.instances] for one in prepared}
    again = prepare_tasks(NAMES, source=str(tmp_path))
    with quiet_harness():
        asking = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions", model=server.serving.service.name,
            tokenizer=str(folder), max_length=256, **options,
        )  # fmt: skip
        found = lm_eval.evaluate(
            asking, {"tasks": {one.name: one.task for one in again}}, bootstrap_iters=0
        )
    for score in scores:
        assert score.value == found["results"][score.task][f"{score.metric},none"]
    for name, own in ours.items():
        theirs = [
            response[0]
            for sample in found["samples"][name]
            for response in sample["resps"]
        ]  # fmt: skip
        for (log, greedy), (their_log, their_greedy) in zip(own, theirs, strict=True):
            assert their_log == pytest.approx(log, abs=1e-4)
            assert greedy == their_greedy
