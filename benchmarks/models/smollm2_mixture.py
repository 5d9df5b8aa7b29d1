"""SmolLM2-135M as a mixture of experts, which learns from the dense model.

    python -m benchmarks.models.smollm2_mixture FOLDER --text c4.jsonl wiki.txt

The 1,536 neurons of a layer become 16 experts, of which a token is sent to 6. The form is
Mixtral's: its router and its experts compute what those of Qwen3-MoE do, the softmax of the chosen
experts' logits, and its attention is Llama's. So structure, fit, export and llama.cpp run it.
Qwen3-MoE normalises each head of queries and keys, which no weights undo; Qwen2-MoE has no such
norms, but divides the softmax among all experts, so a cut would double what the others add.

    core      the 32 neurons with the largest E[h_i²] · ‖d_i‖²: each expert has them
    experts   94 of the others, by balanced k-means of |h_i| · ‖d_i‖ over tokens: large at the same
    router    ridge regression of the experts' output norms, of which each has the same spread
    down      the dense columns, those outside of the core times the number of chosen experts

h_i is the value of a neuron and d_i its column of the down projection. The weights of the chosen
experts sum to 1, so what all of them have counts once. In some layers a few neurons of the core
write states at the first token that are a hundred times as large as others; without them nothing
works. Two more neurons, which return nothing yet, make an expert 128 wide, for types of llama.cpp.
The router's logits are so small that the weights of the chosen experts are nearly equal: with all
experts chosen, the mixture is nearly the dense model. Then `secateur train` teaches it the predictions and the hidden states of
the dense model, with a slow router. A killed run goes on.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import MixtralConfig

import secateur
from secateur.calibration.run_windows import WindowReader
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.shared import CalibrationWindows

EXPERTS, CHOSEN, CORE, WIDTH, LENGTH = 16, 6, 32, 128, 256
SPREAD, RIDGE, SEED = 0.3, 0.01, 0
"""The standard deviation of each expert's logits, the part of the mean square in a ridge."""


def clusters(points: Tensor, count: int) -> Tensor:
    """Balanced k-means of unit rows [neurons, …] by their cosines: the rows [count, neurons / count]
    of each cluster.
    """
    draw = torch.Generator().manual_seed(SEED)
    centers = points[torch.randperm(len(points), generator=draw)[:count]]
    for _ in range(20):
        members: list[list[int]] = [[] for _ in range(count)]
        free = [True] * len(points)
        nearest = (points @ centers.T).flatten().argsort(descending=True)
        for place in nearest.tolist():
            point, center = divmod(place, count)
            if free[point] and len(members[center]) < len(points) // count:
                members[center].append(point)
                free[point] = False
        centers = normalize(torch.stack([points[own].mean(0) for own in members]), dim=-1)
    return torch.tensor(members)


def router_of(states: Tensor, norms: Tensor) -> Tensor:
    """The rows [experts, channels] that find which experts add much.

    Args:
        states: the inputs of the feed-forward [tokens, channels].
        norms: of what each expert adds [tokens, experts].
    """
    square = states.T @ states
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    wanted = (norms - norms.mean(0)) / norms.std(0)
    router = torch.linalg.solve(square, states.T @ wanted)
    return (router * (SPREAD / (states @ router).std(0))).T


def mixture_of(mlp: Any, states: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that replace a dense feed-forward, by their names in a checkpoint of Mixtral.

    Args:
        mlp: the feed-forward.
        states: its inputs [tokens, channels].
    """
    gate, up, down = (x.weight for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    values = mlp.act_fn(states @ gate.T) * (states @ up.T)
    added = (values.abs() * down.norm(dim=0)).T  # [neurons, tokens]
    order = added.square().mean(1).argsort(descending=True)
    core, others = order[:CORE], order[CORE:]
    profiles = added[others] - added[others].mean(1, keepdim=True)
    experts = others[clusters(normalize(profiles, dim=-1), EXPERTS)]
    norms = torch.stack([(values[:, e] @ down[:, e].T).norm(dim=-1) for e in experts], 1)
    yield "gate.weight", router_of(states, norms)
    fill = WIDTH - CORE - experts.shape[1]
    factors = torch.tensor([1.0] * CORE + [CHOSEN] * experts.shape[1] + [0.0] * fill)
    for number, own in enumerate(experts):
        rows = torch.cat([core, own, core[:fill]])
        for name, weight in (("w1", gate[rows]), ("w3", up[rows]), ("w2", down[:, rows] * factors)):
            yield f"experts.{number}.{name}.weight", weight


@torch.no_grad()
def clustered(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """The tensors of the mixture before it learns.

    Args:
        model: the dense one.
        windows: token ids [windows, length], which pass through the dense model.
    """
    made = {n: t for n, t in model.named_parameters() if ".mlp." not in n}
    if model.config.tie_word_embeddings:
        made.pop("lm_head.weight", None)

    def convert(number: int, mlp: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for name, tensor in mixture_of(mlp, inputs[0].flatten(0, 1)):
            made[f"model.layers.{number}.block_sparse_moe.{name}"] = tensor
        print(f"layer {number}", flush=True)

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *given, number=number: convert(number, *given))
    model.model(input_ids=windows, use_cache=False)
    return made


def configuration(dense: Any) -> MixtralConfig:
    """That of the mixture."""
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
        "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return MixtralConfig(
        **{name: getattr(dense, name) for name in names},
        architectures=["MixtralForCausalLM"], dtype="bfloat16", num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN, intermediate_size=WIDTH, router_aux_loss_coef=0.0,
    )  # fmt: skip


def write_clustered(source: Path, folder: Path, text: str, windows: int) -> None:
    """The mixture before it learns, as a folder; nothing if it is there."""
    if folder.exists():
        return
    model = secateur.load(source, dtype=torch.float32)
    reader = WindowReader(model.config, lambda: load_tokenizer(source))
    ids = reader.read(text, CalibrationWindows(windows=windows, sequence_length=LENGTH))[0]
    made = {name: t.bfloat16().contiguous() for name, t in clustered(model, ids).items()}
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    skipped = shutil.ignore_patterns("*.safetensors", "README.md", "config.json")
    shutil.copytree(source, partial, ignore=skipped)
    save_file(made, partial / "model.safetensors", metadata={"format": "pt"})
    configuration(model.config).save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    """Cluster, then learn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--text", nargs="+", required=True, help="the first one clusters, all teach"
    )
    parser.add_argument("--windows", type=int, default=16, help=f"of {LENGTH} tokens, to cluster")
    parser.add_argument("--steps", type=int, default=500, help="of four windows")
    args = parser.parse_args()
    source = resolve(args.model).folder
    start = args.folder.with_name(f"{args.folder.name}-clustered")
    write_clustered(source, start, args.text[0], args.windows)
    secateur.train(
        start, output=args.folder, teacher=source, text=args.text, sequence_length=LENGTH,
        steps=args.steps, batch=4, learning_rate=5e-4, hidden_weight=1.0,
        rates={"*.gate.weight": 0.1}, resume=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
