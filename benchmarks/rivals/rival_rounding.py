"""auto-round on our windows, a rival of `fit.py` and `gguf_types.py`, run by a Python that has it.

    RIVAL/bin/python -m benchmarks.rivals.rival_rounding MODEL WINDOWS OUTPUT [--bits 4] [--recipe default]
    RIVAL/bin/python -m benchmarks.rivals.rival_rounding MODEL WINDOWS OUTPUT --gguf q4_k_s --recipe opt_rtn

auto-round 0.16.1 (Cheng et al., SignRound, arXiv 2309.05516) on the token windows of a safetensors
file (`input_ids` [n, length]), so all see the same text. Its recipes are those of its command line:
`default` is 200 iterations, `light` is 50 with a rate of 5e-3, `opt_rtn` none; `short` is ours, 20.
Batches of 8 windows. OUTPUT becomes a dense checkpoint with the rounded weights, and `rival.json`
has the seconds and the bytes that its own format needs: codes, a float16 scale for each group, and
a zero point unless the grids are symmetric; everything else in bfloat16, or the embedding in int8.
With `--gguf` OUTPUT has a GGUF file of its own writer, in one of its mixes of types; there its
documentation advises `opt_rtn`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

RECIPES = {"default": (200, None), "light": (50, 5e-3), "short": (20, None), "opt_rtn": (0, None)}
"""Iterations and learning rate."""


def sizes_of(model: torch.nn.Module, bits: int, group: int, symmetric: bool) -> dict[str, int]:
    """The bytes of the rounded model, with the embedding in bfloat16 and in int8."""
    rounded = [
        x for n, x in model.named_modules() if isinstance(x, torch.nn.Linear) and "layers" in n
    ]
    codes = sum(x.weight.numel() * bits for x in rounded)
    groups = sum(x.weight.shape[0] * -(-x.weight.shape[1] // group) for x in rounded)
    rest = sum(x.numel() for x in model.parameters()) - sum(x.weight.numel() for x in rounded)
    size = (codes + groups * (16 + (0 if symmetric else bits))) // 8 + 2 * rest
    ends = {id(x.weight): x.weight for x in (model.get_input_embeddings(), model.lm_head)}
    saved = sum(x.numel() - 2 * x.shape[0] for x in ends.values())
    return {"bytes": size, "bytes_int8_embedding": size - saved}


def main() -> None:
    """Round and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--recipe", default="short", choices=[*RECIPES])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--gguf", help="a mix of types, such as q4_k_s")
    args = parser.parse_args()
    windows = load_file(args.windows)["input_ids"][: args.samples].long()
    began, (iterations, rate) = time.perf_counter(), RECIPES[args.recipe]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    grid = {"bits": args.bits, "group_size": args.group_size, "sym": not args.asymmetric}
    rival = AutoRound(
        model,
        tokenizer,
        **({"scheme": f"GGUF:{args.gguf.upper()}"} if args.gguf else grid),
        iters=iterations,
        lr=rate,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=8,
        dataset=torch.utils.data.DataLoader(
            [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in windows]
        ),
        device_map="cpu",
        enable_torch_compile=False,
    )
    if args.gguf:
        rival.quantize_and_save(str(args.output), format=f"gguf:{args.gguf}")
        return
    rounded, _ = rival.quantize()  # its own writer puts the source's float32 weights back
    weight = rounded.model.layers[0].mlp.up_proj.weight[:8, : args.group_size].float()
    assert max(len(row.unique()) for row in weight) <= 2**args.bits, "the weights are not rounded"
    rounded.float().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    sizes = sizes_of(rounded, args.bits, args.group_size, not args.asymmetric)
    facts = {"recipe": args.recipe, "seconds": time.perf_counter() - began, **sizes}
    (args.output / "rival.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(facts)


if __name__ == "__main__":
    main()
