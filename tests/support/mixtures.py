"""A tiny mixture of experts that has really learned three kinds of documents, letter by letter.

The text is the standard library of the Python that runs this, and one file in ten is held out:

- `code`: the sources, without comments and docstrings;
- `prose`: the docstrings;
- `records`: one line of JSON for each function: module, name, arguments, number of the line.

The form is that of Qwen3-30B-A3B, made small: four layers of 16 experts, four for a token,
normalised weights of the chosen experts, and a loss that balances the experts of each layer. The
loss of transformers 5.24 adds up the tokens of an expert's number over all layers first, so it
allows that an expert has nearly none in one layer and very many in another.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tiny import CHARACTERS, SPECIAL, saved
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trained import LENGTH, OnStep, source_files, train
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

from secateur.models.tokenizer import byte_letters

LAYERS, EXPERTS, CHOSEN, KINDS = 4, 16, 4, ("code", "prose", "records")
BALANCE = 0.01
"""The weight of the loss that balances experts, as in OLMoE and Switch."""
LETTERS = 400_000
"""Of each kind that are trained on; shorter texts are repeated."""


@cache
def documents(held_out: bool = False) -> dict[str, Tensor]:
    """The token ids of each kind of text; one character is one token."""
    ids = {c: i for i, c in enumerate([*SPECIAL, *CHARACTERS])}
    texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for file in source_files(held_out):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts["prose"] += docstrings(tree)
        texts["records"] += records(file.stem, tree)
        texts["code"].append(ast.unparse(tree))
    joined = {"code": "\n\n", "prose": "\n\n", "records": "\n"}
    return {
        kind: torch.tensor([ids[c] for c in joined[kind].join(texts[kind]) if c in ids])
        for kind in KINDS
    }


def docstrings(tree: ast.Module) -> Iterator[str]:
    """The docstrings of a module; they are taken out of it."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                node.body[:1] = [ast.Pass()]
                yield inspect.cleandoc(text)


def records(module: str, tree: ast.Module) -> Iterator[str]:
    """A line of JSON for each function; without braces, which are no tokens."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.args]
            yield json.dumps([module, node.name, names, node.lineno])


def training_ids() -> Tensor:
    """As much text of each kind."""
    parts = documents().values()
    return torch.cat([x.repeat(-(-LETTERS // len(x)))[:LETTERS] for x in parts])


def windows_of(held_out: bool, each: int, seed: int = 0) -> dict[str, Tensor]:
    """Windows [each, length] of each kind that do not overlap, drawn at random."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for kind, ids in documents(held_out).items():
        cut = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        found[kind] = cut[torch.randperm(len(cut), generator=generator)[:each]]
    return found


class Balanced(nn.Module):
    """A mixture whose loss also has E · Σ_i f_i · P_i for each layer, times `BALANCE`.

    E is the number of experts, f_i the share of the tokens that are sent to expert i, P_i the mean
    of its probability.
    Paper: Fedus et al. 2021, "Switch Transformers", arXiv:2101.03961, equations 4 to 6.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        out = self.model(**inputs, output_router_logits=True)
        for logits in out.router_logits:
            chances = logits.float().softmax(-1)
            chosen = chances.topk(CHOSEN, dim=-1).indices.flatten()
            share = torch.bincount(chosen, minlength=EXPERTS) / len(chances)
            out.loss = out.loss + BALANCE * EXPERTS * (share * chances.mean(0)).sum()
        return out


def untrained_mixture(seed: int) -> Any:
    """393 000 of its 453 000 weights are those of experts."""
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=256, num_experts=EXPERTS, num_experts_per_tok=CHOSEN,
        norm_topk_prob=True, router_aux_loss_coef=0.0, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("grouped_mm")
    return model


def trained_mixture(seed: int, steps: int, on_step: OnStep | None = None) -> Any:
    """The same, trained on all three kinds of text.

    Args:
        seed: of the weights and of the windows.
        steps: of the training.
        on_step: a hook.
    """
    model = untrained_mixture(seed)
    train(Balanced(model), training_ids(), seed=seed, steps=steps, on_step=on_step)
    return model


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter, as byte-level BPE, which llama.cpp knows. It needs a merge."""
    letters, merge = byte_letters(), ("Q", "Z")
    known = {letters[ord(c)]: i for i, c in enumerate(CHARACTERS, len(SPECIAL))}
    *special, _ = SPECIAL
    vocabulary = {name: i for i, name in enumerate([*special, "".join(merge)])}
    inner = Tokenizer(models.BPE(vocabulary | known, [merge]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")


def save_mixture(model: Any, folder: Path) -> Path:
    """A checkpoint with its tokenizer."""
    saved(model, folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def window_losses(model: Any, windows: Tensor) -> Tensor:
    """Nats per character of each window: [windows]."""
    found = []
    for batch in windows.split(128):
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        each = cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
        found.append(each.mean(1))
    return torch.cat(found)
