"""Every reader of files of others: how a sound folder for it is made, and how it reads one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from gguf_models import byte_level, save
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import save_tiny
from torch.nn.utils import prune
from zoo import tiny_windows

import secateur
from runtime.packed_models import packed_model
from secateur.calibration.documents import read_documents
from secateur.calibration.windows import load_windows, save_windows
from secateur.importing import import_formats
from secateur.importing.adapter import MergedReader
from secateur.importing.masks import MaskedReader
from secateur.models.at_rest import SourceFolder
from secateur.models.checkpoint import CheckpointReader
from secateur.models.configuration import read_configuration
from secateur.models.skeleton import quiet_transformers
from secateur.models.sources import resolve
from secateur.models.tokenizer import encoded, load_tokenizer
from secateur.recipes.prune import PruneRecipe
from secateur.recipes.reading import build_recipe
from secateur.recipes.recipe_files import read_recipe_file
from secateur.report_page.records import read_places
from secateur.steps.inspect import inspect
from secateur.training.masks import stored_masks

FEW: dict[str, Any] = {"num_hidden_layers": 2}
IDS = torch.tensor([[5, 17, 80, 33]])
GOLDEN = Path(__file__).parents[1] / "importing" / "golden.safetensors"


@dataclass(frozen=True)
class Reader:
    """A reader.

    Attributes:
        name: of what it reads.
        make: writes a sound folder.
        files: patterns of the files that are damaged.
        read: reads the folder, as a verb of secateur does.
    """

    name: str
    make: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], object]


def read_everything(reader: CheckpointReader) -> None:
    """Read every tensor."""
    for name in reader.entries:
        reader.read(name)


def read_dense(room: Path) -> None:
    read_everything(CheckpointReader(resolve(room).folder))
    inspect(str(room))


def make_packed(**options: Any) -> Callable[[Path], object]:
    def make(place: Path) -> None:
        packed_model(place.with_name(place.name + "-made"), **options).rename(place)

    return make


def read_packed(room: Path) -> None:
    """Load it, and let the kernels run over what was read."""
    model: Any = secateur.load(room)
    with torch.no_grad():
        model(IDS)
        model(IDS[:, :1])
    inspect(str(room))


def make_gguf(place: Path) -> None:
    source = save(place.with_name("dense-gguf"), byte_level(), "llama", **FEW)
    made = secateur.export(source, output=place.with_name("made-gguf"), to="gguf", type="q8_0")
    place.mkdir()
    (made.output / made.files[0]).rename(place / "model.gguf")


def read_gguf(room: Path) -> None:
    inspect(str(room / "model.gguf"))
    read_everything(CheckpointReader(resolve(room / "model.gguf").folder))


def make_integers(place: Path) -> None:
    """A small model with four bits for each weight, as vLLM reads it."""
    source = save_tiny(place, dtype=torch.bfloat16, hidden_size=64, intermediate_size=96, **FEW)
    secateur.export(source, output=place.with_name("made-integers"),
                    to="compressed-tensors", type="w4a16")  # fmt: skip
    for file in source.iterdir():
        file.unlink()
    for file in place.with_name("made-integers").iterdir():
        if file.is_file():
            file.rename(place / file.name)


def read_imported(room: Path) -> None:
    secateur.import_model(room, output=room.parent / "cache" / "imported", overwrite=True)


def make_torch_prune(place: Path) -> None:
    save_tiny(place, **FEW)
    model = transformers.AutoModelForCausalLM.from_pretrained(place)
    for layer in model.model.layers:
        prune.l1_unstructured(layer.mlp.up_proj, "weight", 0.5)
    state = {n: x.contiguous().clone() for n, x in model.state_dict().items() if "lm_head" not in n}
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})


def make_sparse_bitmask(place: Path) -> None:
    """A folder of compressed-tensors with one matrix for each of its old formats."""
    place.mkdir()
    with safe_open(GOLDEN, framework="pt") as stored:
        case = "sparse-bitmask"
        config = json.loads(stored.metadata()[case])["config"]
        names = [n for n in stored.keys() if n.partition("/")[0] == case]  # noqa: SIM118
        parts = {f"layer.{n.partition('/')[2]}": stored.get_tensor(n) for n in names}
    (place / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": config})
    )
    save_file(parts, place / "model.safetensors")


def read_parts(room: Path) -> None:
    """Read the assembled tensors, though the folder is no whole model."""
    reader = CheckpointReader(room)
    source = SourceFolder(room, read_configuration(room), reader, torch.bfloat16)
    for kind in import_formats:
        if import_formats[kind].recognises(source):
            read_everything(import_formats[kind].open(source))


def make_masks(place: Path) -> None:
    save_tiny(place / "model", **FEW)
    reader = CheckpointReader(place / "model")
    masks = {n: reader.read(n) > 0 for n in reader.entries if n.endswith("proj.weight")}
    save_file(masks, place / "masks.safetensors")


def read_masks(room: Path) -> None:
    file = room / "masks.safetensors"
    read_everything(MaskedReader(CheckpointReader(room / "model"), file))
    for _ in stored_masks(file):
        pass


def make_adapter(place: Path) -> None:
    save_tiny(place / "model", **FEW)
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    with quiet_transformers():
        adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(place / "adapter")


def read_adapter(room: Path) -> None:
    read_everything(MergedReader(room / "model", room / "adapter"))


def read_tokenizer(room: Path) -> None:
    encoded(load_tokenizer(room), ["a word", "0 1 2", "\ud7ff ü"])


def make_texts(place: Path) -> None:
    place.mkdir()
    lines = [json.dumps({"text": f"a text of {n} words"}) for n in range(8)]
    (place / "text.jsonl").write_text("\n".join(lines))
    with gzip.open(place / "text.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))


def read_texts(room: Path) -> None:
    read_documents(str(room / "text.jsonl"))
    read_documents(str(room / "text.jsonl.gz"))


def make_windows(place: Path) -> None:
    place.mkdir()
    save_windows(tiny_windows(), place / "windows.safetensors")


def read_windows(room: Path) -> None:
    load_windows(room / "windows.safetensors", vocab_size=100)


def make_recipe(place: Path) -> None:
    place.mkdir()
    (place / "recipe.yaml").write_text(
        "model: somewhere\nmethod: sparsegpt\nsparsity: 0.5\npattern: null\n"
        "calibration:\n  source: text.jsonl\n  windows: 8\n  sequence_length: 64\n  seed: 7\n"
        "include: ['*.mlp.*', '*.self_attn.*']\nexclude: ['*.k_proj']\n"
    )


def read_recipe(room: Path) -> None:
    build_recipe(PruneRecipe, read_recipe_file(room / "recipe.yaml"))


def make_run(place: Path) -> None:
    source = save_tiny(place.with_name("dense-run"), **FEW)
    save_windows(tiny_windows(), place.with_name("run.safetensors"))
    secateur.prune(source, output=place, method="magnitude", sparsity=0.5,
                   calibration=str(place.with_name("run.safetensors")))  # fmt: skip


def read_run(room: Path) -> None:
    read_places([room])
    inspect(str(room))


READERS = (
    Reader("dense folder", lambda p: save_tiny(p, shards=2, **FEW),
           ("*.safetensors", "*.index.json", "config.json"), read_dense),
    Reader("packed bitmask", make_packed(**FEW), ("*.safetensors", "*.json"), read_packed),
    Reader("packed int8", make_packed(values="int8", **FEW), ("*.safetensors",), read_packed),
    Reader("packed int4", make_packed(values="int4", group_size=32, embeddings="int4", **FEW),
           ("*.safetensors",), read_packed),
    Reader("packed archive", make_packed(archive=True, **FEW), ("*.safetensors",), read_packed),
    Reader("GGUF", make_gguf, ("*.gguf",), read_gguf),
    Reader("compressed-tensors", make_integers, ("*.safetensors", "config.json"), read_imported),
    Reader("sparse-bitmask", make_sparse_bitmask, ("*.safetensors", "config.json"), read_parts),
    Reader("torch's masks", make_torch_prune, ("*.safetensors",), read_imported),
    Reader("masks", make_masks, ("masks.safetensors",), read_masks),
    Reader("adapter", make_adapter, ("adapter/*",), read_adapter),
    Reader("tokenizer", lambda p: save_tiny(p, **FEW), ("tokenizer*.json",), read_tokenizer),
    Reader("texts", make_texts, ("text.*",), read_texts),
    Reader("windows", make_windows, ("*.safetensors",), read_windows),
    Reader("recipe", make_recipe, ("*.yaml",), read_recipe),
    Reader("run", make_run, ("secateur/*.json*", "secateur/*.yaml"), read_run),
)  # fmt: skip
