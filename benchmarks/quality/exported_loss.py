"""What the types of compressed-tensors lose: perplexity with weights and activations rounded.

    python -m benchmarks.quality.exported_loss MODEL --work WORK

Exports MODEL to w8a8 and w4a16, and judges each folder twice: as transformers loads it (with the
package compressed-tensors), and with the weights of the file in a plain model. For w8a8, a hook
rounds the inputs of every linear of the plain model as the scheme says: int8, a scale for each
token. WikiText-2, `secateur.evaluate`, float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import heading, markdown
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import secateur

MEASURES = ("src/secateur/exporting",)


def rounded_per_token(linear: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The inputs of a linear as w8a8 rounds them: x ≈ s · round(x / s), s = max |x| / 127."""
    scale = inputs[0].abs().amax(dim=-1, keepdim=True).clamp_min(1e-10) / 127
    return ((inputs[0] / scale).round().clamp(-128, 127) * scale,)


def weights_of(folder: Path) -> dict[str, Tensor]:
    """The weights of the quantized linears of a folder, by the name of the linear."""
    found = {}
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        owner = name.removesuffix(".weight_scale")
        if owner == name:
            continue
        if f"{owner}.weight" in stored:
            codes = stored[f"{owner}.weight"].float()
        else:
            words = stored[f"{owner}.weight_packed"]
            places = torch.arange(8, dtype=torch.int32) * 4
            codes = ((words[:, :, None] >> places) & 15).flatten(1).float() - 8
        scale = stored[name].float()
        found[owner] = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
    return found


def plain(source: Path, weights: dict[str, Tensor], *, activations: bool) -> Any:
    """The source with other weights, and with rounded activations."""
    model = secateur.load(source, dtype=torch.float32, expand=True)
    for owner, weight in weights.items():
        linear = model.get_submodule(owner)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if activations:
            linear.register_forward_pre_hook(rounded_per_token)
    return model


def main() -> None:
    """Export, judge, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def row(name: str, model: Any) -> list[str]:
        found = secateur.evaluate(
            model, tokenizer=tokenizer, text=args.text, windows=args.windows,
            sequence_length=args.sequence_length,
        )  # fmt: skip
        print(f"{name}: {found.perplexity:.3f}", flush=True)
        return [name, f"{found.perplexity:.2f}"]

    rows = [row("source", secateur.load(args.model, dtype=torch.float32, expand=True))]
    for type in ("w8a8", "w4a16"):
        out = args.work / type
        secateur.export(args.model, output=out, to="compressed-tensors", type=type, overwrite=True)
        weights = weights_of(out)
        loaded = secateur.load(out, dtype=torch.float32)
        rows.append(row(f"{type} in transformers", loaded))
        del loaded
        rows.append(row(f"{type}, weights", plain(args.model, weights, activations=False)))
        if type == "w8a8":
            both = plain(args.model, weights, activations=True)
            rows.append(row("w8a8, weights and activations", both))
    print(heading())
    print(f"{args.windows} windows of {args.sequence_length} tokens of {args.text}, float32")
    print(markdown(["", "perplexity"], rows))


if __name__ == "__main__":
    main()
