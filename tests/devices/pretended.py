"""Devices "cuda" whose tensors are computed on the CPU: values are real, only the place is not.

A tensor of such a device says that it lies on cuda:0 or cuda:1, to Python and to torch's C++ alike,
and keeps its numbers in a CPU tensor inside. So all that depends on the device takes the way it
takes on a GPU: `is_cpu`, autocast, the kernels chosen by device. And what a GPU refuses is refused:
tensors of two devices in one operation, and `numpy()`.

What a GPU would be asked to do is counted: launches, waits and bytes that cross (`counted`), and
the bytes of the storages that live (`torch.cuda.memory_allocated`).

torch's FakeTensorMode has the same rules but no numbers, and stops at the first `if mask.any()`,
which nearly every solver has. `test_the_rules_are_those_of_fake_tensors` compares the two.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from secateur.runtime.kernels import linear

aten = torch.ops.aten
CPU = torch.device("cpu")
GIB = 2**30
HOUSE = str(Path("src", "secateur"))

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


UNLAUNCHED = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.set_.source_Storage_storage_offset,
    aten._local_scalar_dense.default,
}
"""Nothing runs on the GPU in them; views are like them, and a copy of one number is a wait."""


class OnCuda(Tensor):
    """A tensor that says it lies on a GPU; its numbers are in `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> OnCuda:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
        )
        made.inner = inner
        outer = made.untyped_storage()
        homes[outer._cdata] = inner.untyped_storage()
        weakref.finalize(outer, homes.pop, outer._cdata, None).atexit = False
        memory[device.index].hold(inner.untyped_storage())
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func == torch.Tensor.data.__set__:
                return set_data(*args)
            if func == functional.scaled_dot_product_attention and not torch.is_grad_enabled():
                if torch.is_autocast_enabled("cuda"):
                    rough = torch.get_autocast_dtype("cuda")
                    args = (*(x.to(rough) for x in args[:3]), *args[3:])
                return run(aten.scaled_dot_product_attention.default, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    def tolist(self) -> Any:
        note_wait("tolist", self.inner.nbytes)
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


@dataclass
class Traffic:
    """What the host made the GPUs do.

    Attributes:
        launches: operations that run there.
        waits: how often the host waited for them.
        up: bytes that went there.
        down: bytes that came back.
        lines: the lines of our code, by what they did.
    """

    launches: int = 0
    waits: int = 0
    up: int = 0
    down: int = 0
    lines: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, what: str, count: int = 1) -> None:
        """Count something, and the line of our code that asked for it."""
        setattr(self, what, getattr(self, what) + count)
        frame = sys._getframe(2)
        while frame is not None and HOUSE not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is not None:
            place = f"{frame.f_code.co_filename.partition(HOUSE)[2][1:]}:{frame.f_lineno}"
            self.lines[what, place] += count


traffic: list[Traffic] = []
"""The counts that are open."""


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count launches, waits and bytes inside."""
    traffic.append(Traffic())
    try:
        yield traffic[-1]
    finally:
        traffic.pop()


def note(what: str, count: int = 1) -> None:
    """Add to all counts that are open."""
    for each in traffic:
        each.note(what, count)


def note_wait(what: str, down: int = 0) -> None:
    """The host waits, and some bytes come back."""
    waits.append(what)
    note("waits")
    note("down", down)


@dataclass
class Memory:
    """The storages of a GPU that live, and the most bytes that lived at a time."""

    live: int = 0
    peak: int = 0
    known: dict[int, int] = field(default_factory=dict)

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until nothing refers to it."""
        key = storage._cdata
        if key not in self.known:
            self.known[key] = 0
            weakref.finalize(storage, self.release, key).atexit = False
        self.resize(key, storage.nbytes())

    def resize(self, key: int, size: int) -> None:
        """A storage that is counted has another size now."""
        self.live += size - self.known[key]
        self.known[key] = size
        self.peak = max(self.peak, self.live)

    def release(self, key: int) -> None:
        self.live -= self.known.pop(key)


memory = (Memory(), Memory())


library = ctypes.CDLL(os.environ["PRETENDED_CUDA"])
"""It keeps the current device of a thread, because torch's C++ asks for it."""


def current() -> int:
    """The number of the device that "cuda" without a number means."""
    return library.current_device()


def exchange(index: int) -> int:
    """Make another device the current one; returns the one before."""
    return library.exchange_device(index) if index >= 0 else current()


def on_gpu(device: Any) -> torch.device | None:
    """The GPU that a device names; None if it names none."""
    named = None if device is None else torch.device(device)
    if named is None or named.type != "cuda":
        return None
    return torch.device("cuda", current()) if named.index is None else named


class Pretending(TorchDispatchMode):
    """Tensors can be made on cuda and moved there while this is entered."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, by the rules of a GPU."""
    flat = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in flat if isinstance(x, OnCuda)]
    device = kwargs.get("device")
    if not there and on_gpu(device) is None:
        return func(*args, **kwargs)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )
    if composite and func is not aten.scaled_dot_product_attention.default:  # one kernel on a GPU
        with Pretending():  # as under no_grad, where it is taken apart before it comes here
            return func.decompose(*args, **kwargs)
    if func.namespace == "secateur":  # an operator of ours is Python, and runs on the device
        with Pretending():
            return getattr(linear, f"_{func._opname}")(*args)
    if func is aten.set_.source_Storage:
        return set_storage(*args)
    if there:
        refuse_mixed(func, args, kwargs)
    target = on_gpu(device) or torch.device(device or there[0].device)
    if func is aten.copy_.default:
        target = args[0].device
    count(func, args, there, target)
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
    same = [x for x in there if x.device == target]
    out = tree_map(lambda x: sharing_storage(x, same, target) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def count(func: Any, args: Any, there: list[Any], target: torch.device) -> None:
    """Count the launch, the wait and the bytes of one operation."""
    if there and (func in WAITING or has_bool_index(func, args)):
        read = there[0].element_size() if func is aten._local_scalar_dense.default else 0
        note_wait(str(func), read)
    elif there and target.type == "cpu":
        note_wait(str(func), there[0].nbytes)
    elif func in CROSSING and not isinstance(args[func is aten.copy_.default], OnCuda):
        note("up", args[func is aten.copy_.default].nbytes)
    if not (func.is_view or func in UNLAUNCHED):
        note("launches")


def sharing_storage(inner: Tensor, others: list[Any], device: torch.device) -> OnCuda:
    """A tensor on cuda; it shares the storage there of those whose numbers it shares here."""
    made = OnCuda(inner, device)
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
    tensors = [x for x in tree_leaves((looked_at, kwargs)) if isinstance(x, Tensor)]
    there = next((x.device for x in tensors if isinstance(x, OnCuda)), None)
    changed = func._schema.is_mutable and args and args[0] is not None
    wrong = [
        x
        for x in tensors
        if x.device != there and (isinstance(x, OnCuda) or x.dim() or (changed and x is args[0]))
    ]
    if there is not None and wrong:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{there} and {wrong[0].device}! ({func}: a tensor {list(wrong[0].shape)})"
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
    memory[storage.device.index].resize(home._cdata, size)
    return storage


_resize = torch.UntypedStorage.resize_


def set_data(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`: torch changes what it knows, and the numbers follow."""
    if isinstance(tensor, OnCuda) != isinstance(value, OnCuda):
        raise RuntimeError("`.data =` cannot move a tensor to another device here")
    torch.Tensor.data.__set__(tensor, value)
    if isinstance(tensor, OnCuda):
        tensor.inner = value.inner


def named(device: Any) -> int:
    """The number of a device as the functions of torch.cuda take it; None is the current one."""
    if isinstance(device, int):
        return device
    found = on_gpu("cuda" if device is None else device)
    assert found is not None
    return found.index


def forget_peak(device: Any = None) -> None:
    """`torch.cuda.reset_peak_memory_stats`."""
    memory[named(device)].peak = memory[named(device)].live


def enter_inference(mode: Any) -> None:
    """`inference_mode` is `no_grad` here: a view of a subclass needs a count of its versions."""
    mode.before = torch.is_grad_enabled()
    torch.set_grad_enabled(mode.before and not mode.mode)


def leave_inference(mode: Any, *_: Any) -> None:
    torch.set_grad_enabled(mode.before)


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """A machine with two GPUs of 80 GiB, of which 64 are free."""
    cuda = "torch.cuda."
    answers: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": current,
        "set_device": lambda device: exchange(named(device)),
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "synchronize": lambda *_: note_wait("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda *_: (64 * GIB, 80 * GIB),
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: (7, 5),  # without kernels that only transformers calls
        "get_device_name": lambda *_: "pretended",
        "manual_seed_all": lambda _: None,
        "manual_seed": lambda _: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "reset_peak_memory_stats": forget_peak,
        "max_memory_allocated": lambda device=None: memory[named(device)].peak,
        "memory_allocated": lambda device=None: memory[named(device)].live,
    }
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") comes by here
    patches = [mock.patch(cuda + name, answer) for name, answer in answers.items()]
    address = safetensors.torch.storage_ptr  # where a tensor lies, for safetensors to find twins
    patches.append(mock.patch("torch.UntypedStorage.resize_", resize_storage))
    patches.append(mock.patch("safetensors.torch.storage_ptr", lambda x: address(unwrapped(x))))
    for name, answer in (("__enter__", enter_inference), ("__exit__", leave_inference)):
        patches.append(mock.patch.object(torch.inference_mode, name, answer))
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
        exchange(0)
        torch.__future__.set_swap_module_params_on_conversion(before)
