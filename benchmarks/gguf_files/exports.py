"""Our GGUF files beside those of llama.cpp's own converter, and in llama.cpp beside transformers.

    python -m benchmarks.gguf_files.exports --work FOLDER [--source LLAMA_CPP] [--only NAME …]

For each tiny model of `tiny_models` both write a float32 file of the same folder. Tensors are
compared byte for byte and keys by value; keys of the tokenizer and names are left out, because tiny
tokenizers are none that the converter knows. llama.cpp computes the logits of our file, and those
of its layer for further tokens (MTP) from random states; transformers and our own module the same.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from benchmarks.gguf_files import architectures as cuts
from benchmarks.gguf_files.tiny_models import MODELS, predicted, saved
from benchmarks.hardware import add, markdown
from benchmarks.stored import known_rows

import secateur
from secateur.models.gguf_file import GGUFSource
from secateur.models.mtp import read_mtp
from secateur.models.opening import load_whole, open_weights

MEASURES = tuple(
    f"src/secateur/exporting/gguf/{name}.py" for name in ("architectures", "model", "writing")
)
MINUTES = 10
RESULT = "gguf-exports"
NAMES = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3", "gemma4", "gemma4 moe", "phi3", "smollm3",
    "mixtral", "qwen2moe", "qwen3moe", "qwen35", "qwen35 mtp", "qwen35moe", "qwen35moe mtp",
    "glm4moe",
)  # fmt: skip
BESIDE = ("tokenizer.", "general.")
TOKENS = 20


def measured(name: str, work: Path, converter: cuts.Converter) -> cuts.Row:
    """The row of one model."""
    tiny = MODELS[name]
    shutil.rmtree(work, ignore_errors=True)
    model = saved(name, work / "folder")
    theirs = converter.write(work / "folder", work / "f32.gguf", tiny, tiny.released)
    made = secateur.export(work / "folder", output=work / "out", to="gguf", type="f32")
    ours = work / "out" / made.files[0]
    found = cuts.compared(ours, theirs)
    row = {"model": name, "architecture": GGUFSource.read(ours).architecture, **found}
    row["keys"] = {k: x for k, x in found["keys"].items() if not k.startswith(BESIDE)}
    words = len(GGUFSource.read(ours).fields["tokenizer.ggml.tokens"].value)
    windows = np.random.default_rng(0).integers(9, words, (cuts.WINDOWS, cuts.LENGTH))
    logits = [cuts.llama_cpp(file, windows) for file in (ours, theirs)]
    row["logits"] = cuts.largest(*logits)
    row |= cuts.distance(logits[0], cuts.by_transformers(model, windows))
    if tiny.mtp:
        parent = load_whole(work / "folder", torch.device("cpu"), dtype=torch.float32)
        mtp = read_mtp(parent, open_weights(work / "folder"), torch.float32)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, TOKENS, parent.config.hidden_size, generator=generator)
        ids = torch.randint(9, words, (1, TOKENS), generator=generator)
        theirs_of_mtp = predicted(ours, states[0], ids[0].tolist())
        row["mtp"] = float((mtp(states, mtp.embed(ids))[0][0] - theirs_of_mtp).abs().max())
    return row


def main() -> None:
    """Write, compare, show."""
    work, names, converter = cuts.asked(__doc__.splitlines()[0], NAMES)
    protocol = {
        "converter": cuts.PACKAGE, "llama_cpp": version("llama-cpp-py-sync"),
        "windows": cuts.WINDOWS, "length": cuts.LENGTH, "mtp_tokens": TOKENS,
    }  # fmt: skip
    for name in names:
        if name not in {row["model"] for row in known_rows(RESULT, protocol)}:
            add(RESULT, protocol, measured(name, work / name.replace(" ", "-"), converter))
            print(name, flush=True)
    print(markdown(*exports(known_rows(RESULT, protocol))))


def exports(rows: list[cuts.Row]) -> tuple[list[str], list[list[str]]]:
    """A line for each model."""
    columns = ["architecture", "equal tensors", "other keys", "logits", "of the MTP layer"]
    lines = []
    for row in sorted(rows, key=lambda x: NAMES.index(x["model"])):
        name, arch = row["model"], row["architecture"]
        unequal = sum(not x.endswith("gate_up_exps.weight") for x in row["unequal"])
        lines.append([
            f"`{arch}`" if name == arch else f"`{arch}` ({name})",
            f"{row['tensors'] - unequal} of {row['tensors']}",
            ", ".join(f"`{key.partition('.')[2]}`" for key in row["keys"]),
            f"{row['usual']:.0e}", f"{row['mtp']:.0e}" if "mtp" in row else "",
        ])  # fmt: skip
    return columns, lines


TABLES = {"exports": exports}

if __name__ == "__main__":
    main()
