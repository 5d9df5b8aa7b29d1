"""Conversations as documents: their tokens, their answers, their windows, and what is refused."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers_of_kinds import save_tokenizer

from secateur.calibration.chats import Chat, PromptCompletion
from secateur.calibration.documents import read_documents, read_text
from secateur.calibration.run_windows import load_calibration
from secateur.calibration.windows import (
    WindowPlan,
    evaluation_windows,
    evaluation_with_answers,
    pack_with_answers,
)
from secateur.errors import SourceError

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content | trim }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # as Qwen 3: only the last answer keeps its thoughts
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think></think>{% endif %}{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is a parser? yes"},
    {"role": "assistant", "content": " It reads arguments. "},
    {"role": "user", "content": "Is that all?"},
    {"role": "assistant", "content": "yes"},
]
ANSWERS = ["It reads arguments.<|im_end|>", "yes<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer that puts a start token in front of a text, as Llama 3 does."""
    made = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama 3")
    made.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|end|>"]}
    )
    return made


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def spoken(tokenizer: Any, ids: list[int], marks: list[bool]) -> list[str]:
    """The text of each run of marked tokens."""
    runs: list[list[int]] = []
    for place, (token, marked) in enumerate(zip(ids, marks, strict=True)):
        if marked and not (place and marks[place - 1]):
            runs.append([])
        if marked:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in TALK]},
        {"prompt": TALK[:4], "completion": TALK[4:]},
        {"prompt": "Be short.", "messages": TALK},  # UltraChat has both
        {"text": None, "messages": TALK},
    ],
)
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_tokens_are_those_of_the_template(tmp_path, tokenizer, row, template):
    tokenizer.chat_template = template
    (chat,) = read_documents(write(tmp_path / "a.jsonl", [row]))
    expected = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert chat.ids(tokenizer) == expected
    ids, marks = chat.marked(tokenizer)
    assert ids == expected
    assert spoken(tokenizer, ids, marks) == ANSWERS


def test_a_field_may_be_named(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [{"text": "plain", "dialog": TALK}])
    assert read_documents(source) == ["plain"]
    (chat,) = read_documents(source, field="dialog")
    assert chat.messages[0] == TALK[0]


def test_answers_that_the_template_shortens_later(tokenizer):
    """An earlier answer is found by its text where the template writes it differently."""
    tokenizer.chat_template = THINKING
    ids, marks = Chat(tuple(TALK), "here").marked(tokenizer)
    assert ids == tokenizer.apply_chat_template(TALK, return_dict=False)
    assert spoken(tokenizer, ids, marks) == [
        " It reads arguments. </s>",
        "<think></think>yes</s>",
    ]


def test_a_conversation_that_begins_with_an_answer(tokenizer):
    tokenizer.chat_template = CHATML
    talk = ({"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Hello."})
    ids, marks = Chat(talk, "here").marked(tokenizer)
    assert spoken(tokenizer, ids, marks) == ["Hello.<|im_end|>"]
    assert marks.index(True) < len(marks) // 2


def test_a_prompt_with_its_completion_needs_no_template(tmp_path, tokenizer):
    tokenizer.chat_template = None
    source = write(tmp_path / "a.jsonl", [{"prompt": "one two", "completion": " three"}])
    (pair,) = read_documents(source)
    assert isinstance(pair, PromptCompletion)
    ids, marks = pair.marked(tokenizer)
    assert tokenizer.decode(ids) == "one two three"
    assert spoken(tokenizer, ids, marks) == [" three"]


def test_windows_have_one_start_token(tmp_path, tokenizer):
    """The template's start token is cut as that of a text, and no end token is added."""
    tokenizer.chat_template = CHATML
    source = write(tmp_path / "a.jsonl", [{"messages": TALK}] * 3)
    start = tokenizer.bos_token_id
    whole = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert whole[0] == start
    stream = whole[1:] * 3
    plan = WindowPlan(windows=2, sequence_length=21)
    windows, answers = pack_with_answers(read_documents(source), tokenizer, plan, 2)
    for row in windows.tolist():
        assert row[0] == start
        assert start not in row[1:]
        assert tokenizer.eos_token_id not in row
        assert row[1:] in [stream[a : a + 20] for a in range(0, len(stream) - 19, 20)]
    assert answers is not None
    assert answers.shape == windows.shape
    assert not answers[:, 0].any()
    text = read_text(source)
    assert "conversations" in text.join
    judged, marks = evaluation_with_answers(text.text, tokenizer, len(stream) + 1)
    assert judged.tolist() == [[start, *stream]]
    assert marks is not None
    assert spoken(tokenizer, judged[0].tolist(), marks[0].tolist()) == ANSWERS * 3
    assert evaluation_windows(text.text, tokenizer, 21, max_windows=2).tolist() == [
        [start, *stream[:20]],
        [start, *stream[20:40]],
    ]


def test_the_record_names_the_template(tmp_path, tokenizer):
    tokenizer.chat_template = CHATML
    chats = write(tmp_path / "chats.jsonl", [{"messages": TALK}] * 30)
    texts = write(tmp_path / "texts.jsonl", [{"text": "some words " * 99}] * 3)
    plan = WindowPlan(windows=8, sequence_length=32)
    _, record = load_calibration(chats, tokenizer, plan, vocab_size=1000)
    assert len(record["chat_template"]) == 16
    windows, mixed = load_calibration(f"{texts},{chats}", tokenizer, plan, vocab_size=1000)
    assert len(windows) == 8
    assert mixed["chat_template"] == record["chat_template"]
    assert ["chat_template" in text for text in mixed["texts"]] == [False, True]
    _, plain = load_calibration(texts, tokenizer, plan, vocab_size=1000)
    assert "chat_template" not in plain
    tokenizer.chat_template = MARKED
    assert (
        load_calibration(chats, tokenizer, plan, vocab_size=1000)[1]["chat_template"]
        != (record["chat_template"])
    )


def test_data_sets(tmp_path, tokenizer, monkeypatch):
    """Of the hub, and Parquet: columns that are missing in a row are None."""
    tokenizer.chat_template = CHATML
    call = {"role": "assistant", "content": "", "name": "one"}
    rows = datasets.Dataset.from_list([{"messages": TALK}, {"messages": [*TALK[:4], call]}])
    expected = tokenizer.apply_chat_template(TALK, return_dict=False)
    asked = []

    def load_dataset(repo, config=None, **options):
        asked.append((repo, options["split"]))
        return rows

    monkeypatch.setattr("secateur.models.hub.why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows.to_parquet(tmp_path / "a.parquet")
    for source in ("hub:org/chats:train_sft", str(tmp_path / "a.parquet")):
        chats = read_documents(source)
        assert len(chats) == 2
        assert chats[0].ids(tokenizer) == expected
        assert chats[1].messages[-1] == call
        assert len(chats[0:1]) == 1
    assert asked == [("org/chats", "train_sft")]


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([{"id": 1}], r"(?s)'text' is not there; the line has: id.*conversations in the field"),
        ([{"messages": []}], "the conversation is empty"),
        ([user("")], "the conversation is empty"),
        ([{"messages": "hello"}], "'messages' is a str, not a list of messages"),
        ([{"messages": ["hello"]}], "no role or no content; it has: no field"),
        ([{"messages": [{"role": "user"}]}], "no role or no content; it has: role"),
        ([{"messages": [{"role": "usr", "content": "x"}]}],
         r"(?s)unknown role 'usr'.*did you mean 'user'"),
        ([{"messages": [{"role": ["user"], "content": "x"}]}], "unknown role"),
        ([user([{"type": "image", "url": "x"}])], r"a part that is no text \(image\)"),
        ([user(5)], "a part that is no text"),
        ([{**user("x"), "tools": {"a": 1}}], "'tools' is a dict, not a list of tools"),
        ([user("\ud800")], "half of a surrogate pair"),
        ([{"text": "plain"}, user("hello")], "has 1 texts and 1 conversations"),
    ],
)  # fmt: skip
def test_bad_conversations(tmp_path, rows, fault):
    with pytest.raises(SourceError, match=fault):
        read_documents(write(tmp_path / "a.jsonl", rows))


def test_templates_that_refuse(tmp_path, tokenizer):
    (chat,) = read_documents(write(tmp_path / "a.jsonl", [{"messages": [TALK[1], TALK[1]]}]))
    tokenizer.chat_template = STRICT
    with pytest.raises(SourceError, match=r"a\.jsonl:1"):
        chat.ids(tokenizer)
    tokenizer.chat_template = None
    for read in (chat.ids, chat.marked):
        with pytest.raises(SourceError, match=r"chat_template\.jinja"):
            read(tokenizer)
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(SourceError, match="message 2"):
        Chat(tuple(TALK), "here").ids(tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content | upper "
    tokenizer.chat_template += "if m.role == 'assistant' else m.content }}{% endfor %}"
    with pytest.raises(SourceError, match="message 3"):
        Chat(tuple(TALK), "here").marked(tokenizer)


TRL = find_spec("trl")
TEMPLATES = Path(TRL.origin if TRL and TRL.origin else "none").parent / "chat_templates"
PATCHED = sorted(
    name.stem.removesuffix("_training")
    for name in TEMPLATES.glob("*_training.jinja")
    # they write lists of parts only, or mark the token of the next turn as well
    if not name.stem.startswith(("idefics3", "llava", "smolvlm", "glm4moe"))
)


@pytest.mark.parametrize("name", PATCHED)
def test_answers_of_known_templates(tokenizer, name):
    """Those that TRL marks in a copy of the template, from the first token that a model writes."""
    talk = tuple(TALK[1:])
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    found = spoken(tokenizer, *Chat(talk, "here").marked(tokenizer))
    tokenizer.chat_template = (TEMPLATES / f"{name}_training.jinja").read_text(encoding="utf-8")
    theirs = spoken(tokenizer, *Chat(talk, "here").marked(tokenizer))
    assert len(found) == len(theirs) == 2
    for ours, wanted, message in zip(found, theirs, talk[1::2], strict=True):
        assert message["content"].strip() in ours
        assert wanted.rstrip().endswith(ours.rstrip())
