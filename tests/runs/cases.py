"""What faults are injected into: every verb that writes, on a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from further import save_further
from gguf_bytes import SOUND, U32, key, number
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer, save_tiny
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on; " * 60


def make_sources(place: Path) -> None:
    """The models and texts that all cases start from."""
    place.mkdir(parents=True)
    save_tiny(place / "dense", shards=2, num_hidden_layers=2)
    save_tiny(place / "deep", num_hidden_layers=3)
    save_tiny(place / "norms", "gemma3")
    save_further(place / "further", "glm4_moe")
    save_tiny(place / "mixture", "mixtral", num_hidden_layers=2)
    secateur.prune(place / "dense", output=place / "pruned", method="magnitude", sparsity=0.5)
    secateur.compress(place / "pruned", output=place / "small")
    secateur.prune(place / "deep", output=place / "old", method="magnitude", sparsity=0.25)
    wide = {"num_hidden_layers": 1, "vocab_size": 256, "intermediate_size": 64}
    save_tiny(place / "bytes", tokenizer=False, **wide)
    byte_tokenizer().save_pretrained(place / "bytes")
    coarse = {"values": "int3", "embeddings": "int3", "group_size": 32}
    secateur.compress(place / "bytes", output=place / "coarse", **coarse)
    secateur.export(place / "coarse", output=place / "file", type="stored")
    min((place / "file").glob("*.gguf")).rename(place / "like.gguf")
    pruned = load_file(place / "old" / "model.safetensors")
    masks = {n: x != 0 for n, x in pruned.items() if n.endswith("proj.weight") and ".2." not in n}
    save_file(masks, place / "masks.safetensors")
    (place / "mixture.gguf").write_bytes(SOUND.content)
    (place / "old.gguf").write_bytes(SOUND.plus(key("old", U32, number(1))).content)
    save_windows(tiny_windows(4, 20), place / "windows.safetensors")
    save_windows(tiny_windows(4, 20, seed=2), place / "others.safetensors")
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    (place / "other.txt").write_text(TEXT.replace("fox", "cat"), encoding="utf-8")


@dataclass(frozen=True)
class Case:
    """A verb with its options.

    Attributes:
        verb: a function of `secateur`.
        source: the model, one of `make_sources`.
        options: the other arguments; `{sources}` and `{here}` in texts stand for the folder of the
            sources and the one that the output lies in.
        resumes: whether the verb takes `resume`.
        weight: how many times as many points the tests try.
        output: the name of the output.
        old: the output that is replaced, one of `make_sources`.
        saves: whether a distillation at the end of the run is saved at every step; otherwise after
            minutes, which is never here.
    """

    verb: str
    source: str
    options: Mapping[str, Any]
    resumes: bool = True
    weight: int = 1
    output: str = "out"
    old: str = "old"
    saves: bool = False

    def call(
        self, sources: Path, output: Path, progress: Any, model: Path | None = None, **more: Any
    ) -> Any:
        """Call the verb, of another model than the case's if one is given."""
        places = {"{sources}": str(sources), "{here}": str(output.parent)}
        options = filled({**self.options, **more}, places)
        verb = getattr(secateur, self.verb)
        source = sources / self.source if model is None else model
        return verb(source, output=output, progress=progress, **options)

    def retry(self, overwrite: bool) -> dict[str, bool]:
        """Options of the call that mends what a fault left."""
        return {**({"resume": True} if self.resumes else {}), **self.anew(overwrite)}

    def anew(self, overwrite: bool) -> dict[str, bool]:
        """Options of a call that replaces what is there, or of a plain one."""
        return {"overwrite": True} if overwrite else {}


def filled(value: Any, places: Mapping[str, str]) -> Any:
    """A value whose texts have the places filled in."""
    if isinstance(value, str):
        for name, place in places.items():
            value = value.replace(name, place)
        return value
    if isinstance(value, Mapping):
        return {key: filled(x, places) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [filled(x, places) for x in value]
    return value


MASKED = {"masks": "{sources}/masks.safetensors"}
WINDOWS = {"calibration": "{sources}/windows.safetensors"}
WANDA = {"method": "wanda", "sparsity": 0.5, **WINDOWS}
ASYMMETRIC = {"method": "sparsegpt", "sparsity": 0.5, "asymmetric": True, **WINDOWS}
FEW = {"method_parameters": {"iterations": 3, "growth": 2.0}}
BEST = {"effort": "best", **FEW, **WINDOWS}
"""The preset, in small. Whoever gives parameters gives method, or score and solver, too."""
FAST = {"effort": "fast", **WINDOWS}
REFIT = {"score": "wanda", "solver": "alps"}
LEARNT = {"generated_windows": 2, "distill_epochs": 1, "distill_learning_rate": 1e-3}
PRUNE_BEST = {**BEST, **LEARNT, "method": "alps", "sparsity": 0.5}
TRAINING = {
    "text": "{sources}/text.txt", "sequence_length": 16, "windows": 12, "batch": 4, "steps": 3,
    "validations": 1, "validation_windows": 2, "save_minutes": 0,
}  # fmt: skip

CASES: Mapping[str, Case] = {
    "prune": Case("prune", "dense", WANDA),
    "prune best": Case("prune", "dense", PRUNE_BEST, weight=3),
    "prune best saved": Case("prune", "dense", PRUNE_BEST, saves=True),
    "prune best in sweeps": Case(
        "prune", "deep", {**PRUNE_BEST, "distill_sweep_windows": 4}, weight=2, saves=True
    ),
    "prune behind norms": Case("prune", "norms", ASYMMETRIC),
    "prune experts": Case("prune", "mixture", {**ASYMMETRIC, "activations": "disk"}),
    "prune with a bound": Case(
        "prune", "dense", {**WANDA, "must_keep": ("loss@{sources}/text.txt:9",)}
    ),
    "prune disk": Case("prune", "dense", {**WANDA, "activations": "disk"}),
    "prune search": Case("prune", "dense", {**WANDA, "allocation": "search"}),
    "structure": Case("structure", "dense", {**FAST, "ffn": 0.5, "kv_groups": 0.5}),
    "structure best": Case(
        "structure", "deep", {**BEST, **REFIT, **LEARNT, "keep_layers": 2, "ffn": 0.75}
    ),
    "structure experts": Case(
        "structure",
        "mixture",
        {**FAST, "asymmetric": True, "experts": 3, "experts_by": "divergence"},
    ),
    "structure of a file": Case(
        "structure",
        "mixture.gguf",
        {"experts": 2, "experts_by": "random"},
        output="out.gguf",
        old="old.gguf",
    ),
    "train": Case("train", "pruned", TRAINING),
    "train with a teacher": Case(
        "train",
        "pruned",
        {**TRAINING, "teacher": "{sources}/dense", "top_k": 4},
    ),
    "chain": Case(
        "chain",
        "dense",
        {
            "steps": [
                {"structure": {**FAST, "ffn": 0.5}},
                {"prune": {"pattern": "2:4", "method": "wanda", **WINDOWS}},
                {"train": TRAINING},
                {"compress": {}},
            ]
        },
    ),
    "compress": Case("compress", "pruned", {}),
    "compress int8": Case("compress", "pruned", {"values": "int8", **WINDOWS}),
    "compress to gguf": Case(
        "compress",
        "bytes",
        {"values": "q4_0", "to": "gguf", "distill_epochs": 1, "windows": 4, **WINDOWS},
    ),
    "decompress": Case("decompress", "small", {}, resumes=False),
    "fit": Case(
        "fit",
        "dense",
        {"max_size": "60KiB", "effort": "fast", "heal_tokens": 128, **WINDOWS},
    ),
    "fit for llama.cpp": Case(
        "fit", "bytes",
        {
            "max_size": "20KB", "effort": "fast", "heal_tokens": 128, "target": "llama.cpp",
            **WINDOWS,
        },
    ),
    "fit like": Case(
        "fit", "bytes",
        {"like": "{sources}/like.gguf", "effort": "fast", "heal_tokens": 128, **WINDOWS},
    ),
    "draft": Case(
        "draft", "dense", {"effort": "fast", "heal_tokens": 128, **WINDOWS}
    ),
    "draft mtp": Case("draft", "further", {"mtp": True, **WINDOWS}),
    "export": Case("export", "bytes", {"type": "f16"}, resumes=False),
    "import": Case("import_model", "dense", MASKED, resumes=False),
    "sweep": Case(
        "sweep",
        "dense",
        {
            "methods": ("magnitude", "wanda"), "sparsities": (0.5,), **WINDOWS,
            "text": ("{sources}/text.txt",), "text_sequence_length": 16, "text_windows": 4,
        },
    ),
}  # fmt: skip
