"""A device "cuda" whose tensors are computed on the CPU: values are real, only the place is not.

A tensor of this device says that it lies on cuda:0, to Python and to torch's C++ alike, and keeps
its numbers in a CPU tensor inside. So all that depends on the device takes the way it takes on a
GPU: `is_cpu`, autocast, the kernels chosen by device. And what a GPU refuses is refused: tensors of
two devices in one operation, and `numpy()`.

torch's FakeTensorMode has the same rules but no numbers, and stops at the first `if mask.any()`,
which nearly every solver has. `test_the_rules_are_those_of_fake_tensors` compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
GIB = 2**30

CROSSING = {aten.copy_.default, aten._to_copy.default}
"""Operations that take tensors of two devices, whatever their sizes."""

INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
"""Their indices may lie on the CPU."""

WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}
"""The host waits for the GPU in them."""


class OnCuda(Tensor):
    """A tensor that says it lies on cuda:0; its numbers are in `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCuda:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )
        made.inner = inner
        homes[made.untyped_storage()._cdata] = inner.untyped_storage()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func == torch.Tensor.data.__set__:
                return set_data(*args)
            return func(*args, **(kwargs or {}))

    def tolist(self) -> Any:
        waits.append("tolist")
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnCuda({self.inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None


homes: dict[int, torch.UntypedStorage] = {}
"""Where the numbers of a storage on cuda are."""

waits: list[str] = []
"""What the host waited for since this was emptied."""


class Pretending(TorchDispatchMode):
    """Tensors can be made on cuda and moved there while this is entered."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, by the rules of a GPU."""
    flat = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in flat if isinstance(x, OnCuda)]
    device = kwargs.get("device")
    if not there and (device is None or torch.device(device).type != "cuda"):
        return func(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with Pretending():  # as under no_grad, where it is taken apart before it comes here
            return func.decompose(*args, **kwargs)
    if func is aten.set_.source_Storage:
        return set_storage(*args)
    if there:
        refuse_mixed(func, args, kwargs)
    target = CUDA if device is None else torch.device(device)
    if func is aten.copy_.default:
        target = CUDA if isinstance(args[0], OnCuda) else CPU
    if there and (func in WAITING or has_bool_index(func, args) or target.type == "cpu"):
        waits.append(str(func))
    inner_args, inner_kwargs = tree_map(unwrapped, (args, kwargs))
    if device is not None and target.type == "cuda":
        inner_kwargs["device"] = CPU
    if inner_kwargs.get("pin_memory"):
        inner_kwargs["pin_memory"] = False
    if func is aten.histc.default and not inner_args[0].is_floating_point():
        out = func(inner_args[0].float(), *inner_args[1:]).to(inner_args[0].dtype)  # a GPU can
    else:
        out = func(*inner_args, **inner_kwargs)
    if func is aten._to_copy.default and out is inner_args[0]:
        out = out.clone()
    if target.type != "cuda":
        return args[0] if func is aten.copy_.default else out
    out = tree_map(lambda x: sharing_storage(x, there) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def sharing_storage(inner: Tensor, others: list[Any]) -> OnCuda:
    """A tensor on cuda; it shares the storage there of those whose numbers it shares here."""
    made = OnCuda(inner)
    for other in others:
        if other.inner.untyped_storage()._cdata == inner.untyped_storage()._cdata:
            place = inner.storage_offset(), inner.size(), inner.stride()
            move_storage(made, other.untyped_storage(), *place)
            break
    return made


def refuse_mixed(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """What a GPU does with tensors of two devices: it takes only single numbers of the CPU.

    Raises:
        RuntimeError: as torch does, and in its words.
    """
    if func in CROSSING:
        return
    looked_at = args
    if func in INDEXING and isinstance(args[0], OnCuda):
        looked_at = (args[0], *args[2:])
    elif func is aten.fill_.Tensor:
        return
    here = [
        x
        for x in tree_leaves((looked_at, kwargs))
        if isinstance(x, Tensor) and not isinstance(x, OnCuda)
    ]
    changed = func._schema.is_mutable and args and args[0] is not None
    wrong = [x for x in here if x.dim() or (changed and x is args[0])]
    if wrong:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and cpu! ({func}: a tensor {list(wrong[0].shape)} is on the CPU)"
        )


def has_bool_index(func: Any, args: Any) -> bool:
    """Whether places are looked up by a mask, whose True entries must be counted first."""
    return func in INDEXING and any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1]
    )


def unwrapped(value: Any) -> Any:
    return value.inner if isinstance(value, OnCuda) else value


def set_storage(tensor: OnCuda, storage: torch.UntypedStorage) -> OnCuda:
    """`tensor.set_(storage)`: all bytes of a storage."""
    tensor.inner = torch.empty(0, dtype=tensor.dtype).set_(homes[storage._cdata])
    move_storage(tensor, storage, 0, tensor.inner.size(), tensor.inner.stride())
    return tensor


def move_storage(tensor: OnCuda, storage: torch.UntypedStorage, *place: Any) -> None:
    """Tell torch where a tensor lies: storage, offset, size and strides."""
    before = torch._C._meta_in_tls_dispatch_include()
    with no_dispatch():
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            aten.set_.source_Storage_storage_offset(tensor, storage, *place)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(before)


def resize_storage(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    """`storage.resize_(size)`."""
    home = homes.get(storage._cdata) if storage.device.type == "cuda" else None
    if home is None:
        return _resize(storage, size)
    assert 0 in (size, home.nbytes()) or size == home.nbytes()
    _resize(home, size)
    return storage


_resize = torch.UntypedStorage.resize_


def set_data(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`: torch changes what it knows, and the numbers follow."""
    if isinstance(tensor, OnCuda) != isinstance(value, OnCuda):
        raise RuntimeError("`.data =` cannot move a tensor to another device here")
    torch.Tensor.data.__set__(tensor, value)
    if isinstance(tensor, OnCuda):
        tensor.inner = value.inner


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """A machine with one GPU of 80 GiB, of which 64 are free."""
    cuda = "torch.cuda."
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (64 * GIB, 80 * GIB),
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: (7, 5),  # without kernels that only transformers calls
        "get_device_name": lambda *_: "pretended",
        "manual_seed_all": lambda _: None,
        "manual_seed": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "reset_peak_memory_stats": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
    }
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") comes by here
    patches = [mock.patch(cuda + name, answer) for name, answer in answers.items()]
    address = safetensors.torch.storage_ptr  # where a tensor lies, for safetensors to find twins
    patches.append(mock.patch("torch.UntypedStorage.resize_", resize_storage))
    patches.append(mock.patch("safetensors.torch.storage_ptr", lambda x: address(unwrapped(x))))
    for patch in patches:
        patch.start()
    try:
        with Pretending():
            yield
    finally:
        for patch in patches:
            patch.stop()
        torch._C._set_only_lift_cpu_tensors(False)
        homes.clear()
        torch.__future__.set_swap_module_params_on_conversion(before)
