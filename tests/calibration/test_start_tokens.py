"""Where the tokenizer puts a start token, every window begins with it; else nothing changes."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_windows import WORDS, documents
from tiny import save_tiny, tiny_tokenizer
from zoo import tiny_model, tiny_windows

import secateur
from secateur.calibration.continuation import PREFIX, continue_windows
from secateur.calibration.run_windows import load_calibration
from secateur.calibration.windows import (
    WindowPlan,
    evaluation_windows,
    make_windows,
    save_windows,
    stored_start,
)
from secateur.errors import CheckpointError, RecipeError
from secateur.evaluation.divergence import divergence
from secateur.evaluation.perplexity import perplexity, protocol, protocol_id
from secateur.models.tokenizer import start_tokens
from secateur.recipes.train import TrainRecipe
from secateur.training.batches import read_training_text

BOS, EOS = 1, 2
PACKINGS = ("concatenate", "random-crop")


def framed(template: str, vocab: list[str] | None = None) -> Any:
    """A tokenizer that puts special tokens around a text `$A`, as the template says."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer(vocab)
    ids = {"<bos>": BOS, "<eos>": EOS, "<pad>": 0}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, i) for t, i in ids.items() if t in template]
    )
    return tokenizer


def digest(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]


def bare(text: str, vocab: list[str] | None = None) -> list[int]:
    return list(tiny_tokenizer(vocab)(text)["input_ids"])


@pytest.fixture
def gemma(tmp_path: Path) -> Path:
    """A tiny Gemma 2 whose tokenizer puts a start token, as Gemma's does."""
    folder = save_tiny(tmp_path / "gemma", "gemma2")
    tiny_tokenizer(add_bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    rng = random.Random(0)
    lines = (" ".join(rng.choices(["stone", "river", "lamp", "ink"], k=6)) for _ in range(80))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


# -- what the tokenizer really does --------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "start"),
    [
        ("$A", ()),
        ("<bos> $A", (BOS,)),
        ("<bos> $A <eos>", (BOS,)),
        ("$A <eos>", ()),
        ("<pad> <bos> $A", (0, BOS)),
    ],
)
def test_start_tokens_are_found_by_encoding(template: str, start: tuple[int, ...]) -> None:
    for vocab in (None, WORDS):  # the second knows no letter alone
        tokenizer = framed(template, vocab)
        assert tokenizer.bos_token_id == BOS  # a name says nothing
        assert start_tokens(tokenizer) == start


def test_a_tokenizer_that_hides_the_text_is_refused() -> None:
    def strange(texts: list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        return {"input_ids": [[5, 6] if add_special_tokens else [7] for _ in texts]}

    with pytest.raises(CheckpointError, match=r"'a' becomes \[5, 6\]"):
        start_tokens(strange)


def test_no_room_for_text() -> None:
    tokenizer = framed("<pad> <bos> $A")
    for make in (
        lambda: evaluation_windows("words", tokenizer, 2),
        lambda: make_windows(["words"], tokenizer, WindowPlan(1, 2)),
    ):
        with pytest.raises(RecipeError, match="windows of 2 tokens"):
            make()


# -- calibration ---------------------------------------------------------------------------------


COMPUTED = {"dtype": "float32", "activations": "none"}


def test_without_a_start_token_nothing_changes() -> None:
    """Windows and protocol ids as commit 80ad24a made them."""
    tokenizer = tiny_tokenizer(WORDS)
    made = [make_windows(documents(), tokenizer, WindowPlan(12, 9, 5, p)) for p in PACKINGS]
    judged = evaluation_windows("\n\n".join(documents()), tokenizer, 9)
    assert [digest(w) for w in (*made, judged)] == [
        "a1fdc8f308f5f49b", "ebfb30c94bf70fa1", "a9808585134fce9e",
    ]  # fmt: skip
    described = protocol(judged, dataset="a", join="b", computed=COMPUTED, start=())
    assert protocol_id("ppl", described) == "ppl-180aae63-float32"
    assert protocol_id("div", described) == "div-6c28ee82-float32"


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", "<pad> <bos> $A"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_calibration_windows_begin_with_it_and_have_it_once(template: str, packing: str) -> None:
    tokenizer = framed(template, WORDS)
    start = start_tokens(tokenizer)
    windows = make_windows(documents(), tokenizer, WindowPlan(12, 9, packing=packing))
    assert windows.shape == (12, 9)
    assert (windows[:, : len(start)] == torch.tensor(start)).all()
    assert not (windows[:, len(start) :] == BOS).any()
    ends = [ids[-1] for ids in windows.tolist()]
    assert packing == "random-crop" or EOS in {*ends, *windows.flatten().tolist()}


@pytest.mark.parametrize("template", ["$A", "<bos> $A", "<bos> $A <eos>", "<pad> <bos> $A"])
def test_packed_windows_lose_and_repeat_no_text(template: str) -> None:
    """8 documents of 7 words and an end: 64 tokens of text, in windows of 4 without overlap."""
    tokenizer = framed(template, WORDS)
    start = len(start_tokens(tokenizer))
    texts = documents(8, 7)
    windows = make_windows(texts, tokenizer, WindowPlan(16, 4 + start))
    stream = [i for text in texts for i in [*bare(text, WORDS), EOS]]
    assert sorted(windows[:, start:].flatten().tolist()) == sorted(stream)
    halves = {tuple(stream[i : i + 4]) for i in range(0, 64, 4)}
    assert {tuple(ids) for ids in windows[:, start:].tolist()} == halves


@pytest.mark.parametrize("add_bos", [True, False])
def test_random_crops_are_the_published_ones_behind_the_start_token(add_bos: bool) -> None:
    """The published code crops ids that begin with the start token, and mostly crops it away."""
    tokenizer, length = tiny_tokenizer(WORDS, add_bos=add_bos), 20
    texts = documents(15, 18) + documents(15, 30, seed=4)
    windows = make_windows(texts, tokenizer, WindowPlan(10, length, 7, "random-crop"))
    random.seed(7)
    for window in windows.tolist():
        while True:
            i = random.randint(0, len(texts) - 1)
            ids = tokenizer(texts[i])["input_ids"]
            if len(ids) > length:
                break
        i = random.randint(0, len(ids) - length - 1)
        assert window == [BOS] * add_bos + ids[i + add_bos : i + length]


def test_records_and_files_name_it(tmp_path: Path, text: Path) -> None:
    plan, tokenizer = WindowPlan(4, 10), tiny_tokenizer(add_bos=True)
    windows, record = load_calibration(str(text), tokenizer, plan, vocab_size=96)
    assert record["start_tokens"] == [BOS]
    file = tmp_path / "w.safetensors"
    save_windows(windows, file, start=record["start_tokens"])
    assert stored_start(file) == (BOS,)
    _, again = load_calibration(str(file), None, plan, vocab_size=96)
    assert again["start_tokens"] == [BOS]
    assert again["sha256"] == record["sha256"]
    _, without = load_calibration(str(text), tiny_tokenizer(), plan, vocab_size=96)
    assert "start_tokens" not in without
    save_file({"input_ids": windows}, file)
    assert stored_start(file) == ()


# -- windows that the model writes ---------------------------------------------------------------


@pytest.mark.parametrize("start", [(BOS,), (0, BOS)])
@pytest.mark.parametrize("begun", [True, False])
def test_written_windows_begin_with_it_once(start: tuple[int, ...], begun: bool) -> None:
    """Also where the given windows, made by somebody else, do not."""
    model, words = tiny_model("llama"), tiny_windows(5, 40).clamp(min=3)
    heads = torch.tensor(start).expand(5, -1)
    windows = torch.cat([heads, words], dim=1) if begun else words
    own = continue_windows(model, windows, 7, seed=0, start=start)
    assert own.shape == (7, windows.shape[1])
    count = len(start)
    assert (own[:, :count] == torch.tensor(start)).all()
    assert not torch.isin(own[:, count:], torch.tensor([*start, EOS])).any()
    for row, ids in enumerate(own.tolist()):
        source = words[row % 5].tolist()
        prefix = ids[count : count + PREFIX]
        assert prefix in [source[i : i + PREFIX] for i in range(40 - PREFIX)]


def test_prune_writes_windows_that_begin_with_it(gemma: Path, text: Path, tmp_path: Path) -> None:
    secateur.prune(
        gemma, method="wanda", sparsity=0.5, output=tmp_path / "out", calibration=text,
        windows=3, sequence_length=32, generated_windows=2,
    )  # fmt: skip
    file = tmp_path / "out" / "secateur" / "windows.safetensors"
    windows = load_file(file)["input_ids"]
    assert windows.shape == (5, 32)
    assert ((windows == BOS).sum(1) == 1).all()
    assert (windows[:, 0] == BOS).all()
    assert stored_start(file) == (BOS,)
    manifest = json.loads((tmp_path / "out" / "secateur" / "manifest.json").read_text())
    assert manifest["calibration"]["start_tokens"] == [BOS]


def test_a_loaded_model_gets_them_too(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    model = tiny_model("gemma2")
    model.register_forward_pre_hook(
        lambda _m, _args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    secateur.prune(
        model, method="wanda", sparsity=0.5, calibration=text,
        tokenizer=tiny_tokenizer(add_bos=True), windows=3, sequence_length=32, generated_windows=2,
    )  # fmt: skip
    whole = [ids for ids in seen if ids.shape[1] == 32]
    assert whole
    # One forward reads windows backwards, to see which arguments of layers depend on tokens.
    assert all((ids[:, 0] == BOS).all() or (ids[:, -1] == BOS).all() for ids in whole)
    assert sum(bool((ids[:, -1] == BOS).all()) for ids in whole) <= 1


# -- training ------------------------------------------------------------------------------------


def test_training_windows_begin_with_it(gemma: Path, text: Path, tmp_path: Path) -> None:
    watched = tmp_path / "watched.txt"
    watched.write_text("paper and stone and glass " * 40, encoding="utf-8")
    recipe = TrainRecipe(
        model=str(gemma), output="x", text=(str(text),), validation_text=str(watched),
        sequence_length=33, windows=12, batch=2, steps=1,
    )  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(gemma)
    read, watched, record = read_training_text(recipe, gemma, config, 2)
    assert record["start_tokens"] == [BOS]
    for windows in (read.windows, watched.windows):
        assert ((windows == BOS).sum(1) == 1).all()
        assert (windows[:, 0] == BOS).all()


def test_the_overlap_of_texts_is_that_of_their_words(
    gemma: Path, text: Path, tmp_path: Path
) -> None:
    """The same text, cut three characters later: a sequence with a start token is no text."""
    later = tmp_path / "later.txt"
    later.write_text(text.read_text()[3:], encoding="utf-8")
    recipe = TrainRecipe(
        model=str(gemma), output="x", text=(str(text),), validation_text=str(later),
        sequence_length=40, windows=500, batch=2, steps=1,
    )  # fmt: skip
    ids = bare(text.read_text())

    def sequences(ids: list[int]) -> list[tuple[int, ...]]:
        windows = [ids[i : i + 39] for i in range(0, len(ids) - 38, 39)]
        return [tuple(w[i : i + 32]) for w in windows for i in range(8)]

    known, judged = set(sequences([*ids, EOS])), sequences(ids[3:])[: 8 * 8]
    share = sum(one in known for one in judged) / len(judged)
    config = transformers.AutoConfig.from_pretrained(gemma)
    with pytest.raises(RecipeError, match=f"{share:.1%} of the sequences"):
        read_training_text(recipe, gemma, config, 2)


# -- judging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["<bos> $A", "<pad> <bos> $A", "<bos> $A <eos>"])
def test_perplexity_is_that_of_a_plain_loop(template: str, text: Path) -> None:
    """Start tokens and S − k tokens of text, window by window; what is predicted is text."""
    model, tokenizer = tiny_model("gemma2"), framed(template)
    start = list(start_tokens(tokenizer))
    ids = bare(text.read_text()) + ([EOS] if "<eos>" in template else [])
    length = 32 - len(start)
    losses = []
    with torch.no_grad():
        for first in range(0, len(ids) - length + 1, length):
            read = [*start, *ids[first : first + length]]
            log_p = model(torch.tensor([read])).logits[0].double().log_softmax(-1)
            losses += [-log_p[i - 1, read[i]].item() for i in range(len(start), 32)]
    [found] = secateur.evaluate(model, text=text, tokenizer=tokenizer, sequence_length=32).texts
    assert found.mean_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.protocol["tokens"] == len(losses) == len(ids) // length * length
    assert found.protocol["start_tokens"] == start


def test_divergence_predicts_no_start_token() -> None:
    model, reference = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.5)
    windows = tiny_windows(4, 12)
    found = divergence(model, reference, windows, start_tokens=3)
    with torch.no_grad():
        p, q = (m(windows).logits.double().log_softmax(-1) for m in (reference, model))
    kl = (p.exp() * (p - q)).sum(-1)[:, 2:-1].mean()
    assert found.kl == pytest.approx(kl.item(), rel=1e-4)
    assert found.tokens == 4 * 9
    loss = perplexity(model, windows, start_tokens=3).mean_loss
    assert found.model.mean_loss == pytest.approx(loss, rel=1e-5)


def test_diagnosis_reads_them_too(gemma: Path, text: Path) -> None:
    found = secateur.diagnose(gemma, dense=gemma, text=text, windows=2, sequence_length=32)
    assert found.protocol["start_tokens"] == [BOS]


def test_a_sweep_calibrates_and_judges_behind_it(gemma: Path, text: Path, tmp_path: Path) -> None:
    result = secateur.sweep(
        gemma, methods=["wanda"], sparsities=[0.5], calibration=text, windows=3,
        sequence_length=32, text=[str(text)], text_sequence_length=32, output=tmp_path / "sweep",
    )  # fmt: skip
    assert list(result.failures) == []
    assert result.sweep.calibration["start_tokens"] == [BOS]
    [judged] = secateur.evaluate(gemma, text=text, sequence_length=32).texts
    assert result.dense[str(text)] == pytest.approx(judged.perplexity)
    assert protocol_id("ppl", result.sweep.protocol[str(text)]) == judged.protocol_id


@pytest.mark.parametrize("add_bos", [True, False])
def test_tasks_are_read_behind_the_start_token(add_bos: bool) -> None:
    """lm-eval encodes with the tokenizer's own special tokens: right as it is."""
    from lm_eval.api.instance import Instance

    from secateur.evaluation.harness import HarnessModel

    class Seen(HarnessModel):
        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[Any]:
            self.seen = requests
            return [(0.0, True)] * len(requests)

    model = Seen(tiny_model("gemma2"), tiny_tokenizer(add_bos=add_bos), lambda _: None)
    model.loglikelihood(
        [Instance("loglikelihood", {}, ("a stone", " falls"), 0)], disable_tqdm=True
    )
    ((_, context, continuation),) = model.seen
    assert context == [BOS] * add_bos + bare("a stone")
    assert continuation == bare(" falls")
