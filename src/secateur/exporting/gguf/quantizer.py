"""Types of 256 weights to a block (K types), made by llama.cpp's own quantizer.

The package `llama-cpp-py-sync` has the quantizer. It turns a float32 file into a mix of types: most
matrices get the type in the name of the mix, and some that matter more get a larger one. Rows that
are no multiple of 256 weights long get a type with blocks of 32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf

from secateur.errors import VerificationError
from secateur.exporting import Exported, missing_extra
from secateur.exporting.gguf.writing import ENDS, dequantized
from secateur.progress import Progress

Q = gguf.GGMLQuantizationType
F = gguf.LlamaFileType

MIXES = MappingProxyType(
    {
        "q6_k": F.MOSTLY_Q6_K,
        "q3_k": F.MOSTLY_Q3_K_S,
        "q5_k_m": F.MOSTLY_Q5_K_M,
        "q4_k_m": F.MOSTLY_Q4_K_M,
        "q3_k_m": F.MOSTLY_Q3_K_M,
        "q2_k": F.MOSTLY_Q2_K,
    }
)
"""Names of mixes in llama.cpp."""

LOSSY = frozenset({"q5_k_m", "q4_k_m", "q3_k_m", "q2_k"})
"""Mixes with types that have no exact zero in most blocks (Q2_K, Q4_K, Q5_K)."""

LONG_BLOCK = 256
"""Weights of a row in one block of a K type."""


@dataclass(frozen=True)
class Quantizer:
    """llama.cpp's quantizer.

    Attributes:
        ffi: the interface of the package.
        library: the loaded library.
    """

    ffi: Any
    library: Any

    def quantized(
        self, exact: Path, file: Path, type: str, notes: list[str], progress: Progress
    ) -> Exported:
        """Quantize a float32 file, and count what it keeps.

        Args:
            exact: the float32 file.
            file: the file to write.
            type: a name in `MIXES`.
            notes: on the float32 file.
            progress: receives every tensor.

        Raises:
            VerificationError: llama.cpp could not quantize the file.
        """
        before = _tensors_of(exact)
        options = self.library.llama_model_quantize_default_params()
        options.nthread = 0  # as many as there are processors
        options.ftype = int(MIXES[type])
        alive = self.keep_zeros(options, before) if type == "q3_k" else None
        with self.silence():
            status = self.library.llama_model_quantize(
                str(exact).encode(),
                str(file).encode(),
                self.ffi.new("llama_model_quantize_params *", options),
            )
        del alive
        if status != 0:
            raise VerificationError(
                f"llama.cpp could not quantize the file to {type} (status {status})",
                where=str(file),
                remedy="export to q8_0, q5_0 or q4_0, which need no quantizer",
            )
        made = _compared(before, _tensors_of(file), progress)
        made.notes += notes
        made.file_bytes = file.stat().st_size
        return made

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Drop llama.cpp's log, two lines for every tensor, inside the context."""
        before = self.ffi.new("ggml_log_callback *"), self.ffi.new("void **")
        self.library.llama_log_get(*before)
        drop = self.ffi.callback("void(enum ggml_log_level, const char *, void *)", _ignored)
        self.library.llama_log_set(drop, self.ffi.NULL)
        try:
            yield
        finally:
            self.library.llama_log_set(before[0][0], before[1][0])

    def keep_zeros(self, options: Any, tensors: dict[str, gguf.ReaderTensor]) -> list[Any]:
        """Give every matrix a type that keeps zeros, instead of those of the mix.

        Returns:
            What must stay alive while the quantizer runs.
        """
        chosen = {
            name: _keeping(name, int(x.shape[0])) for name, x in tensors.items() if len(x.shape) > 1
        }
        alive: list[Any] = [self.ffi.new("char[]", f"^{name}$".encode()) for name in chosen]
        table = self.ffi.new("struct llama_model_tensor_override[]", len(chosen) + 1)
        for row, pattern, kind in zip(table, alive, chosen.values(), strict=False):
            row.pattern, row.type = pattern, int(kind)
        options.tt_overrides = table
        return [*alive, table]


def _ignored(level: int, text: Any, user_data: Any) -> None:
    """A line of llama.cpp's log."""


def _keeping(name: str, columns: int) -> Q:
    """The smallest type from 3 bits that keeps the zeros of a matrix; more for the ends."""
    if columns % LONG_BLOCK:
        return Q.Q8_0 if name in ENDS else Q.Q4_0
    return Q.Q6_K if name in ENDS else Q.Q3_K


def load_quantizer() -> Quantizer:
    """Load llama.cpp.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError as error:
        raise missing_extra("llama.cpp's quantizer", "llamacpp") from error
    return Quantizer(get_ffi(), get_lib())


def _tensors_of(file: Path) -> dict[str, gguf.ReaderTensor]:
    """The tensors of a file, as views of it."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def _compared(
    before: dict[str, gguf.ReaderTensor], after: dict[str, gguf.ReaderTensor], progress: Progress
) -> Exported:
    """Count types, and the zeros that are still exactly zero."""
    made = Exported(types=dict(Counter(tensor.tensor_type.name for tensor in after.values())))
    progress.start("checking", len(after))
    for name, tensor in after.items():
        if len(tensor.shape) > 1 and name not in ENDS:
            weight = dequantized(before[name].data, before[name].tensor_type)
            made.count_matrix(weight, dequantized(tensor.data, tensor.tensor_type))
        progress.step(note=name)
    progress.finish()
    odd = [name for name, x in after.items() if len(x.shape) > 1 and int(x.shape[0]) % LONG_BLOCK]
    if odd:
        made.notes.append(
            f"{len(odd)} matrices have rows that are no multiple of {LONG_BLOCK} weights long, so "
            f"they have another type ({after[odd[0]].tensor_type.name} for {odd[0]})"
        )
    return made
