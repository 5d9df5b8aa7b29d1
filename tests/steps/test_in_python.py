"""What a user of Python meets: short results, a bar in notebooks, texts and tokenizers found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForCausalLM, PreTrainedModel

import secateur
from secateur.errors import RecipeError
from secateur.progress import ProgressBar, Silent, listener
from secateur.reporting.tables import Line, Table, html

TEXTS = ["def add(a, b): return a + b\n" * 30, "for word in words: print(word)\n" * 30]
WINDOWS = {"windows": 4, "sequence_length": 16, "sparsity": 0.5, "method": "wanda"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with its tokenizer; the cache is a folder of the test."""
    monkeypatch.setenv("SECATEUR_HOME", str(tmp_path / "cache"))
    return save_tiny(tmp_path / "model")


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_result_shows_its_tables_as_the_last_line_of_a_cell(folder: Path) -> None:
    result = secateur.prune(loaded(folder), calibration=TEXTS, **WINDOWS)
    assert repr(result) == str(result)
    assert "50.0" in repr(result)
    assert len(repr(result)) < 2_000
    assert "<table>" in result._repr_html_()


def test_html_keeps_text_apart_from_markup() -> None:
    table = Table.of("a <b>", ("name", "n"), [("x & y", "1")])
    page = html([Line("first"), Line("second <i>"), table, Line("")])
    assert '<p style="white-space: pre-wrap">first\nsecond &lt;i&gt;</p>' in page
    assert "<caption>a &lt;b&gt;</caption>" in page
    assert '<td style="text-align: left">x &amp; y</td><td style="text-align: right">1</td>' in page
    assert page.endswith("</table>")


def test_a_list_of_texts_is_calibration_as_a_file_of_them_is(folder: Path, tmp_path: Path) -> None:
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    by_file, by_list = loaded(folder), loaded(folder)
    secateur.prune(by_file, calibration=lines, **WINDOWS)
    secateur.prune(by_list, calibration=TEXTS, **WINDOWS)
    assert same_weights(by_file, by_list)
    by_generator = loaded(folder)
    secateur.prune(by_generator, calibration=(text for text in TEXTS), **WINDOWS)
    assert same_weights(by_file, by_generator)
    output = secateur.prune(folder, output=tmp_path / "out", calibration=TEXTS, **WINDOWS).output
    assert output is not None
    assert same_weights(loaded(output), by_list)


@pytest.mark.parametrize(
    ("texts", "fault"),
    [([], "empty"), (["", " "], "empty"), ([1, "a"], "holds int"), ([None], "holds NoneType")],
)
def test_a_list_that_is_no_texts_is_refused(folder: Path, texts: list, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        secateur.prune(loaded(folder), calibration=texts, **WINDOWS)


def test_a_list_of_files_is_refused_with_the_form_for_files(folder: Path, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    with pytest.raises(RecipeError, match=r"names of files(?s:.*)a\.txt=1,.*b\.txt=1"):
        secateur.prune(loaded(folder), calibration=files, **WINDOWS)


def test_the_tokenizer_is_found_where_the_model_came_from(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXTS[0] + TEXTS[1])
    model = loaded(folder)
    found = secateur.evaluate(model, text=tmp_path / "text.txt", sequence_length=16, windows=4)
    named = secateur.evaluate(folder, text=tmp_path / "text.txt", sequence_length=16, windows=4)
    assert found.perplexity == pytest.approx(named.perplexity, rel=1e-5)
    model.config._name_or_path = ""
    with pytest.raises(RecipeError, match=r"does not say where(?s:.*)pass tokenizer="):
        secateur.evaluate(model, text=tmp_path / "text.txt", sequence_length=16)


CELLS = (
    """
from secateur.progress import listener
bar = listener(None)
for stage in ("reading", "pruning", "writing"):
    bar.start(stage, 2)
    bar.step(note="one")
    bar.step(note="two")
    bar.finish()
""",
    """
from secateur.reporting.fields import Result
from secateur.reporting.tables import Table, next_steps
class Shown(Result):
    def blocks(self):
        return [Table.of("t", ["", ""], [("a", "1")]), *next_steps({"here": "."}, {"look": "ls"})]
    __repr__ = Result.__repr__
Shown()
""",
    "Shown().show()",
    "print(Shown())",
)


def test_a_cell_of_a_notebook_has_one_output() -> None:
    import nbclient
    import nbformat

    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbclient.NotebookClient(notebook, timeout=300, coalesce_streams=True).execute()
    [bars], [value], [shown], [printed] = [cell.outputs for cell in notebook.cells]
    assert bars.name == "stderr"
    assert bars.text.splitlines()[-1].startswith("writing: 100%|██████████| 2/2")
    assert "<table>" in value.data["text/html"]
    for text in (value.data["text/plain"], shown.text, printed.text):
        assert "here: ." in text
        assert "  ls" in text


def test_a_notebook_gets_a_bar_and_a_script_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert isinstance(listener(None), Silent)
    shell = type("ZMQInteractiveShell", (), {})()
    notebook = ModuleType("IPython")
    notebook.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    bar = listener(None)
    assert isinstance(bar, ProgressBar)
    bar.start("pruning", 2)
    bar.step(note="layer 1")
    bar.step(note="layer 2")
    bar.finish()
    assert "pruning: 100%" in capsys.readouterr().err
    own = Silent()
    assert listener(own) is own


@pytest.mark.parametrize("progress", ["bar", True, ProgressBar])
def test_a_progress_that_does_not_listen_is_refused(folder: Path, progress: Any) -> None:
    with pytest.raises(RecipeError, match="start, step"):
        secateur.prune(loaded(folder), method="magnitude", sparsity=0.5, progress=progress)


def test_what_is_no_tokenizer_no_name_and_no_device_is_refused(folder: Path) -> None:
    model = loaded(folder)
    for tokenizer in ("gpt2", 3):
        with pytest.raises(RecipeError, match="tokenizer"):
            secateur.prune(model, calibration=TEXTS, tokenizer=tokenizer, **WINDOWS)
        with pytest.raises(RecipeError, match="tokenizer"):
            secateur.evaluate(model, text="t.txt", tokenizer=tokenizer)
    with pytest.raises(RecipeError, match="model"):
        secateur.generate(model, "a")
    with pytest.raises(RecipeError, match="gpu"):
        secateur.load(folder, device="gpu")
    with pytest.raises(RecipeError, match="bf16"):
        secateur.load(folder, dtype="bf16")
    assert secateur.generate(folder, "a", max_new_tokens=2, stop="nowhere").text


@pytest.mark.parametrize("prompt", [None, ["a", "b"], 3])
def test_a_prompt_that_is_no_text_is_refused(folder: Path, prompt: Any) -> None:
    with pytest.raises(RecipeError, match="prompt"):
        secateur.generate(folder, prompt=prompt)
