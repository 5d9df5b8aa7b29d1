"""Answers that follow a JSON schema, a regular expression or choices, and calls of tools."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import transformers
from tiny import save_tiny
from tokenizers_of_kinds import tokenizer_of

from secateur.runtime.grammar import GrammarError, Grammars, choice_text, json_text, regex_text
from secateur.serving.http.app import Endpoints
from secateur.serving.http.requests import Message
from secateur.serving.tools import CallReader, ToolCall, ToolFormat, tool_format
from serving.conftest import Running, byte_level, refusal

Start = Callable[..., Running]
USER = [{"role": "user", "content": "x"}]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-zé]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "bé", "c\n"]}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"leaf": {"type": "object", "properties": {"x": {"type": "boolean"}},
                       "required": ["x"], "additionalProperties": False}},
}  # fmt: skip


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    tool("get_weather", city={"enum": ["Paris", "Rome"]}),
    tool("add", a={"type": "integer", "minimum": 0, "maximum": 99}, b={"type": "boolean"}),
]

HERMES = """{% if tools %}{% for t in tools %}{{ t.function | tojson }};{% endfor %}{% endif %}
{%- for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"""

LLAMA_3 = """{% if tools %}{{ tools | tojson }};{% endif %}
{%- for m in messages %}{% if 'tool_calls' in m %}{% set c = m.tool_calls[0].function %}
{{- '{"name": "' + c.name + '", "parameters": ' }}{{ c.arguments | tojson }}{{ '}' }}
{%- else %}{{ m.role }}:{{ m.content }};{% endif %}{% endfor %}
{%- if add_generation_prompt %}a:{% endif %}"""

OWN = """{% if tools %}{{ tools | tojson }};{% endif %}
{%- for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}
<call {{ c.function.name }}>{{ c.function.arguments }}</call>{% endfor %}{% endfor %}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the servers of this file have, unless a test gives them another model."""
    return byte_level(tmp_path_factory.mktemp("structured") / "hermes", HERMES)


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def following(**structure: Any) -> dict[str, Any]:
    return {"structured_outputs": structure}


def chat(server: Running, **options: Any) -> Any:
    body = {"messages": USER, "max_tokens": 150, **options}
    answer = server.post("chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


DRAWS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.5, "top_p": 0.9},
    {"temperature": 1, "top_k": 3, "repetition_penalty": 1.5},
    {"temperature": 2, "presence_penalty": 2, "frequency_penalty": 2, "min_p": 0.2},
]


@pytest.mark.parametrize("draws", DRAWS)
def test_every_answer_follows_its_schema(server: Running, draws: dict[str, Any]) -> None:
    for seed in range(12):
        form = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
        for choice in chat(server, response_format=form, seed=seed * 10, n=3, **draws):
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


CONSTRAINTS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"structured_outputs": {"json": json.dumps({"enum": [1, "zwei"]})}}, r'1|"zwei"'),
    "regex": ({"structured_outputs": {"regex": r"[a-f/]{2,4}!", "choice": None}}, r"[a-f/]{2,4}!"),
    "choice": ({"structured_outputs": {"choice": ["ja\n", 'n"ein', "où"]}}, 'ja\n|n"ein|où'),
    "json": ({"structured_outputs": {"json": {"type": "null"}}}, "null"),
    "object": ({"response_format": {"type": "json_object", "schema": {"const": 5}}}, "5"),
}


@pytest.mark.parametrize("name", [*CONSTRAINTS])
def test_regular_expressions_and_choices(server: Running, name: str) -> None:
    options, expected = CONSTRAINTS[name]
    for seed in range(5):
        body = {"prompt": "x", "max_tokens": 30, "seed": seed, **options}
        answer = server.post("completions", body)
        assert answer.status_code == 200, answer.text
        assert re.fullmatch(expected, answer.json()["choices"][0]["text"])
    assert re.fullmatch(expected, chat(server, **options)[0]["message"]["content"])


def test_any_object_is_json(server: Running) -> None:
    """Random strings go on for long, so most answers are cut; the others are JSON."""
    ended = 0
    for seed in range(15):
        [choice] = chat(server, response_format={"type": "json_object"}, seed=seed, temperature=3)
        text = choice["message"]["content"]
        assert text[0] == "{"
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(text), dict)
            ended += 1
    assert ended


def test_a_grammar_changes_nothing_for_neighbours(server: Running) -> None:
    """Texts and log probabilities of plain requests beside constrained ones, bit for bit."""

    def plain(seed: int) -> Any:
        body = {"prompt": "def f(x" * 3, "max_tokens": 40, "temperature": 1, "seed": seed}
        return server.post("completions", {**body, "logprobs": 3}).json()["choices"]

    alone = [plain(seed) for seed in range(8)]
    with ThreadPoolExecutor(16) as pool:
        constrained = [
            pool.submit(chat, server, **following(json=PERSON), seed=seed) for seed in range(8)
        ]
        together = [*pool.map(plain, range(8))]
        for answer in constrained:
            jsonschema.validate(json.loads(answer.result()[0]["message"]["content"]), PERSON)
    assert together == alone


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_draft_follows_the_grammar(serve: Start, model: Path, temperature: float) -> None:
    """The model is its own draft; at temperature 0 the text is that without a draft."""
    drafted, plain = serve(draft=str(model), slots=3), serve()
    drafted.scheduler.drafter.pace.awake = lambda: True
    drafted.scheduler.drafter.pace.accepts = lambda sure: 1.0
    drafted.scheduler.drafter.pace.value = lambda texts: 1e9
    for seed in range(6):
        options = {**following(json=PERSON), "temperature": temperature, "seed": seed}
        [found] = chat(drafted, **options)
        jsonschema.validate(json.loads(found["message"]["content"]), PERSON)
        if temperature == 0:
            assert found["message"] == chat(plain, **options)[0]["message"]
    assert drafted.scheduler.counts["draft_tokens_accepted"] > 20


def test_conversations_use_the_prefix_cache_and_stop_texts_still_count(server: Running) -> None:
    known = server.scheduler.counts["prompt_tokens_cached"]
    long = [{"role": "user", "content": "y" * 100}]
    for _ in range(2):
        [choice] = chat(
            server, messages=long, **following(regex="[ab]{20}"), stop="c", temperature=0
        )
        assert re.fullmatch("[ab]{20}", choice["message"]["content"])
    assert server.scheduler.counts["prompt_tokens_cached"] >= known + 64
    [choice] = chat(server, **following(regex="[0-9]{20}END"), stop=["E"])
    assert re.fullmatch("[0-9]{20}", choice["message"]["content"])
    [choice] = chat(server, **following(regex="[0-9]{20}END"), max_tokens=4)
    assert choice["finish_reason"] == "length"


def test_log_probabilities_are_those_of_the_model(server: Running) -> None:
    [choice] = chat(
        server, **following(choice=["zq"]), logprobs=True, top_logprobs=1, temperature=0
    )
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "z"
    assert first["logprob"] < first["top_logprobs"][0]["logprob"] < 0


def arguments_of(message: Any) -> list[tuple[str, Any]]:
    found = []
    for call in message.tool_calls:
        assert call.type == "function"
        assert call.id.startswith("call_")
        found.append((call.function.name, json.loads(call.function.arguments)))
    return found


def check_calls(calls: list[tuple[str, Any]]) -> None:
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    for name, arguments in calls:
        jsonschema.validate(arguments, schemas[name])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=str
)
def test_tools_that_must_be_called(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    given: Any = {"model": "hermes", "messages": USER, "tools": TOOLS, "tool_choice": choice}
    for seed in range(8):
        options = {**given, "seed": seed, "max_tokens": 200, "parallel_tool_calls": False}
        if stream:
            with client.chat.completions.stream(**options) as events:
                for _ in events:
                    pass
                answer = events.get_final_completion()
        else:
            answer = client.chat.completions.create(**options)
        [found] = answer.choices
        assert found.finish_reason == "tool_calls"
        assert found.message.content is None
        [call] = arguments_of(found.message)
        check_calls([call])
        if choice != "required":
            assert call[0] == "add"


def test_several_calls_in_one_answer(server: Running) -> None:
    counts = set()
    for seed in range(30):
        [choice] = chat(server, tools=TOOLS, tool_choice="required", seed=seed, temperature=2)
        calls = choice["message"].get("tool_calls", [])
        found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
        check_calls(found)
        assert len({call["id"] for call in calls}) == len(calls)
        counts.add(len(calls))
    assert len(counts) > 1


def test_an_answer_or_a_call(server: Running) -> None:
    kinds = set()
    for seed in range(20):
        schema = {"type": "object", "properties": {"done": {"type": "boolean"}},
                  "required": ["done"], "additionalProperties": False}  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        [choice] = chat(
            server, tools=TOOLS, response_format=form, seed=seed, temperature=3,
            parallel_tool_calls=False,
        )  # fmt: skip
        kinds.add(choice["finish_reason"])
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
    assert kinds == {"stop", "tool_calls"}


def test_references_in_the_parameters_of_a_tool(server: Running) -> None:
    one = {"type": "function", "function": {"name": "save", "parameters": PERSON}}
    options = {"tool_choice": "required", "max_tokens": 400, "parallel_tool_calls": False}
    for seed in range(5):
        [choice] = chat(server, tools=[one], seed=seed, **options)
        for call in choice["message"]["tool_calls"]:
            jsonschema.validate(json.loads(call["function"]["arguments"]), PERSON)


CALLED = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function",
         "function": {"name": "add", "arguments": '{"a": 1, "b": true}'}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": "two"},
]  # fmt: skip


def test_calls_and_their_results_go_through_the_template(server: Running) -> None:
    messages = [Message.model_validate(message) for message in CALLED]
    text = asyncio.run(Endpoints(server.serving.service, None).conversation(messages, None))
    assert text == (
        'user:x;assistant:<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": true}}\n'
        "</tool_call>;tool:two;a:"
    )
    assert chat(server, messages=CALLED, tools=TOOLS[:1], max_tokens=3)


def test_the_format_is_that_of_the_template() -> None:
    def of(template: str | None, special: tuple[str, ...] = ()) -> ToolFormat | None:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer_of("bytes"), chat_template=template
        )
        tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
        return tool_format(tokenizer)

    assert of(HERMES) == ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments")
    assert of(LLAMA_3) == ToolFormat("", "", "parameters")
    assert of(OWN) is None
    assert of("{{ messages[0].content }}") is None
    assert of(None) is None
    assert of(HERMES, ("<tool_call>", "</tool_call>")) is None  # no text shows them


HERMES_FORMAT = ToolFormat("<tool_call>\n", "\n</tool_call>", "arguments")
LLAMA_FORMAT = ToolFormat("", "", "parameters")
ADD = ToolCall("add", '{"a": "é<tool_call>"}')
ADD_TEXT = '<tool_call>\n{"name": "add", "arguments": {"a": "é<tool_call>"}}\n</tool_call>'
TEXTS = [
    (HERMES_FORMAT, "just < text <tool and more\n", "just < text <tool and more\n", []),
    (HERMES_FORMAT, ADD_TEXT, "", [ADD]),
    (HERMES_FORMAT, f"Let me see.\n\n{ADD_TEXT}\n{ADD_TEXT}\n", "Let me see.", [ADD, ADD]),
    (HERMES_FORMAT, f"{ADD_TEXT}Then", "Then", [ADD]),
    (HERMES_FORMAT, ADD_TEXT.removesuffix("\n</tool_call>"), "", [ADD]),
    (HERMES_FORMAT, "<tool_call>\n{broken}\n</tool_call>", None, []),
    (HERMES_FORMAT, '<tool_call>{"name": "no", "arguments": {}}</tool_call>', None, []),
    (HERMES_FORMAT, '<tool_call>{"name": ["add"], "arguments": {}}</tool_call>', None, []),
    (HERMES_FORMAT, '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>', None, []),
    (HERMES_FORMAT, r'<tool_call>{"name": "add", "arguments": {"a": "\ud800"}}</tool_call>',
     None, []),
    (HERMES_FORMAT, '<tool_call>{"name": "add", "argu', None, []),
    (LLAMA_FORMAT, '{"name": "add", "parameters": {}}', "", [ToolCall("add", "{}")]),
    (LLAMA_FORMAT, ' {"name": "add", "parameters": {}}; {"name": "add", "parameters": {}}', "",
     [ToolCall("add", "{}")] * 2),
    (LLAMA_FORMAT, '{"name": "add"}', None, []),
    (LLAMA_FORMAT, 'It is {"name": "add", "parameters": {}}', None, []),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("case", range(len(TEXTS)))
def test_calls_are_found_in_any_pieces(case: int, size: int) -> None:
    form, text, passed, calls = TEXTS[case]
    reader, found, listed = CallReader(form, frozenset(["add"])), "", list[ToolCall]()
    for begin in range(0, len(text), size):
        more, new = reader.add(text[begin : begin + size])
        found, listed = found + more, [*listed, *new]
    more, new = reader.finish()
    assert (found + more, [*listed, *new]) == (text if passed is None else passed, calls)
    one = CallReader(form, frozenset(["add"]), most=1)
    assert [*one.add(text)[1], *one.finish()[1]] == calls[:1]
    assert one.found == len(calls[:1])


def test_text_before_a_call_is_streamed_at_once() -> None:
    reader = CallReader(HERMES_FORMAT, frozenset(["add"]))
    assert reader.add("I look") == ("I look", [])
    assert reader.add(" it up. <to") == (" it up.", [])
    assert reader.add("p>") == (" <top>", [])


def refused(server: Running, **options: Any) -> dict[str, Any]:
    return refusal(server, "chat/completions", {"messages": USER, "max_tokens": 5, **options})


NESTED: Any = {"type": "integer"}
for _ in range(200):
    NESTED = {"type": "object", "properties": {"a": NESTED}, "required": ["a"]}
STRINGS = {"type": "string"}
HOSTILE: dict[str, Any] = {
    "nested": NESTED,
    "itself": {"$ref": "#"},
    "a circle": {"$ref": "#/$defs/a", "$defs": {
        "a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "of another server": {"$ref": "http://127.0.0.1:9/x"},
    "of a file": {"$ref": "file:///etc/passwd"},
    "many words": {"enum": [f"word {n}" * 3 for n in range(50_000)]},
    "many properties": {"type": "object", "additionalProperties": False,
                        "properties": {f"p{n}": STRINGS for n in range(3_000)}},
    "nothing": {"type": "integer", "minimum": 5, "maximum": 1},
    "false": False,
    "a type": {"type": "strange"},
    "look ahead": {"type": "string", "pattern": "(?=a)b"},
    "steps": {"type": "string", "pattern": "^(a?){5000}a{5000}$"},
    "choices": {"oneOf": [STRINGS, {"type": "string", "maxLength": 5}]},
}  # fmt: skip


@pytest.mark.parametrize("case", [*HOSTILE])
def test_a_hostile_schema_costs_little_and_ends_nobody_elses_request(
    server: Running, case: str
) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": HOSTILE[case]}}
    began = time.process_time()
    error = refused(server, response_format=form, max_tokens=100)
    # one that is nested too deeply is no JSON for pydantic
    assert error["code"] == (None if case == "nested" else "grammar")
    assert "start:" not in error["message"]
    assert time.process_time() - began < 5
    assert server.serving.service.worker.failures == 0
    assert server.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_hostile_regular_expression_ends_its_own_stream_only(server: Running) -> None:
    body = {"prompt": "x", "max_tokens": 9, "stream": True, "temperature": 3}
    body |= following(regex="(a?){5000}a{5000}")
    events = server.post("completions", body).text.strip().split("\n\n")
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == "grammar"
    assert server.scheduler.idle


def test_a_grammar_is_read_beside_other_requests(server: Running) -> None:
    begun, go_on = threading.Event(), threading.Event()
    server.serving.service.grammar_reader.submit(lambda: (begun.set(), go_on.wait(20)))
    begun.wait()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(chat, server, **following(choice=["a"]))
        assert server.post("completions", {"prompt": "x", "max_tokens": 3}).status_code == 200
        assert not waiting.done()
        go_on.set()
        assert waiting.result()[0]["message"]["content"] == "a"


def test_a_template_without_tools(serve: Start, tmp_path: Path) -> None:
    plain = serve(byte_level(tmp_path / "plain"))
    assert "get_weather" in refused(plain, tools=TOOLS)["message"]
    assert refused(plain, messages=CALLED)["param"] == "messages[1].tool_calls"
    answer = plain.post(
        "chat/completions",
        {"messages": USER, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200},
    ).json()
    assert len(answer["warnings"]) == 1
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    own = serve(byte_level(tmp_path / "own", OWN))
    assert refused(own, tools=TOOLS)["param"] == "tools"
    assert own.post("chat/completions", {"messages": USER, "tools": TOOLS, "max_tokens": 3,
                                         "tool_choice": "none"}).status_code == 200  # fmt: skip


def test_without_llguidance(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(server.serving.service.__dict__, "grammars", raising=False)
    for structure in ({"json": True}, {"regex": "a"}, {"choice": ["a"]}):
        error = refused(server, structured_outputs=structure)
        assert "pip install '.[structured]'" in error["message"]


def test_a_tokenizer_that_llguidance_does_not_know(serve: Start, tmp_path: Path) -> None:
    server = serve(save_tiny(tmp_path / "words"))
    body = {"prompt": "x", **following(json=True)}
    assert refusal(server, "completions", body)["code"] == "grammar"
    assert server.post("completions", {"prompt": "x", "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("kind", ["bytes", "llama 3", "characters", "unigram"])
def test_tokenizers_of_every_kind(kind: str) -> None:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(kind))
    grammars = Grammars(tokenizer, {2})
    for text, right in (
        (json_text(PERSON), '{"name": "Zoé", "age": 5,"tags":["bé"], "next":null}'),
        (regex_text("[é/]+x"), "é/éx"),
        (choice_text(["née", "b"]), "née"),
    ):
        grammar = grammars.of(text).begin()
        for token in [*tokenizer(right, add_special_tokens=False)["input_ids"], 2]:
            grammar.note(token)
        other = grammars.of(text).begin()
        [*_, wrong] = tokenizer("?", add_special_tokens=False)["input_ids"]
        with pytest.raises(GrammarError):
            other.note(wrong)
