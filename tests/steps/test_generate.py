"""Texts and conversations: streaming, stop texts, chat templates, in both loops."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import save_tiny

import secateur
from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.recipes.deploy import GenerateRecipe
from secateur.recipes.reading import build_recipe
from secateur.reporting.evaluate import GenerateResult
from secateur.runtime.decode import SlotDecoder
from secateur.steps.generate import ONE_CALL, Conversation
from serving.conftest import byte_level

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and forbidden is defined %}{% endif %}"
    "{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"


@pytest.fixture(params=["one call", "transformers"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model that our loop decodes, and one that it does not."""
    if request.param == "one call":
        return save_tiny(tmp_path / "m", "llama", head_dim=16, max_position_embeddings=128)
    return save_tiny(tmp_path / "m", "gpt2", n_positions=128)


def with_template(model: Path, template: str = TEMPLATE) -> Path:
    """The same model with a chat template."""
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return model


def conversation(model: str | Path, **options: Any) -> Conversation:
    return Conversation(build_recipe(GenerateRecipe, {"model": str(model), **options}))


def test_pieces_make_the_text(model: Path) -> None:
    pieces: list[str] = []
    made = secateur.generate(model, "abc", max_new_tokens=20, tell=pieces.append)
    assert "".join(pieces) == made.text
    assert len(pieces) > 5  # as it comes, not at the end
    assert made.tokens == 20
    assert (made.loop == ONE_CALL) == ("gpt2" not in (model / "config.json").read_text())
    assert made.first_token_seconds is not None
    assert made.tokens_per_second is not None


def test_a_stop_text_ends_it_and_is_not_shown(model: Path) -> None:
    whole = secateur.generate(model, "abc", max_new_tokens=20).text
    stop = whole[7:9]
    pieces: list[str] = []
    made = secateur.generate(
        model, "abc", max_new_tokens=20, stop=[stop, "never"], tell=pieces.append
    )
    assert made.text == whole[: whole.index(stop)] == "".join(pieces)
    assert made.tokens < 20


def test_top_k_of_one_is_the_most_likely_token(model: Path) -> None:
    greedy = secateur.generate(model, "abc", max_new_tokens=12).text
    alone = secateur.generate(model, "abc", max_new_tokens=12, temperature=2.0, top_k=1).text
    assert alone == greedy
    drawn = secateur.generate(model, "abc", max_new_tokens=12, temperature=2.0, seed=3).text
    assert drawn != greedy


def test_a_chat_template_is_used_if_there_is_one(model: Path) -> None:
    plain = secateur.generate(model, "u:abc;a:", max_new_tokens=8)
    assert not plain.chat
    with_template(model)
    made = secateur.generate(model, "abc", max_new_tokens=8)
    assert made.chat
    assert made.text == plain.text  # the template writes the same prompt
    assert secateur.generate(model, "u:abc;a:", max_new_tokens=8, chat=False).text == plain.text
    answer = secateur.generate(model, "abc", max_new_tokens=8, system="be brief")
    written = secateur.generate(model, "s:be brief;u:abc;a:", max_new_tokens=8, chat=False)
    assert answer.text == written.text


def test_a_conversation_remembers(model: Path) -> None:
    talk = conversation(with_template(model), max_new_tokens=6, system="s")
    first = talk.say("one")
    second = talk.say("two")
    assert talk.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": second.text},
    ]
    alone = secateur.generate(
        model, f"s:s;u:one;a:{first.text};u:two;a:", max_new_tokens=6, chat=False
    )
    assert second.text == alone.text
    talk.forget()
    assert talk.say("one").text == first.text


def test_what_is_refused(tmp_path: Path) -> None:
    bare = str(save_tiny(tmp_path / "bare", max_position_embeddings=64))
    for options in ({"chat": True}, {"system": "be brief"}):
        with pytest.raises(RecipeError, match="chat template"):
            secateur.generate(bare, "abc", **options)
    strict = str(with_template(save_tiny(tmp_path / "strict"), NO_SYSTEM))
    with pytest.raises(RecipeError, match="no system"):
        secateur.generate(strict, "abc", system="be brief")
    with pytest.raises(RecipeError, match="no-chat"):
        conversation(strict, system="x", chat=False)
    with pytest.raises(RecipeError, match="64 positions"):
        secateur.generate(bare, "abc", max_new_tokens=62)
    assert conversation(bare).say("abc").tokens <= 61  # what the positions leave


def test_options_come_from_the_models_generation_config(model: Path) -> None:
    """An option that is given wins; options of drawing need do_sample."""
    file = model / "generation_config.json"
    stored = json.loads(file.read_text())

    def settled(settings: dict[str, object], **given: object) -> Conversation:
        file.write_text(json.dumps(stored | settings))
        return conversation(model, **given)

    found = settled({"do_sample": True, "top_k": 5, "temperature": 0.5})
    assert found.taken == {"temperature": 0.5, "top_k": 5}
    assert (found.sampling.temperature, found.sampling.top_k) == (0.5, 5)
    found = settled({"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1}, top_p=0.5)
    assert found.taken == {"temperature": 1.0, "repetition_penalty": 1.1}
    assert found.sampling.top_p == 0.5
    found = settled({"temperature": 0.5, "top_k": 50, "repetition_penalty": 1.2})
    assert found.taken == {"repetition_penalty": 1.2}
    assert not found.sampling.temperature
    found = settled({"do_sample": True, "top_k": 0, "temperature": 1.0}, top_k=0)
    assert found.sampling.top_k == 0  # all
    for bad in ({"repetition_penalty": "1"}, {"do_sample": True, "top_p": 7.0}):
        with pytest.raises(CheckpointError, match="generation_config"):
            settled(bad)
    file.write_text("{")
    with pytest.raises(CheckpointError, match="generation_config"):
        conversation(model)


def test_penalties_change_the_text(model: Path) -> None:
    greedy = secateur.generate(model, "abc", max_new_tokens=30).text
    for penalty in ({"repetition_penalty": 1.8}, {"frequency_penalty": 2.0}):
        made = secateur.generate(model, "abc", max_new_tokens=30, **penalty).text
        assert len(set(made)) > len(set(greedy))


def test_an_answer_is_read_only_from_where_the_conversation_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says the same as if all of it had been read."""
    model = with_template(
        save_tiny(tmp_path / "m", "llama", head_dim=16, max_position_embeddings=256)
    )
    read: list[int] = []
    whole = SlotDecoder.read
    monkeypatch.setattr(
        SlotDecoder,
        "read",
        lambda self, slot, ids: (read.append(len(ids)), whole(self, slot, ids))[1],
    )
    talk = conversation(model, max_new_tokens=6)
    talk.say("one")
    second = talk.say("two")
    assert len(read) == 2
    assert read[1] <= len(";u:two;a:") + 1
    alone = conversation(model, max_new_tokens=6)
    alone.messages = [*talk.messages[:2]]
    assert alone.say("two").text == second.text
    talk.forget()
    talk.say("other")
    assert read[-1] == len("ther;a:")  # "u:o" is what "u:one" begins with


def test_the_rate_counts_the_tokens_after_the_first(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one second between two tokens, a second has one token."""
    seconds = itertools.count(10)
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr("secateur.runtime.sampling.time", clock)
    made = secateur.generate(model, "abc", max_new_tokens=8)
    assert made.tokens > 2
    assert made.tokens_per_second == 1.0


def test_a_draft_changes_nothing_but_the_speed(tmp_path: Path) -> None:
    """In a conversation too. One for another loop or vocabulary is refused."""
    sizes = {"head_dim": 16, "max_position_embeddings": 128}
    model = with_template(save_tiny(tmp_path / "m", "llama", **sizes))
    secateur.compress(model, values="int4", group_size=32, output=tmp_path / "draft")
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0.0}
    alone = secateur.generate(model, "def f(", **options)
    drafted = secateur.generate(model, "def f(", draft=tmp_path / "draft", **options)
    assert drafted.text == alone.text
    assert alone.proposed is None
    assert drafted.proposed is not None
    assert f"of {drafted.proposed} drafted tokens accepted" in drafted.account
    talks = [
        conversation(model, max_new_tokens=20, temperature=0, draft=draft)
        for draft in (None, str(tmp_path / "draft"))
    ]
    for line in ("def f(", "x = 1", "import o"):
        assert len({talk.say(line).text for talk in talks}) == 1
    other = save_tiny(tmp_path / "gpt2", "gpt2", n_positions=128)
    with pytest.raises(RecipeError, match="draft"):
        secateur.generate(other, "def f(", draft=model, **options)


def test_a_draft_that_is_not_there_is_refused_before_the_first_prompt(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nowhere"):
        conversation(save_tiny(tmp_path / "m"), draft=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_that_follows_a_json_schema(tmp_path: Path, family: str) -> None:
    model = byte_level(tmp_path / "m", family=family)
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}},
              "required": ["n"], "additionalProperties": False}  # fmt: skip
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    for seed, given in enumerate((file, str(file), schema)):
        made = secateur.generate(model, "x", json_schema=given, temperature=1, seed=seed)
        assert [*json.loads(made.text)] == ["n"]
        assert made.tokens < 64


def test_a_draft_follows_a_json_schema_too(tmp_path: Path) -> None:
    model = byte_level(tmp_path / "m")
    given: dict[str, Any] = {"json_schema": {"enum": ["one", "two"]}, "max_new_tokens": 20}
    made = secateur.generate(model, "x", draft=model, **given)
    assert made.text == secateur.generate(model, "x", **given).text
    assert json.loads(made.text) in ("one", "two")


def test_a_json_schema_that_cannot_be_read(tmp_path: Path) -> None:
    model = byte_level(tmp_path / "m")
    for content, said in (("{", "schema"), ("[1]", "object"), ('{"type": "strange"}', "grammar")):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(RecipeError, match=said):
            secateur.generate(model, "x", json_schema=tmp_path / "s.json")
    with pytest.raises(RecipeError, match=r"nowhere\.json"):
        secateur.generate(model, "x", json_schema="nowhere.json")


@pytest.mark.parametrize(
    ("tokens", "chat", "silent"), [(0, True, True), (0, False, False), (3, True, False)]
)
def test_a_model_that_answers_nothing_is_named(tokens: int, chat: bool, silent: bool) -> None:
    result = GenerateResult(
        model="m", prompt="Hi", text="", tokens=tokens, load_seconds=1.0, first_token_seconds=None,
        tokens_per_second=None, loop="transformers", chat=chat,
    )  # fmt: skip
    assert ("--no-chat" in result.account) == silent
