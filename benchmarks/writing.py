"""Windows that the model writes itself: seconds beside those of `generate` of transformers.

    python benchmarks/writing.py [--windows 32] [--length 512]

Both draw at temperature 1 with nothing cut off, all windows at once, from the first 16 tokens of
windows of the sample text, with the same model in the same process, one after the other.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from hardware import heading, keep, markdown
from secateur.calibration.continuation import PREFIX, continue_windows
from secateur.calibration.windows import WindowPlan, make_windows
from secateur.evaluation.perplexity import load_model
from secateur.models.hub import sample_text
from secateur.models.skeleton import quiet_transformers
from secateur.precision import fast_dtype


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


def main() -> None:
    """Write twice, keep, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, tokenizer = load_model(args.model, "cpu", trust_remote_code=False)
    model = model.to(fast_dtype(torch.device("cpu")) or torch.float32)
    plan = WindowPlan(windows=args.windows, sequence_length=args.length)
    windows = make_windows(sample_text("boolq-calibration"), tokenizer, plan)
    writers = {
        "generate": lambda: generated(model, windows),
        "ours": lambda: continue_windows(model, windows, len(windows), seed=0),
    }
    rows = []
    for name, write in writers.items():
        with quiet_transformers():
            started = time.perf_counter()
            shape = tuple(write().shape)
        rows.append({"way": name, "seconds": time.perf_counter() - started})
        assert shape == tuple(windows.shape)
    protocol = {"model": args.model, "windows": args.windows, "length": args.length,
                "dtype": str(model.dtype)}  # fmt: skip
    keep("writing", protocol, rows)
    print(heading())
    print(markdown(["", "seconds"], [[r["way"], f"{r['seconds']:.1f}"] for r in rows]))


if __name__ == "__main__":
    main()
