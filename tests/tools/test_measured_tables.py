"""Tables that were written by hand say what `benchmarks/results` says."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.reporting.tables import duration

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "docs" / "methods" / "presets.md"
OTHERS = ("60 %", "70 %", "2:4", "4:8")
NAMES = {
    "Wanda, published code": "wanda",
    "SparseGPT, published code": "sparsegpt",
    "ALPS, published code": "alps",
    "fast": "fast",
    "balanced": "balanced",
    "best": "best",
    "best, one seed": "best",
    "best, 98,304 tokens": "best, 98,304 tokens",
    "`--effort fast`, then int8": "fast",
    "`--effort balanced` (default), then int8": "balanced",
    "`--effort best`, then int8": "best",
}


def mean(row: str, column: str, text: str) -> float:
    """The perplexity of the mean loss of the rows of a benchmark."""
    rows = json.loads((ROOT / "benchmarks/results/presets.json").read_text())["rows"]
    found = [r["perplexity"][text] for r in rows if (r["row"], r["column"]) == (row, column)]
    return statistics.geometric_mean(found)


def tables(page: Path) -> Iterator[list[list[str]]]:
    """The cells of each table of a page."""
    for table in re.findall(r"(?:^\|.*\|\n)+", page.read_text(encoding="utf-8"), re.M):
        yield [
            [cell.strip(" *") for cell in line.strip("|").split("|")] for line in table.split("\n")
        ]


def written(page: Path, column: str) -> Iterator[tuple[str, str, str]]:
    """Method, text and cell, of the table whose first head is this column."""
    for head, _, *lines in tables(page):
        if head[0] == column and head[1] == "WikiText-2":
            for line in lines:
                if line[0] in NAMES:
                    yield line[0], "wikitext2", line[1]
                    yield line[0], "c4", line[2]
            return


@pytest.mark.parametrize(("column", "count"), [("50 %", 14), *((x, 12) for x in OTHERS)])
def test_presets(column: str, count: int) -> None:
    cells = list(written(PRESETS, column))
    assert len(cells) == count
    for name, text, cell in cells:
        assert cell.split()[0] == f"{mean(NAMES[name], column, text):.2f}", (name, text)


def test_the_readme() -> None:
    rows = json.loads((ROOT / "benchmarks/results/first-page.json").read_text())["rows"]
    known: dict[str, dict[str, Any]] = {}
    for row in rows:  # torch and our kernels run the same file
        known.setdefault(row["row"].removesuffix(", torch"), {}).update(row)
    [table] = [t for t in tables(ROOT / "README.md") if t[0][1:2] == ["weight files"]]
    names = {"50 % zeros, int8": "balanced, int8", "50 % zeros, int4": "balanced, int4"}
    names |= {"no zeros, bfloat16, in torch": "no zeros, bfloat16"}
    lines = [line for line in table[2:] if len(line) > 1]
    assert len(lines) == 8
    for name, *cells in lines:
        row = known[names.get(name.strip("*"), name.strip("*"))]
        assert cells[0] == f"{row['file_bytes'] / 2**20:.0f} MiB", name
        assert cells[1] == f"{row['tokens_per_second']:.0f}", name
        assert cells[2] == f"{row['perplexity']:.2f}", name


def test_presets_on_the_bench_of_small_models() -> None:
    rows = json.loads((ROOT / "benchmarks/results/bench-presets.json").read_text())["rows"]

    def excess(model: str, row: str, column: str) -> dict[str, float]:
        (dense,) = [r["loss"] for r in rows if (r["model"], r["row"]) == (model, "dense")]
        key = (model, row, column)
        found = [r["loss"] for r in rows if (r["model"], r["row"], r["column"]) == key]
        return {text: statistics.mean(x[text] for x in found) - dense[text] for text in dense}

    table = next(t for t in tables(PRESETS) if t[0][:2] == ["model", "ALPS"])
    shares: dict[str, list[float]] = {}
    lines = [line for line in table[2:] if len(line) > 1]
    for name, alps, *cells in lines[:-1]:
        model, column = name.split(", ")
        rival = excess(model, "ALPS", column)
        assert alps == ", ".join(f"{x:.3f}" for x in rival.values())
        for row, cell in zip(table[0][2:], cells, strict=True):
            if cell:
                own = excess(model, row, column)
                share = statistics.mean(own[text] / rival[text] for text in own)
                assert cell == f"{share:.2f}", (name, row)
                shares.setdefault(row, []).append(share)
    assert len(lines) == 13
    for row, cell in zip(table[0][2:], lines[-1][2:], strict=True):
        if cell:
            assert len(shares[row]) == 12
            assert cell == f"{statistics.mean(shares[row]):.2f}", row


def test_models_that_were_trained_again() -> None:
    def losses(name: str) -> dict[tuple[str, str, str], dict[str, float]]:
        rows = json.loads((ROOT / "benchmarks/results" / f"{name}.json").read_text())["rows"]
        return {(r["model"], r["column"], r["row"]): r["loss"] for r in rows if r["seed"] == 0}

    now, earlier = losses("bench-balanced"), losses("bench-rates")
    table = next(t for t in tables(PRESETS) if t[0][0] == "trained again")
    lines = [line for line in table[2:] if len(line) > 1]
    assert len(lines) == 12
    for name, alps, balanced, share, uniform, best in lines:
        model, column = name.split(", ")

        def excess(known: Any, row: str, model: str = model, column: str = column) -> list[float]:
            own, dense = known[model, column, row], known[model, "", "dense"]
            return [own[text] - dense[text] for text in dense]

        def shown(values: list[float]) -> str:
            return ", ".join(f"{round(x, 3) + 0:.3f}" for x in values)

        rival, own = excess(now, "ALPS"), excess(now, "balanced")
        assert (alps, balanced) == (shown(rival), shown(own)), name
        assert uniform == shown(excess(now, "balanced, uniform")), name
        if share:
            ratio = statistics.mean(x / y for x, y in zip(own, rival, strict=True))
            assert share == f"{ratio:.2f}", name
        if best:
            assert best == shown(excess(earlier, "best")), name


def test_the_rates_of_a_distillation() -> None:
    rows = json.loads((ROOT / "benchmarks/results/bench-rates.json").read_text())["rows"]
    losses = {r["row"]: r["loss"] for r in rows if (r["model"], r["column"]) == ("gemma", "50 %")}
    (dense,) = [r["loss"] for r in rows if (r["model"], r["row"]) == ("gemma", "dense")]
    page = ROOT / "docs" / "methods" / "distillation.md"
    table = next(t for t in tables(page) if t[0][:2] == ["steps", "0.25 / hidden size"])
    assert [line[0] for line in table[2:] if len(line) > 1] == ["192", "1024"]
    for steps, *cells in table[2:4]:
        for part, cell in zip((1, 4, 16, 64), cells, strict=True):
            row = f"best, {256 * int(steps):,} tokens, 1/{part} of the highest rate"
            assert cell == ", ".join(f"{losses[row][text] - dense[text]:.3f}" for text in dense)


def test_the_times_of_a_newcomer() -> None:
    rows = json.loads((ROOT / "benchmarks/results/newcomer.json").read_text())["rows"]
    walked = {row["command"]: row for row in rows if row["part"] == "start"}
    documented = {
        line[0].strip("`"): line[1:]
        for table in tables(ROOT / "docs" / "start.md")
        for line in table
        if line[0].startswith("`")
    }
    assert len(documented) == 7
    for start, cells in documented.items():
        [row] = [row for command, row in walked.items() if command.startswith(start)]
        assert cells[:2] == [duration(row["seconds"]), duration(row["processor_seconds"])], start
    ready = ["python3 -m venv", "pip install", "secateur prune"]
    seconds = [row["seconds"] for command, row in walked.items() if command.startswith((*ready,))]
    assert len(seconds) == len(ready)
    assert sum(seconds) < 300
    assert 400 < sum(row["seconds"] for row in walked.values()) < 430


def test_the_trimmed_vocabularies() -> None:
    rows = json.loads((ROOT / "benchmarks/results/vocabulary.json").read_text())["rows"]
    page = ROOT / "docs" / "structure" / "vocabulary.md"
    shown = {line[0]: line[1:] for table in tables(page) for line in table}

    def cells(name: str, form: Callable[[dict[str, Any]], str]) -> None:
        assert shown[name][1:] == [*map(form, rows)], name

    cells("tokens", lambda r: f"{r['tokens']:,}")
    cells("parameters", lambda r: f"{r['parameters'] / 1e6:.1f} M")
    cells("weight files", lambda r: f"{r['file_bytes'] / 2**20:.1f} MiB")
    cells("of C4's tokens stay", lambda r: f"{100 * r['covered']:.1f} %")
    cells("of WikiText-2's tokens stay", lambda r: f"{100 * r['covered_of_text']:.1f} %")
    cells("windows whose tokens all stay", lambda r: f"{r['windows_that_stay']}")
    uncut = "perplexity, uncut model, "
    cells(f"{uncut}all tokens", lambda r: f"{r['perplexity_before']:.4f}")
    cells(f"{uncut}among the kept tokens", lambda r: f"{r['perplexity_among_kept']:.4f}")
    cells("perplexity, trimmed model", lambda r: f"{r['perplexity']:.4f}")
    cells("WikiText-2 in tokens", lambda r: f"{r['longer']:.3f}")
    alike = "windows that become the same tokens"
    cells(alike, lambda r: f"{r['windows_encoded_alike']} of {r['windows_judged']}")
    decoded = "random Unicode strings decoded as by the uncut tokenizer"
    cells(decoded, lambda r: f"{r['decoded_alike']:,} of 10,000")
    for row in rows:
        assert abs(row["perplexity"] / row["perplexity_among_kept"] - 1) < 1e-7


def test_which_experts_to_keep() -> None:
    rows = json.loads((ROOT / "benchmarks/results/experts.json").read_text())["rows"]
    page = ROOT / "docs" / "methods" / "experts.md"
    found = [
        line
        for head, _, *lines in tables(page)
        if head[:2] == ["balanced over", "seed"]
        for line in lines
        if len(line) > 1
    ]
    expected = []
    for row in rows:
        for keep in (12, 8):
            of = row[f"keep_{keep}"]
            gap = of["frequency"]
            expected.append([
                row["setup"], str(row["seed"]), f"{row['dense']:.3f}", f"{keep} of 16",
                *(f"{of[n]['loss']:.3f}" for n in ("reap", "frequency", "merge", "random")),
                f"{gap['above_reap']:+.3f} ± {gap['error']:.3f}",
            ])  # fmt: skip
    assert found == expected
    text = page.read_text(encoding="utf-8")
    for setup in ("each layer", "all layers together"):
        own = [row["alone"] for row in rows if row["setup"] == setup]
        means = {name: sum(x[name] for x in own) / len(own) for name in own[0]}
        words = (f"{means[n]:.2f}" for n in ("reap", "frequency", "product"))
        assert "| {} | {} | {} | {} |".format(setup, *words) in text
