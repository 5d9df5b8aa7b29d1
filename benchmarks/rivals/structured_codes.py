"""The published structured-pruning codes, run on one model by `structured_rivals.py`.

A rival is a function of a task and a level that gives the cut model and what is to be said of it.
What is changed of the rivals' code, in memory only:

* ShortGPT (no code of its authors; sramshetty/ShortGPT): its class is given hidden states of
  transformers instead of those of Meta's package.
* SLEB: `cuda:0` reads `cpu`; loss in bfloat16 (published: float16) on the first 16 windows, about
  as many tokens as its default of 128 lines of WikiText-2; states before the layer in question are
  shared between candidates, which gives the same numbers.
* SliceGPT: the adapter for Llama is taken as it is, without its check of the model's name; the new
  width is the one that reaches the level (shortcut matrices counted), not rounded to 8.
* FLAP: 128 reads as the columns of a KV group (3 heads of 64), so that whole groups go; half
  precision means and biases are float32; the model is that of transformers with biases.
* LLM-Pruner: the settings of its `llama3.py` (Taylor, `param_first`, all layers but the first three
  and the last, KV groups), gradient of the mean loss over all windows; the ratio of channels is
  the one that reaches the level. No fine-tuning.
* OSSCAR (OPT only): its solver per layer on o_proj (KV groups) and down_proj, in a loop of ours
  that follows `opt_sequential`; `osscar` cuts FFN neurons only, `osscar-heads` one KV group of
  three in each layer as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.rivals.rivals import load_model, patched
from torch import Tensor, nn
from torch.nn import functional

Result = tuple[Any, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """The dense model, a rival's code, calibration ids [64, 512], and a folder to keep things."""

    model: Path
    checkout: Path
    windows: Tensor
    work: Path


def stand_in(name: str, **names: Any) -> None:
    """A module that a rival imports and that is not needed here."""
    module = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module


def package(name: str, folder: Path) -> None:
    """A package of a checkout without what its `__init__` imports."""
    stand_in(name, __path__=[str(folder)])


def layers_of(model: Any) -> nn.ModuleList:
    return model.model.layers


def decoder_parameters(model: Any) -> int:
    return sum(p.numel() for p in layers_of(model).parameters())


def without_layers(model: Any, dropped: Sequence[int]) -> Any:
    """The model without some layers."""
    kept = [layer for i, layer in enumerate(layers_of(model)) if i not in dropped]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = nn.ModuleList(kept)
    return model


def shortgpt(task: Task, level: float) -> Result:
    """Block influence, the lowest go."""
    stand_in("llama", Llama=object, Transformer=object)
    patched(task.checkout / "short_gpt" / "metrics.py", "", "cpu")
    code = patched(task.checkout / "short_gpt" / "short_llama.py", "", "cpu")
    model = load_model(task.model)
    layers = layers_of(model)
    count = round(level * len(layers))
    states: list[Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    layers[-1].register_forward_hook(lambda _m, _a, out: states.append(out[0]))
    short = types.SimpleNamespace(importances=[0.0] * len(layers), n_prune_layers=count)
    with torch.inference_mode():
        for window in task.windows:
            states.clear()
            model.model(window[None], use_cache=False)
            code.ShortLlama.compute_bi(short, states, angular=False)
    # its own loop deletes layers of this model
    short.llama = types.SimpleNamespace(model=types.SimpleNamespace(layers=[*layers]))
    dropped = code.ShortLlama.remove_layers(short)
    details = {"dropped": sorted(dropped), "influence": short.importances}
    return without_layers(load_model(task.model), dropped), details


class SharedPrefixes:
    """The loss of SLEB for one more layer turned off; states before that layer are shared."""

    def __init__(self, windows: Tensor, known: Path) -> None:
        self.windows, self.file = windows, known
        self.known = json.loads(known.read_text()) if known.exists() else {}
        self.base: set[int] | None = None
        self.inputs: list[Tensor] = []
        self.candidate = -1

    def run(self, model: Any, state: Tensor, start: int, kept: bool = False) -> Tensor:
        positions = torch.arange(self.windows.shape[1])[None]
        for layer in layers_of(model)[start:]:
            if kept:
                self.inputs.append(state)
            state = layer(state, attention_mask=None, position_ids=positions)[0]
        return state

    @torch.inference_mode()
    def __call__(self, model: Any, *_: Any, **__: Any) -> float:
        layers = layers_of(model)
        off = {i for i, layer in enumerate(layers) if layer.pass_layer}
        if (name := " ".join(map(str, sorted(off)))) in self.known:
            return self.known[name]
        layers[self.candidate].turn_on()
        if self.base != off - {self.candidate}:
            self.base, self.inputs = off - {self.candidate}, []
            self.run(model, model.model.embed_tokens(self.windows), 0, kept=True)
        state = self.run(model, self.inputs[self.candidate], self.candidate + 1)
        layers[self.candidate].turn_off()
        losses = [
            functional.cross_entropy(model.lm_head(model.model.norm(s[:-1])).float(), w[1:])
            for s, w in zip(state, self.windows, strict=True)
        ]
        self.known[name] = torch.stack(losses).sum().item() * self.windows.shape[1]
        self.file.write_text(json.dumps(self.known))
        return self.known[name]


def sleb(task: Task, level: float) -> Result:
    """The layer whose removal raises the loss least, again and again."""
    package("utils", task.checkout / "utils")
    windows = task.windows[:16]
    model = load_model(task.model).to(torch.bfloat16)
    model.name, model.seqlen = "llama", windows.shape[1]
    stand_in("fire")
    stand_in("utils.model_utils", get_llm=lambda _: model)
    stand_in("utils.data_utils", get_trainloaders=lambda *_, **__: None)
    stand_in("utils.eval_utils", load_and_eval_ppl=None, eval_zero_shot=None)
    code = patched(task.checkout / "sleb.py", "", "cpu")
    loss = SharedPrefixes(windows, task.work / "sleb-losses.json")
    published = code.turn_off

    def turn_off(model: Any, index: int) -> None:
        loss.candidate = index
        published(model, index)

    code.turn_off, code.get_loss = turn_off, loss
    log, whole = task.work / f"sleb-{level}.log", len(layers_of(model))
    with log.open("w") as stream, contextlib.redirect_stdout(stream):
        code.sleb("llama", whole, round(level * whole), eval_ppl=False,
                  result_folder=str(task.work))  # fmt: skip
    order = json.loads(re.findall(r"Block Removal Order: (.*)", log.read_text())[-1])
    return without_layers(load_model(task.model), order), {"dropped": order}


def slicegpt(task: Task, level: float) -> Result:
    """The residual stream rotated to principal components, the last of them cut."""
    from slicegpt import layernorm_fusion, rotate
    from slicegpt.adapters.llama_adapter import LlamaModelAdapter
    from slicegpt.slicing_scheduler import ConstSlicingScheduler

    model = load_model(task.model)
    dense, width, count = decoder_parameters(model), model.config.hidden_size, len(layers_of(model))
    linear = sum(p.numel() for p in layers_of(model)[0].parameters() if p.ndim == 2) / width
    goal = (1 - level) * dense / count
    kept = round((math.sqrt(linear**2 + 8 * goal) - linear) / 4)  # 2 kept² + linear · kept = goal
    adapter = LlamaModelAdapter(model)
    with torch.no_grad():
        layernorm_fusion.replace_layers(adapter)
        layernorm_fusion.fuse_modules(adapter)
    parts = task.windows.split(8)
    batches = [{"input_ids": w, "attention_mask": torch.ones_like(w)} for w in parts]
    torch.manual_seed(42)
    scheduler = ConstSlicingScheduler(kept)
    rotate.rotate_and_slice(adapter, batches, scheduler, final_orientation="random")
    return model, {"width": kept}


def flap(task: Task, level: float) -> Result:
    """Fluctuation of the inputs, with biases for what is removed."""
    model = load_model(task.model)
    head = layers_of(model)[0].self_attn.head_dim
    group = head * layers_of(model)[0].self_attn.num_key_value_groups
    text = (task.checkout / "lib" / "prune.py").read_text(encoding="utf-8")
    kv = f"torch.where(attn_mask.view(-1, {group})[:, :{head}].reshape(-1))[0]"
    for name in ("k_proj", "v_proj"):
        options = f"layer.self_attn.{name}.weight.data[torch.where(attn_mask)[0]]"
        text = text.replace(options, options.replace("torch.where(attn_mask)[0]", kv))
    text = text.replace("(2048, model.seqlen", "(len(dataloader), model.seqlen")
    text = text.replace("torch.half", "torch.float32").replace("128", str(group))
    package("lib", task.work)
    stand_in("lib.data", get_loaders=None)
    patched(task.checkout / "lib" / "layerwrapper.py", "lib", "cpu")
    (task.work / "prune.py").write_text(text, encoding="utf-8")
    code = patched(task.work / "prune.py", "lib", "cpu")
    code.get_loaders = lambda *_, **__: ([(w[None], None) for w in task.windows], None)
    for layer in layers_of(model):
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    model.seqlen = task.windows.shape[1]
    options = argparse.Namespace(nsamples=len(task.windows), metrics="WIFV", structure="AL-AM",
                              pruning_ratio=level, unstr=False, seed=0)  # fmt: skip
    with torch.no_grad():
        code.prune_flap(options, model, None, torch.device("cpu"))
    return with_sizes(model)


def with_sizes(model: Any) -> Result:
    """A cut model whose attention knows how many heads each layer has."""
    groups, neurons = [], []
    for layer in layers_of(model):
        attention = layer.self_attn
        tell_heads(attention)
        groups.append(attention.num_key_value_heads)
        neurons.append(layer.mlp.down_proj.weight.shape[1])
        if not groups[-1]:
            layer.self_attn = Constant(attention.o_proj.bias)
    return model, {"groups": groups, "neurons": neurons}


def tell_heads(attention: Any) -> None:
    """Give an attention sub-block the sizes that its weights have."""
    attention.num_key_value_heads = attention.k_proj.weight.shape[0] // attention.head_dim
    attention.num_heads = attention.num_key_value_heads * attention.num_key_value_groups
    attention.hidden_size = attention.num_heads * attention.head_dim


class Constant(nn.Module):
    """An attention sub-block without heads: its bias, if any, is what is left."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None, None]:
        nothing = torch.zeros_like(hidden_states)
        return (nothing if self.bias is None else nothing + self.bias), None, None


def llm_pruner(task: Task, level: float) -> Result:
    """Taylor first order per coupled group; the steps of `llama3.py`."""
    package("LLMPruner", task.checkout / "LLMPruner")
    package("LLMPruner.pruner", task.checkout / "LLMPruner" / "pruner")
    import LLMPruner.torch_pruning as pruning
    from LLMPruner.pruner import hf_llama_pruner
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = load_model(task.model)
    layers = layers_of(model)
    chosen = layers[3 : len(layers) - 1]
    ratio = channel_ratio(model, level * decoder_parameters(model) / len(chosen))
    roots = [x.mlp.gate_proj for x in chosen]
    if int(model.config.num_key_value_heads * ratio):  # without a group to remove, its code fails
        roots = [x.self_attn.k_proj for x in chosen] + roots
    pruner = pruning.pruner.MetaPruner(
        model,
        torch.tensor([[1, 306, 4658, 278, 6593, 310, 2834, 338]] * 2),
        importance=hf_llama_pruner.TaylorImportance(group_reduction="sum", taylor="param_first"),
        ch_sparsity=ratio,
        consecutive_groups={x.self_attn.k_proj: x.self_attn.head_dim for x in layers},
        customized_pruners={LlamaRMSNorm: hf_llama_pruner.hf_rmsnorm_pruner},
        root_module_types=None,
        root_instances=roots,
    )
    model.zero_grad()
    for batch in task.windows.split(2):
        loss = model(batch, labels=batch).loss * len(batch) / len(task.windows)
        loss.backward()
    pruner.step()
    model.zero_grad()
    return with_sizes(model)


def channel_ratio(model: Any, goal: float) -> float:
    """The ratio of channels with which its rounding removes nearest to so many a layer."""
    config, layer = model.config, layers_of(model)[0]
    channels, head = layer.self_attn.k_proj.out_features, layer.self_attn.head_dim
    group = sum(p.numel() for p in layer.self_attn.parameters()) // config.num_key_value_heads

    def removed(ratio: float) -> int:
        groups = (channels - int(channels * (1 - ratio))) // head
        neurons = config.intermediate_size - int(config.intermediate_size * (1 - ratio))
        return groups * group + neurons * 3 * config.hidden_size

    return min((n / 10000 for n in range(1, 10000)), key=lambda r: abs(removed(r) - goal))


def osscar(task: Task, level: float, groups: int = 0) -> Result:
    """OBS-type removal of units with refit of the kept columns, layer by layer."""
    text = (task.checkout / "osscar_prune.py").read_text(encoding="utf-8")
    patched(task.checkout / "prune_algo.py", "", "cpu")
    (task.work / "osscar_prune.py").write_text(text.replace('"cuda"', '"cpu"'), encoding="utf-8")
    code = patched(task.work / "osscar_prune.py", "", "cpu")
    model = load_model(task.model)
    config, layers = model.config, layers_of(model)
    attention = sum(p.numel() for p in layers[0].self_attn.parameters())
    goal = level * decoder_parameters(model) / len(layers)
    goal -= groups * attention / config.num_key_value_heads
    # its own rounding is int(units * (1 - ratio)) kept
    share = (round(goal / (3 * config.hidden_size)) - 0.5) / config.intermediate_size
    heads = (groups - 0.5) / config.num_key_value_heads
    ratios = {"self_attn.o_proj": heads, "mlp.down_proj": share}
    positions = torch.arange(task.windows.shape[1])[None]
    with torch.no_grad(), contextlib.redirect_stdout(None):
        states = [*model.model.embed_tokens(task.windows).split(4)]
        for layer in layers:
            cut_layer(code, layer, states, positions, ratios, config)
            states = [layer(x, position_ids=positions)[0] for x in states]
    return with_sizes(model)


def cut_layer(
    code: types.ModuleType,
    layer: Any,
    states: list[Tensor],
    positions: Tensor,
    ratios: dict[str, float],
    config: Any,
) -> None:
    """The step of `opt_sequential` for one layer, and the columns without weight cut away."""
    pruners = {}
    for name, ratio in ratios.items():
        if ratio > 0:
            # the published code takes the layer's name to tell heads from neurons
            layer_name = "self_attn.out_proj" if name == "self_attn.o_proj" else "fc2"
            pruners[name] = code.OSSCAR_prune(
                layer.get_submodule(name), "OSSCAR_prune", len(states), positions.shape[1],
                update_iter=10, update_iter2=2, layername=layer_name,
                num_heads=config.num_key_value_heads,
            )  # fmt: skip
    hooks = [
        layer.get_submodule(name).register_forward_hook(
            lambda _, args, out, pruner=pruner: pruner.add_batch(args[0], out)
        )
        for name, pruner in pruners.items()
    ]
    for state in states:
        layer(state, position_ids=positions)
    for hook in hooks:
        hook.remove()
    for name, pruner in pruners.items():
        pruner.prune(sp_fc=ratios[name], sp_out=ratios[name])
        pruner.free()
    mlp, attention = layer.mlp, layer.self_attn
    kept = (mlp.down_proj.weight != 0).any(0)
    resize([mlp.gate_proj, mlp.up_proj], mlp.down_proj, kept)
    kept = (attention.o_proj.weight != 0).any(0)
    resize([attention.q_proj], attention.o_proj, kept)
    first = kept.view(config.num_key_value_heads, -1)[:, : attention.head_dim].reshape(-1)
    resize([attention.k_proj, attention.v_proj], None, first)
    tell_heads(attention)


def resize(makers: list[nn.Linear], user: nn.Linear | None, kept: Tensor) -> None:
    """Keep some units: rows of the linears that make them, columns of the one that uses them."""
    for linear in makers:
        linear.weight = nn.Parameter(linear.weight[kept].contiguous())
    if user is not None:
        user.weight = nn.Parameter(user.weight[:, kept].contiguous())


def osscar_heads(task: Task, level: float) -> Result:
    return osscar(task, level, groups=1)


def dense(task: Task, level: float) -> Result:
    return load_model(task.model), {}


RIVALS: dict[str, Callable[[Task, float], Result]] = {
    "dense": dense,
    "shortgpt": shortgpt,
    "sleb": sleb,
    "slicegpt": slicegpt,
    "flap": flap,
    "llm-pruner": llm_pruner,
    "osscar": osscar,
    "osscar-heads": osscar_heads,
}
