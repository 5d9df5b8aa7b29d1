"""auto-round on our windows: the rival of `low_bits.py`, run with the Python that has it installed.

    RIVAL/bin/python benchmarks/rival_rounding.py MODEL WINDOWS OUTPUT [--iterations 20]

auto-round 0.16.1 (Cheng et al., SignRound, arXiv 2309.05516): 4 bits, symmetric, groups of 64, on
the token windows of a safetensors file (`input_ids` [n, length]), so both see the same text. OUTPUT
becomes a dense checkpoint with the rounded weights, which `low_bits.py --rounded OUTPUT` judges.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Round and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--samples", type=int, default=16)
    args = parser.parse_args()
    windows = load_file(args.windows)["input_ids"][: args.samples].long()
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rival = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=64,
        sym=True,
        iters=args.iterations,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=8,
        dataset=torch.utils.data.DataLoader(
            [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
        ),
        device_map="cpu",
    )
    rounded, _ = rival.quantize()  # its own writer puts the source's float32 weights back
    weight = rounded.model.layers[0].mlp.up_proj.weight[:8, :64].float()
    assert max(len(row.unique()) for row in weight) <= 16, "the weights are not rounded"
    rounded.float().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
