"""`secateur generate` and `secateur bench` as a user meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from slow import slow
from tiny import save_tiny
from with_kernels import needs_kernels

import secateur as library
from runtime.kernel_examples import TIERS
from runtime.packed_models import packed_model
from secateur.errors import RecipeError
from secateur.evaluation.speed import BACKENDS, USUAL_BACKENDS, Speed
from secateur.reporting.evaluate import BenchResult
from secateur.runtime.kernels.library import kernel_info

SHORT = ("--prompt-tokens", 4, "--new-tokens", 3, "--rounds", 1)


@needs_kernels
def test_generate(secateur, tmp_path: Path) -> None:
    folder = packed_model(tmp_path, head_dim=16, eos_token_id=None)
    asked = ("generate", folder, "--prompt", "abc", "--max-new-tokens", 8)
    shown = secateur(*asked)
    assert shown.code == 0, shown.err
    assert shown.out.startswith("abc")
    assert shown.err.startswith("8 tokens, ")
    assert "(fused decode loop)" in shown.err
    record = json.loads(secateur(*asked, "--json").out)
    assert record["model"] == str(folder)
    assert record["prompt"] + record["text"] + "\n" == shown.out
    assert record["tokens"] == 8
    assert record["first_token_seconds"] > 0
    assert record["tokens_per_second"] > 0
    drawn = [secateur(*asked, "--temperature", 2, "--seed", seed).out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    single = json.loads(secateur(*asked, "--max-new-tokens", 1, "--json").out)
    assert (single["tokens"], single["tokens_per_second"]) == (1, None)


@needs_kernels
def test_generate_falls_back_to_transformers(secateur, tmp_path) -> None:
    folder = save_tiny(tmp_path / "m", "gpt2")
    done = secateur("generate", folder, "--prompt", "abc", "--max-new-tokens", 8)
    assert done.code == 0, done.err
    assert "(transformers: its type is gpt2" in done.err


@needs_kernels
def test_kv_cache(secateur, tmp_path: Path) -> None:
    folder = packed_model(tmp_path / "packed", head_dim=16, eos_token_id=None)
    asked = ("generate", folder, "--prompt", "abc", "--max-new-tokens", 8, "--kv-cache", "int8")
    shown = secateur(*asked)
    assert shown.code == 0, shown.err
    assert "(fused decode loop)" in shown.err
    other = save_tiny(tmp_path / "gpt2", "gpt2")
    refused = secateur("generate", other, "--prompt", "abc", "--kv-cache", "int8")
    assert refused.code == 2
    assert "--kv-cache" in refused.err
    with pytest.raises(RecipeError, match="kv_cache='int9'"):
        library.generate(folder, "abc", max_new_tokens=8, kv_cache="int9")


@needs_kernels
@pytest.mark.slow
def test_contenders_that_cannot_run_are_reported_and_the_rest_is_measured(
    secateur, tmp_path
) -> None:
    """GPT-2 is none for the decode loop; the GGUF file lacks most of a model."""
    folder = packed_model(tmp_path, "gpt2", values="bfloat16")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    done = secateur(
        "bench", folder, *SHORT, "--json", "--contenders", "packed, torch bf16",
        "--gguf", tmp_path / "broken.gguf",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = json.loads(done.out)
    packed, plain, gguf = record["contenders"]
    assert "its type is gpt2" in packed["failure"]
    assert gguf["contender"] == "broken.gguf"
    assert gguf["failure"]
    assert plain["contender"] == "torch bf16"
    assert plain["rounds"] == 1
    assert plain["tokens_per_second"] > 0
    assert plain["resident_bytes"] > 0
    assert "nothing to compare" in record["verdict"]
    assert record["protocol"]["kernels"] == kernel_info().tier
    assert record["file_bytes"] == (folder / "secateur.safetensors").stat().st_size


def bench_of(speeds: list[Speed], *, compressed: bool) -> BenchResult:
    protocol = {"prompt_tokens": 4}
    return BenchResult.of(
        "model", speeds, compressed=compressed, protocol=protocol, file_bytes=1, dense_bytes=2
    )


def test_contenders_with_one_reason_share_a_line() -> None:
    failed = [Speed(name, failure="its type is gpt2") for name in ("dense bf16", "dense int8")]
    result = bench_of(failed, compressed=False)
    assert result.exit_code == 1
    assert "dense bf16, dense int8" in str(result)
    assert str(result).count("its type is gpt2") == 1


def test_verdicts() -> None:
    def verdict(**seconds: float) -> str:
        speeds = [Speed(name.replace("_", " "), (s,), (1.0,)) for name, s in seconds.items()]
        speeds.append(Speed("torch int8", failure="no"))
        return bench_of(speeds, compressed=True).verdict

    assert verdict(packed=0.1, dense_bf16=0.15, torch_bf16=0.4) == (
        "1.50 times as fast as dense bf16, the fastest of the others"
    )
    assert verdict(packed=0.1, dense_bf16=0.05).startswith("no gain: dense bf16")
    assert "2.00 times" in verdict(packed=0.1, dense_bf16=0.05)
    assert verdict(packed=0.1, packed_in_transformers=0.2).startswith("nothing to compare")
    assert verdict(dense_bf16=0.1).startswith("nothing to compare")
    assert set(USUAL_BACKENDS) < set(BACKENDS)


@pytest.mark.parametrize("sent", [signal.SIGINT, slow(signal.SIGKILL)])
def test_a_stopped_bench_leaves_no_process(tmp_path: Path, sent: signal.Signals) -> None:
    folder = save_tiny(tmp_path / "m")
    command = [sys.executable, "-m", "secateur", "bench", str(folder), "--rounds", "1000000"]
    bench = subprocess.Popen(
        [*command, "--contenders", "torch bf16"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    try:
        children = wait_for(psutil.Process(bench.pid).children)
        time.sleep(0.5)
        bench.send_signal(sent)
        assert bench.wait(60) == (130 if sent == signal.SIGINT else -signal.SIGKILL)
        assert not psutil.wait_procs(children, 60)[1]
    finally:
        bench.kill()
        bench.wait()


def hear_interrupts() -> None:
    """Undo what a shell does to its background jobs and all below them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(ask) -> list[psutil.Process]:
    """What a question gives as soon as it gives anything."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        found = ask()
        if found:
            return found
        time.sleep(0.1)
    raise TimeoutError


def test_kernel_info_says_what_runs() -> None:
    info = library.kernel_info()
    assert info.tier in (*TIERS, "neon-i8mm", "neon", "none")
    assert (info.threads > 0) is (info.tier != "none")
    assert bool(info.reason) is (info.tier == "none")


@pytest.mark.parametrize("archive", [False, True])
def test_compressed_folders_are_judged_like_their_dense_ones(secateur, tmp_path, archive) -> None:
    folder = packed_model(tmp_path, archive=archive)
    text = tmp_path / "text.txt"
    text.write_text("w3 w4 w5 w6 " * 40)
    judged = [
        json.loads(secateur("evaluate", x, "--text", text, "--sequence-length", 16, "--json").out)
        for x in (folder, tmp_path / "dense")
    ]
    packed, dense = (one["perplexity"][0]["perplexity"] for one in judged)
    assert packed == pytest.approx(dense, rel=1e-5)
