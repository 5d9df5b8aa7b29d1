from __future__ import annotations

import gzip

import datasets
import pytest
from test_conversations import write

from secateur.calibration.documents import read_documents, read_text
from secateur.errors import SourceError
from secateur.models import hub as models_hub
from secateur.models.samples import TEXTS, split_passages


def test_json_lines(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"text": "één"}, {"text": "two\nlines", "x": 1}])
    assert read_documents(source) == ["één", "two\nlines"]
    text = read_text(source)
    assert text.text == "één\n\ntwo\nlines"
    assert text.join.startswith("documents joined")


def test_compressed_and_other_fields(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.write('{"content": "one"}\n\n{"content": "two"}\n')
    assert read_documents(str(tmp_path / "a.jsonl.gz"), field="content") == ["one", "two"]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".raw"])
def test_a_text_file_is_one_document_and_stays_as_it_is(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(" = Title = \n\n first\n\n second \n", encoding="utf-8")
    assert read_documents(str(path)) == [" = Title = \n\n first\n\n second \n"]
    assert read_text(str(path)).text == " = Title = \n\n first\n\n second \n"
    assert read_text(str(path)).join.startswith("one text")


def test_a_folder_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.md").write_text("third", encoding="utf-8")
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "picture.png").write_bytes(b"\xff\xfe")
    write(tmp_path / "a.jsonl", [{"text": "first"}])
    assert read_documents(str(tmp_path)) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"text": "a"}\n{"text": \n', r"a\.jsonl:2"),
        ('{"body": "a", "id": 3}\n', r"(?s)'text' is not there; the line has: body, id.*jsonl:1"),
        ('{"text": 5}\n', "'text' is a int, not text"),
        ('["a"]\n', "list"),
        ("{}\n", "the line has: no field"),
        ('{"text": "a cat", "image": "cat.png"}\n', r"(?s)has a picture \(image\).*jsonl:1"),
        ("\n\n", "contains no text"),
        ('{"text": " "}\n', "contains no text"),
    ],
)
def test_bad_json_lines(tmp_path, content, fault):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=fault):
        read_documents(str(tmp_path / "a.jsonl"))


def test_bad_files(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(SourceError, match=r"a\.pdf"):
        read_documents(str(tmp_path / "a.pdf"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(SourceError, match="contains no text"):
        read_documents(str(tmp_path / "folder"))


def test_an_unknown_name_gets_near_ones():
    with pytest.raises(SourceError, match="'boolq-calibration'"):
        read_documents("boolq-calibrate")
    with pytest.raises(SourceError, match=r"'missing\.txt'"):
        read_documents("missing.txt")


@pytest.fixture
def hub(monkeypatch):
    """A hub that answers with three rows and remembers what it was asked for."""
    asked = []
    monkeypatch.setattr(models_hub, "why_unreachable", lambda: None)

    def load_dataset(repo, config=None, **options):
        asked.append((repo, config, options))
        return datasets.Dataset.from_dict({"text": ["", "a", "b"], "id": [0, 1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikitext2_is_one_document_of_all_rows(hub):
    assert list(read_documents("wikitext2")) == ["\n\na\n\nb"]
    text = read_text("wikitext2")
    assert text.text == "\n\na\n\nb"
    assert text.join.startswith("rows joined")
    assert text.dataset.split() == ["Salesforce/wikitext", "wikitext-2-raw-v1", "test"]
    assert [(repo, config, o["split"]) for repo, config, o in hub] == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    ]


def test_c4_calibrates_on_the_first_shard_and_judges_on_another_split(hub):
    assert list(read_documents("c4")) == ["", "a", "b"]
    assert read_text("c4").text == "\n\na\n\nb"
    train, validation = (options for _, _, options in hub)
    assert "c4-train.00000" in train["data_files"]["train"]
    assert "c4-validation.00000" in validation["data_files"]["validation"]


def test_hub_data_sets(hub):
    read_documents("hub:org/name@v1:train[:9]")
    repo, config, options = hub[0]
    assert (repo, config, options["revision"]) == ("org/name", None, "v1")
    assert options["split"] == "train[:9]"
    with pytest.raises(SourceError, match="'body'"):
        read_documents("hub:org/name", field="body")


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (ConnectionError("Couldn't reach it"), r"(?s)downloaded \(Couldn't reach.*boolq-held"),
        (datasets.exceptions.DatasetNotFoundError("no such set"), r"downloaded \(no such set\)"),
        (ValueError('Unknown split "x"'), r'(?s)Unknown split "x".*where: hub: org/name'),
    ],
)
def test_hub_faults(monkeypatch, error, fault):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(models_hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SourceError, match=fault):
        read_documents("hub:org/name")


def test_without_a_network_only_the_cache_is_read(monkeypatch):
    def load_dataset(*_, **__):
        assert datasets.config.HF_HUB_OFFLINE
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(models_hub, "why_unreachable", lambda: "no network")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SourceError, match=r"org/name.*\(no network\)"):
        read_documents("hub:org/name")


def test_a_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "mine.txt").write_text("mine", encoding="utf-8")
    assert read_documents("c4") == ["mine"]


def test_split_passages_keeps_together_what_shares_text_or_subject():
    shared = "these eight words stand in both of them"
    passages = []
    for i in range(300):
        passages += [
            f"Thing{i} is number {i}. First {i} {shared} {i}" if i == 0 else f"Thing{i} is {i}.",
            f"The Thing{i} was seen again in {i} {'and ' + shared if i == 1 else ''}",
        ]
    calibration, held_out = split_passages(passages + passages[:40])
    assert sorted(calibration + held_out) == sorted(passages)
    assert 40 < len(held_out) < 120

    def part(text: str) -> bool:
        return text in set(held_out)

    assert all(part(passages[i]) == part(passages[i + 1]) for i in range(0, 600, 2))
    assert part(passages[0]) == part(passages[3])
    assert split_passages(passages)[1] == held_out
    assert sorted(split_passages(passages[::-1])[1]) == sorted(held_out)


@pytest.mark.real_model
def test_the_two_boolq_texts_are_large_enough_and_disjoint():
    calibration, held_out = (read_documents(name) for name in TEXTS)
    assert not set(calibration) & set(held_out)
    assert len(calibration) == len(set(calibration)) == 2577
    assert len(held_out) == len(set(held_out)) == 361
    # about four characters a token: at least 128 windows of 2048, and 64 of 512
    assert sum(map(len, calibration)) > 128 * 2048 * 4
    assert sum(map(len, held_out)) > 64 * 512 * 4
