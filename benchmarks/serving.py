"""Our server under load, and beside llama.cpp's.

    python benchmarks/serving.py speed --pruned SMOLLM2 --work DIR [--rounds 5]
    python benchmarks/serving.py load --pruned SMOLLM2 --work DIR [--seconds 60]

`--pruned` is SmolLM2-135M with 50 % zeros. It is packed with int8 and with int4 values (groups of
64), both with an int8 embedding, and exported as Q8_0 and Q4_0 for llama.cpp (`xllamacpp`, with 8
slots and as many threads as processors). Every server is a process of its own, and answers over
HTTP.

`speed`: 1, 4 and 8 clients. Every client sends requests one after the other, each with another
prompt of some 60 tokens and 64 greedy tokens to write, not streamed. Tokens a second are those of
all answers by the time of all; the clients' own work is in that time. A round has all servers and
numbers of clients, the servers in turns. Medians over rounds.

`load`: 200 streamed requests from 16 clients, spread over 60 seconds, eight slots, and a prefix
cache of 32 MiB, which is soon full. Every answer is compared with that of the same request when
the server has nothing else to do. The memory of the process is read twice a second.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

import secateur
from hardware import heading, keep, markdown

NEW_TOKENS, PROMPT_WORDS = 64, 45
CLIENTS = (1, 4, 8)
REQUESTS = {1: 3, 4: 2, 8: 2}
"""Requests of each client in a round, by the number of clients."""

OURS = """
import sys
from secateur.cli import main
sys.argv = ["secateur", "serve", *sys.argv[1:], "--port", "0", "--context-length", "1024", "--json"]
main()
"""
LLAMA = """
import json, os, sys, time, xllamacpp
options = xllamacpp.CommonParams()
options.model.path, options.model_alias = sys.argv[1], {"served"}
options.n_parallel, options.n_ctx = 8, 8 * 1024
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = os.cpu_count()
options.port, options.verbosity = 0, -1
server = xllamacpp.Server(options)
print(json.dumps({"address": server.listening_address}), flush=True)
time.sleep(3600)
"""


class Server:
    """A process that answers."""

    def __init__(self, script: str, model: Path, log: Path, *options: str) -> None:
        self.log = log.open("w")
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(model), *options],
            stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith('{"address"'):
            assert self.process.poll() is None, f"it ended; see {log}"
        self.address = json.loads(line)["address"].replace("0.0.0.0", "127.0.0.1")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


def prompts() -> list[str]:
    """Different beginnings of prose, of the pages of the docs."""
    words: list[str] = []
    for page in sorted(Path(__file__).parents[1].glob("docs/**/*.md")):
        lines = page.read_text(encoding="utf-8").splitlines()
        words += " ".join(x for x in lines if x and x[0].isalpha() and "|" not in x).split()
    starts = range(0, len(words) - PROMPT_WORDS, PROMPT_WORDS)
    return [" ".join(words[start : start + PROMPT_WORDS]) for start in starts]


PROMPTS = prompts()


def ask(client: httpx.Client, address: str, number: int) -> int:
    """How many tokens one answer has."""
    body = {
        "prompt": PROMPTS[number % len(PROMPTS)],
        "max_tokens": NEW_TOKENS,
        "temperature": 0.0,
    }
    answer = client.post(f"{address}/v1/completions", json=body)
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


def rate(address: str, clients: int, first: int) -> float:
    """Tokens a second that a server writes for some clients."""
    with httpx.Client(timeout=300, limits=httpx.Limits(max_connections=clients)) as client:

        def work(place: int) -> int:
            begin = first + place * REQUESTS[clients]
            numbers = range(begin, begin + REQUESTS[clients])
            return sum(ask(client, address, number) for number in numbers)

        with ThreadPoolExecutor(clients) as pool:
            began = time.perf_counter()
            tokens = sum(pool.map(work, range(clients)))
            return tokens / (time.perf_counter() - began)


def models(args: argparse.Namespace) -> dict[str, tuple[str, Path]]:
    """Scripts and models of the servers by name; made once."""
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    for values in ("int8", "int4"):
        if not (work / values).exists():
            secateur.compress(
                args.pruned, values=values, group_size=64, embeddings="int8", output=work / values
            )
    found = {f"secateur {v}, 50 % zeros": (OURS, work / v) for v in ("int8", "int4")}
    for kind in ("q8_0", "q4_0"):
        if not (work / kind).exists():
            secateur.export(args.pruned, to="gguf", type=kind, output=work / kind)
        (file,) = (work / kind).glob("*.gguf")
        found[f"llama.cpp {kind.upper()}"] = (LLAMA, file)
    return found


def speed(args: argparse.Namespace) -> None:
    """Tokens a second beside llama.cpp."""
    ready = models(args)
    servers = {
        name: Server(script, model, args.work / f"{number}.log")
        for number, (name, (script, model)) in enumerate(ready.items())
    }
    found: dict[tuple[str, int], list[float]] = {(n, c): [] for n in servers for c in CLIENTS}
    number = 0
    try:
        for server in servers.values():
            rate(server.address, 8, 1000)  # all slots have been used once
        for round in range(args.rounds):
            for clients in CLIENTS:
                order = [*servers.items()]
                for name, server in order[round % 4 :] + order[: round % 4]:
                    found[name, clients].append(rate(server.address, clients, number))
                number += clients * REQUESTS[clients]
            report(found, args)
    finally:
        for server in servers.values():
            server.stop()


def report(found: dict[tuple[str, int], list[float]], args: argparse.Namespace) -> None:
    """Keep and print what is known so far."""
    rows = [
        {
            "server": name,
            "clients": clients,
            "tokens_per_second": statistics.median(rates),
            "tokens_per_second_least": min(rates),
            "tokens_per_second_most": max(rates),
            "rounds": len(rates),
        }
        for (name, clients), rates in found.items()
    ]
    keep("serving-speed", {"protocol": __doc__, "rounds": args.rounds}, rows)
    table = [
        [name, *(f"{statistics.median(found[name, c]):.0f}" for c in CLIENTS)]
        for name in dict.fromkeys(name for name, _ in found)
    ]
    print(heading())
    print(markdown(["server", *(f"{c} clients" for c in CLIENTS)], table), flush=True)


def streamed(client: httpx.Client, address: str, number: int) -> str:
    """The text of one streamed answer. Its pieces are in the order in which they came."""
    body = {
        "prompt": PROMPTS[number % len(PROMPTS)],
        "max_tokens": 16 + number * 7 % 80,
        "temperature": 0.0,
        "stream": True,
    }
    text, ended = [], False
    with client.stream("POST", f"{address}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                text.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    assert ended, f"answer {number} has no end"
    return "".join(text)


def load(args: argparse.Namespace) -> None:
    """Many clients for a while: nothing is lost, nothing is mixed up, memory stays."""
    script, model = models(args)["secateur int8, 50 % zeros"]
    server = Server(script, model, args.work / "load.log", "--prefix-cache", "32MiB")
    process, memory, done = psutil.Process(server.process.pid), list[float](), threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            memory.append(process.memory_info().rss / 2**20)

    try:
        with httpx.Client(timeout=300) as client:
            for number in range(8):  # before anything is measured, all slots have been used
                streamed(client, server.address, 300 + number)
            began = time.perf_counter()
            watcher = threading.Thread(target=watch)
            watcher.start()
            seconds: list[float] = []

            def work(number: int) -> str:
                due = began + args.seconds * number / args.requests
                time.sleep(max(0.0, due - time.perf_counter()))
                asked = time.perf_counter()
                text = streamed(client, server.address, number)
                seconds.append(time.perf_counter() - asked)
                return text

            with ThreadPoolExecutor(16) as pool:
                texts = [*pool.map(work, range(args.requests))]
            wall = time.perf_counter() - began
            done.set()
            watcher.join()
            alone = [streamed(client, server.address, number) for number in range(args.requests)]
            metrics = client.get(f"{server.address}/metrics").text
    finally:
        done.set()
        server.stop()
    half = len(memory) // 2
    row: dict[str, Any] = {
        "requests": args.requests,
        "answered": len(texts),
        "as_alone": sum(a == b for a, b in zip(texts, alone, strict=True)),
        "wall_seconds": wall,
        "median_seconds": statistics.median(seconds),
        "slowest_seconds": max(seconds),
        "memory_mib_first_half": max(memory[:half]),
        "memory_mib_second_half": max(memory[half:]),
        "exit_code": server.process.returncode,
    }
    keep("serving-load", {"protocol": __doc__, "seconds": args.seconds}, [row])
    print(heading())
    print(json.dumps(row, indent=1))
    print("\n".join(line for line in metrics.splitlines() if "ended" in line and line[0] != "#"))


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["speed", "load"])
    parser.add_argument("--pruned", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--requests", type=int, default=200)
    args = parser.parse_args()
    {"speed": speed, "load": load}[args.part](args)


if __name__ == "__main__":
    main()
