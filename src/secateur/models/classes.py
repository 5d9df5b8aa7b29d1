"""Which class of transformers a configuration is loaded with."""

from __future__ import annotations

from typing import Any

from secateur.models.architecture import text_config


def auto_class(config: Any) -> Any:
    """The Auto class of a configuration: for causal language models, or for models that see.

    A model that reads pictures is often no causal language model for transformers, or one without
    its tower for pictures. So the class that the checkpoint was saved with decides.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in AutoModelForImageTextToText._model_mapping or own_code:
        return AutoModelForCausalLM
    seeing = str(getattr(AutoModelForImageTextToText._model_mapping[type(config)], "__name__", ""))
    saved = getattr(config, "architectures", None) or [seeing]
    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if saved[0] == seeing or not known else AutoModelForCausalLM


def text_part(config: Any) -> str | None:
    """The name of the part of a configuration that describes the decoder; None where all of it."""
    text = text_config(config)
    if text is config:
        return None
    return next(name for name in config.sub_configs if getattr(config, name, None) is text)
