"""Every result obeys one contract: JSON for programs, and the same tables for show and print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.errors import RecipeError
from secateur.evaluation.speed import Speed
from secateur.reporting.evaluate import BenchResult, EvaluateResult, GenerateResult
from secateur.reporting.fields import Result
from secateur.reporting.models import PruneResult, TrainResult
from secateur.reporting.tables import PLAIN_WIDTH
from secateur.runs.measured import EvaluationRecord, PerplexityRecord
from secateur.runs.records import Cost, SkippedMatrix, Source, Training

PROTOCOL = {
    "cpu": "P", "threads": 2, "kernels": "avx2", "prompt_tokens": 4, "new_tokens": 8, "rounds": 2,
}  # fmt: skip


def perplexity(text: str) -> PerplexityRecord:
    """A result on a text."""
    return PerplexityRecord(
        text=text, perplexity=23.5, mean_loss=3.157, standard_error=0.01, seconds=1.0,
        reference_perplexity=None, protocol={"windows": 4}, protocol_id="ppl-1", reference=None,
        environment={},
    )  # fmt: skip


def evaluated(*texts: str) -> EvaluateResult:
    """What evaluate returns for some texts."""
    record = EvaluationRecord(
        model="m", perplexity=[perplexity(t) for t in texts], divergence=[], tasks=[], generation=[]
    )
    return EvaluateResult(record=record)


def written(prompt: str, text: str) -> GenerateResult:
    """A text of one token."""
    return GenerateResult(
        model="m", prompt=prompt, text=text, tokens=1, load_seconds=0.1, first_token_seconds=0.1,
        tokens_per_second=None, loop="one call",
    )  # fmt: skip


TRAINING = Training(
    source=Source(name="m", kind="folder", revision=None, file_bytes=1), objective="next token",
    text={}, learning_rate=0.1, optimizer="AdamW", processes=1, recipe={}, environment={},
    planned={},
    cost=Cost(
        seconds=3.0, peak_resident_bytes=2**30, peak_is_of_this_run_alone=True,
        training_seconds=2.0,
    ),
    result={
        "best_step": 9, "step": 10, "tokens": 4096, "decoder_sparsity": 0.5,
        "perplexity_before": 30.0, "perplexity_after": 20.0,
    },
)  # fmt: skip

SKIPPED = SkippedMatrix(names="lm_head", reason="the head", tensors=1, weights=1000)

RESULTS = {
    "prune": (PruneResult(sparsity=0.5, layers=[], left=[SKIPPED]), "lm_head: the"),
    "train": (TrainResult(output=Path("out"), manifest=TRAINING), "30.000 → 20.000"),
    "evaluate": (evaluated("one.txt"), "23.5000"),
    "generate": (written("Once", " upon"), "Once upon"),
    "bench": (
        BenchResult.of(
            "m",
            [Speed("packed", (0.1, 0.2), (0.5, 0.5), 2**20), Speed("torch bf16", (0.2,), (0.5,))],
            compressed=True, protocol=PROTOCOL, file_bytes=2**20, dense_bytes=2**21,
        ),
        "5.0 to 10.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("verb", RESULTS)
def test_one_contract(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(PLAIN_WIDTH))
    result, words = RESULTS[verb]
    assert isinstance(result, Result)
    json.dumps(result.to_json())
    result.show()
    shown = capsys.readouterr().out
    print(result)
    printed = capsys.readouterr().out
    assert words in shown
    assert words in printed
    assert [line.rstrip() for line in shown.splitlines()] == printed.splitlines()


def test_brackets_in_texts_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    written("[bold]a[/]", " [red]").show()
    assert "[bold]a[/] [red]" in capsys.readouterr().out


def test_one_text_has_its_numbers_at_hand() -> None:
    one = evaluated("one.txt")
    assert (one.perplexity, one.mean_loss, one.standard_error) == (23.5, 3.157, 0.01)
    assert (one.protocol, one.protocol_id) == ({"windows": 4}, "ppl-1")
    with pytest.raises(RecipeError, match="measured on 2 texts"):
        _ = evaluated("one.txt", "two.txt").perplexity
