"""A package of somebody else brings a part of every kind; all work from the command line.

The package is `tests/foreign_package`. It lies beside Secateur as an installed one does, and
nothing in Secateur knows its parts by name. Its score `quince-peak` is one decorated function.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import save_tiny
from torch import Tensor
from trained import source_text
from transformers import AutoModelForCausalLM
from zoo import tiny_windows

import secateur
from secateur.calibration.windows import save_windows

PACKAGE = Path(__file__).parent.parent / "foreign_package"
MIB = 2**20
PARTS = {
    "score": "quince-peak",
    "solver": "quince-stretch",
    "refine": "quince-magnitude",
    "pattern": "pairs",
    "allocation": "quince-slope",
    "sparsity": "0.7",
}

DRIVER = """
import contextlib, io, json, sys
from secateur.cli import main
answers = []
for words in json.loads(sys.stdin.read()):
    sys.argv, out = ["secateur", *words, "--json"], io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                sys.exit(f"{words}: {ended.code}")
    answers.append(json.loads(out.getvalue()))
print(json.dumps(answers))
"""
"""Runs commands one after the other in one process; one JSON list of what they printed."""

SCOPE = ("--scope", "layer", "--sparsity", "0.5", "--calibration", "windows.safetensors")
BY_OUTPUT = (*SCOPE, "--score", "quince-output", "--sequential")
BY_SIZE = (*SCOPE, "--score", "magnitude", "--sequential")
FLAGS = [word for key, value in PARTS.items() for word in (f"--{key}", value)]
ON_TEXT = ("--calibration", "windows.safetensors")
ON_WINDOWS = {"calibration": "windows.safetensors"}
PLAN = ("prune", "--dry-run")
BY_PEAK = ("--score", "quince-peak")
TRAINED = (
    "--text", "text.txt", "--sequence-length", "16", "--windows", "8", "--steps", "4", "--batch",
    "2", "--validations", "1", "--validation-windows", "2",
)  # fmt: skip
COMMANDS: dict[str, tuple[str, ...]] = {
    "counted": ("quince-count", "generic"),
    "parts": ("methods",),
    "seen": ("inspect", "generic"),
    "plan": (*PLAN, "generic", *FLAGS, *ON_TEXT),
    "plain": (*PLAN, "generic", "--method", "wanda", "--sparsity", "0.5", *ON_TEXT),
    "pruned": ("prune", "generic", *FLAGS, *ON_TEXT, "--output", "pruned"),
    "packed": (
        "compress", "pruned", "--format", "quince-positions", "--values", "keep", "--output",
        "packed",
    ),
    "again": ("decompress", "packed", "--output", "again"),
    "peak": ("prune", "llama", *BY_PEAK, "--sparsity", "0.5", *ON_TEXT, "--output", "peak"),
    "swept": (
        "sweep", "llama", "--methods", "quince-peak", "--sparsities", "0.5", *ON_TEXT, "--text",
        "text.txt", "--text-sequence-length", "16", "--text-windows", "4", "--output", "swept",
    ),
    "chained": ("chain", "chain.yaml"),
    "gradual": (
        "train", "llama", "--gradual", "0.5", "--set", "gradual.score=quince-peak", "--set",
        "gradual.schedule=quince-late", "--set", "gradual.every=1", *TRAINED, "--output", "gradual",
    ),
    "iterative": (
        "train", "llama", "--iterative", "0.5", "--set", "iterative.score=quince-peak", "--set",
        "iterative.rounds=2", *TRAINED, "--output", "iterative",
    ),
    "structured": (
        "structure", "llama", *BY_PEAK, "--ffn", "0.5", *ON_TEXT, "--output", "structured",
    ),
    **{
        f"{by} {order}": (*PLAN, "llama", *words, order)
        for order in ("group", "layer")
        for by, words in (("output", BY_OUTPUT), ("size", BY_SIZE))
    },
    **{
        order: ("prune", "llama", *BY_OUTPUT, order, "--output", order)
        for order in ("group", "layer")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its entry points, as pip leaves it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE / "quince", folder / "quince")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    notes = folder / f"{project['name']}-{project['version']}.dist-info"
    notes.mkdir()
    (notes / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (notes / "entry_points.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the commands run in, with two models and windows."""
    place = tmp_path_factory.mktemp("place")
    for family in ("generic", "llama"):
        save_tiny(place / family, family)
    save_windows(tiny_windows(), place / "windows.safetensors")
    prune = {"score": "quince-peak", "sparsity": 0.5}
    chain = {"model": "llama", "output": "chained", "steps": [{"prune": prune | ON_WINDOWS}]}
    (place / "text.txt").write_text(source_text()[:20_000])
    (place / "chain.yaml").write_text(json.dumps(chain))
    return place


@pytest.fixture(scope="module")
def said(installed: Path, place: Path) -> dict[str, Any]:
    """What every command prints where the package is installed."""
    where = Path(secateur.__file__).parent.parent
    paths = [str(installed), str(where), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps([*COMMANDS.values()]), cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(COMMANDS, json.loads(done.stdout), strict=True))


def test_parts_of_a_foreign_package_work_from_the_command_line(
    said: dict[str, Any], place: Path
) -> None:
    counted, parts, seen, plan, plain = (
        said[name] for name in ("counted", "parts", "seen", "plan", "plain")
    )
    assert counted["files"] == len(list((place / "generic").iterdir()))
    assert "quince-peak" in parts["scores"]
    assert parts["statistics"]["quince-peak"] == "inputs"
    assert "pairs" in parts["patterns"]["quince-pairs"]
    assert "quince-positions" in parts["formats"]
    assert seen["family"] == "quince"

    # 64 MiB of the solver, which prepares nothing, so the 40 of score and pattern are over by then;
    # 128 of the allocation at one layer. The built-in parts need less than one here.
    assert 0 <= plan["solve_bytes"] - (64 + 128) * MIB < MIB
    assert 0 <= plan["disk_bytes"] - plain["disk_bytes"] - 256 * MIB < MIB
    assert plan["peak_bytes"] - plain["peak_bytes"] > 180 * MIB

    assert parts["statistics"]["quince-output"] == "outputs"
    check_pruned(place / "generic", place / "pruned")
    check_packed(*(place / name for name in ("pruned", "packed", "again")))
    # here, without the package, nobody can read them
    with pytest.raises(secateur.SecateurError, match="'quince-positions'"):
        secateur.load(place / "packed")


def test_a_score_of_one_function_works_in_every_verb_that_takes_a_score(
    said: dict[str, Any], place: Path
) -> None:
    assert said["parts"]["scores"]["quince-peak"] == ["quince-peak"]
    assert "quince-late" in said["parts"]["schedules"]
    pruned = load_file(place / "peak" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    model, seen = AutoModelForCausalLM.from_pretrained(place / "llama"), list[Tensor]()
    linear = model.get_submodule(name.removesuffix(".weight"))
    linear.register_forward_hook(lambda m, x, y: seen.append(x[0]))
    with torch.no_grad():
        model(tiny_windows())
    score = linear.weight.detach().abs() * seen[0].abs().amax((0, 1))
    threshold = score.flatten().sort().values[score.numel() // 2 - 1]
    assert torch.equal(pruned[name] != 0, score > threshold)
    # the same zeros by the other doors, and as many where training comes between
    assert said["swept"]["points"][0]["method"] == "quince-peak"
    assert torch.equal(
        load_file(place / "chained" / "model.safetensors")[name] != 0, pruned[name] != 0
    )
    for way in ("gradual", "iterative"):
        weight = load_file(place / way / "model.safetensors")[name]
        assert int((weight == 0).sum()) == weight.numel() // 2
    assert (
        load_file(place / "structured" / "model.safetensors")[
            "model.layers.0.mlp.down_proj.weight"
        ].shape[1]
        == AutoModelForCausalLM.from_pretrained(place / "llama").config.intermediate_size // 2
    )


@pytest.mark.parametrize("order", ["group", "layer"])
def test_a_foreign_statistic_of_a_kind_of_its_own_prunes(
    order: str, said: dict[str, Any], place: Path
) -> None:
    plan, plain = said[f"output {order}"], said[f"size {order}"]
    # 2 MiB for each linear: three share an input; a layer has seven
    held = {"group": 3, "layer": 8}[order]
    assert 0 <= plan["solve_bytes"] - plain["solve_bytes"] - 2 * held * MIB < MIB

    model, seen = AutoModelForCausalLM.from_pretrained(place / "llama"), dict[str, Tensor]()
    first = {n: m for n, m in model.named_modules() if n.startswith("model.layers.0.self_attn.")}
    outputs = {n: m for n, m in first.items() if n.endswith(("q_proj", "k_proj", "v_proj"))}
    for name, module in outputs.items():
        module.register_forward_hook(lambda m, x, y, name=name: seen.__setitem__(name, y))
    with torch.no_grad():
        model(tiny_windows())
    after = load_file(place / order / "model.safetensors")
    for name, module in outputs.items():
        norm = seen[name].double().square().sum((0, 1)).sqrt()
        score = module.weight.double().abs() * norm[:, None]
        threshold = score.flatten().sort().values[score.numel() // 2 - 1]
        assert torch.equal(after[f"{name}.weight"] != 0, score > threshold)


def check_pruned(source: Path, pruned: Path) -> None:
    """Pairs are pruned by magnitude, the rest is stretched, later layers lose more."""
    before, after = load_file(source / "model.safetensors"), load_file(pruned / "model.safetensors")
    shares = {}
    for name, weight in before.items():
        if ".layers." not in name or weight.ndim != 2:
            assert torch.equal(weight, after[name])
            continue
        new = after[name]
        kept = new != 0
        assert torch.equal(kept[:, 0::2], kept[:, 1::2])
        assert torch.equal(new, 1.25 * weight * kept)
        pairs = weight.abs().unflatten(1, (-1, 2)).sum(2)
        assert bool((pairs.where(kept[:, ::2], torch.inf).amin(1) >= pairs.where(
            ~kept[:, ::2], -torch.inf).amax(1)).all())  # fmt: skip
        shares.setdefault(int(name.split(".")[2]), []).append(float((~kept).float().mean()))
    means = [sum(shares[i]) / len(shares[i]) for i in sorted(shares)]
    assert means[0] < 0.65 < 0.75 < means[-1]
    assert sum(means) / len(means) == pytest.approx(0.7, abs=0.02)


def check_packed(pruned: Path, packed: Path, again: Path) -> None:
    """Matrices are stored as positions and values, and come back bit for bit."""
    names = set()
    for file in packed.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    assert "model.layers.0.mlp.down_proj.positions" in names
    assert "model.layers.0.mlp.down_proj.values" in names
    first, second = load_file(pruned / "model.safetensors"), {}
    for file in again.glob("*.safetensors"):
        second |= load_file(file)
    assert all(torch.equal(first[name], second[name]) for name in first)
