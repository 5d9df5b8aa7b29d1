"""A large GGUF file cut to fewer experts: seconds beside a plain copy, memory, and kills.

    python -m benchmarks.speed.gguf_cut [--size 8] [--work DIR] [--rounds 3] [--kills 10]

The file is a mixture with the sizes of Qwen3-30B-A3B, 64 experts and as many layers as the size
needs: random bytes as Q4_K and Q6_K blocks, a vocabulary of 151,936 words and as many merges. The
experts that stay are drawn at random, 48 of 64 in each layer. Each cut is a process of its own; its
seconds begin after the imports. In turns with it, the bytes that stay are copied by
`shutil.copyfile` and synced to the disk, as the cut syncs them. Before each, the system forgets
the pages of what is read.

Then the cut is killed at random moments and resumed each time: the file must be that of the whole
run.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
from benchmarks.hardware import heading, keep, markdown

from secateur.exporting.gguf.edit import Edit, Kept, written
from secateur.models.gguf_file import GGUFSource, block_bytes

MEASURES = ("src/secateur/exporting/gguf/edit.py", "src/secateur/models/gguf_file.py")
MINUTES = 15
Q = gguf.GGMLQuantizationType
HIDDEN, NEURONS, EXPERTS, KEPT, WORDS = 2048, 768, 64, 48, 151_936
PIECE_BYTES = 2**22

CHILD = """
import json, resource, sys, time
import secateur
from secateur.steps.cut_file import CutFile
source, listed, output, again = sys.argv[1:]
print("begun", flush=True)
begun = time.perf_counter()
secateur.structure(source, experts_list=listed, output=output, resume=again == "again")
seconds = time.perf_counter() - begun
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak}))
"""


def shapes(layers: int) -> dict[str, tuple[tuple[int, ...], Q]]:
    """Shape and type of each tensor."""
    found = {
        "token_embd.weight": ((WORDS, HIDDEN), Q.Q6_K),
        "output.weight": ((WORDS, HIDDEN), Q.Q6_K),
    }
    for layer in range(layers):
        own = {
            "attn_q.weight": ((4096, HIDDEN), Q.Q4_K),
            "attn_k.weight": ((512, HIDDEN), Q.Q4_K),
            "attn_v.weight": ((512, HIDDEN), Q.Q6_K),
            "attn_output.weight": ((HIDDEN, 4096), Q.Q4_K),
            "ffn_gate_inp.weight": ((EXPERTS, HIDDEN), Q.F32),
            "ffn_gate_exps.weight": ((EXPERTS, NEURONS, HIDDEN), Q.Q4_K),
            "ffn_up_exps.weight": ((EXPERTS, NEURONS, HIDDEN), Q.Q4_K),
            "ffn_down_exps.weight": ((EXPERTS, HIDDEN, NEURONS), Q.Q6_K),
        }
        found |= {f"blk.{layer}.{name}": each for name, each in own.items()}
    return found


def random_bytes(shape: tuple[int, ...], kind: Q, seed: int) -> Iterator[bytes]:
    """Random bytes of a tensor, a piece at a time."""
    draw, count = np.random.default_rng(seed), block_bytes(shape, kind)
    for begin in range(0, count, PIECE_BYTES):
        yield draw.bytes(min(PIECE_BYTES, count - begin))


def make(place: Path, size_bytes: float) -> Path:
    """A mixture of about this size."""
    in_layer = sum(block_bytes(*each) for n, each in shapes(1).items() if n.startswith("blk"))
    outside = sum(block_bytes(*each) for each in shapes(0).values())
    layers = max(1, round((size_bytes - outside) / in_layer + 0.49))
    small = gguf.GGUFWriter(place / "seed.gguf", "qwen3moe")
    numbers = {
        "block_count": layers, "context_length": 32768, "embedding_length": HIDDEN,
        "feed_forward_length": 6144, "expert_feed_forward_length": NEURONS, "head_count": 32,
        "head_count_kv": 4, "key_length": 128, "value_length": 128, "expert_count": EXPERTS,
        "expert_used_count": 8,
    }  # fmt: skip
    for name, number in numbers.items():
        getattr(small, f"add_{name}")(number)
    small.add_layer_norm_rms_eps(1e-6)
    small.add_tokenizer_model("gpt2")
    words = [f"w{number}" for number in range(WORDS)]
    small.add_token_list(words)
    small.add_token_types([1] * WORDS)
    small.add_token_merges([f"w {word[1:]}" for word in words])
    small.add_tensor("seed", np.zeros(1, np.float32))
    small.write_header_to_file()
    small.write_kv_data_to_file()
    small.write_tensors_to_file()
    small.close()
    source = GGUFSource.read(place / "seed.gguf")
    tensors = {
        name: Kept(
            "seed", replaced=partial(random_bytes, shape, kind, seed), shape=shape, type=kind
        )
        for seed, (name, (shape, kind)) in enumerate(shapes(layers).items())
    }
    [file] = written(source, Edit(source.fields, tensors), place / "mixture.gguf")
    return file


def listed(place: Path, layers: int) -> Path:
    """A list of the experts that stay."""
    draw = random.Random(0)
    kept = {layer: sorted(draw.sample(range(EXPERTS), KEPT)) for layer in range(layers)}
    file = place / "experts.json"
    file.write_text(json.dumps(kept), encoding="utf-8")
    return file


def forget(file: Path) -> None:
    """Let the system drop the pages of a file, which is on the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def started(words: Sequence[Path | str]) -> subprocess.Popen[str]:
    """A process that has just begun to cut."""
    command = [sys.executable, "-c", CHILD, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def finished(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a process that must succeed has measured."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the cut failed: {process.returncode}")
    measured: dict[str, Any] = json.loads(output)
    return measured


def copied(file: Path, copy: Path) -> float:
    """Seconds of a plain copy that is on the disk."""
    begun = time.perf_counter()
    shutil.copyfile(file, copy)
    with copy.open("rb") as stream:
        os.fsync(stream.fileno())
    return time.perf_counter() - begun


def timed(source: Path, kept: Path, place: Path, rounds: int) -> dict[str, Any]:
    """Cuts and copies in turns."""
    output, copy, cuts, copies = place / "cut.gguf", place / "copy.gguf", [], []
    for _ in range(rounds):
        output.unlink(missing_ok=True)
        forget(source)
        cuts.append(finished(started([source, kept, output, "first"])))
        forget(output)
        copies.append(copied(output, copy))
        copy.unlink()
        print(f"cut {cuts[-1]['seconds']:.1f} s, copy {copies[-1]:.1f} s", flush=True)
    return {
        "source_bytes": source.stat().st_size,
        "result_bytes": output.stat().st_size,
        "cut_seconds": median(cut["seconds"] for cut in cuts),
        "copy_seconds": median(copies),
        "ratio": median(cut["seconds"] / copy for cut, copy in zip(cuts, copies, strict=True)),
        "peak_bytes": max(cut["peak_bytes"] for cut in cuts),
    }


def killed(source: Path, kept: Path, output: Path, seconds: float, kills: int) -> list[int]:
    """Kill a cut, resume it, kill it again; at last let it finish.

    Args:
        source: the file.
        kept: the list of experts.
        output: the result.
        seconds: of a cut that nobody kills.
        kills: how often. The moments are drawn so that they spread over the whole cut.

    Returns:
        How many bytes of the result were there after each kill.
    """
    draw, found = random.Random(0), []
    there = output.with_name(output.name + ".partial") / "model" / output.name
    for _ in range(kills):
        process = started([source, kept, output, "again"])
        try:
            process.wait(draw.uniform(0, 2 * seconds / kills))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        if output.exists():
            break
        found.append(there.stat().st_size if there.exists() else 0)
        print(f"killed at {found[-1] / 1e9:.2f} GB", flush=True)
    finished(started([source, kept, output, "again"]))
    return found


def main() -> None:
    """Make the file, cut it, kill it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=float, default=8, help="GB of the file")
    parser.add_argument("--work", type=Path, help="a folder with room for three such files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=10)
    args = parser.parse_args()
    print(heading())
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        place = Path(scratch)
        source = make(place, args.size * 1e9)
        kept = listed(place, GGUFSource.read(source).get("block_count"))
        row = timed(source, kept, place, args.rounds)
        again = place / "killed.gguf"
        row["killed_at_bytes"] = killed(source, kept, again, row["cut_seconds"], args.kills)
        row["identical"] = filecmp.cmp(place / "cut.gguf", again, shallow=False)
    protocol = {key: value for key, value in vars(args).items() if key != "work"}
    print(f"written to {keep('gguf-cut', protocol, [row])}")
    print(markdown(*table([row])))
    sys.exit(0 if row["identical"] else 3)


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """One line for a file."""
    columns = [
        "file",
        "after the cut",
        "cut",
        "plain copy",
        "ratio",
        "peak memory",
        "killed and resumed",
    ]
    lines = []
    for row in rows:
        same = "the same bytes" if row["identical"] else "other bytes"
        lines.append(
            [
                f"{row['source_bytes'] / 1e9:.2f} GB",
                f"{row['result_bytes'] / 1e9:.2f} GB",
                f"{row['cut_seconds']:.1f} s",
                f"{row['copy_seconds']:.1f} s",
                f"{row['ratio']:.2f}",
                f"{row['peak_bytes'] / 2**20:.0f} MiB",
                f"{len(row['killed_at_bytes'])} times: {same}",
            ]
        )
    return columns, lines


def readme(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The same without the copy."""
    shown = ("file", "after the cut", "cut", "peak memory", "killed and resumed")
    columns, lines = table(rows)
    return [*shown], [[line[columns.index(name)] for name in shown] for line in lines]


TABLES = {"readme": readme, "cut": table}


if __name__ == "__main__":
    main()
