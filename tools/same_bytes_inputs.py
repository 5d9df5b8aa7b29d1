"""What the command lines of `same_bytes.yaml` start from: tiny models, texts, recipes, mistakes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

__all__ = ["loaded_values", "make_inputs", "mistakes"]


def make_inputs(place: Path, families: Sequence[str]) -> None:
    """Write everything to a folder that does not exist."""
    from at_rest import in_float8
    from cases import CASES, filled, make_sources
    from task_rows import write_task
    from tiny import save_tiny
    from tokenizers_of_kinds import save_tokenizer

    make_sources(place)
    for family in families:
        save_tiny(place / family, family)
    vocabulary = len(save_tokenizer(place / "pieces", "byte-level"))
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    save_tiny(place / "pieces", tokenizer=False, vocab_size=vocabulary, **wide)
    in_float8(place / "float8", "llama")
    for task in ("hellaswag", "boolq"):
        write_task(place / "tasks", task, 4)
    steps = filled(CASES["chain"].options, {"{sources}": str(place)})
    recipe = {"model": str(place / "dense"), **steps}
    (place / "chain.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    make_adapter(place / "pruned", place / "adapter")
    make_mistakes(place / "mistakes")


def make_adapter(model: Path, folder: Path) -> None:
    """An adapter of peft with random weights."""
    import peft
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(loaded, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(str(folder))


def make_mistakes(place: Path) -> None:
    """The folder in which the mistakes of `tests/inputs/test_mistakes.py` are made."""
    from test_mistakes import SENTENCES
    from tiny import save_tiny

    from secateur import compress, prune

    save_tiny(place / "m")
    save_tiny(place / "plain", tokenizer=False)
    prune(place / "m", output=place / "sparse", method="magnitude", sparsity=0.5)
    compress(place / "sparse", output=place / "packed", values="int8")
    texts = {
        "t.txt": SENTENCES, "t.jsonl": json.dumps({"text": SENTENCES}), "short.txt": "Hi.",
        "empty.txt": "", "picture.png": "\x89PNG", "typo.yaml": "model: m\nsparsty: 0.5\noutput: o",
        "indented.yaml": "model: m\nmethod: wanda\n  sparsity: 0.5\n", "mine/mine.txt": "precious",
    }  # fmt: skip
    (place / "mine").mkdir()
    for name, text in texts.items():
        (place / name).write_text(text, encoding="latin-1")


def mistakes() -> list[str]:
    """Command lines that are refused."""
    from test_mistakes import MISTAKES

    return list(MISTAKES)


def loaded_values(place: Path) -> None:
    """Print what the functions without a command line give."""
    import secateur

    tokens = torch.arange(3, 19)[None]
    found = {
        name: str(secateur.load(place / name)(tokens).logits.sum(-1).tolist())
        for name in ("small", "pruned")
    }
    for name in ("scores", "solvers", "refinements", "allocations"):
        found[name] = str([*getattr(secateur, name)])
    found["composed"] = str(secateur.compose("wanda", "2:4"))
    print(json.dumps(found))
