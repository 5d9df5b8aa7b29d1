"""Attention done otherwise than a model asks for it, in a context: no family knows of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

__all__ = ["OtherAttention"]


class OtherAttention(TorchFunctionMode, ABC):
    """While it is entered, `attend` is called instead of torch's attention, if it `takes` that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every other function on."""
        told = kwargs or {}
        if func is scaled_dot_product_attention and self.takes(told):
            return self.attend(*args, **told)
        return func(*args, **told)

    def takes(self, options: dict[str, Any]) -> bool:
        """Whether a call with these options is replaced."""
        return True

    @abstractmethod
    def attend(self, *args: Any, **options: Any) -> Tensor:
        """The output; arguments as of `scaled_dot_product_attention`."""
