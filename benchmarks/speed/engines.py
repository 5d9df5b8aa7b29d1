"""The one table of engines: who loads what, with which tokens, speed, size and zeros.

    python -m benchmarks.speed.engines prepare WORK
    python -m benchmarks.speed.engines check WORK --engine onnxruntime=PYTHON --engine vllm=PYTHON ...
    python -m benchmarks.speed.engines time WORK --engine ...      on a quiet machine
    python -m benchmarks.speed.engines show

Models: SmolLM2-135M dense, pruned to 50 % by Wanda (half), and with 24 of its 30 layers (depth).
`prepare` makes them, exports each to every engine and type, and lets transformers write greedy
texts in float32: 24 tokens after each of 10 prompts. Its Python needs the extra `onnx`, too.
`check` runs every engine in a process of its own, in the environment of PYTHON. A row says how many
of the ten texts are equal, how many of the 240 tokens agree up to the first difference of their
text, the bytes of the files, and how many zeros they keep. The texts are compared with those of the
same weights: for quantized GGUF with those that transformers reads from the file. ONNX int8 and
int4 are compared with the source, because transformers cannot read them. Engines that round
activations, too, are secateur, onnxruntime and llama.cpp with int8 and int4 weights, and vLLM with
`w8a8`. vLLM computes in float32, `w4a16` in float16 and `w8a8` in bfloat16: its kernels take no
others. `time` measures tokens/s of one sequence after its first token, for the dense and the 50 %
model, in one type of 8 bits of every engine. The first type of an engine runs all three models, the
timed one those two, others the 50 % model alone.

Rows are kept at once and skipped when they are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.hardware import add, heading, keep, markdown
from benchmarks.speed.engines_worker import transformers_stream
from benchmarks.stored import known_rows

import secateur

MEASURES = ("src/secateur/exporting",)
MINUTES = 20

HERE, NAME = Path(__file__).parent, "engines"
SAMPLE, TOKENS, TIMED, THREADS = "smollm2-135m", 24, 48, 2
CALIBRATION = {"calibration": "boolq-calibration", "windows": 8, "sequence_length": 256}
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time there was",
    "Water boils at",
    "The three states of matter are",
    "In 1969, the first",
    "To make bread you need",
    "The opposite of hot is",
    "Photosynthesis is the process by which",
    "A triangle has",
)
MODELS = ("dense", "half", "depth")
TIMED_MODELS = MODELS[:2]
TIMED_TYPES = {
    "secateur": "int8",
    "llama.cpp": "q8_0",
    "openvino": "q8_0",
    "onnxruntime": "int8",
    "vllm": "w8a8",
}
EXPORTS = {
    "secateur": dict.fromkeys(("float32", "int8"), "compress"),
    "llama.cpp": dict.fromkeys(("f32", "q8_0", "q4_0"), "gguf"),
    "openvino": dict.fromkeys(("f16", "q8_0", "q4_0"), "gguf"),
    "onnxruntime": dict.fromkeys(("fp32", "int8", "int4"), "onnx"),
    "vllm": {
        "float32": "dense",
        "int8": "compress",
        "w4a16": "compressed-tensors",
        "w8a8": "compressed-tensors",
    },
}
"""What every engine reads: types, and the verb or the target of the export that makes them."""
PROTOCOL = {
    "model": SAMPLE,
    "prompts": len(PROMPTS),
    "tokens": TOKENS,
    "timed": TIMED,
    "timed_types": TIMED_TYPES,
    "threads": THREADS,
    "calibration": CALIBRATION,
}


def make_models(work: Path) -> dict[str, Path]:
    """The three models, made once."""
    made = {name: work / name for name in MODELS}
    if not made["half"].exists():
        secateur.prune(SAMPLE, output=made["half"], method="wanda", sparsity=0.5, **CALIBRATION)
    if not made["depth"].exists():
        fast: dict[str, Any] = {"effort": "fast", "distill_epochs": 0, **CALIBRATION}
        secateur.structure(SAMPLE, output=made["depth"], keep_layers=24, **fast)
    if not made["dense"].exists():
        from secateur.models.sources import resolve

        made["dense"].symlink_to(resolve(SAMPLE).folder)
    return made


def exported(work: Path, model: str, engine: str, type: str) -> dict[str, Any]:
    """An export, made once: its path, bytes and zeros."""
    target = EXPORTS[engine][type]
    output = work / f"{model}-{target}-{type}"
    note = output.with_suffix(".json")
    if target == "dense":
        size = (work / model / "model.safetensors").stat().st_size
        return {"path": str(work / model), "bytes": size, "zeros_kept": "100 %"}
    if not note.exists():
        if target == "compress":
            secateur.compress(work / model, output=output, values=type, embeddings="keep")
            size = sum(f.stat().st_size for f in output.glob("*.safetensors"))
            found = {"path": str(output), "bytes": size, "zeros_kept": "100 %"}
        else:
            made = secateur.export(work / model, output=output, to=target, type=type)
            kept, zeros = made.exported.zeros_kept, made.exported.zeros
            found = {
                "path": str(output / made.files[0] if target == "gguf" else output),
                "bytes": made.exported.file_bytes,
                "zeros_kept": f"{kept / zeros:.0%}".replace("%", " %") if zeros else "no zeros",
            }
        note.write_text(json.dumps(found), encoding="utf-8")
    return dict(json.loads(note.read_text(encoding="utf-8")))


def answer(python: str, script: Iterable[str | Path], asked: dict[str, Any]) -> dict[str, Any]:
    """What a worker prints on its last line."""
    done = subprocess.run(
        [python, *script],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        said = done.stderr.strip().splitlines() or ["nothing"]
        errors = [line for line in said if "Error" in line] or said
        return {"fault": errors[-1][:300]}
    return dict(json.loads(lines[-1]))


def prompt_ids(work: Path) -> list[list[int]]:
    """The prompts as tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "dense")
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def expected(work: Path, path: str) -> list[list[int]]:
    """The texts of transformers in float32 for the weights of a folder or file, made once."""
    note = work / f"texts-{Path(path).name}.json"
    if not note.exists():
        stream = transformers_stream({"model": path, "threads": 1})
        texts = [list(stream(prompt, TOKENS)) for prompt in prompt_ids(work)]
        note.write_text(json.dumps(texts), encoding="utf-8")
    return list(json.loads(note.read_text(encoding="utf-8")))


def reference_of(work: Path, model: str, engine: str, type: str, found: dict[str, Any]) -> str:
    """The folder or file whose weights an engine computes with."""
    target = EXPORTS[engine][type]
    if target == "compressed-tensors":
        plain = work / f"{model}-imported-{type}"
        if not plain.exists():
            secateur.import_model(found["path"], output=plain)
        return str(plain)
    own = (target, type) in (("compress", "int8"), ("gguf", "q8_0"), ("gguf", "q4_0"))
    return found["path"] if own else str(work / model)


def compared(theirs: list[list[int]], ours: list[list[int]]) -> dict[str, int]:
    """Equal texts, and tokens up to the first difference of each text."""
    alike = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), len(x))
        for x, y in zip(theirs, ours, strict=True)
    ]
    return {"equal_texts": sum(n == TOKENS for n in alike), "equal_tokens": sum(alike)}


def cells() -> list[tuple[str, str, str]]:
    """(model, engine, type): all in the first type of an engine, fewer in others."""
    found = []
    for engine, types in EXPORTS.items():
        for type in types:
            models = TIMED_MODELS if type == TIMED_TYPES[engine] else MODELS[1:2]
            models = MODELS if type == next(iter(types)) else models
            found += [(model, engine, type) for model in models]
    return found


def prepare(work: Path, only: list[str]) -> None:
    """Make models, exports and expected texts."""
    work.mkdir(parents=True, exist_ok=True)
    make_models(work)
    for model, engine, type in cells():
        if engine in only:
            begun = time.perf_counter()
            found = exported(work, model, engine, type)
            expected(work, reference_of(work, model, engine, type, found))
            print(model, engine, type, f"{time.perf_counter() - begun:.0f} s", flush=True)


def measure(work: Path, pythons: dict[str, str], timed: bool) -> None:
    """Measure the missing rows: texts, or speeds."""
    prompts = prompt_ids(work)
    key = ("model", "engine", "type", "timed")
    done = {tuple(row[k] for k in key) for row in known_rows(NAME, PROTOCOL)}
    for model, engine, type in cells():
        target = EXPORTS[engine][type]
        wanted = not timed or (model in TIMED_MODELS and TIMED_TYPES[engine] == type)
        if engine not in pythons or not wanted or (model, engine, type, timed) in done:
            continue
        found = exported(work, model, engine, type)
        script = "engines_vllm.py" if engine == "vllm" else "engines_worker.py"
        asked = {"engine": engine, "model": found["path"], "threads": THREADS if timed else 1}
        asked |= {"prompts": prompts[:1] if timed else prompts, "timed": TIMED if timed else 0}
        if target == "compressed-tensors":
            asked["dtype"] = "float16" if type == "w4a16" else "bfloat16"
        elif engine == "vllm" and target == "compress":
            asked["load_format"] = "secateur"
        got = answer(pythons[engine], [HERE / script], {**asked, "tokens": 1 if timed else TOKENS})
        row = dict(zip(key, (model, engine, type, timed), strict=True))
        if "fault" in got:
            row["fault"] = got["fault"]
        elif timed:
            row["tokens_per_second"] = got["tokens_per_second"]
        else:
            ours = expected(work, reference_of(work, model, engine, type, found))
            row |= compared(got["tokens"], ours) | {"versions": got["versions"]}
        row |= {} if timed else {"bytes": found["bytes"], "zeros_kept": found["zeros_kept"]}
        add(NAME, PROTOCOL, row)
        print(row, flush=True)


def engines(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A row for each engine and type, a column for each model."""
    texts = {(r["engine"], r["type"], r["model"]): r for r in rows if not r["timed"]}
    speeds = {(r["engine"], r["type"], r["model"]): r for r in rows if r["timed"]}
    lines = []
    for engine, types in EXPORTS.items():
        for type in types:
            found = [texts.get((engine, type, model)) for model in MODELS]
            if not any(found):
                continue
            pace = [
                speeds.get((engine, type, m), {}).get("tokens_per_second") for m in TIMED_MODELS
            ]
            size = [f"{r['bytes'] / 2**20:.0f}" if r else "" for r in found]
            own = [engine, type, *map(alike, found), size[0], size[1]]
            lines.append([*own, *(f"{one:.0f}" if one else "" for one in pace)])
    columns = ["engine", "type", *(f"{name}: equal" for name in MODELS)]
    columns += [f"{name}: MiB" for name in TIMED_MODELS]
    return [*columns, *(f"{name}: tokens/s" for name in TIMED_MODELS)], lines


TABLES = {"engines": engines}


def show() -> None:
    """Print the table."""
    print(markdown(*engines(known_rows(NAME))))


def alike(row: dict[str, Any] | None) -> str:
    """Equal texts of ten, and the tokens up to the first differences where they are not all."""
    if row is None:
        return ""
    if "fault" in row:
        return "does not load"
    rest = f" ({row['equal_tokens']})" if row["equal_texts"] < len(PROMPTS) else ""
    return f"{row['equal_texts']}{rest}"


def main() -> None:
    """Prepare, check, time or show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "check", "time", "show"))
    parser.add_argument("work", type=Path, nargs="?", default=Path("engines-work"))
    parser.add_argument("--engine", action="append", default=[], help="NAME or NAME=PYTHON")
    given = parser.parse_args()
    pythons = {n: p or sys.executable for n, _, p in (e.partition("=") for e in given.engine)}
    if given.what == "prepare":
        prepare(given.work.resolve(), list(pythons) or list(EXPORTS))
    elif given.what != "show":
        if not known_rows(NAME, PROTOCOL):
            keep(NAME, PROTOCOL, [])
        measure(given.work.resolve(), pythons, given.what == "time")
    else:
        print(heading())
        show()


if __name__ == "__main__":
    main()
