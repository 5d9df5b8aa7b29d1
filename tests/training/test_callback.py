"""Zeros inside other people's trainers: transformers' Trainer, TRL, peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import launched
from learning import SEQUENCES, pruned_model, zeros
from safetensors.torch import load_file
from slow import slow_but
from torch.distributed.fsdp import FullyShardedDataParallel
from zoo import CONFIGS

import secateur
from secateur.errors import RecipeError, VerificationError
from secateur.models.skeleton import quiet_transformers
from secateur.training.masks import Masks

DATA = [{"input_ids": row, "labels": row} for row in SEQUENCES]


class Filler(transformers.TrainerCallback):
    """Breaks one zero after every step, as an average of weights would."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        weight = given["model"].get_parameter(self.name).data
        weight[tuple((weight == 0).nonzero()[0])] = 1.0


def dense_model() -> Any:
    """The model before pruning."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]())


def trainer_of(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    """transformers' Trainer on a CPU, two steps."""
    args = transformers.TrainingArguments(
        str(folder),
        **{
            "use_cpu": True, "report_to": [], "max_steps": 2, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
            "dataloader_pin_memory": False, "seed": 0, **options,
        },
    )  # fmt: skip
    return transformers.Trainer(model, args, train_dataset=DATA, callbacks=list(callbacks))


def kept_and_lost(before: dict[str, Any], after: dict[str, Any]) -> tuple[int, int]:
    """How many zeros are still there, and how many are not."""
    kept = sum(int((after[name][gone] == 0).sum()) for name, gone in before.items())
    return kept, sum(int(gone.sum()) for gone in before.values()) - kept


MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3, "weight_decay": 0.1},
    "mixed precision": {"bf16": True, "optim": "adamw_torch"},
    "other optimizer": {"optim": "adafactor"},
    "checkpointing": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("mode", slow_but({"plain", "accumulated"}, MODES))
def test_the_trainer_keeps_every_zero_with_the_callback_alone(mode: str, tmp_path: Path) -> None:
    model = pruned_model()
    gone, before = zeros(model), {n: p.clone() for n, p in model.named_parameters()}
    callback = secateur.SecateurCallback()
    trainer = trainer_of(model, tmp_path / "held", callback, **MODES[mode])
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "held" / "model.safetensors")
    assert kept_and_lost(gone, saved) == (sum(int(x.sum()) for x in gone.values()), 0)
    moved = [name for name in gone if not torch.equal(saved[name], before[name])]
    assert len(moved) == len(gone)
    assert callback.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(not p._backward_hooks for p in model.parameters())

    plain = pruned_model()
    trainer_of(plain, tmp_path / "lost", **MODES[mode]).train()
    kept, lost = kept_and_lost(gone, dict(plain.named_parameters()))
    assert lost > 0.95 * (kept + lost)


def test_the_weights_are_those_of_a_masked_step(tmp_path: Path) -> None:
    """SGD by hand, with a norm that counts no pruned weight."""
    model = pruned_model()
    oracle, gone = pruned_model().train(), zeros(model)
    options = {
        "max_steps": 1,
        "optim": "sgd",
        "max_grad_norm": 0.25,
        "lr_scheduler_type": "constant",
    }
    trainer = trainer_of(model, tmp_path, secateur.SecateurCallback(), **options)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    oracle(**batch).loss.backward()
    parameters = dict(oracle.named_parameters())
    for name, zero in gone.items():
        parameters[name].grad[zero] = 0.0
    norm = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.25)
    logged = next(x["grad_norm"] for x in trainer.state.log_history if "grad_norm" in x)
    assert logged == pytest.approx(float(norm), rel=1e-4)
    for name, p in model.named_parameters():
        expected = parameters[name] - 1e-2 * parameters[name].grad
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)


def test_masks_of_a_folder_prune_a_dense_model_and_hold(tmp_path: Path) -> None:
    pruned = pruned_model()
    gone = zeros(pruned)
    with quiet_transformers():
        pruned.save_pretrained(tmp_path / "pruned")
    dense = dense_model()
    callback = secateur.SecateurCallback(tmp_path / "pruned")
    trainer_of(dense, tmp_path / "out", callback).train()
    assert kept_and_lost(gone, dict(dense.named_parameters()))[1] == 0
    Masks.of(pruned).save(tmp_path / "masks.safetensors")
    other = dense_model()
    trainer_of(
        other, tmp_path / "again", secateur.SecateurCallback(tmp_path / "masks.safetensors")
    ).train()
    assert kept_and_lost(gone, dict(other.named_parameters()))[1] == 0


def test_moments_of_a_training_without_masks_do_not_come_back(tmp_path: Path) -> None:
    model = pruned_model()
    gone = zeros(model)
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(model, tmp_path, max_steps=2, **options).train()
    Masks({n: ~x for n, x in gone.items()}).apply(model)
    stored = tmp_path / "checkpoint-2" / "model.safetensors"
    with quiet_transformers():
        model.save_pretrained(stored.parent)
    again = trainer_of(
        pruned_model(), tmp_path, secateur.SecateurCallback(), max_steps=4, **options
    )
    again.train(resume_from_checkpoint=str(stored.parent))
    assert again.state.global_step == 4
    assert kept_and_lost(gone, dict(again.model.named_parameters()))[1] == 0


@pytest.mark.parametrize("asked", slow_but({"steps"}, ["steps", "epoch"]))
def test_a_model_that_lost_zeros_is_not_saved(asked: str, tmp_path: Path) -> None:
    model = pruned_model()
    name = "model.layers.1.mlp.up_proj.weight"
    callbacks = [secateur.SecateurCallback(), Filler(name)]
    options = {"save_strategy": asked, "save_steps": 1}
    trainer = trainer_of(model, tmp_path, *callbacks, max_steps=1, **options)
    with pytest.raises(VerificationError, match="1 pruned") as raised:
        trainer.train()
    assert raised.value.where == name
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_end_is_checked_even_if_nothing_was_saved(tmp_path: Path) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    fillers = [Filler(name) for name in names]
    trainer = trainer_of(
        pruned_model(), tmp_path, secateur.SecateurCallback(), *fillers, max_steps=1
    )
    with pytest.raises(VerificationError, match="2 pruned") as raised:
        trainer.train()
    assert all(name in str(raised.value.where) for name in names)


def test_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no zeros"):
        trainer_of(dense_model(), tmp_path, secateur.SecateurCallback()).train()
    trainer = trainer_of(pruned_model(), tmp_path, secateur.SecateurCallback())
    trainer.args.deepspeed = {"zero_optimization": {"stage": 3}}
    callback = next(c for c in trainer.callback_handler.callbacks if hasattr(c, "masks"))
    with pytest.raises(RecipeError, match="DeepSpeed"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.args.deepspeed = None
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    torch.nn.Module.__init__(flat)
    trainer.model.add_module("flat", flat)
    with pytest.raises(RecipeError, match="FSDP 1") as raised:
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert "fsdp_version 2" in str(raised.value.remedy)


def adapted_by_peft(model: Any, **options: Any) -> Any:
    """A model with ordinary adapters, as other programs make them."""
    import peft

    names = [n.removesuffix(".weight") for n in zeros(model)]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM", **options
    )
    with quiet_transformers():
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("kind", slow_but([{}], [{}, {"use_dora": True}, {"use_rslora": True}]))
def test_adapters_trained_elsewhere_merge_into_the_zeros(kind: Any, tmp_path: Path) -> None:
    model = pruned_model()
    gone = zeros(model)
    trainer = trainer_of(adapted_by_peft(model, **kind), tmp_path, secateur.SecateurCallback())
    trainer.train()
    trained = {n: p.clone() for n, p in trainer.model.named_parameters()}
    assert any(p.any() for n, p in trained.items() if "lora_B" in n)
    trainer.model.save_pretrained(tmp_path / "adapter")
    merged = secateur.merge(trainer.model)
    after = dict(merged.named_parameters())
    assert kept_and_lost(gone, after)[1] == 0

    import peft

    with quiet_transformers():
        naive = peft.PeftModel.from_pretrained(pruned_model(), tmp_path / "adapter")
        naive = dict(naive.merge_and_unload().named_parameters())
    kept, lost = kept_and_lost(gone, naive)
    assert lost > 0.95 * (kept + lost)
    for name, zero in gone.items():  # what is kept is the plain sum
        torch.testing.assert_close(after[name], naive[name].masked_fill(zero, 0.0))


def test_a_base_that_changes_under_adapters_is_noticed(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    trainer = trainer_of(
        adapted_by_peft(pruned_model()), tmp_path, secateur.SecateurCallback(), Filler(name)
    )
    with pytest.raises(VerificationError, match="2 pruned") as raised:
        trainer.train()
    assert raised.value.where == "model.layers.0.mlp.up_proj.base_layer.weight"
    adapted = adapted_by_peft(pruned_model())
    with pytest.raises(RecipeError, match="masks"):
        trainer_of(adapted, tmp_path, secateur.SecateurCallback(tmp_path)).train()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_trl_fine_tunes_a_pruned_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset
    from tiny import tiny_tokenizer

    model = pruned_model()
    gone = zeros(model)
    data = Dataset.from_dict({"text": ["the quick brown fox jumps"] * 16})
    args = trl.SFTConfig(
        str(tmp_path), use_cpu=True, report_to=[], max_steps=1, learning_rate=1e-2,
        per_device_train_batch_size=4, save_strategy="no", bf16=False, max_length=16,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, args, train_dataset=data, processing_class=tiny_tokenizer(),
        callbacks=[secateur.SecateurCallback()],
    )  # fmt: skip
    trainer.train()
    assert kept_and_lost(gone, dict(model.named_parameters()))[1] == 0
    plain = pruned_model()
    trl.SFTTrainer(plain, args, train_dataset=data, processing_class=tiny_tokenizer()).train()
    kept, lost = kept_and_lost(gone, dict(plain.named_parameters()))
    assert lost > 0.9 * (kept + lost)


@pytest.mark.slow
def test_two_processes_keep_every_zero(tmp_path: Path) -> None:
    """DDP in the Trainer; FSDP 2 through the same hooks."""
    ended = launched(2, Path(__file__).with_name("callback_run.py"), tmp_path)
    assert ended.code == 0, ended.err[-4000:]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    gone, before = zeros(pruned_model()), dict(pruned_model().named_parameters())
    assert kept_and_lost(gone, saved)[1] == 0
    assert not torch.equal(saved[next(iter(gone))], before[next(iter(gone))])
