"""Our server beside llama.cpp's, under load.

    python -m benchmarks.speed.serving --dense SMOLLM2 --pruned SMOLLM2 --work DIR [--rounds 2]
        [--llama PYTHON]

`--pruned` is SmolLM2-135M with 50 % zeros, `--dense` without. They are packed with int8 and with
int4 values (groups of 64), with an int8 embedding, and the dense one is exported as Q8_0 and Q4_0
for llama.cpp (`xllamacpp`, in the environment of `--llama`). Every server is a process of its own with as many threads as
processors, 20 slots and else its defaults, and answers over HTTP.

1, 8 and 16 clients stream greedy answers of 96 tokens to prompts of 60 tokens, one
after the other. Every two seconds another client sends a prompt of 512 tokens and takes one token
of the answer. All prompts are different. A round has all servers and numbers of clients, five
seconds each, the servers in turns; then all connections are closed. Tokens a second are those that
the streaming clients received. A gap is the time between two tokens of an answer. The clients' own
work is in all times.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hardware import heading, keep, markdown

import secateur
from secateur.models.tokenizer import load_tokenizer

MEASURES = ("src/secateur/serving/scheduler.py", "src/secateur/runtime/kernels/csrc")
MINUTES = 7

CLIENTS = (1, 8, 16)
NEW_TOKENS, PROMPT_TOKENS, LONG_TOKENS = 96, 60, 512
SLOTS, WINDOW_SECONDS, LONG_EVERY = 20, 5.0, 2.0
PROMPT_WORDS = 45

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
options.n_parallel, options.n_ctx = 20, 20 * 1024
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = os.cpu_count()
options.port, options.verbosity = 0, -1
server = xllamacpp.Server(options)
print(json.dumps({"address": server.listening_address}), flush=True)
time.sleep(3600)
"""


class Server:
    """A process that answers."""

    def __init__(self, python: str, script: str, model: Path, log: Path, *options: str) -> None:
        self.log = log.open("w")
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        self.process = subprocess.Popen(
            [python, "-c", script, str(model), *options],
            stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith('{"address"'):
            assert self.process.poll() is None, f"it ended; see {log}"
        self.address = json.loads(line)["address"].replace("0.0.0.0", "127.0.0.1")
        self.host = self.address.removeprefix("http://")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


def prompts() -> list[str]:
    """Different beginnings of prose, of the pages of the docs."""
    words: list[str] = []
    for page in sorted(Path(__file__).parents[2].glob("docs/**/*.md")):
        lines = page.read_text(encoding="utf-8").splitlines()
        words += " ".join(x for x in lines if x and x[0].isalpha() and "|" not in x).split()
    starts = range(0, len(words) - PROMPT_WORDS, PROMPT_WORDS)
    return [" ".join(words[start : start + PROMPT_WORDS]) for start in starts]


PROMPTS = prompts()


@dataclass
class Received:
    """What the clients of one server got, with one number of them; times in seconds."""

    rates: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    long_firsts: list[float] = field(default_factory=list)
    long_asked: int = 0

    def row(self) -> dict[str, Any]:
        """The numbers of a row, in milliseconds."""
        gaps = sorted(self.gaps)
        row = {
            "tokens_per_second": statistics.median(self.rates),
            "tokens_per_second_least": min(self.rates),
            "tokens_per_second_most": max(self.rates),
            "gap_median": 1e3 * statistics.median(gaps),
            "gap_99": 1e3 * gaps[int(0.99 * len(gaps))],
            "gap_most": 1e3 * gaps[-1],
            "first_token_median": 1e3 * statistics.median(self.firsts),
            "long_prompts": self.long_asked,
            "long_prompts_answered": len(self.long_firsts),
        }
        if self.long_firsts:
            row["long_first_token_median"] = 1e3 * statistics.median(self.long_firsts)
        return row


def times_of(host: str, prompt: list[int], new: int, until: float) -> Iterator[float]:
    """When each token of a streamed answer comes; the connection is closed when time is over."""
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0.0, "stream": True}
    connection = http.client.HTTPConnection(host)
    try:
        connection.connect()
        kind = {"Content-Type": "application/json"}
        connection.request(
            "POST", "/v1/completions", json.dumps({**body, "ignore_eos": True}), kind
        )
        lines = connection.sock
        rest = b""
        while (left := until - time.perf_counter()) > 0:
            lines.settimeout(left)
            more = lines.recv(1 << 16)
            now = time.perf_counter()
            *whole, rest = (rest + more).split(b"\n")
            texts = [line for line in whole if line.startswith(b"data: {")]
            assert not any(b'"error"' in line for line in texts), texts
            yield from (now for line in texts if TOKEN.search(line))
            if b"data: [DONE]" in whole or b"data: [DONE]\r" in whole or not more:
                return
    except TimeoutError:
        return
    finally:
        connection.close()


TOKEN = re.compile(rb'"finish_reason": ?null')


def window(
    host: str, clients: int, prompts: Prompts, received: Received, seconds: float = WINDOW_SECONDS
) -> None:
    """Let clients stream for some seconds, while long prompts come in."""
    begin = time.perf_counter()
    until, counts = begin + seconds, [0] * clients

    def write(place: int) -> None:
        while (asked := time.perf_counter()) < until:
            last = None
            for now in times_of(host, prompts.next(PROMPT_TOKENS), NEW_TOKENS, until):
                counts[place] += 1
                (received.firsts if last is None else received.gaps).append(now - (last or asked))
                last = now

    def read(number: int) -> None:
        due = begin + 0.5 + LONG_EVERY * number
        time.sleep(max(0.0, due - time.perf_counter()))
        received.long_asked += 1
        came = [*times_of(host, prompts.next(LONG_TOKENS), 1, until)]
        received.long_firsts += [came[0] - due] if came else []

    long = math.ceil((seconds - 0.5) / LONG_EVERY)
    with ThreadPoolExecutor(clients + long) as pool:
        jobs = [pool.submit(write, n) for n in range(clients)]
        jobs += [pool.submit(read, n) for n in range(long)]
    for job in jobs:
        job.result()
    received.rates.append(sum(counts) / seconds)
    time.sleep(0.7)  # servers notice that the clients have gone


class Prompts:
    """Token lists that begin differently."""

    def __init__(self, folder: Path) -> None:
        tokenizer = load_tokenizer(folder)
        self.ids = list(tokenizer(" ".join(PROMPTS))["input_ids"])
        self.numbers = itertools.count()

    def next(self, tokens: int) -> list[int]:
        """The next prompt. After the last page the first one comes again, from another token on."""
        at = 61 * next(self.numbers) % (len(self.ids) - LONG_TOKENS)
        return self.ids[at : at + tokens]


def packed(args: argparse.Namespace, source: Path, values: str, name: str) -> Path:
    """A folder with values of integers; made once."""
    folder: Path = args.work / name
    if not folder.exists():
        group = {"group_size": 64} if values == "int4" else {}
        form = {"format": "dense"} if source == args.dense else {}
        secateur.compress(source, values=values, embeddings="int8", output=folder, **group, **form)
    return folder


def models(args: argparse.Namespace) -> dict[str, tuple[str, Path]]:
    """Scripts and models of the servers by name; made once."""
    args.work.mkdir(parents=True, exist_ok=True)
    found = {}
    for values, kind in (("int8", "q8_0"), ("int4", "q4_0")):
        found[f"{values}, 50 % zeros"] = OURS, packed(args, args.pruned, values, values)
        found[values] = OURS, packed(args, args.dense, values, f"dense-{values}")
        if not (args.work / kind).exists():
            secateur.export(args.dense, to="gguf", type=kind, output=args.work / kind)
        (file,) = (args.work / kind).glob("*.gguf")
        found[f"llama.cpp {kind.upper()}"] = LLAMA, file
    return found


def speed(args: argparse.Namespace) -> None:
    """Tokens a second and gaps beside llama.cpp."""
    ready = models(args)
    prompts = Prompts(args.pruned)
    found = {(name, clients): Received() for name in ready for clients in CLIENTS}
    servers: dict[str, Server] = {}
    try:
        for number, (name, (script, model)) in enumerate(ready.items()):
            ours, log = script is OURS, args.work / f"{number}.log"
            options = ("--slots", str(SLOTS)) if ours else ()
            python = sys.executable if ours else args.llama
            servers[name] = Server(python, script, model, log, *options)
            window(servers[name].host, 4, prompts, Received(), 2.0)
        for round in range(args.rounds):
            for clients in CLIENTS:
                order = [*servers.items()]
                for name, server in order[round % 6 :] + order[: round % 6]:
                    window(server.host, clients, prompts, found[name, clients])
            report(found, args)
    finally:
        for server in servers.values():
            server.stop()


def report(found: dict[tuple[str, int], Received], args: argparse.Namespace) -> None:
    """Keep and print what is known so far."""
    rows = [
        {"server": name, "clients": n, **got.row()} for (name, n), got in found.items() if got.gaps
    ]
    keep("serving-speed", {"protocol": __doc__, "rounds": args.rounds}, rows)
    table = [
        [
            row["server"], str(row["clients"]), f"{row['tokens_per_second']:.0f}",
            *(f"{row[name]:.0f}" for name in ("gap_median", "gap_99", "gap_most")),
            f"{row['first_token_median']:.0f}", f"{row.get('long_first_token_median', 0):.0f}",
            f"{row['long_prompts_answered']} of {row['long_prompts']}",
        ]
        for row in rows
    ]  # fmt: skip
    print(heading())
    names = ["server", "clients", "tokens/s", "gap, median", "99 %", "most", "first token"]
    print(markdown([*names, "first of 512", "answered in time"], table), flush=True)


def servers(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Tokens a second of all clients together, gaps between tokens, and times to a first token."""
    of = {(row["server"], row["clients"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["server"] for row in rows):
        speeds = [f"{of[name, clients]['tokens_per_second']:.0f}" for clients in CLIENTS]
        gaps = [f"{of[name, clients]['gap_99']:.0f} ms" for clients in (8, 16)]
        first = f"{of[name, 8]['first_token_median']:.0f} ms"
        lines.append([name, *speeds, *gaps, first])
    columns = ["", "1 client, tokens/s", "8 clients", "16 clients", "gap, 99 %, 8 clients"]
    return [*columns, "16 clients", "first token, 8 clients"], lines


TABLES = {"servers": servers}


def main() -> None:
    """Make the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pruned", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--llama", default=sys.executable, help="a python that has xllamacpp")
    speed(parser.parse_args())


if __name__ == "__main__":
    main()
