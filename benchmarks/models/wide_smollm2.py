"""SmolLM2-135M in 768 channels: the same function, with rows that K types fit.

    python -m benchmarks.models.wide_smollm2 FOLDER --text c4.jsonl

SmolLM2 has 576 channels, and the types of llama.cpp with blocks of 256 weights do not divide a row
of 576. An orthonormal map P [576, 768] of the residual stream makes another model with the same
logits: the embedding E P, readers W P, writers Pᵀ W, norms with the factor √(576/768) as the root
mean square is over more channels, and ε × 576/768. transformers wants the channels to be a multiple
of the heads, so nine heads become twelve: in each group of queries the weakest head becomes two
copies, each with half the columns in `o_proj`. Every row is then a multiple of 256 weights long.

**P splits channels.** 384 channels stay; each of the 192 that have the least energy becomes two
copies with the factor 1/√2. So the norms' gains stay where they are, the embedding stays tied, and
the blocks of weights keep the outliers of a trained model. A dense random P would need the gains in
the next matrices; it makes all weights look Gaussian and all inputs equally strong, which takes
from an importance matrix what it is for. Every P leaves 192 directions of the inputs empty: errors
there cost nothing, which only a quantizer that uses the inputs' covariance can spend. Copies of the
weakest channels and heads keep this gift small: `copied` has their part of the inputs' energy.

The source of SmolLM2 is a file of Q4_1, so 32 neighbours have 16 values. Channels, neurons and the
dimensions of each head's values are shuffled, or Q4_1 and Q4_K would find the old values again.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur
from secateur.calibration.run_windows import WindowReader
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.shared import CalibrationWindows

WIDTH, SEED = 768, 0
READERS = re.compile(r"(q_proj|k_proj|v_proj|gate_proj|up_proj|embed_tokens|lm_head)\.weight$")
WRITERS = re.compile(r"(o_proj|down_proj)\.weight$")


class Split(NamedTuple):
    """A map of channels to more channels.

    Attributes:
        origin: the old channel of each new one.
        share: the factor of each new channel; the squares of the copies of a channel sum to one.
    """

    origin: Tensor
    share: Tensor

    @classmethod
    def of(cls, energy: Tensor, width: int) -> Split:
        """Split the weakest channels in two, and shuffle all."""
        split = energy.argsort()[: width - len(energy)]
        origin = torch.cat([torch.arange(len(energy)), split])
        share = torch.ones(len(energy)).index_fill(0, split, 0.5**0.5)[origin]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(SEED))
        return cls(origin[order], share[order])

    def tensor(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the wider model."""
        if READERS.search(name):
            return value[:, self.origin] * self.share
        if WRITERS.search(name):
            return value[self.origin] * self.share[:, None]
        return value[self.origin] * (len(value) / len(self.origin)) ** 0.5


class Energy(NamedTuple):
    """Mean squares over a text, each matrix with the same weight.

    Attributes:
        channels: of what the norms give to the next matrices [channels].
        heads: of what each head adds to the residual stream [layers, heads].
    """

    channels: Tensor
    heads: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, windows: Tensor) -> Energy:
        """Run the model over the windows."""
        count = model.config.num_attention_heads
        channels, heads = list[Tensor](), list[Tensor]()

        def after_norm(_: nn.Module, inputs: Any, output: Tensor) -> None:
            squares = output.double().square().flatten(0, -2).mean(0)
            channels.append(squares / squares.sum())

        def before_output(linear: Any, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].double().square().flatten(0, -2).mean(0)
            added = squares * linear.weight.double().square().sum(0)
            heads.append(added.view(count, -1).sum(1) / added.sum())

        for name, module in model.named_modules():
            if name.endswith("norm"):
                module.register_forward_hook(after_norm)
            if name.endswith("o_proj"):
                module.register_forward_pre_hook(before_output)
        model(input_ids=windows, use_cache=False)
        return cls(torch.stack(channels).mean(0), torch.stack(heads))


def shuffled(state: dict[str, Tensor], config: Any, heads: Tensor) -> dict[str, Tensor]:
    """The same function with other neighbours, and each group's weakest head twice.

    Neurons are shuffled, and the dimensions of the values of each head.

    Args:
        state: the weights.
        config: the configuration.
        heads: the energy of each head [layers, heads].
    """
    draw, state = torch.Generator().manual_seed(SEED + 1), dict(state)
    size, groups = config.head_dim, config.num_key_value_heads
    for layer, energy in enumerate(heads.view(len(heads), groups, -1)):
        at = f"model.layers.{layer}."
        neurons = torch.randperm(config.intermediate_size, generator=draw)
        for name in ("gate_proj", "up_proj"):
            state[f"{at}mlp.{name}.weight"] = state[f"{at}mlp.{name}.weight"][neurons]
        state[f"{at}mlp.down_proj.weight"] = state[f"{at}mlp.down_proj.weight"][:, neurons]
        query, value, output = (f"{at}self_attn.{x}_proj.weight" for x in "qvo")
        places = torch.stack([torch.randperm(size, generator=draw) for _ in range(groups)])
        values = state[value].view(groups, size, -1)
        state[value] = torch.cat([x[order] for x, order in zip(values, places, strict=True)])
        queries = state[query].view(groups, -1, size, state[query].shape[1])
        outputs = state[output].view(len(state[output]), groups, -1, size)
        twice = energy.argmin(1)
        rows, columns = list[Tensor](), list[Tensor]()
        for group, order in enumerate(places):
            copied, read = int(twice[group]), outputs[:, group][..., order].clone()
            read[:, copied] /= 2
            rows += [queries[group].flatten(0, 1), queries[group, copied]]
            columns += [read.flatten(1), read[:, copied]]
        state[query], state[output] = torch.cat(rows), torch.cat(columns, 1)
    return state


def widened(model: Any, split: Split, heads: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the configuration of the wider model."""
    config = model.config
    narrow, wide = config.hidden_size, len(split.origin)
    state = shuffled(model.state_dict(), config, heads)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    made = {name: split.tensor(name, value).contiguous() for name, value in state.items()}
    described = config.to_dict() | {
        "hidden_size": wide, "rms_norm_eps": config.rms_norm_eps * narrow / wide,
        "num_attention_heads": config.num_attention_heads + config.num_key_value_heads,
    }  # fmt: skip
    return made, described


@torch.no_grad()
def largest_difference(one: nn.Module, other: nn.Module, windows: Tensor) -> float:
    """Of the logits of two models; only norms, softmax and rotations compute in float32."""
    first, second = (m.double()(input_ids=windows, use_cache=False).logits for m in (one, other))
    return float((first - second).abs().max())


def main() -> None:
    """Write the folder, and check it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--text", required=True, help="its first windows say which channels are weak"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = resolve(args.model).folder
    model = secateur.load(source, dtype=torch.float32)
    reader = WindowReader(model.config, lambda: load_tokenizer(source))
    windows = reader.read(args.text, CalibrationWindows(windows=8, sequence_length=512))[0]
    energy = Energy.of(model, windows)
    split = Split.of(energy.channels, WIDTH)
    made, config = widened(model, split, energy.heads)
    partial = args.folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns("*.safetensors", "README.md"))
    save_file(made, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    wide = secateur.load(partial, dtype=torch.float32)
    difference = largest_difference(model, wide, windows[:2])
    copied = {
        "channels": float(energy.channels[split.origin][split.share < 1].sum() / 2),
        "heads": float(energy.heads.view(len(energy.heads), -1, 3).amin(2).sum(1).mean()),
    }
    print({"largest_difference_of_logits": difference, "copied": copied})
    assert difference < 1e-4, "another function"
    partial.rename(args.folder)


if __name__ == "__main__":
    main()
