"""A Llama whose layers differ in size, or lack attention or FFN, in vLLM."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.nemotron_nas import DeciLMDecoderLayer, DeciLMForCausalLM, DeciModel


class VariedLayer(DeciLMDecoderLayer):
    """A decoder layer with its own number of query heads.

    vLLM's layer has its own KV heads and neurons already. In a first layer it needs attention.
    """

    def __init__(self, config: Any, layer_idx: int, *args: Any, **kwargs: Any) -> None:
        own = copy.copy(config)
        heads = config.block_configs[layer_idx].attention.heads
        # vLLM's layer reads the number of query heads from the configuration of the whole model
        own.num_attention_heads = heads or config.num_attention_heads
        super().__init__(own, layer_idx, *args, **kwargs)

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As in vLLM: the output of the last sub-block, and the residual stream before it."""
        if residual is None and self._is_no_op_attention:
            if self._is_no_op_ffn:
                return hidden_states, None
            # vLLM's code has no branch for a first layer without attention: no residual stream yet
            normed = self.post_attention_layernorm(hidden_states)
            return self.mlp(normed), hidden_states
        found: tuple[Tensor, Tensor] = super().forward(positions, hidden_states, residual)
        return found


class VariedDecoder(DeciLMForCausalLM):
    """The whole model."""

    def _init_model(self, vllm_config: Any, prefix: str = "") -> torch.nn.Module:
        model: torch.nn.Module = DeciModel(
            vllm_config=vllm_config, prefix=prefix, layer_type=VariedLayer
        )
        return model
