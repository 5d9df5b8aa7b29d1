"""What llama.cpp computes of a file, in a process of its own: it ends the process at some faults.

`llama_cpp.py FILE WINDOWS.npy LOGITS.npy`: windows int [windows, length], logits float32
[windows, length, vocabulary]. Keys and values are float32, and one thread computes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib


def logits(file: Path, windows: np.ndarray) -> np.ndarray:
    """The logits of each token of each window."""
    ffi, library = get_ffi(), get_lib()
    options = library.llama_model_default_params()
    options.n_gpu_layers = 0
    model = library.llama_model_load_from_file(str(file).encode(), options)
    if model == ffi.NULL:
        raise SystemExit("llama.cpp does not load the file")
    words = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = windows.shape[1]
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = 0
    found = []
    for window in windows.tolist():
        context = library.llama_init_from_model(model, settings)
        batch = library.llama_batch_init(len(window), 0, 1)
        batch.n_tokens = len(window)
        for i, token in enumerate(window):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if context == ffi.NULL or library.llama_decode(context, batch):
            raise SystemExit("llama.cpp loads the file and cannot run it")
        buffer = ffi.buffer(library.llama_get_logits(context), 4 * words * len(window))
        found.append(np.frombuffer(buffer, dtype=np.float32).reshape(len(window), words).copy())
        library.llama_batch_free(batch)
        library.llama_free(context)
    library.llama_model_free(model)
    return np.stack(found)


if __name__ == "__main__":
    np.save(sys.argv[3], logits(Path(sys.argv[1]), np.load(sys.argv[2])))
