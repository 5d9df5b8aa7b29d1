"""Prune a Llama-shaped model with the published code of Wanda, SparseGPT or ALPS, on any device.

    python -m benchmarks.rivals.rivals wanda WANDA_CHECKOUT MODEL WINDOWS.safetensors OUT --sparsity 0.5

Runs in an environment of its own: torch, safetensors, numpy below 2, and transformers 4.36 (the
release that the published code was written for). The checkouts are those of locuslab/wanda (which
carries SparseGPT too) and mazumder-lab/ALPS. What is changed of their code, in memory only:
`cuda:0` reads as the device asked, `torch.cuda.synchronize` does nothing without CUDA, and the
calibration windows are those of the file. OUT gets the model and `rival.json`: seconds of the
pruning loop (windows and model already loaded) and peak resident memory of the process.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def load_model(folder: Path) -> Any:
    """The model as transformers 4.36 understands its configuration."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # transformers 5 writes the base of the rotary embedding inside a section that 4.36 ignores
    values.setdefault("rope_theta", values.pop("rope_parameters", {}).get("rope_theta", 10000.0))
    config = LlamaConfig.from_dict({**values, "torch_dtype": torch.float32})
    model = LlamaForCausalLM(config)
    weights = load_file(folder / "model.safetensors")
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    lost = model.load_state_dict(weights, strict=False)
    buffers = [k for k in lost.missing_keys if "rotary" not in k]
    if buffers or lost.unexpected_keys:
        raise SystemExit(f"{folder}: {buffers} missing, {lost.unexpected_keys} unexpected")
    return model.eval()


def patched(source: Path, package: str, device: str, **names: Any) -> types.ModuleType:
    """One module of a rival's checkout, with `cuda:0` read as the device asked."""
    name = f"{package}.{source.stem}" if package else source.stem
    module = types.ModuleType(name)
    module.__package__ = package
    module.__dict__.update(names)
    sys.modules[name] = module
    text = source.read_text(encoding="utf-8").replace("cuda:0", device)
    exec(compile(text, str(source), "exec"), module.__dict__)
    return module


def wanda_code(checkout: Path, device: str) -> types.ModuleType:
    """`lib/prune.py` of the checkout; its own loader of hub data is replaced by windows."""
    package = types.ModuleType("lib")
    package.__path__ = []
    sys.modules["lib"] = package
    data = types.ModuleType("lib.data")
    data.get_loaders = None
    ablate = types.ModuleType("lib.ablate")
    ablate.AblateGPT = None
    sys.modules.update({"lib.data": data, "lib.ablate": ablate})
    for name in ("layerwrapper", "sparsegpt"):
        patched(checkout / "lib" / f"{name}.py", "lib", device)
    return patched(checkout / "lib" / "prune.py", "lib", device)


def prune(args: argparse.Namespace, model: Any, windows: torch.Tensor) -> float:
    """Run the published loop; returns its seconds."""
    n, m = (int(x) for x in args.pattern.split(":")) if args.pattern else (0, 0)
    sparsity = 1 - n / m if m else args.sparsity
    batches = [(window[None], None) for window in windows]
    options = argparse.Namespace(
        nsamples=len(batches), seed=0, sparsity_ratio=sparsity, use_variant=False,
        method="ALPS", sp=sparsity, nm_n=n, nm_m=m,
    )  # fmt: skip
    device = torch.device(args.device)
    if args.method == "alps":
        for name in ("modelutils", "alps"):
            patched(args.checkout / f"{name}.py", "", args.device)
        sys.modules.setdefault("pandas", types.ModuleType("pandas"))
        code = patched(args.checkout / "llama.py", "", args.device, args=options)
        start = time.perf_counter()
        code.llama_sequential(model, batches, device, nsamples=len(batches))
        return time.perf_counter() - start
    code = wanda_code(args.checkout, args.device)
    code.get_loaders = lambda *_, **__: (batches, None)
    # the published Wanda counts the pruned in a group, we count the kept: for N:M = 2:4 and 4:8
    # they are the same
    loop = {"wanda": code.prune_wanda, "sparsegpt": code.prune_sparsegpt}[args.method]
    start = time.perf_counter()
    loop(options, model, None, device, prune_n=m - n, prune_m=m)
    return time.perf_counter() - start


def main() -> None:
    """Prune, save, and say what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", choices=["wanda", "sparsegpt", "alps"])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="", help="N:M; without it unstructured")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.device == "cpu":
        torch.cuda.synchronize = lambda *_: None
        torch.cuda.empty_cache = lambda: None
    windows = load_file(args.windows)["input_ids"].to(torch.int64)
    model = load_model(args.model).to(args.device)
    model.seqlen = windows.shape[1]
    model.hf_device_map = {}
    seconds = prune(args, model, windows)
    args.output.mkdir(parents=True)
    for file in args.model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, args.output)
    weights = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, args.output / "model.safetensors", metadata={"format": "pt"})
    zeros = [v for k, v in weights.items() if ".layers." in k and v.ndim == 2]
    cost = {
        "method": args.method, "pattern": args.pattern, "sparsity": args.sparsity,
        "seconds": seconds,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "zeros": sum((v == 0).sum().item() for v in zeros) / math.fsum(v.numel() for v in zeros),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    (args.output / "rival.json").write_text(json.dumps(cost, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(cost))


if __name__ == "__main__":
    main()
