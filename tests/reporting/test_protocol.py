"""Every result obeys one contract: JSON for programs, and the same tables for show and print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from secateur.errors import RecipeError
from secateur.evaluation.speed import Speed
from secateur.report_page.report import ReportResult
from secateur.reporting.evaluate import BenchResult, EvaluateResult, GenerateResult
from secateur.reporting.fields import Result
from secateur.reporting.models import (
    ChainResult,
    CompressResult,
    DecompressResult,
    PruneResult,
    TrainResult,
)
from secateur.reporting.tables import PLAIN_WIDTH
from secateur.runs.records import ChainStep, Cost, FormatTotals, SkippedMatrix, Source, Training
from secateur.runs.records.measured import EvaluationRecord, PerplexityRecord

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


def step(name: str, zeros: int) -> ChainStep:
    """A line of a chain's account."""
    return ChainStep(
        step=name, parameters=100, zeros=zeros, file_bytes=2**21, seconds=3.0, kept=100 - zeros
    )


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

PACKED = CompressResult(
    output=Path("out"), archive=False, source_bytes=2**22, bfloat16_bytes=2**21, file_bytes=2**20,
    ratio=0.5, sparsity=0.5, negative_zeros=0,
    linears=FormatTotals().plus(2**20, 2**19, 2**20, matrices=2), formats={},
    embeddings=FormatTotals(), rounding={}, value_error=0.0, dense_file_bytes={}, seconds=0.0,
)  # fmt: skip
SKIPPED = SkippedMatrix(names="lm_head", reason="the head", tensors=1, weights=1000)

RESULTS = {
    "prune": (
        PruneResult(sparsity=0.5, layers=[], left=[SKIPPED]),
        "lm_head: the",
    ),
    "train": (
        TrainResult(output=Path("out"), manifest=TRAINING),
        "30.000 → 20.000",
    ),
    "compress": (
        PACKED,
        "50.00%",
    ),
    "decompress": (
        DecompressResult(
            output=Path("out"), source_bytes=1, file_bytes=2**21, matrices=7, seconds=0.5
        ),
        "matrices unpacked",
    ),
    "chain": (
        ChainResult(links=(step("source", 0), step("prune", 50)), output=Path("out")), "50.0%",
    ),
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
    "report": (ReportResult(page=Path("report.html")), "report: report.html"),
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
