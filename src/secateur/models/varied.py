"""A model whose layers differ in size, or lack a sub-block: any class of transformers, resized.

This file imports only transformers and torch. Importing secateur registers it with the Auto
classes. A copy of it is stored with the weights as the model's own code, so that transformers
without secateur loads the folder with `trust_remote_code=True`.

`config.json` is that of the base class, which is built first. Its entry `secateur_cut` lists the
differences of the model:

    base_model_type   the model type of the base class
    secateur_cut
      shapes          {module, parameter or buffer: the shape of its weight, as it is stored}
      attributes      {module: {attribute: value}}; `config.x` is what the module reads as config.x
      absent          {module: "attention" | "ffn" | "norm"}
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

MODEL_TYPE = "secateur_varied"
FILE_NAME = "modeling_secateur_varied.py"
"""The name of the copy of this file in a model's folder."""

CACHES = ("cache", "past_key_values", "layer_past")
"""The names of the cache among the arguments of decoder layers."""


class VariedConfig(PreTrainedConfig):
    """Placeholder for the configuration of any varied model until its base class is known."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration, as a subclass of the base class's configuration."""
        return varied_classes(config_dict["base_model_type"])[0].from_dict(config_dict, **kwargs)


class VariedForCausalLM:
    """Placeholder for the class of any varied model until its base class is known."""

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any, **kwargs: Any) -> Any:
        """The model in a folder."""
        model_class = varied_classes(config.base_model_type)[1]
        return model_class.from_pretrained(*args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return varied_classes(config.base_model_type)[1]._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Does nothing, because a varied model saves its own code."""


@cache
def varied_classes(base_model_type: str) -> tuple[Any, Any]:
    """Configuration and class of varied models of one type, registered with the Auto classes."""
    # Imported here, because transformers imports this file while it is still importing this class.
    from transformers import AutoModelForCausalLM

    base_config: Any = type(AutoConfig.for_model(base_model_type))
    base_model: Any = AutoModelForCausalLM._model_mapping[base_config]
    config_class = type(
        f"Varied{base_config.__name__}",
        (base_config,),
        {"model_type": MODEL_TYPE, "__module__": __name__},
    )
    model_class = type(
        f"Varied{base_model.__name__}",
        (Varied, base_model),
        {"config_class": config_class, "__module__": __name__},
    )
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    _read_as_the_base(base_model, base_model_type, model_class)
    return config_class, model_class


def _read_as_the_base(base_model: Any, base_model_type: str, model_class: Any) -> None:
    """Convert stored names as for the base class, for example fuse experts stored one by one."""
    from transformers import conversion_mapping

    known = conversion_mapping.get_checkpoint_conversion_mapping
    conversion = known(base_model.__name__) or known(base_model_type)
    if conversion is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(
            model_class.__name__, conversion, overwrite=True
        )


class Varied:
    """Comes before the base class: builds its model, then resizes it."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _resize(self, config, config.secateur_cut)

    def save_pretrained(self, folder: Any, *args: Any, **kwargs: Any) -> None:
        """Save like the base class, and copy this file to the folder."""
        super().save_pretrained(folder, *args, **kwargs)
        shutil.copyfile(__file__, Path(folder) / FILE_NAME)


def _resize(model: Any, config: Any, differences: Mapping[str, Any]) -> None:
    """Give the modules of a built model their own sizes."""
    for path, kind in differences.get("absent", {}).items():
        old = model.get_submodule(path)
        stand_ins = {"attention": NoAttention(getattr(old, "layer_idx", 0)), "ffn": NoOutput()}
        model.set_submodule(path, stand_ins.get(kind, nn.Identity()))
    for path, shape in differences.get("shapes", {}).items():
        _reshape(model, path, tuple(shape))
    for path, values in differences.get("attributes", {}).items():
        module = model.get_submodule(path)
        # all modules share the configuration, so a module that reads a size there gets its own
        read = {n.removeprefix("config."): v for n, v in values.items() if n.startswith("config.")}
        if read:
            module.config = OwnConfig(config, read)
        for name, value in values.items():
            if not name.startswith("config."):
                setattr(module, name, value)
    model.tie_weights()


def _reshape(model: Any, path: str, shape: tuple[int, ...]) -> None:
    """Give the weight and bias of a module, or a parameter or a buffer, another shape."""
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in {**module._parameters, **module._buffers}:
        leaves = {leaf: shape}
    else:
        module = model.get_submodule(path)
        leaves = {"weight": shape}
        if getattr(module, "bias", None) is not None:
            leaves["bias"] = shape[-1:] if isinstance(module, Conv1D) else shape[:1]
        _name_sizes(module, shape)
    for name, size in leaves.items():
        old = getattr(module, name)
        made = torch.empty(size, dtype=old.dtype, device=old.device)
        setattr(module, name, made if name in module._buffers else nn.Parameter(made))
    model._init_weights(module)


def _name_sizes(module: Any, shape: tuple[int, ...]) -> None:
    """Set the size attributes of modules of torch and transformers."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = shape


class NoAttention(nn.Module):
    """Replaces a removed attention sub-block: adds nothing, and counts the tokens.

    transformers computes positions and masks of the whole model from the cache of the first layers.
    So this module caches one byte for keys and one for values of every token.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Zeros."""
        past = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        if past is not None:
            batch, tokens = hidden_states.shape[:2]
            counted = hidden_states.new_zeros(batch, 1, tokens, 1, dtype=torch.int8)
            past.update(counted, counted, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoOutput(nn.Module):
    """Replaces a removed feed-forward sub-block: adds nothing."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros."""
        return torch.zeros_like(hidden_states)


class OwnConfig:
    """The configuration of the model, with a few values that differ for one module."""

    def __init__(self, config: Any, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)
        self.__dict__["_of_the_model"] = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of_the_model"], name)


AutoConfig.register(MODEL_TYPE, VariedConfig, exist_ok=True)
