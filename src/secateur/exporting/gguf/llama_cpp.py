"""llama.cpp itself, in this process: its quantizer, and runs of a GGUF file on the processor.

The package `llama-cpp-py-sync` has its libraries. The quantizer turns a float file into one of a
mix: most matrices get the type in its name, and some that matter more a larger one. A run maps a
file, passes windows of token ids through it, and shows the tensors that llama.cpp computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from secateur.calibration.run_windows import WindowReader
from secateur.errors import CheckpointError, RecipeError, VerificationError, install_extra
from secateur.exporting import Exported
from secateur.exporting.gguf.writing import ENDS
from secateur.models.gguf_file import GGUFSource
from secateur.progress import Progress, Silent, each_step
from secateur.recipes.shared import Calibration

_MIXES = "q6_k q5_k_m q5_k_s q4_k_m q4_k_s iq4_xs q3_k_l q3_k_m q3_k_s q2_k"
MIXES = MappingProxyType({x: gguf.LlamaFileType[f"MOSTLY_{x.upper()}"] for x in _MIXES.split()})
"""The mixes that need no importance matrix, by their names in llama.cpp."""

AT_ONCE = 512
"""Tokens that llama.cpp computes together. The logits of so many are in memory."""

MAPPED, F32, NO_FLASH, ERROR = 1, 0, 0, 4
"""LLAMA_LOAD_MODE_MMAP, GGML_TYPE_F32, LLAMA_FLASH_ATTN_TYPE_DISABLED, GGML_LOG_LEVEL_ERROR"""

HEAD_INPUT = "result_norm"
"""llama.cpp's name of it. All layers are computed before."""


GGML = """
struct ggml_tensor {
    int type; void * buffer; int64_t ne[4]; size_t nb[4]; int op; int32_t op_params[16];
    int32_t flags; struct ggml_tensor * src[10]; struct ggml_tensor * view_src;
    size_t view_offs; void * data; char name[64]; void * extra; char padding[8]; };
struct ggml_type_traits {
    const char * type_name; int64_t blck_size; int64_t blck_size_interleave; size_t type_size;
    bool is_quantized; void (*to_float)(const void *, float *, int64_t); void * from_float_ref; };
const char * ggml_get_name(const struct ggml_tensor *);
const char * ggml_op_desc(const struct ggml_tensor *);
size_t ggml_nbytes(const struct ggml_tensor *);
void ggml_backend_tensor_get(const struct ggml_tensor *, void *, size_t, size_t);
const struct ggml_type_traits * ggml_get_type_traits(int);
"""
"""What is used of ggml.h, for cffi."""


def load_llama_cpp() -> tuple[Any, Any]:
    """The interface and the library of llama.cpp.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib
    except ImportError as error:
        remedy = install_extra("llamacpp")
        raise RecipeError("llama.cpp is not installed", remedy=remedy) from error
    return get_ffi(), get_lib()


@cache
def _load_ggml() -> tuple[Any, Any]:
    """The interface and the library of ggml: tensors of the graph, and decoders of types."""
    load_llama_cpp()
    from cffi import FFI
    from llama_cpp_py_sync import _cffi_bindings

    ffi = FFI()
    ffi.cdef(GGML)
    [file, *_] = sorted(Path(_cffi_bindings.__file__).parent.glob("*ggml-base*"))
    return ffi, ffi.dlopen(str(file))


def decoded(stored: np.ndarray, type: gguf.GGMLQuantizationType) -> Tensor:
    """The weights of any type: float32 [rows, columns] of bytes [rows, bytes].

    llama.cpp decodes all types that it has, and fast; gguf those it knows, where it is missing.

    Raises:
        CheckpointError: nothing that is installed decodes this type.
    """
    stored = np.ascontiguousarray(stored)
    try:
        ffi, library = _load_ggml()
        traits = library.ggml_get_type_traits(int(type))
        if traits.to_float:
            columns = stored.shape[-1] // traits.type_size * traits.blck_size
            found = np.empty((*stored.shape[:-1], columns), np.float32)
            place = ffi.cast("float *", found.ctypes.data)
            traits.to_float(ffi.from_buffer(stored), place, found.size)
            return torch.from_numpy(found)
    except RecipeError:
        pass  # it is not installed
    try:
        return torch.from_numpy(gguf.quants.dequantize(stored, type))
    except NotImplementedError as error:
        raise CheckpointError(
            f"{type.name} cannot be decoded", remedy=install_extra("llamacpp")
        ) from error


@contextmanager
def silence(ffi: Any, library: Any) -> Iterator[list[str]]:
    """Drop llama.cpp's log, two lines for every tensor, inside the context.

    Yields:
        The errors that it logs.
    """
    before, errors = (ffi.new("ggml_log_callback *"), ffi.new("void **")), list[str]()
    library.llama_log_get(*before)

    @ffi.callback("void(enum ggml_log_level, const char *, void *)")
    def drop(level: int, text: Any, data: Any) -> None:
        if level == ERROR:
            errors.append(ffi.string(text).decode(errors="replace").strip())

    library.llama_log_set(drop, ffi.NULL)
    try:
        yield errors
    finally:
        library.llama_log_set(before[0][0], before[1][0])


def quantize(exact: Path, file: Path, kind: gguf.LlamaFileType, **chosen: Any) -> None:
    """Quantize a file by llama.cpp.

    Args:
        exact: a file of floats.
        file: the file to write.
        kind: the mix.
        **chosen: fields of `llama_model_quantize_params` with other values than the default.

    Raises:
        RecipeError: llama.cpp is not installed.
        VerificationError: llama.cpp could not quantize the file.
    """
    ffi, library = load_llama_cpp()
    options = library.llama_model_quantize_default_params()
    for name, value in {"ftype": int(kind), **chosen}.items():
        setattr(options, name, value)
    paths = str(exact).encode(), str(file).encode()
    with silence(ffi, library) as errors:
        wanted = ffi.new("llama_model_quantize_params *", options)
        status = library.llama_model_quantize(*paths, wanted)
    if status != 0:
        said = f": {errors[-1]}" if errors else ""
        raise VerificationError(
            f"llama.cpp could not quantize the file to {kind.name} (status {status}){said}",
            where=str(file),
            remedy="export to q8_0, q5_0 or q4_0, which need no quantizer",
        )


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
    quantize(exact, file, MIXES[type])
    read, after = (GGUFSource.read(path).tensors for path in (exact, file))
    types = Counter(tensor.type.name for tensor in after.values())
    made = Exported(types=dict(types), file_bytes=file.stat().st_size, may_lose_zeros=True)
    for name in each_step(progress, "checking", after):
        if len(after[name].shape) > 1 and name not in ENDS:
            made.count_matrix(*(decoded(one.read(), one.type) for one in (read[name], after[name])))
    return made


@dataclass(frozen=True)
class Node:
    """A tensor of llama.cpp's graph, computed or about to be.

    Attributes:
        tensor: ggml's own description.
    """

    tensor: Any

    @property
    def name(self) -> str:
        """Such as `ffn_moe_topk-3`; of a weight, its name in the file."""
        ffi, library = _load_ggml()
        return str(ffi.string(library.ggml_get_name(self.tensor)).decode())

    @property
    def op(self) -> str:
        """What computes it, such as MUL_MAT."""
        ffi, library = _load_ggml()
        return str(ffi.string(library.ggml_op_desc(self.tensor)).decode())

    @property
    def shape(self) -> tuple[int, ...]:
        """All four axes, outermost first."""
        return tuple(self.tensor.ne)[::-1]

    def source(self, number: int) -> Node:
        """One of the tensors from which it is computed."""
        return Node(self.tensor.src[number])

    def value(self) -> Tensor:
        """Its numbers, float32 or int32, copied; axes as in `shape`."""
        ffi, library = _load_ggml()
        dtype = {F32: np.float32, int(gguf.GGMLQuantizationType.I32): np.int32}[self.tensor.type]
        raw = np.empty(library.ggml_nbytes(self.tensor), np.uint8)
        library.ggml_backend_tensor_get(self.tensor, ffi.from_buffer(raw), 0, raw.nbytes)
        strides = tuple(self.tensor.nb)[::-1]
        return torch.from_numpy(np.ndarray(self.shape, dtype, raw, strides=strides).copy())


class LlamaCpp:
    """A GGUF file that llama.cpp has mapped, to be run on the processor; a context manager.

    It is also a tokenizer, with the calls of one of transformers.

    Args:
        file: the file, or the first of its parts.
        vocabulary_only: it is a tokenizer alone, and the file needs no tensors.

    Raises:
        RecipeError: llama.cpp is not installed.
        CheckpointError: llama.cpp does not load the file.
    """

    is_fast = False

    def __init__(self, file: Path, *, vocabulary_only: bool = False) -> None:
        self.ffi, self.library = load_llama_cpp()
        self.name_or_path = str(file)
        options = self.library.llama_model_default_params()
        options.n_gpu_layers, options.load_mode = 0, MAPPED
        options.use_extra_bufts = False  # they are copies of the weights
        options.vocab_only = vocabulary_only
        self.library.llama_backend_init()
        load = self.library.llama_model_load_from_file
        self.model = self._called("load this file", load, str(file).encode(), options)
        self.vocabulary = self.library.llama_model_get_vocab(self.model)
        self.vocabulary_size = self.library.llama_vocab_n_tokens(self.vocabulary)
        self.positions = self.library.llama_model_n_ctx_train(self.model)
        self.eos_token_id = self._special("eos")[0]
        template = self.library.llama_model_chat_template(self.model, self.ffi.NULL)
        self.chat_template = self.ffi.string(template).decode() if template else None

    def _called(self, what: str, function: Any, *args: Any) -> Any:
        """What a function of llama.cpp returns, unless it is NULL or a status other than 0."""
        with silence(self.ffi, self.library) as errors:
            found = function(*args)
        if found != 0 if isinstance(found, int) else not found:
            raise CheckpointError(
                "; ".join([f"llama.cpp cannot {what}", *errors[:2]]),
                where=self.name_or_path,
                remedy="check the file with `secateur inspect`; update llama-cpp-py-sync if the "
                "architecture is new",
            )
        return found

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *raised: object) -> None:
        self.library.llama_model_free(self.model)

    def __call__(
        self, texts: Sequence[str], add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[list[int]]]:
        """The token ids of texts, as `input_ids`. Special tokens in a text are read as such."""
        found = []
        for text in map(str.encode, texts):
            ids, count = self.ffi.new("llama_token[]", len(text) + 16), -1
            while count < 0:  # a normalizer may lengthen the text; then it returns −count
                given = self.vocabulary, text, len(text), ids, len(ids), add_special_tokens, True
                with silence(self.ffi, self.library):
                    count = self.library.llama_tokenize(*given)
                ids = ids if count >= 0 else self.ffi.new("llama_token[]", -count)
            found.append(self.ffi.unpack(ids, count))
        return {"input_ids": found}

    def get_chat_template(self, **_: Any) -> str | None:
        """The template of conversations in the file."""
        return self.chat_template

    def apply_chat_template(self, messages: list[Any], *, tokenize: bool, **options: Any) -> str:
        """A conversation as the file's template writes it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options |= {f"{name}_token": self._special(name)[1] for name in ("bos", "eos")}
        written = render_jinja_template([messages], chat_template=self.chat_template, **options)
        return str(written[0][0])

    def _special(self, name: str) -> tuple[int | None, str]:
        """The number and the text of a special token."""
        token = getattr(self.library, f"llama_vocab_{name}")(self.vocabulary)
        if token < 0:
            return None, ""
        text = self.library.llama_vocab_get_text(self.vocabulary, token)
        return token, self.ffi.string(text).decode()

    def windows(self, options: Calibration) -> tuple[Tensor, dict[str, Any]]:
        """Calibration windows in the tokens of the file, and a record of their source.

        Args:
            options: the text, and how it is cut.
        """
        from transformers import PretrainedConfig

        kind: Any = PretrainedConfig
        config = kind(vocab_size=self.vocabulary_size, max_position_embeddings=self.positions)
        tokenizer: Any = self  # it is called as one
        return WindowReader(config, lambda: tokenizer).read(options.source, options)

    def run(
        self,
        windows: Tensor,
        wanted: Callable[[Node], bool] = lambda node: False,
        seen: Callable[[Node], None] = lambda node: None,
        *,
        logits: bool = False,
        progress: Progress | None = None,
        done: int = 0,
    ) -> Iterator[Tensor | None]:
        """Pass windows through the model, one after the other, each from its beginning.

        Keys and values are float32.

        Args:
            windows: token ids [windows, length].
            wanted: says which nodes `seen` receives.
            seen: is called with each wanted node when it is computed. A node has the values of
                at most `AT_ONCE` tokens.
            logits: without them, the head is not computed.
            progress: receives every window.
            done: windows that are left out.

        Yields:
            Float32 [length, vocabulary] of each window, or None.
        """
        ffi, graph, raised = self.ffi, _load_ggml()[0], list[BaseException]()

        @ffi.callback("ggml_backend_sched_eval_callback")
        def evaluated(tensor: Any, ask: bool, data: Any) -> bool:
            last, place = False, int(ffi.cast("uintptr_t", tensor))
            try:
                node = Node(graph.cast("struct ggml_tensor *", place))
                last = not logits and node.name == HEAD_INPUT
                if ask:
                    return last or wanted(node)
                if not last:
                    seen(node)
            except BaseException as error:  # it cannot pass through llama.cpp
                raised.append(error)
            return not last and not raised

        length, progress = windows.shape[1], progress or Silent()
        progress.start("running windows in llama.cpp", len(windows))
        progress.step(done)
        with self._context(length, evaluated) as context:
            for window in windows[done:]:
                self.library.llama_memory_clear(self.library.llama_get_memory(context), True)
                found = []
                for first in range(0, length, AT_ONCE):
                    found.append(self._decoded(context, window, first, logits))
                    if raised:
                        raise raised[0]
                yield torch.cat(found) if logits else None
                progress.step()
        progress.finish()

    @contextmanager
    def _context(self, length: int, evaluated: Any) -> Iterator[Any]:
        """What llama.cpp needs to run windows of a length."""
        options = self.library.llama_context_default_params()
        options.n_ctx = length
        options.n_batch = options.n_ubatch = min(AT_ONCE, length)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        options.type_k = options.type_v = F32
        options.flash_attn_type, options.cb_eval = NO_FLASH, evaluated
        create = self.library.llama_init_from_model
        context = self._called(f"run {length} tokens", create, self.model, options)
        try:
            yield context
        finally:
            with silence(self.ffi, self.library):
                self.library.llama_free(context)

    def _decoded(self, context: Any, window: Tensor, first: int, logits: bool) -> Any:
        """Run the tokens of a window from `first` on; their logits, if wanted."""
        ids = window[first : first + AT_ONCE].tolist()
        batch = self.library.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = token, first + i
            # the last layer computes only tokens whose logits are wanted
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        try:
            self._called("compute a window", self.library.llama_decode, context, batch)
        finally:
            self.library.llama_batch_free(batch)
        if not logits:
            return None
        place = self.library.llama_get_logits(context)
        raw = self.ffi.buffer(place, 4 * len(ids) * self.vocabulary_size)
        return torch.frombuffer(bytearray(raw), dtype=torch.float32).view(len(ids), -1)
