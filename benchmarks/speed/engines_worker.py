"""Run one model in one engine: greedy tokens and their speed. For `engines.py`.

    echo '{"engine": "llama.cpp", "model": FILE, "prompts": [[1, 2]]}' | PYTHON engines_worker.py

PYTHON is the Python of an environment with the engine. stdin takes one JSON object, as that of
`engines_vllm.py`, with one key more:

    engine        transformers, secateur, llama.cpp, onnxruntime or openvino
    model         folder or file
    prompts       lists of token ids
    tokens        new tokens of each prompt [24]
    timed         new tokens of the timed text, 0 for none [0]
    threads       [2]

The last line of stdout is one JSON object with `tokens`, `tokens_per_second` of one sequence after
the first token (the best of three), and `versions`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

UNUSED = 3
"""A token of SmolLM2 that no text has."""

Stream = Callable[[list[int], int], Iterator[int]]
"""Greedy tokens after a prompt, one at a time; never ends by itself before their number."""


def transformers_stream(asked: dict[str, Any]) -> Stream:
    import torch

    import secateur

    torch.set_num_threads(asked.get("threads", 2))
    if asked["model"].endswith(".gguf"):
        from pathlib import Path

        from transformers import AutoModelForCausalLM

        file = Path(asked["model"])
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    else:
        model = secateur.load(asked["model"], expand=True, dtype=torch.float32)

    @torch.no_grad()
    def stream(prompt: list[int], count: int) -> Iterator[int]:
        ids, cache = torch.tensor([prompt]), None
        for _ in range(count):
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, int(out.logits[0, -1].argmax())
            yield token
            ids = torch.tensor([[token]])

    return stream


def secateur_stream(asked: dict[str, Any]) -> Stream:
    import torch

    import secateur
    from secateur.runtime.decode import Decoder

    torch.set_num_threads(asked.get("threads", 2))
    model = secateur.load(asked["model"])

    def stream(prompt: list[int], count: int) -> Iterator[int]:
        decoder = Decoder(model, len(prompt) + count + 1)
        token = int(decoder.prefill(torch.tensor(prompt)).argmax())
        yield token
        for _ in range(count - 1):
            token = int(decoder.step(token).argmax())
            yield token

    return stream


def llama_cpp_stream(asked: dict[str, Any]) -> Stream:
    from llama_cpp_py_sync import Llama

    longest = max(map(len, asked["prompts"])) + max(asked["tokens"], asked["timed"]) + 8
    engine = Llama(
        asked["model"], n_ctx=longest, n_threads=asked.get("threads", 2), type_k="f32", type_v="f32"
    )
    count_of_words = engine.n_vocab

    def stream(prompt: list[int], count: int) -> Iterator[int]:
        import numpy as np

        engine._clear_context_state()
        past, ids = 0, prompt
        for _ in range(count):
            past = engine._eval_tokens(ids, past)
            logits = engine._lib.llama_get_logits_ith(engine._ctx, -1)
            row = np.frombuffer(engine._ffi.buffer(logits, 4 * count_of_words), dtype=np.float32)
            token = int(row.argmax())
            yield token
            ids = [token]

    return stream


def onnxruntime_stream(asked: dict[str, Any]) -> Stream:
    import onnxruntime_genai

    # no token ends a text: a least length would forbid the end token instead
    config = onnxruntime_genai.Config(asked["model"])
    config.overlay(json.dumps({"model": {"eos_token_id": UNUSED}}))
    model = onnxruntime_genai.Model(config)

    def stream(prompt: list[int], count: int) -> Iterator[int]:
        options = onnxruntime_genai.GeneratorParams(model)
        whole = len(prompt) + count
        options.set_search_options(max_length=whole, do_sample=False)
        generator = onnxruntime_genai.Generator(model, options)
        generator.append_tokens(prompt)
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return stream


def openvino_stream(asked: dict[str, Any]) -> Stream:
    import numpy as np
    import openvino
    import openvino_genai

    limits = {
        "INFERENCE_NUM_THREADS": asked.get("threads", 2),
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
    }
    pipeline = openvino_genai.LLMPipeline(asked["model"], "CPU", **limits)

    def stream(prompt: list[int], count: int) -> Iterator[int]:
        how = openvino_genai.GenerationConfig()
        how.max_new_tokens, how.ignore_eos, how.do_sample = count, True, False
        given = openvino.Tensor(np.array([prompt], dtype=np.int64))
        yield from map(int, pipeline.generate(given, how).tokens[0])

    return stream


ENGINES: dict[str, tuple[Callable[[dict[str, Any]], Stream], tuple[str, ...]]] = {
    "transformers": (transformers_stream, ("transformers", "torch")),
    "secateur": (secateur_stream, ("torch",)),
    "llama.cpp": (llama_cpp_stream, ("llama-cpp-py-sync",)),
    "onnxruntime": (onnxruntime_stream, ("onnxruntime", "onnxruntime-genai")),
    "openvino": (openvino_stream, ("openvino", "openvino-genai")),
}


def tokens_per_second(stream: Stream, prompt: list[int], count: int) -> float:
    """Of one sequence, after its first token; the best of three."""
    seconds = []
    for length in (1, count):
        taken = []
        for _ in range(3):
            begun = time.perf_counter()
            list(stream(prompt, length))
            taken.append(time.perf_counter() - begun)
        seconds.append(min(taken))
    return (count - 1) / (seconds[1] - seconds[0])


def main() -> None:
    """Read the request, run it, and print the answer."""
    asked = {"tokens": 24, "timed": 0, **json.load(sys.stdin)}
    open_engine, packages = ENGINES[asked["engine"]]
    stream = open_engine(asked)
    answer = {
        "tokens": [list(stream(prompt, asked["tokens"])) for prompt in asked["prompts"]],
        "tokens_per_second": tokens_per_second(stream, asked["prompts"][0], asked["timed"])
        if asked["timed"]
        else None,
        "versions": {name: version(name) for name in packages},
    }
    print("\n" + json.dumps(answer), flush=True)
    os._exit(0)  # some engines crash while they are torn down


if __name__ == "__main__":
    main()
