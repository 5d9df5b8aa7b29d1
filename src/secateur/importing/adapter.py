"""Adapters that peft trained elsewhere, merged into a pruned model with its zeros."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from secateur.errors import CheckpointError, RecipeError, SecateurError, SourceError, first_line
from secateur.models.checkpoint import CheckpointReader, read_header, refuse_not_finite
from secateur.models.opening import load_whole
from secateur.models.skeleton import StoredModel, build_skeleton, quiet_transformers
from secateur.training.lora import merge, need_peft

WEIGHTS = "adapter_model.safetensors"


class MergedReader(CheckpointReader):
    """Reads the tensors of a model with an adapter merged into it, zeros kept.

    The whole model is in memory in float32, and the sum is rounded once to the stored dtype.

    Args:
        folder: the pruned model.
        adapter: the folder of the adapter, as peft saves it.

    Attributes:
        kind: what peft calls this kind of adapter.

    Raises:
        SourceError: there is no adapter.
        CheckpointError: it is a pickle, damaged, or of another model.
        NumericalError: its weights are NaN or infinite.
        RecipeError: peft is not installed.
    """

    def __init__(self, folder: Path, adapter: Path) -> None:
        stored = CheckpointReader(folder)
        self.folder, self.files, self.entries = folder, stored.files, stored.entries
        self.stored = stored
        _check_adapter(adapter)
        refuse_not_finite([adapter / WEIGHTS])
        peft = need_peft()
        model = load_whole(folder, torch.device("cpu"), dtype=torch.float32)
        skeleton = build_skeleton(folder, opened=False)
        try:
            with warnings.catch_warnings(), quiet_transformers():
                # peft only warns of keys that the adapter lacks
                warnings.filterwarnings("error", message=".*missing adapter keys.*")
                warnings.filterwarnings("ignore")
                adapted = peft.PeftModel.from_pretrained(model, str(adapter))
            known = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
            _refuse_unknown(adapter, known | adapted.state_dict().keys())
            self.kind = str(adapted.active_peft_config.peft_type.value)
            merged = merge(adapted)
        except (SecateurError, MemoryError):
            raise
        except Exception as error:  # whatever peft raises on a foreign file
            raise _of_another_model(first_line(error)[:300], str(adapter)) from error
        values = dict(merged.named_parameters())
        self.changed = {
            name: tensor.detach() for name, tensor in StoredModel(skeleton, stored).written(values)
        }
        for name, tensor in self.changed.items():
            if tuple(tensor.shape) != self.entries[name].shape:
                raise RecipeError(
                    f"the adapter makes {list(tensor.shape)} of {list(self.entries[name].shape)}",
                    where=name,
                    remedy="resize the embeddings of the model first, as the adapter's did",
                )

    def read(self, name: str) -> Tensor:
        """One tensor, in the stored dtype."""
        if name not in self.changed:
            return self.stored.read(name)
        return self.changed[name].to(self.entries[name].dtype).contiguous()


def _refuse_unknown(adapter: Path, known: set[str]) -> None:
    """Refuse an adapter with tensors that peft left out, which it does without a word."""
    left = sorted(read_header(adapter / WEIGHTS).keys() - known)
    if left:
        raise _of_another_model(f"{len(left)} of its tensors belong to no part of it", left[0])


def _of_another_model(why: str, where: str) -> CheckpointError:
    return CheckpointError(
        f"peft cannot put this adapter on the model: {why}",
        where=where,
        remedy="name the model that the adapter was trained on, pruned",
    )


def _check_adapter(folder: Path) -> None:
    """Refuse a folder that holds no adapter in safetensors."""
    if not (folder / "adapter_config.json").is_file():
        raise SourceError(
            "the folder has no adapter_config.json",
            where=str(folder),
            remedy="name a folder that peft's save_pretrained wrote",
        )
    if not (folder / WEIGHTS).is_file():
        pickled = [p.name for p in folder.glob("adapter_model.*")]
        raise CheckpointError(
            f"the adapter is a pickle ({pickled[0]}), which can run code when loaded"
            if pickled
            else f"there is no {WEIGHTS}",
            where=str(folder),
            remedy="save it again where you trust it: "
            "PeftModel.from_pretrained(model, DIR).save_pretrained(OUT)",
        )
    read_header(folder / WEIGHTS)
