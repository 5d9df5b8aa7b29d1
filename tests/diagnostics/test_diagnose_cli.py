"""`secateur diagnose` as a user meets it: verdicts, files, exit codes, bad input."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import save_tiny

from diagnostics.planted import Pair, edit
from secateur.diagnostics.findings import SEVERITIES


def flat(text: str) -> str:
    """A table's text without its frame and line ends."""
    return " ".join(text.replace("│", " ").split())


def test_a_healthy_model_in_one_line(secateur, pair: Pair) -> None:
    done = secateur("diagnose", pair.dense)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{pair.dense}: healthy")
    assert "41 tensors" in done.out
    pruned = secateur("diagnose", pair.pruned)
    assert pruned.code == 0
    _, _, rest = pruned.out.partition("\n")
    assert "no-reference" in rest


def test_findings_in_a_table_and_exit_code_3(secateur, pair: Pair) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(pair.pruned, name, lambda w: w.masked_fill_(w != 0, float("nan")))
    done = secateur("diagnose", pair.pruned)
    assert done.code == 3
    assert ": 1 error (41 tensors" in done.out.splitlines()[0]
    assert "not-finite" in done.out
    record = json.loads(secateur("diagnose", pair.pruned, "--json").out)
    severities = [x["severity"] for x in record["findings"]]
    assert severities == sorted(severities, key=SEVERITIES.index)
    assert severities[0] == "error"


def test_warnings_alone_are_exit_code_0(secateur, pair: Pair) -> None:
    edit(pair.pruned, "model.layers.1.self_attn.o_proj.weight", lambda w: w[:, :8].zero_())
    done = secateur("diagnose", pair.pruned)
    assert done.code == 0
    assert done.out.splitlines()[0].startswith(f"{pair.pruned}: ")
    assert "dead-head" in done.out
    assert "head 0: 1 of 4 dead" in flat(done.out)


def test_the_shape_of_the_json(secateur, pair: Pair) -> None:
    done = secateur(
        "diagnose", pair.pruned, "--dense", pair.dense, "--text", pair.windows, "--windows", 3,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert record == json.loads((pair.pruned / "secateur" / "diagnosis.json").read_text())
    assert next(iter(record)) == "schema"
    assert record["schema"] == "secateur.diagnosis/1"
    assert (record["model"], record["dense"]) == (str(pair.pruned), str(pair.dense))
    assert record["protocol"]["windows"] == 3
    for finding in record["findings"]:
        assert set(finding) == {"id", "severity", "where", "evidence", "remedy"}
        assert all(isinstance(x, str) and x for x in finding.values())
    assert [x["layer"] for x in record["layers"]] == [0, 1, 2]
    for layer in record["layers"]:
        assert layer["sparsity"] == 0.5
        assert 0 < layer["relative_error"] < 1
        assert 0.5 < layer["cosine"] < 1
        assert 0.5 < layer["norm_ratio"] < 2
        assert 0 < layer["could_bear"] <= 0.95
    assert len(record["linears"]) == 21
    assert {x["claimed"] for x in record["linears"]} == {0.5}
    assert record["environment"]["torch"]


def test_without_a_reference_layers_are_null(secateur, pair: Pair) -> None:
    record = json.loads(secateur("diagnose", pair.pruned, "--json").out)
    assert record["dense"] is None
    layer = record["layers"][1]
    assert layer.pop("layer") == 1
    assert layer.pop("sparsity") == 0.5
    assert set(layer.values()) == {None}
    (note,) = [x for x in record["findings"] if x["id"] == "no-reference"]
    assert note["remedy"].endswith("pair0/dense")  # as the manifest names it


def test_a_text_is_read_with_the_model_s_tokenizer(secateur, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    asked = ("diagnose", pair.pruned, "--dense", pair.dense, "--text", tmp_path / "text.txt")
    done = secateur(*asked, "--sequence-length", 20, "--json")
    assert json.loads(done.out)["protocol"] == {
        "text": str(tmp_path / "text.txt"),
        "windows": 8,
        "sequence_length": 20,
        "computed_in": "float32",
    }
    for file in pair.pruned.glob("tokenizer*"):
        file.unlink()
    done = secateur(*asked)
    assert done.code == 1
    assert str(pair.pruned) in done.err
    assert secateur("diagnose", pair.pruned).code == 0  # no text is needed without a reference


def test_bad_input(secateur, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = save_tiny(tmp_path / "other", num_hidden_layers=2, hidden_size=16)
    both = (pair.pruned, "--dense", pair.dense)
    for words, code, place in (
        ((), 2, "MODEL"),
        ((tmp_path / "none",), 2, "none"),
        ((tmp_path / "empty",), 1, "config.json"),
        ((pair.pruned, "--dense", tmp_path / "none"), 2, "none"),
        ((pair.pruned, "--dense", other), 2, "32 and 16 channels"),
        ((*both, "--windows", 0), 2, "--windows 0"),
        ((*both, "--text", "nowhere"), 2, "'nowhere'"),
        ((*both, "--sequence-length", 65), 2, "--sequence-length 64"),
        ((pair.pruned, "--device", "tpu"), 2, "--device tpu"),
    ):
        done = secateur("diagnose", *words)
        assert done.code == code, done.err
        assert place in " ".join(done.err.split())
