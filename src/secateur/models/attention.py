"""Replaces the attention function of a model within a context; no family is changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


class OtherAttention(TorchFunctionMode, ABC):
    """Within this context `attend` replaces torch's attention for the calls that it `takes`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every other function on."""
        named = kwargs or {}
        if func is scaled_dot_product_attention and self.takes(named):
            return self.attend(*args, **named)
        return func(*args, **named)

    def takes(self, options: dict[str, Any]) -> bool:
        """Whether a call with these options is replaced."""
        return True

    @abstractmethod
    def attend(self, *args: Any, **options: Any) -> Tensor:
        """The output; arguments as of `scaled_dot_product_attention`."""
