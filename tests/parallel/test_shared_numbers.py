"""What several processes gather and measure is what one gathers and measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from together import Started, call_differently, judge_together, run_together, sum_statistics
from torch import Tensor
from trained import source_text

import secateur
from secateur.errors import RankError
from secateur.parallel.ranks import ALONE, Ranks
from secateur.training.process_group import ProcessGroup


def expected(inputs: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """Every statistic by its formula, in float64."""
    x, g = inputs.double(), gradients.double()
    return {
        "column_mean": x.mean(0),
        "column_norm": x.square().sum(0).sqrt(),
        "column_variance": x.var(0, correction=0),
        "gram": x.t() @ x,
        "fisher": g.square().mean(0),
        "gradient": g.mean(0),
    }


def test_statistics_of_two_processes_are_those_of_all_rows(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(101, 40, generator=draw) * torch.logspace(-2, 2, 40)
    gradients = torch.randn(9, 24, 40, generator=draw)
    save_file({"inputs": inputs, "gradients": gradients}, tmp_path / "rows.safetensors")
    run_together(2, sum_statistics, tmp_path, str(tmp_path))
    found = load_file(tmp_path / "sums.safetensors")
    oracle = expected(inputs, gradients)
    assert found.keys() == oracle.keys()
    for name, value in found.items():
        size = oracle[name].abs()
        if name == "gram":  # relative to what its columns could have in common
            norms = oracle["column_norm"]
            size = norms[:, None] * norms
        if name in ("gradient", "column_mean"):  # relative to what is added up
            size = torch.ones_like(size) * oracle[name].abs().amax()
        assert ((value - oracle[name]).abs() <= 1e-6 * size).all(), name


@pytest.mark.parametrize("memory", [(), ("100MiB",)], ids=["whole", "layer by layer"])
def test_two_processes_measure_the_perplexity_of_one(tmp_path: Path, memory) -> None:
    save_tiny(tmp_path / "dense")
    secateur.prune(tmp_path / "dense", output=tmp_path / "pruned", method="magnitude", sparsity=0.5)
    (tmp_path / "text.txt").write_text(source_text()[:5000])
    places = [str(tmp_path / name) for name in ("pruned", "dense", "text.txt", "two.json")]
    run_together(2, judge_together, tmp_path, *places, *memory)
    pruned, dense, text, two = places
    secateur.evaluate(
        pruned, dense=dense, text=text, sequence_length=32, windows=13, output=tmp_path / "one.json"
    )
    one, both = (json.loads(Path(x).read_text()) for x in (tmp_path / "one.json", two))
    for kind, names in (
        ("perplexity", ("perplexity", "standard_error", "reference_perplexity")),
        ("divergence", ("kl", "top1_agreement", "loss_change_standard_error", "tokens")),
    ):
        for name in names:
            assert both[kind][0][name] == one[kind][0][name], name
    ids = [found["perplexity"][0]["protocol_id"] for found in (one, both)]
    assert ids[0] == ids[1]
    kept = json.loads((tmp_path / "pruned" / "secateur" / "evaluation.json").read_text())
    assert len(kept["perplexity"]) == 1


CALLS: dict[str, Callable[[Ranks], object]] = {
    "total": lambda ranks: ranks.total(torch.zeros(1)),
    "share from 0": lambda ranks: ranks.share(torch.zeros(1), 0),
    "gather": lambda ranks: ranks.gather(1),
    "once": lambda ranks: ranks.once(lambda: 1),
    "wait": lambda ranks: ranks.wait(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "ranks", [ALONE, ProcessGroup(torch.device("cpu"))], ids=["alone", "group"]
)
def test_the_work_of_one_process_makes_no_calls_of_all(ranks: Ranks, name: str) -> None:
    call = CALLS[name]
    with pytest.raises(RankError, match=f"`{name}`"):
        ranks.once(lambda: call(ranks))
    call(ranks)
    assert ranks.once(lambda: "done") == "done"


def test_different_calls_end_the_run_within_seconds(tmp_path: Path) -> None:
    started = Started(2, call_differently, tmp_path)
    assert started.join(30) == [1, 1]
    said = started.output(0) + started.output(1)
    assert "call 3 " in said
    assert "`gather`" in said
    assert "`share from 0 of (1,)`" in said
