"""The layer behind `lora`: peft's adapter of a linear with the mask inside the product.

It has its own module because the class needs peft, which is optional.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.nn import functional


class MaskedAdapter(Linear):
    """x · ((W₀ + scaling · B A) ⊙ M)ᵀ + bias for a linear or a Conv1D.

    peft merges and unmerges the result of `get_delta_weight`, so its methods keep the zeros too.

    Args:
        base_layer: the pruned linear; its zeros are the mask.
        adapter_name: the name of the adapter.
        config: peft's configuration.
        **kwargs: the arguments that peft passes to its own layers.
    """

    kept: Tensor

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        kept = base_layer.get_parameter("weight").detach() != 0
        self.register_buffer("kept", kept, persistent=False)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the product to add to the stored weight. It is zero where the weight is pruned."""
        delta = super().get_delta_weight(adapter)
        return torch.where(self.kept, delta, torch.zeros_like(delta))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of the masked sum, [..., out]. Every forward computes the product."""
        base = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return base
        added = base
        for name in self.active_adapters:
            delta = self.get_delta_weight(name)
            rows = delta.t() if self.fan_in_fan_out else delta
            inputs = self.lora_dropout[name](x.to(rows.dtype))
            added = added + functional.linear(inputs, rows)
        return added.to(base.dtype)
