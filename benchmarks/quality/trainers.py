"""Training a pruned model in transformers' Trainer: zeros and perplexity of each way.

    python -m benchmarks.quality.trainers PRUNED [--steps 8]

Protocol: the same windows of 256 tokens of BoolQ text in the same order for each way, 4 of them in
a step, AdamW, linear decay, no dropout; float32 weights, bfloat16 autocast where the Trainer does
that. Perplexity of held-out BoolQ text by `secateur.evaluate`, float32 weights, 8 windows of 512
tokens. Adapters: rank 16, alpha 32, on every linear of the decoder layers. Zeros: those of the
pruned model that are still exactly zero.

    weights            all weights, the Trainer alone
    weights, callback  the same with SecateurCallback
    lora, plain merge  peft's adapters, peft's merge
    lora, our merge    the same adapters, secateur.merge
    attach             adapters with the mask in their products, secateur.merge
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from benchmarks.hardware import heading, keep, markdown

import secateur
from secateur.calibration.documents import read_text
from secateur.models.opening import load_whole
from secateur.models.skeleton import quiet_transformers
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.train import LoraOptions
from secateur.training.lora import attach
from secateur.training.masks import Masks

MEASURES = ("src/secateur/training/callback.py", "src/secateur/training/masks.py")
MINUTES = 9

LENGTH, BATCH = 256, 4
CPU = torch.device("cpu")


def windows(folder: Path, count: int) -> list[dict[str, torch.Tensor]]:
    """Windows of the training text."""
    text = read_text("boolq-calibration").text
    ids = torch.tensor(load_tokenizer(folder)(text)["input_ids"][: count * LENGTH])
    return [{"input_ids": row, "labels": row} for row in ids.view(-1, LENGTH)]


def trained(model: Any, data: list[Any], steps: int, rate: float, *callbacks: Any) -> float:
    """Train in place; the seconds it took."""
    args = transformers.TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, bf16=True, report_to=[], max_steps=steps,
        per_device_train_batch_size=BATCH, learning_rate=rate, logging_steps=steps,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
        lr_scheduler_type="linear",
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=list(callbacks))
    return float(trainer.train().metrics["train_runtime"])


def measured(model: Any, source: Path, zeros: dict[str, torch.Tensor]) -> dict[str, float]:
    """The zeros that are left, and the perplexity."""
    parameters = dict(model.named_parameters())
    left = sum(int((parameters[n][gone] == 0).sum()) for n, gone in zeros.items())
    with tempfile.TemporaryDirectory() as place:
        with quiet_transformers():
            model.save_pretrained(place)
            load_tokenizer(source).save_pretrained(place)
        found = secateur.evaluate(place, text="boolq-held-out", sequence_length=512, windows=8)
        assert found.perplexity is not None
    total = sum(int(gone.sum()) for gone in zeros.values())
    return {"zeros_kept": left / total, "perplexity": found.perplexity}


NAMES = {
    "weights": "all weights, the Trainer alone",
    "weights, callback": "all weights, with the callback",
    "lora, plain merge": "peft's LoRA, peft's merge",
    "lora, our merge": "peft's LoRA, `secateur.merge`",
    "attach": "`attach`, `secateur.merge`",
}


def ways(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The zeros that are left, and the perplexity."""
    lines = [
        [NAMES.get(x["way"], x["way"]), f"{x['zeros_kept']:.0%}", f"{x['perplexity']:.2f}"]
        for x in rows
    ]
    return ["way", "zeros kept", "perplexity"], lines


TABLES = {"ways": ways}


def main() -> None:
    """Run all ways and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    data = windows(args.model, args.steps * BATCH)

    def fresh() -> Any:
        return load_whole(args.model, CPU, dtype=torch.float32)

    model = fresh()
    zeros = {name: ~kept for name, kept in Masks.of(model).kept.items()}
    rows = {"pruned, not trained": {**measured(model, args.model, zeros), "seconds": 0.0}}
    for mode, callbacks in {
        "weights": [], "weights, callback": [secateur.SecateurCallback()],
    }.items():  # fmt: skip
        model = fresh()
        seconds = trained(model, data, args.steps, 1e-4, *callbacks)
        rows[mode] = {**measured(model, args.model, zeros), "seconds": seconds}
    names = [name.removesuffix(".weight") for name in zeros]
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM")
    with quiet_transformers(), tempfile.TemporaryDirectory() as place:
        torch.manual_seed(0)
        adapted = peft.get_peft_model(fresh(), config)
        seconds = trained(adapted, data, args.steps, 1e-3, secateur.SecateurCallback())
        adapted.save_pretrained(place)
        plain = peft.PeftModel.from_pretrained(fresh(), place).merge_and_unload()
        rows["lora, plain merge"] = {**measured(plain, args.model, zeros), "seconds": seconds}
        ours = secateur.merge(adapted)
        rows["lora, our merge"] = {**measured(ours, args.model, zeros), "seconds": seconds}
    adapted = attach(fresh(), LoraOptions(rank=16, alpha=32.0))
    seconds = trained(adapted, data, args.steps, 1e-3, secateur.SecateurCallback())
    rows["attach"] = {**measured(secateur.merge(adapted), args.model, zeros), "seconds": seconds}
    found = [{"way": mode, **row} for mode, row in rows.items()]
    protocol = {"model": args.model.name, "steps": args.steps, "batch": BATCH, "length": LENGTH}
    print(heading())
    print(markdown(*ways(found)))
    print(keep("trainers", protocol, found))


if __name__ == "__main__":
    main()
