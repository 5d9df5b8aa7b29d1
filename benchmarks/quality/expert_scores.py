"""Scores of experts that need a run, a published importance matrix, or nothing but the weights.

    python -m benchmarks.quality.expert_scores --work DIR [--setups …] [--seeds 0 1 2]

The mixtures, their calibration and the windows that judge are those of `benchmarks.quality.experts`,
and DIR may be the same: models that were trained there are read again. Each is also exported as a
float32 and a Q8_0 GGUF file, which llama.cpp runs over the same windows: for REAP on the file
itself, and to collect the importance matrix that people publish.

Seconds are those of a score: of the pass over the calibration where it needs one. `imatrix` reads a
matrix that is there; `collected` is what collecting it took.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.gguf_files.importance import collected as collected_matrix
from benchmarks.hardware import add, heading, markdown
from benchmarks.quality import experts
from benchmarks.quality.experts import CHOSEN, DRAWS, EXPERTS, KEPT
from benchmarks.stored import known_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import secateur
from secateur.engine.search.experts import (
    ExpertUse,
    aimer_scores,
    best_experts,
    expert_use,
    scores_of,
)
from secateur.exporting.gguf.expert_scores import expert_use as use_by_llama_cpp
from secateur.exporting.gguf.expert_scores import imatrix_scores
from secateur.exporting.gguf.importance import ImportanceMatrix
from secateur.exporting.gguf.llama_cpp import LlamaCpp
from secateur.models.experts import opened_experts
from secateur.models.gguf_file import GGUFSource
from secateur.models.targets import ModelTarget
from secateur.models.tokenizer import byte_letters
from secateur.progress import Silent
from secateur.structured.cut import Cut
from secateur.structured.surgery import cut_model

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))
from mixtures import window_losses, windows_of
from tiny import CHARACTERS, SPECIAL

MEASURES = ("src/secateur/engine/search/experts.py", "src/secateur/exporting/gguf/expert_scores.py")

SCORES = ("reap", "reap, llama.cpp", "reap, llama.cpp, Q8_0", "imatrix", "aimer", "frequency")
Scores = dict[int, Tensor]


def exported(model: Any, work: Path) -> dict[str, Path]:
    """The files of a model, by their types."""
    place, files = work / "exported", {}
    shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(place / "folder")
    letter_tokenizer().save_pretrained(place / "folder")
    for kind in ("f32", "q8_0"):
        found = secateur.export(place / "folder", to="gguf", type=kind, output=place / kind)
        files[kind] = place / kind / found.files[0]
    return files


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter, as byte-level BPE, which llama.cpp knows. It needs a merge."""
    letters, merge = byte_letters(), ("Q", "Z")
    known = {letters[ord(c)]: i for i, c in enumerate(CHARACTERS, len(SPECIAL))}
    *special, _ = SPECIAL
    vocabulary = {name: i for i, name in enumerate([*special, "".join(merge)])}
    inner = Tokenizer(models.BPE(vocabulary | known, [merge]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")


def scored(
    model: Any, files: dict[str, Path], windows: Tensor, work: Path
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Every score, and the seconds that each took."""
    found: dict[str, Scores] = {}
    seconds: dict[str, float] = {}

    def timed(name: str, make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = make()
        seconds[name] = time.perf_counter() - start
        return made

    def by_llama_cpp(file: Path) -> dict[int, ExpertUse]:
        store = work / "sums.safetensors"
        store.unlink(missing_ok=True)
        with LlamaCpp(file) as engine:
            return use_by_llama_cpp(GGUFSource.read(file), engine, windows, store, Silent())

    def collected() -> ImportanceMatrix:
        with LlamaCpp(files["q8_0"]) as engine:
            return collected_matrix(engine, windows)

    with opened_experts(model):
        target = ModelTarget(model)
        use = timed("reap", lambda: expert_use(target, windows, 4096, Silent()))
        found["aimer"] = timed("aimer", lambda: aimer_scores(target, Silent()))
    found |= {name: scores_of(use, name) for name in ("reap", "frequency")}
    seconds["frequency"] = seconds["reap"]
    for name, kind in ((SCORES[1], "f32"), (SCORES[2], "q8_0")):
        uses = timed(name, lambda kind=kind: by_llama_cpp(files[kind]))
        found[name] = scores_of(uses)
    matrix, source = timed("collected", collected), GGUFSource.read(files["q8_0"])
    found["imatrix"] = timed("imatrix", lambda: imatrix_scores(source, matrix, [*use], Silent()))
    return found, seconds


def losses_of(model: Any, kept: dict[int, tuple[int, ...]], judged: Tensor) -> Tensor:
    """Of each window, after a cut."""
    return window_losses(cut_model(model, Cut(experts=kept)), judged)


def measured(setup: str, seed: int, work: Path, judged_windows: int) -> dict[str, Any]:
    """One row."""
    model = experts.model_of(setup, seed, work)
    judged = torch.cat(list(windows_of(True, judged_windows).values()))
    calibration = torch.cat(list(windows_of(False, experts.CALIBRATION, seed).values()))
    scores, seconds = scored(model, exported(model, work), calibration, work)
    dense = float(window_losses(model, judged).mean())
    row: dict[str, Any] = {"setup": setup, "seed": seed, "dense": dense, "seconds": seconds}
    row["spearman_with_reap"] = {
        name: [experts.correlation(own[n], scores["reap"][n]) for n in own]
        for name, own in scores.items()
    }
    blank = ExpertUse(torch.zeros(EXPERTS), torch.zeros(EXPERTS))
    unused = dict.fromkeys(scores["reap"], blank)
    for keep in KEPT:
        losses = {
            name: losses_of(model, best_experts(own, keep, CHOSEN), judged)
            for name, own in scores.items()
        }
        draws = [scores_of(unused, "random", 100 * draw) for draw in range(DRAWS)]
        drawn = [losses_of(model, best_experts(own, keep, CHOSEN), judged) for own in draws]
        losses["random"] = torch.stack(drawn).mean(0)
        gaps = {name: loss - losses["reap"] for name, loss in losses.items()}
        row[f"keep_{keep}"] = {
            name: {
                "loss": float(loss.mean()), "above_reap": float(gaps[name].mean()),
                "error": float(gaps[name].std() / len(loss) ** 0.5),
            }
            for name, loss in losses.items()
        }  # fmt: skip
    return row


def compared(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for each model and number of experts."""
    names = (*SCORES, "random")
    lines = []
    for row in rows:
        for keep in KEPT:
            found = [row[f"keep_{keep}"][name]["loss"] for name in names]
            lines.append([
                row["setup"], str(row["seed"]), f"{row['dense']:.3f}", f"{keep} of {EXPERTS}",
                *(f"{loss:.3f}" for loss in found),
            ])  # fmt: skip
    return ["balanced over", "seed", "dense", "experts kept", *names], lines


def costs(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Seconds of each score and its correlation with REAP, the mean over all models and layers."""
    lines = []
    for name in (*SCORES, "collected"):
        took = sum(row["seconds"][name] for row in rows) / len(rows)
        alike = [x for row in rows for x in row["spearman_with_reap"].get(name, [])]
        mean = f"{sum(alike) / len(alike):.2f}" if alike else ""
        lines.append([name, f"{took:.2f}", mean])
    return ["score", "seconds", "Spearman with REAP"], lines


TABLES = {"compared": compared, "costs": costs}


def main() -> None:
    """Train, score, cut, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--setups", nargs="*", default=list(experts.SETUPS), choices=experts.SETUPS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--judged", type=int, default=experts.JUDGED)
    parser.add_argument("--try", dest="trial", action="store_true", help="store nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(heading())
    protocol = {
        "experts": EXPERTS, "chosen": CHOSEN, "steps": experts.STEPS,
        "calibration_windows_of_each_kind": experts.CALIBRATION,
        "judged_windows_of_each_kind": args.judged, "random_draws": DRAWS,
        "loss": "nats per character, held-out files",
    }  # fmt: skip
    rows = []
    for setup in args.setups:
        for seed in args.seeds:
            known = known_rows("expert-scores", protocol)
            if not args.trial and (setup, seed) in {(r["setup"], r["seed"]) for r in known}:
                continue
            rows.append(measured(setup, seed, args.work, args.judged))
            if not args.trial:
                add("expert-scores", protocol, rows[-1])
    rows = rows if args.trial else known_rows("expert-scores", protocol)
    print(markdown(*compared(rows)))
    print(markdown(*costs(rows)))


if __name__ == "__main__":
    main()
