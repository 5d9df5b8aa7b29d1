"""Tasks: lm-eval's prompts and scoring, our arithmetic, rows from a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from task_rows import LM_EVAL, write_task
from tiny import tiny_tokenizer
from zoo import tiny_model

import secateur
from runtime.packed_models import packed_model
from secateur.errors import NumericalError, RecipeError, SourceError
from secateur.evaluation import harness as harness_room
from secateur.evaluation import tasks as room
from secateur.evaluation.tasks import prepare_tasks, run_tasks
from secateur.models import hub

CHANCE = {
    "arc_challenge": (1 / 3 + 1 / 4 + 1 / 5) / 3,  # items have different numbers of choices
    "arc_easy": 1 / 4,
    "boolq": 1 / 2,
    "hellaswag": 1 / 4,
    "lambada_openai": 0.0,
    "openbookqa": 1 / 4,
    "piqa": 1 / 2,
    "sciq": 1 / 4,
    "winogrande": 1 / 2,
}


def model_of(family: str = "llama"):
    """A tiny model that reads long enough texts."""
    model = tiny_model(family)
    model.config.max_position_embeddings = 512
    return model


def direct(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihood of a continuation, one token at a time in float64."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    ids = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(context))
    total, greedy = 0.0, True
    model = model.double()
    with torch.no_grad():
        for t in range(start, len(ids)):
            logits = model(torch.tensor([ids[:t]])).logits[0, -1]
            total += math.log(torch.softmax(logits, -1)[ids[t]].item())
            greedy &= int(logits.argmax()) == ids[t]
    model.float()
    return total, greedy


@pytest.mark.parametrize(
    ("family", "task"),
    [
        *(("llama", task) for task in LM_EVAL),
        ("gemma2", "hellaswag"),  # windows and soft caps, padded; a task is the same for all models
    ],
)
def test_log_likelihoods_against_one_token_at_a_time(
    task: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path, task, 3)
    monkeypatch.setattr(harness_room, "TOKENS_PER_FORWARD", 150)  # several to a batch, padded
    model, tokenizer = model_of(family), tiny_tokenizer(model_max_length=512)
    (prepared,) = prepare_tasks([task], folder=str(tmp_path))
    scores = run_tasks(model, tokenizer, [prepared], None)
    requests = prepared.task.instances
    for request in requests:
        total, greedy = direct(model, tokenizer, *request.args)
        found = request.resps[0]
        assert found[0] == pytest.approx(total, rel=1e-4)
        assert found[1] == greedy
    assert scores[0].chance == pytest.approx(CHANCE[task])
    assert scores[0].metric == "acc"


def test_as_lm_eval_scores_with_its_own_model(tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    names = ["arc_challenge", "boolq", "hellaswag", "lambada_openai", "winogrande"]
    for name in names:
        write_task(tmp_path, name, 8)
    model, tokenizer = model_of(), tiny_tokenizer(model_max_length=512)
    prepared = prepare_tasks(names, folder=str(tmp_path))
    ours = {(s.task, s.metric): s for s in run_tasks(model, tokenizer, prepared, None)}
    tasks = {"tasks": {one.name: one.task for one in prepared}}
    with room.quiet_harness():
        theirs = lm_eval.evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), tasks, bootstrap_iters=0
        )
    for (task, metric), score in ours.items():
        assert score.value == theirs["results"][task][f"{metric},none"]
        items = [sample[metric] for sample in theirs["samples"][task]]
        assert list(score.outcomes) == items
    assert ours["hellaswag", "acc"].protocol_id == ours["hellaswag", "acc_norm"].protocol_id


def test_limit_and_protocol(tmp_path: Path) -> None:
    few = prepare_tasks(["piqa"], folder=str(write_task(tmp_path / "a", "piqa", 9)), limit=4)[0]
    assert (few.protocol["items"], few.protocol["items_in_split"]) == (4, 9)
    assert (few.protocol["dataset"], few.protocol["split"]) == ("json", "validation")
    assert few.protocol["harness"].startswith("lm-eval 0.")
    same = prepare_tasks(["piqa"], folder=str(write_task(tmp_path / "b", "piqa", 4)))[0]
    ids = [room.protocol_id("task", one.protocol) for one in (few, same)]
    assert ids[0] == ids[1]  # the same requests, wherever they came from
    more = prepare_tasks(["piqa"], folder=str(tmp_path / "a"), limit=5)[0]
    assert room.protocol_id("task", more.protocol) != ids[0]


def test_shots_are_other_items(tmp_path: Path) -> None:
    alone_folder = write_task(tmp_path / "alone", "arc_easy", 5)
    (alone,) = prepare_tasks(["arc_easy"], folder=str(alone_folder), shots=3, limit=5)
    for request in alone.task.instances:
        context = request.args[0]
        assert context.count("Question:") == 4
        assert context.count(request.doc["question"]) == 1
    assert alone.protocol["shots_from"] == "validation"
    apart_folder = write_task(tmp_path / "apart", "arc_easy", 5, shots=8)
    (apart,) = prepare_tasks(["arc_easy"], folder=str(apart_folder), shots=6)
    assert apart.protocol["shots_from"] == "train"
    assert apart.task.instances[0].args[0].count("Question:") == 7


def test_unknown_task(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="hellaswag") as raised:
        prepare_tasks(["helaswag"], folder=str(write_task(tmp_path, "hellaswag")))
    assert raised.value.where == str(tmp_path)


@pytest.mark.parametrize("output_type", ["loglikelihood_rolling", "generate_until"])
def test_tasks_without_a_score_that_is_computed_here(output_type: str, tmp_path: Path) -> None:
    file = write_task(tmp_path, "piqa") / "piqa.yaml"
    metric = "metric_list: [{metric: bleu}]\n"
    file.write_text(file.read_text() + f"output_type: {output_type}\n{metric}")
    with pytest.raises(RecipeError, match=output_type):
        prepare_tasks(["piqa"], folder=str(tmp_path))


def test_written_answers_as_lm_eval_reads_them(tmp_path: Path) -> None:
    """As GSM8K: texts until a word, read by two filters, after the task's own examples."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    rows = [{"q": f"what is {n}", "a": letter} for n, letter in enumerate("etaoinsr")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def read_by(name: str, pattern: str) -> dict[str, Any]:
        found = {"function": "regex", "regex_pattern": pattern}
        return {"name": name, "filter": [found, {"function": "take_first"}]}

    held = {
        "task": "letters", "dataset_path": "json", "test_split": "test", "num_fewshot": 2,
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "generate_until", "doc_to_text": "{{q}}:", "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "exact_match"}],
        "generation_kwargs": {"until": ["q"], "max_gen_toks": 12, "do_sample": False},
        "filter_list": [read_by("first", "(\\w)"), read_by("last", "(\\w)\\W*$")],
    }  # fmt: skip
    (tmp_path / "letters.yaml").write_text(yaml.safe_dump(held))
    model, tokenizer = model_of(), tiny_tokenizer(model_max_length=512)
    prepared = prepare_tasks(["letters"], folder=str(tmp_path))
    assert prepared[0].protocol["shots"] == 2
    ours = {x.metric: x for x in run_tasks(model, tokenizer, prepared, None)}
    with room.quiet_harness():
        theirs = lm_eval.evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1),
            {"tasks": {"letters": prepared[0].task}},
            bootstrap_iters=0,
        )
    assert [*ours] == ["exact_match,first", "exact_match,last"]
    for metric, score in ours.items():
        assert score.value == theirs["results"]["letters"][metric]
        samples = [x for x in theirs["samples"]["letters"] if x["filter"] == metric[12:]]
        assert list(score.outcomes) == [x["exact_match"] for x in samples]


@pytest.mark.parametrize("content", [None, "", "{ this is not"])
def test_data_that_cannot_be_read(content: str | None, tmp_path: Path) -> None:
    rows = write_task(tmp_path, "piqa") / "piqa.jsonl"
    rows.unlink() if content is None else rows.write_text(content)
    with pytest.raises(SourceError, match="piqa"):
        prepare_tasks(["piqa"], folder=str(tmp_path))


@pytest.mark.slow  # lm-eval reads all of its tasks
def test_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SourceError, match="Couldn't reach the Hub") as raised:
        prepare_tasks(["piqa"])
    assert "--task-data" in str(raised.value)


def test_not_a_number(tmp_path: Path) -> None:
    write_task(tmp_path, "piqa", 2)
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    prepared = prepare_tasks(["piqa"], folder=str(tmp_path))
    with pytest.raises(NumericalError, match="log-likelihood"):
        run_tasks(model, tiny_tokenizer(model_max_length=512), prepared, None)


def test_requests_that_are_too_long_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_task(tmp_path, "piqa", 2)
    model = tiny_model("llama")
    model.config.max_position_embeddings = 32
    run_tasks(model, tiny_tokenizer(), prepare_tasks(["piqa"], folder=str(tmp_path)), None)
    assert "4 of 4 requests" in caplog.text


def test_packed_models_are_judged_like_their_dense_ones(tmp_path: Path) -> None:
    packed_model(tmp_path, max_position_embeddings=512)
    write_task(tmp_path / "rows", "hellaswag", 4)
    prepared = prepare_tasks(["hellaswag"], folder=str(tmp_path / "rows"))
    found = []
    for model in (secateur.load(tmp_path / "packed"), secateur.load(tmp_path / "dense")):
        scores = run_tasks(model, tiny_tokenizer(model_max_length=512), prepared, None)
        likelihoods = [request.resps[0][0] for request in prepared[0].task.instances]
        found.append((likelihoods, [score.outcomes for score in scores]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == found[1][1]


def test_items_of_a_packed_model_do_not_depend_on_the_others(tmp_path: Path) -> None:
    model = secateur.load(packed_model(tmp_path, values="int8", max_position_embeddings=512))
    write_task(tmp_path / "rows", "hellaswag", 8)
    together: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: together.append(len(given["input_ids"])), with_kwargs=True
    )
    found = []
    for limit in (1, 8):
        prepared = prepare_tasks(["hellaswag"], folder=str(tmp_path / "rows"), limit=limit)
        run_tasks(model, tiny_tokenizer(model_max_length=512), prepared, None)
        found.append([request.resps[0] for request in prepared[0].task.instances])
    assert found[0] == found[1][:4]
    assert {*together} == {1}
