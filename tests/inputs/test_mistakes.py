"""What a new user may type by mistake: refused with a reason and a remedy, and nothing is left."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows

SENTENCES = "The cat sat on the mat and looked at the moon. " * 200

MISTAKES = {
    # prune
    "prune m --sparsity 50 -o o": "--sparsity 50:",
    "prune m --sparsity 50% -o o": "--sparsity 50%:",
    "prune m --sparsity 0,5 -o o": "--sparsity 0,5:",
    "prune m --sparsity 0.5 --method Wanda -o o": "did you mean 'wanda'",
    "prune m --sparsity 0.9999999 --method magnitude -o o": "keeps no weight of this matrix of 32",
    "prune m --calibration t.txt -o o": "needs a sparsity",
    "prune m m --sparsity 0.5 -o o": "['m']",
    "prune m --sparsity 0.5 --set memory.max_memry=3 -o o": "did you mean 'max_memory'",
    "prune m --sparsity 0.5 --set nosuch=1 -o o": "nosuch: unknown key",
    "prune m --pattern 2:5 --calibration t.txt -o o": "model.layers.0.self_attn.q_proj",
    "prune m --pattern 5x5 --sparsity 0.5 --calibration t.txt -o o": "self_attn.q_proj",
    "prune m --sparsity 0.5 --calibration w.safetensors --max-memory 10MiB -o o": "is 0.01 GiB",
    "prune m --sparsity 0.5 --include q_prj --method magnitude -o o": "no linear matches 'q_prj'",
    "prune m --sparsity 0.5 --max-memory 6 -o o": "6MiB",
    "prune m --sparsity 0.5 --max-memory 6KiB -o o": "6144 bytes",
    "fit m --max-size 75 -o o": "75MiB",
    "fit m --max-inference-memory 400 -o o": "400MiB",
    "structure m --max-size 75 -o o": "without one it is 75 bytes",
    "prune m --pattern 2/4 -o o": "no pattern is written '2/4'",
    "prune m --pattern 4:2 -o o": "4:2 would keep 4 of every 2",
    "prune m --pattern 2:4 --sparsity 0.3 -o o": "2:4 always has sparsity 0.5, not 0.3",
    "prune m --pattern 2:4 --overrides '*.q_proj=0.25' -o o": "override '*.q_proj'",
    "prune m --sparsity 0.5 --calibration picture.png -o o": "not a kind of text",
    "prune m --sparsity 0.5 --calibration empty.txt -o o": "contains no text",
    "prune m --sparsity 0.5 --calibration t.jsonl --field content -o o": "the line has: text",
    "prune m --sparsity 0.5 --calibration t.txt --sequence-length 5000 -o o": "64 positions",
    "prune m --sparsity 0.5 --method magnitude --exclude '*' -o o": "leave no linear to prune",
    "prune m --sparsity 0.5 --method magnitude --include '*.q_prj' -o o": "'*.q_proj' matches",
    "prune m --sparsity 0.5 --method magnitude --overrides '*.q_proj' -o o": "GLOB=SPARSITY",
    "prune m --sparsity 0.5 --method magnitude -o m": "the output folder exists",
    "prune m --sparsity 0.5 --method magnitude -o mine --overwrite": "is no model folder",
    "prune m --sparsity 0.5 --method magnitude --device gpu -o o": "auto, cpu, cuda or cuda:N",
    "prune m --sparsity 0.5 --method magnitude --resume --restart -o o": "give one of the two",
    "prune m --sparsity 0.5 --method magnitude --dtype float16 -o o": "m is no GGUF file",
    "prune m --sparsity 0.5 --method magnitude --score wanda -o o": "'magnitude' has the score",
    "prune m --sparsity 0.5 --method wanda --distill-tokens 99 -o o": "without --distill-epochs",
    "prune packed --sparsity 0.5 --method magnitude -o o": "secateur decompress",
    "prune m/model.safetensors --sparsity 0.5 -o o": "name the folder",
    "prune plain --sparsity 0.5 --calibration t.txt -o o": "no tokenizer",
    "prune indented.yaml": "line 3",
    "prune typo.yaml": "did you mean 'sparsity'",
    # structure
    "structure m --keep-layers 99 -o o": "the model has 3",
    "structure m --keep-layers nan -o o": "--keep-layers nan:",
    "structure m --ffn 1.5 -o o": "--ffn 1.5:",
    "structure m --ffn 1e-9 --calibration t.txt -o o": "keeps 1e-09 FFN neurons of a layer, but",
    "structure m --keep-layers 2 --score wanda -o o": "--score: changes nothing without",
    "structure m --ffn 0.5 --depth-by greedy -o o": "changes nothing without one of --keep-layers",
    "structure m --ffn 0.5 --multiple 7 -o o": "no multiple of 7",
    # training
    "train sparse --text t.txt --steps 3 --minutes 2 -o o": "--steps with",
    "train sparse --text t.txt --steps 1 --rates nothing=0 -o o": "no parameter matches",
    "train sparse --text t.txt --steps 1 --mask m -o o": "keep every weight",
    "train sparse --text t.txt --steps 1 --gradual 0.2 -o o": "more than 20.0%",
    "train sparse --text t.txt --steps 1 --gradual 2:9 -o o": "divisible by 9",
    "train sparse --text short.txt --steps 1 -o o": "0 windows",
    "train sparse --text t.txt --epochs 3 --steps 9 -o o": "--steps with",
    "train sparse --text t.txt --temperature 2 -o o": "changes nothing without --teacher",
    "train sparse --text t.txt --lora 100000 -o o": "rank 100000",
    "train sparse --text t.txt --lora-targets q_prj -o o": "no linear matches 'q_prj'",
    "train sparse --text t.txt --optimizer-options lr=1 -o o": "lr=1:",
    "train sparse --text t.txt --optimizer-options speed=1 -o o": "AdamW cannot be made",
    "train sparse --text t.txt --answers-only -o o": "--answers-only changes nothing",
    "train sparse --text t.txt --validation-text t.txt -o o": "100.0%",
    # compress, export, import
    "compress sparse --values int1 -o o": "'int8'",
    "compress sparse --values int8 --group-size 32 -o o": "for int4, int3, int2",
    "compress sparse --windows 4 -o o": "changes nothing without --calibration",
    "compress sparse --overrides '*.nothing=int8' -o o": "no linear matches '*.nothing'",
    "decompress m -o o": "not the configuration of a compressed",
    "export sparse --to onnxx -o o": "'onnx'",
    "import m --masks t.txt -o o": "t.txt",
    "import m --adapter mine -o o": "adapter_config.json",
    # measuring
    "evaluate sparse --text t.txt --limit 5": "changes nothing without --tasks",
    "evaluate sparse --generation --windows 4": "none is measured",
    "evaluate sparse --text short.txt": "one window needs 64",
    "evaluate sparse --text t.txt -o mine": "the output is a folder, not a file",
    "bench sparse --contenders packed": "needs a compressed model",
    "bench sparse --contenders packd": "'packed'",
    "bench sparse --rounds 0": "--rounds 0:",
    "bench sparse --new-tokens 1": "--new-tokens 1:",
    "bench sparse --gguf nofile.gguf": "no such GGUF file",
    "diagnose m --windows 3": "changes nothing without --dense",
    "sweep m --methods magnitude --sparsities 0.5,1.5 --text t.txt -o o": "--sparsities 1.5:",
    "report m": "neither a run, nor a fit, nor a sweep",
    # running and publishing
    "generate sparse --prompt ''": "the prompt is empty",
    "generate sparse --prompt hi --top-p 0.9": "at temperature 0",
    "generate sparse --prompt hi --chat": "no chat template",
    "serve sparse --host 999.1.1.1 --port 0": "where: --host",
    "serve sparse --host '' --port 0": "--host '':",
    "bench sparse --prompt-tokens 100000": "the model has 64 positions",
    "push sparse noslash --dry-run": "OWNER/NAME",
    "fit m --max-size big -o o": "--max-size big:",
    "fit m --max-size 60kB --calibration short.txt -o o": "windows",
    "fit m --max-size 60kB --calibration nofile.txt -o o": "no text is named 'nofile.txt'",
    "draft m --calibration nofile.txt -o o": "no text is named 'nofile.txt'",
    "chat m --draft nowhere": "nowhere: no such file or folder",
    "advise m --new-tokens 0": "--new-tokens 0:",
    "chain typo.yaml": "steps",
}


OF_THE_FILES = {
    "prune m --sparsity 0.5 --calibration w.safetensors --max-memory 10MiB -o o",
    "prune packed --sparsity 0.5 --method magnitude -o o",
    "prune plain --sparsity 0.5 --calibration t.txt -o o",
    "decompress m -o o",
    "import m --masks t.txt -o o",
}
"""Mistakes where the command makes sense, and a file is of another kind: exit code 1, not 2."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, texts and files of a new user."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "m")
    save_tiny(place / "plain", tokenizer=False)
    secateur.prune(place / "m", output=place / "sparse", method="magnitude", sparsity=0.5)
    secateur.compress(place / "sparse", output=place / "packed", values="int8")
    save_windows(tiny_windows(), place / "w.safetensors")
    (place / "t.txt").write_text(SENTENCES)
    (place / "t.jsonl").write_text(json.dumps({"text": SENTENCES}))
    (place / "short.txt").write_text("Hi.")
    (place / "empty.txt").write_text("")
    (place / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
    (place / "indented.yaml").write_text("model: m\nmethod: wanda\n  sparsity: 0.5\n")
    (place / "typo.yaml").write_text("model: m\nsparsty: 0.5\noutput: o\n")
    (place / "mine").mkdir()
    (place / "mine" / "mine.txt").write_text("precious")
    return place


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_refused_and_nothing_is_left(
    refused: Callable[..., str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    message = refused(*shlex.split(line))
    assert MISTAKES[line] in message
    assert len(message) < 1500
    assert refused.codes == [1 if line in OF_THE_FILES else 2]  # type: ignore[attr-defined]
    assert contents(place) == before


def contents(place: Path) -> dict[str, int]:
    """All files, with their sizes."""
    return {str(file): file.stat().st_size for file in place.rglob("*")}
