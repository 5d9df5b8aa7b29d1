"""What the pages of the documentation take as given: folders and files, and names of Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from gguf_models import byte_level
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from trained import source_text

import secateur
from secateur.models.skeleton import quiet_transformers
from secateur.progress import Silent
from secateur.recipes.train import GradualOptions
from secateur.sparsity.schedules import schedules
from secateur.training.batches import Batches
from secateur.training.gradual import GradualPruning
from secateur.training.lora import attach
from secateur.training.masks import open_masks
from secateur.training.objectives import next_token
from secateur.training.training_plan import TrainingPlan

TEXTS = ("TEXT.txt", "text.jsonl", "code.jsonl", "math.jsonl", "wiki.txt")
QUIET: dict[str, Any] = {"progress": Silent()}
SHORT: dict[str, Any] = {"calibration": "TEXT.txt", "windows": 4, "sequence_length": 32, **QUIET}


def write_model(place: str, family: str, layers: int) -> None:
    """A tiny model of a family with a tokenizer for chats; a Llama has so many layers."""
    tokenizer = byte_level()
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    if family == "mixtral":
        sizes |= {"hidden_size": 64, "intermediate_size": 32}
    elif family == "llama":
        sizes |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
        sizes |= {"head_dim": 16}
    save_tiny(Path(place), family, tokenizer=False, **sizes)
    tokenizer.chat_template = "{% for one in messages %}{{ one.content }}\n{% endfor %}"
    with quiet_transformers():
        tokenizer.save_pretrained(place)


def write_texts() -> None:
    """The texts that pages name, and one to judge on."""
    text = source_text()
    for number, name in enumerate(TEXTS):
        part = text[number * 40_000 : (number + 1) * 40_000]
        if name.endswith(".jsonl"):
            part = json.dumps({"text": part}) + "\n"
        Path(name).write_text(part, encoding="utf-8")
    lines = text.splitlines()[:800]
    chats = [
        [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        for one, other in zip(lines[::2], lines[1::2], strict=True)
        if one.strip() and other.strip()
    ]
    rows = [json.dumps({"messages": chat}) for chat in chats]
    Path("chats.jsonl").write_text("\n".join(rows), encoding="utf-8")
    Path("HELD-OUT.txt").write_text(source_text(held_out=True)[:20_000], encoding="utf-8")


def prune_to(output: str) -> None:
    secateur.prune("MODEL", output=output, method="wanda", pattern="2:4", **SHORT)


def copy_to(output: str) -> None:
    shutil.copytree("MODEL", output)


def compress_to(output: str) -> None:
    made("PRUNED")
    secateur.compress("PRUNED", output=output, values="int4", group_size=32, **QUIET)


def cut_to(output: str) -> None:
    secateur.structure("MODEL", output=output, keep_layers=3, **SHORT)


def write_masks(output: str) -> None:
    made("PRUNED")
    weights = load_file("PRUNED/model.safetensors")
    save_file({n: x != 0 for n, x in weights.items() if n.endswith("proj.weight")}, output)


def write_adapter(output: str) -> None:
    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(output)


def sweep_to(output: str) -> None:
    text = {"calibration": "TEXT.txt", "windows": 4, "sequence_length": 32}
    judged = {"text": ["HELD-OUT.txt"], "text_sequence_length": 32, "text_windows": 4}
    points = {"methods": ["magnitude"], "sparsities": [0.5]}
    secateur.sweep("MODEL", output=output, **points, **text, **judged, **QUIET)


def write_facts(output: str) -> None:
    mine = {"name": "mine", "kind": "cuda", "memory_gib": 24, "bandwidth_gb_s": 900}
    mine |= {"tflops": {"bf16": 150}, "usd_per_hour": [0.1, 0.2, 0.3], "price_source": "mine"}
    Path(output).write_text(yaml.safe_dump({"hardware": {"mine": mine}}), encoding="utf-8")


MAKERS: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(("PRUNED", "DIR", "SOURCE", "OLD"), prune_to),
    **dict.fromkeys(("DENSE", "REF"), copy_to),
    "MIXTURE": lambda output: write_model(output, "mixtral", 0),
    "SMALL": compress_to,
    "CUT": cut_to,
    "MASKS.safetensors": write_masks,
    "ADAPTER": write_adapter,
    "SWEEP": sweep_to,
    "mine.yaml": write_facts,
}


def made(place: str) -> None:
    """Make what a page takes as given, unless it is there."""
    first = place.split("/")[0]
    if first in MAKERS and not Path(first).exists():
        MAKERS[first](first)


def names(source: str) -> dict[str, Any]:
    """What Python blocks take as given; their model is that of a folder."""
    made("PRUNED")
    with quiet_transformers():
        model, dense, pruned = (
            transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
            for place in (source, "MODEL", "PRUNED")
        )
    windows = torch.arange(8 * 16).view(8, 16).remainder(23) + 4
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    inputs = torch.randn(96, weight.shape[1], generator=torch.Generator().manual_seed(0))
    held = torch.ones_like(weight, dtype=torch.bool)
    held[:, ::2] = False
    return {
        "secateur": secateur,
        "peft": peft,
        "model": model,
        "dense": dense,
        "pruned": pruned,
        "folder": Path("MODEL"),
        "output": Path("cut"),
        "weight": weight,
        "mask": held,
        "gram": inputs.T @ inputs,
        "windows": windows,
        "batches": Batches(windows, 2, seed=0),
        "held_out": windows[:2],
        "objective": next_token(model),
        "plan": TrainingPlan(steps=2),
        "how": GradualOptions(every=1, end=0.75),
        "schedules": schedules,
        "data": [{"input_ids": row, "labels": row} for row in windows],
        "args": transformers.TrainingArguments(
            "trained", use_cpu=True, report_to=[], max_steps=1, save_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False,
        ),
        "open_masks": open_masks,
        "GradualPruning": GradualPruning,
        "attach": attach,
    }  # fmt: skip
