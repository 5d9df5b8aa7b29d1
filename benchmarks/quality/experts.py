"""Which experts to keep: REAP, frequency and random, on mixtures that are trained here.

    python -m benchmarks.quality.experts --work DIR [--setups …] [--seeds 0 1 2]

The model and its text are those of `tests/support/mixtures.py`: two layers of 16 experts, two for a token,
that read code, prose and records letter by letter. Set-ups differ in the loss that balances the
experts: of each layer, as models are published, or of all layers together, as transformers 5.24
computes it, which leaves some experts of a layer nearly unused. Calibration is 200 windows of 64
letters of each kind, from the files that were trained on. Judged is the loss on windows of held-out
files, as many of each kind, and all ways on the same ones, so the error of a difference is that of
the differences of windows.

`alone` removes one expert after the other, and correlates (Spearman) what that costs with the
scores: those of REAP, the frequency, and their product. Trained models stay in DIR and are read
again.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.hardware import add, heading, markdown
from benchmarks.stored import known_rows
from safetensors.torch import load_model, save_model
from torch import Tensor

from secateur.engine.search.experts import (
    ExpertUse,
    best_experts,
    expert_use,
    scores_of,
)
from secateur.models.experts import opened_experts
from secateur.models.targets import ModelTarget
from secateur.progress import Silent
from secateur.structured.cut import Cut
from secateur.structured.surgery import VariedSizesWarning, cut_model

sys.path.append(str(Path(__file__).parents[2] / "tests/support"))
from mixtures import (
    CHOSEN,
    EXPERTS,
    KINDS,
    trained_mixture,
    untrained_mixture,
    window_losses,
    windows_of,
)

MEASURES = ("src/secateur/engine/search/experts.py", "src/secateur/structured")

SETUPS = {"each layer": False, "all layers together": True}
"""Over what the experts are balanced."""

STEPS, KEPT, DRAWS, CALIBRATION, JUDGED, ALONE = 3000, (12, 8), 5, 200, 360, 100
Use = dict[int, ExpertUse]


def model_of(setup: str, seed: int, work: Path) -> Any:
    """The trained model of a set-up."""
    file = work / f"{setup}-{seed}.safetensors"
    if not file.exists():
        model = trained_mixture(seed, STEPS, together=SETUPS[setup])
        save_model(model, str(file))
        return model
    model = untrained_mixture(seed)
    load_model(model, str(file))
    return model.eval()


def candidate_cuts(model: Any, use: Use, keep: int) -> Iterator[tuple[str, Any]]:
    """The cut models, by what chose their experts."""
    for score in ("reap", "frequency"):
        kept = best_experts(scores_of(use, score), keep, CHOSEN)
        yield score, cut_model(model, Cut(experts=kept))
    for draw in range(DRAWS):
        kept = best_experts(scores_of(use, "random", 100 * draw), keep, CHOSEN)
        yield "random", cut_model(model, Cut(experts=kept))


def alone(model: Any, use: Use, windows: Tensor) -> dict[str, float]:
    """How well scores tell what each expert costs: Spearman's correlation, the mean over layers."""
    dense = window_losses(model, windows).mean()
    found: dict[str, list[float]] = {"reap": [], "frequency": [], "product": []}
    for index, heard in use.items():
        costs = []
        for expert in range(EXPERTS):
            own = tuple(e for e in range(EXPERTS) if e != expert)
            cut = cut_model(model, Cut(experts={index: own}))
            costs.append(float(window_losses(cut, windows).mean() - dense))
        scores = {name: heard.score(name) for name in ("reap", "frequency")}
        scores["product"] = heard.outputs
        for name, score in scores.items():
            found[name].append(correlation(score, torch.tensor(costs)))
    return {name: sum(each) / len(each) for name, each in found.items()}


def correlation(one: Tensor, two: Tensor) -> float:
    """Spearman's: that of the ranks."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (one, two)])
    return float(torch.corrcoef(ranks)[0, 1])


def measured(setup: str, seed: int, work: Path) -> dict[str, Any]:
    """One row."""
    warnings.simplefilter("ignore", VariedSizesWarning)
    start = time.perf_counter()
    model = model_of(setup, seed, work)
    seconds = time.perf_counter() - start
    judged = torch.cat(list(windows_of(True, JUDGED).values()))
    with opened_experts(model):
        calibration = torch.cat(list(windows_of(False, CALIBRATION, seed).values()))
        use = expert_use(ModelTarget(model), calibration, 4096, Silent())
    dense = window_losses(model, judged)
    row: dict[str, Any] = {
        "setup": setup, "seed": seed, "training_seconds": seconds, "dense": float(dense.mean()),
        "dense_by_kind": by_kind(dense),
        "least_and_most_tokens": [
            [int(u.tokens.min()), int(u.tokens.max())] for u in use.values()
        ],
    }  # fmt: skip
    for keep in KEPT:
        losses: dict[str, Tensor] = {}
        for name, cut in candidate_cuts(model, use, keep):
            losses[name] = losses.get(name, 0) + window_losses(cut, judged)
        losses["random"] /= DRAWS
        row[f"keep_{keep}"] = {
            name: {
                "loss": float(loss.mean()), "by_kind": by_kind(loss),
                "above_reap": float((loss - losses["reap"]).mean()),
                "error": float((loss - losses["reap"]).std() / len(loss) ** 0.5),
            }
            for name, loss in losses.items()
        }  # fmt: skip
    few = torch.cat(list(windows_of(True, ALONE).values()))
    return {**row, "alone": alone(model, use, few)}


def by_kind(losses: Tensor) -> dict[str, float]:
    """The mean of each kind of text."""
    return {k: float(x.mean()) for k, x in zip(KINDS, losses.chunk(len(KINDS)), strict=True)}


def kept(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for each model and number of experts."""
    names = ("reap", "frequency", "random")
    columns = ["balanced over", "seed", "dense", "experts kept", *names, "frequency - REAP"]
    lines = []
    for row in rows:
        for keep in KEPT:
            found = row[f"keep_{keep}"]
            gap = found["frequency"]
            lines.append([
                row["setup"], str(row["seed"]), f"{row['dense']:.3f}", f"{keep} of {EXPERTS}",
                *(f"{found[name]['loss']:.3f}" for name in names),
                f"{gap['above_reap']:+.3f} ± {gap['error']:.3f}",
            ])  # fmt: skip
    return columns, lines


TABLES = {"kept": kept}


def main() -> None:
    """Train, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--setups", nargs="*", default=list(SETUPS), choices=SETUPS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print(heading())
    protocol = {
        "experts": EXPERTS, "chosen": CHOSEN, "steps": STEPS,
        "calibration_windows_of_each_kind": CALIBRATION, "judged_windows_of_each_kind": JUDGED,
        "random_draws": DRAWS, "loss": "nats per character, held-out files",
    }  # fmt: skip
    for setup in args.setups:
        for seed in args.seeds:
            known = {(r["setup"], r["seed"]) for r in known_rows("experts", protocol)}
            if (setup, seed) not in known:
                row = measured(setup, seed, args.work)
                print(row, flush=True)
                add("experts", protocol, row)
    print(markdown(*kept(known_rows("experts", protocol))))


if __name__ == "__main__":
    main()
