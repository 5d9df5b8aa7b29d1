"""vLLM loads compressed folders of secateur, and models whose layers differ in size.

    vllm serve FOLDER --load-format secateur

vLLM finds `register` by its entry points and calls it in every process that it starts. This folder
is the only place of secateur that imports vllm.
"""

from __future__ import annotations

__all__ = ["LOAD_FORMAT", "register"]

LOAD_FORMAT = "secateur"
"""What `load_format` must be. vLLM's own loader does not know our files."""


def register() -> None:
    """Tell vLLM how to read our folders; more than one call does no harm."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.model_loader import register_model_loader

    from secateur.models.varied import MODEL_TYPE
    from secateur.plugins.vllm.packed import FolderLoader, PackedQuantization
    from secateur.plugins.vllm.sizes import ARCHITECTURE, VariedSizes
    from secateur.runtime.packed import QUANT_METHOD

    register_quantization_config(QUANT_METHOD)(PackedQuantization)
    register_model_loader(LOAD_FORMAT)(FolderLoader)
    AutoConfig.register(MODEL_TYPE, VariedSizes, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "secateur.plugins.vllm.varied:VariedDecoder")
