"""Windows that the model writes itself: by our kernels, by transformers, and by its `generate`.

    python -m benchmarks.speed.writing [--windows 64] [--length 512] [--writers kernels transformers]

All draw at temperature 1 with nothing cut off, all windows at once, from the first 16 tokens of
windows of the sample text, in the same process, one after the other. Seconds are those of the wall
and those of the processor, which other programs disturb less. `rounded`: the divergence of the int8
model from the dense one, and the losses of both, on six windows of 256 tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, keep, markdown
from torch import Tensor
from transformers import GenerationConfig

from secateur.calibration.continuation import (
    PREFIX,
    continue_windows,
    opened_for_writing,
    writer_of,
)
from secateur.calibration.windows import WindowPlan, make_windows
from secateur.machine import fast_dtype
from secateur.models.opening import load_whole
from secateur.models.samples import sample_text
from secateur.models.skeleton import quiet_transformers
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.runtime.decode import SlotDecoder
from secateur.runtime.kernels.matrix import kernels

MEASURES = ("src/secateur/runtime", "src/secateur/calibration/continuation.py")


def generated(model: Any, windows: Tensor) -> Tensor:
    """Windows that `generate` writes."""
    beginnings = windows[:, :PREFIX]
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0,
        max_length=windows.shape[1], min_length=windows.shape[1],
        eos_token_id=model.config.eos_token_id,
    )  # fmt: skip
    with torch.inference_mode():
        return model.generate(
            input_ids=beginnings,
            attention_mask=torch.ones_like(beginnings),
            generation_config=settings,
        )


def rounded_loss(packed: Any, source: Path, windows: Tensor) -> dict[str, float]:
    """How far the rounded model, decoded by the kernels, is from the dense one in float32.

    Of the tokens after the first 16, which a window is given.
    """
    dense = load_whole(source, torch.device("cpu"), dtype=torch.float32)
    decoder = SlotDecoder(packed, windows.shape[1], cache="bf16")
    found = dict.fromkeys(("divergence", "loss", "dense_loss"), 0.0)
    with torch.inference_mode():
        for ids in windows:
            decoder.rewind(0)
            q = decoder.read(0, ids, every=True).log_softmax(-1)[PREFIX:-1]
            p = dense(ids[None]).logits[0].log_softmax(-1)[PREFIX:-1]
            follow = ids[PREFIX + 1 :, None]
            found["divergence"] += float((p.exp() * (p - q)).sum(-1).mean()) / len(windows)
            found["loss"] -= float(q.gather(1, follow).mean()) / len(windows)
            found["dense_loss"] -= float(p.gather(1, follow).mean()) / len(windows)
    return found


def main() -> None:
    """Write by each, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    names = ["kernels", "transformers", "generate"]
    parser.add_argument("--writers", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernels().sct_set_threads(args.threads)
    source = resolve(args.model).folder
    cpu = torch.device("cpu")
    whole = load_whole(source, cpu, dtype=fast_dtype(cpu))
    packed = opened_for_writing(source, cpu, args.length)
    plan = WindowPlan(windows=args.windows, sequence_length=args.length)
    windows = make_windows(sample_text("boolq-calibration"), load_tokenizer(source), plan)
    writers = {
        "kernels": lambda: continue_windows(packed, windows, len(windows), seed=0),
        "transformers": lambda: continue_windows(whole, windows, len(windows), seed=0),
        "generate": lambda: generated(whole, windows),
    }
    tokens = args.windows * (args.length - PREFIX)
    rows = []
    for name in args.writers * args.rounds:
        with quiet_transformers():
            started, worked = time.perf_counter(), time.process_time()
            shape = tuple(writers[name]().shape)
        seconds, work = time.perf_counter() - started, time.process_time() - worked
        rows.append({"writer": name, "seconds": seconds, "processor_seconds": work,
                     "seconds_per_1000_tokens": 1000 * seconds / tokens})  # fmt: skip
        print(rows[-1], flush=True)
        assert shape == tuple(windows.shape)
    protocol = {"model": args.model, "windows": args.windows, "length": args.length,
                "threads": args.threads, "dtype": str(whole.dtype),
                "packed": writer_of(packed),
                "rounded": rounded_loss(packed, source, windows[:6, :256])}  # fmt: skip
    keep("writing", protocol, rows)
    print(heading())
    table = [[r["writer"], f"{r['seconds']:.1f}", f"{r['processor_seconds']:.1f}"] for r in rows]
    print(markdown(["", "seconds", "of the processor"], table))


if __name__ == "__main__":
    main()
