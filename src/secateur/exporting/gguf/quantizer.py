"""llama.cpp's own mixes of types, such as q4_k_m, made by its own quantizer.

A mix gives most matrices the type in its name, and some that matter more a larger one. The package
`llama-cpp-py-sync` has the quantizer; it turns a float32 file into one of a mix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf

from secateur.errors import RecipeError, VerificationError, install_extra
from secateur.exporting import Exported
from secateur.exporting.gguf.writing import ENDS, dequantized
from secateur.progress import Progress, each_step

F = gguf.LlamaFileType
MIXES = MappingProxyType(
    {
        kind.name.removeprefix("MOSTLY_").lower(): kind
        for kind in (
            F.MOSTLY_Q6_K, F.MOSTLY_Q5_K_M, F.MOSTLY_Q5_K_S, F.MOSTLY_Q4_K_M, F.MOSTLY_Q4_K_S,
            F.MOSTLY_IQ4_XS, F.MOSTLY_Q3_K_L, F.MOSTLY_Q3_K_M, F.MOSTLY_Q3_K_S, F.MOSTLY_Q2_K,
        )
    }
)  # fmt: skip
"""The mixes that need no importance matrix, by their names in llama.cpp."""


def load_llama_cpp() -> tuple[Any, Any]:
    """The interface and the library of llama.cpp.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError as error:
        remedy = install_extra("llamacpp")
        raise RecipeError("llama.cpp's quantizer is not installed", remedy=remedy) from error
    return get_ffi(), get_lib()


@contextmanager
def silence(ffi: Any, library: Any) -> Iterator[None]:
    """Drop llama.cpp's log, two lines for every tensor, inside the context."""
    before = ffi.new("ggml_log_callback *"), ffi.new("void **")
    library.llama_log_get(*before)
    kind = "void(enum ggml_log_level, const char *, void *)"
    drop = ffi.callback(kind, lambda level, text, data: None)
    library.llama_log_set(drop, ffi.NULL)
    try:
        yield
    finally:
        library.llama_log_set(before[0][0], before[1][0])


def quantized(exact: Path, file: Path, type: str, progress: Progress) -> Exported:
    """Quantize a float32 file, and count the zeros that are still zero.

    Most of these types have no exact zero in most blocks.

    Args:
        exact: the float32 file.
        file: the file to write.
        type: a name in `MIXES`.
        progress: receives every tensor.

    Raises:
        RecipeError: llama.cpp is not installed.
        VerificationError: llama.cpp could not quantize the file.
    """
    ffi, library = load_llama_cpp()
    options = library.llama_model_quantize_default_params()
    options.nthread, options.ftype = 0, int(MIXES[type])  # 0: as many threads as processors
    paths = str(exact).encode(), str(file).encode()
    with silence(ffi, library):
        wanted = ffi.new("llama_model_quantize_params *", options)
        status = library.llama_model_quantize(*paths, wanted)
    if status != 0:
        raise VerificationError(
            f"llama.cpp could not quantize the file to {type} (status {status})",
            where=str(file),
            remedy="export to q8_0, q5_0 or q4_0, which need no quantizer",
        )
    read, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (exact, file)
    )
    types = Counter(tensor.tensor_type.name for tensor in after.values())
    made = Exported(types=dict(types), file_bytes=file.stat().st_size, may_lose_zeros=True)
    for name in each_step(progress, "checking", after):
        if len(after[name].shape) > 1 and name not in ENDS:
            pair = (dequantized(one.data, one.tensor_type) for one in (read[name], after[name]))
            made.count_matrix(*pair)
    return made
