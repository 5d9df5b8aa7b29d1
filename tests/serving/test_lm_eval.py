"""lm-eval asks the server, and finds what it finds when the model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from task_rows import write_task
from tiny import tiny_tokenizer

import secateur
from runtime.packed_models import packed_model
from secateur.evaluation.tasks import prepare_tasks, quiet_harness, run_tasks
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.deploy import ServeRecipe
from secateur.serving.serve import prepare
from serving.conftest import Running

NAMES = ["piqa", "arc_easy", "lambada_openai"]


@pytest.fixture(scope="module", params=["learned", "packed", "start"])
def folder(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A dense model in float32, a packed model, and one whose tokenizer has a start token."""
    if request.param == "learned":
        return model
    made = tmp_path_factory.mktemp(request.param)
    if request.param == "packed":
        return packed_model(made, head_dim=16, max_position_embeddings=256)
    shutil.copytree(model, made / "start")
    tiny_tokenizer(add_bos=True, model_max_length=256).save_pretrained(made / "start")
    return made / "start"


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, ...]]:
    """A server, rows of some tasks, and the loaded model's scores and log-likelihoods of them."""
    rows = tmp_path_factory.mktemp("rows")
    for name in NAMES:
        write_task(rows, name)
    prepared = prepare_tasks(NAMES, folder=str(rows))
    scores = run_tasks(secateur.load(folder), load_tokenizer(folder), prepared, None)
    answers = {one.name: [r.resps[0] for r in one.task.instances] for one in prepared}
    server = Running(prepare(ServeRecipe(model=str(folder), port=0, slots=3)))
    yield server, rows, scores, answers
    server.stop()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 2, "num_concurrent": 8},
        {"batch_size": 3, "tokenized_requests": False},
    ],
    ids=["one", "clients", "texts"],
)
def test_lm_eval_finds_our_numbers(
    folder: Path, ours: tuple[Any, ...], options: dict[str, Any]
) -> None:
    import lm_eval
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    start = folder.name == "start"
    if start and options.get("tokenized_requests") is False:
        pytest.skip("the server adds the start token, and lm-eval does not count it")
    running, rows, scores, answers = ours
    again = prepare_tasks(NAMES, folder=str(rows))
    with quiet_harness():
        asking = LocalCompletionsAPI(
            base_url=f"{running.url}/v1/completions", model=running.serving.service.name,
            tokenizer=str(folder), max_length=256, add_bos_token=start, **options,
        )  # fmt: skip
        found = lm_eval.evaluate(
            asking, {"tasks": {one.name: one.task for one in again}}, bootstrap_iters=0
        )
    for score in scores:
        assert score.value == found["results"][score.task][f"{score.metric},none"]
    for name, own in answers.items():
        theirs = [
            response[0]
            for sample in found["samples"][name]
            for response in sample["resps"]
        ]  # fmt: skip
        for (log, greedy), (their_log, their_greedy) in zip(own, theirs, strict=True):
            assert their_log == pytest.approx(log, abs=1e-4)
            assert greedy == their_greedy
