from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import transformers
from architectures import tiny_architecture
from tiny import save_tiny, tiny_tokenizer
from torch import nn
from zoo import CONFIGS, tiny_model, tiny_windows

from secateur.calibration.windows import evaluation_windows
from secateur.errors import ArchitectureError, NumericalError, RecipeError, SourceError
from secateur.evaluation import perplexity as room
from secateur.evaluation.generation import generate
from secateur.evaluation.perplexity import perplexity
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.deploy import Sampling


def oracle(model: nn.Module, windows: torch.Tensor) -> list[list[float]]:
    """−log p of every predicted token, one forward a token, in float64."""
    model = model.double()
    losses = []
    with torch.no_grad():
        for window in windows:
            losses.append([])
            for t in range(1, len(window)):
                logits = model(window[None, :t]).logits[0, -1]
                p = torch.exp(logits) / torch.exp(logits).sum()
                losses[-1].append(-math.log(p[window[t]].item()))
    model.float()
    return losses


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gpt_neox"])
def test_against_the_oracle(family):
    model, windows = tiny_model(family), tiny_windows(5, 9)
    result = perplexity(model, windows, batch_size=2)
    losses = oracle(model, windows)
    means = [sum(row) / len(row) for row in losses]
    mean = sum(means) / len(means)
    assert result.mean_loss == pytest.approx(mean, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    spread = math.sqrt(sum((m - mean) ** 2 for m in means) / 4 / 5)
    assert result.standard_error == pytest.approx(spread, rel=1e-3)
    assert (result.tokens, result.windows, result.sequence_length) == (40, 5, 9)
    assert result.seconds > 0


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_chunks_and_batches_change_nothing(family, monkeypatch):
    model, windows = tiny_model(family), tiny_windows(5, 17)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    monkeypatch.setattr(room, "LOGITS_BYTES", 96 * 4 * 7)  # seven tokens at a time
    for batch_size in (None, 1, 3):
        got = perplexity(model, windows, batch_size=batch_size).mean_loss
        assert got == pytest.approx(expected, rel=1e-5)


def test_capped_logits_are_not_taken_apart():
    probe = tiny_windows(1, 8)
    assert isinstance(room.body_and_head(tiny_model("llama"), probe).head, nn.Linear)
    model = tiny_model("gemma2")
    model.config.final_logit_softcapping = 2.0
    with torch.no_grad():
        assert isinstance(room.body_and_head(model, probe).head, nn.Identity)
    result = perplexity(model, tiny_windows(3, 8))
    losses = oracle(model, tiny_windows(3, 8))
    assert result.mean_loss == pytest.approx(sum(map(sum, losses)) / 21, rel=1e-5)


def test_any_module_that_gives_logits():
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(96, 96)

        def forward(self, ids):
            return self.table(ids)

    torch.manual_seed(0)
    model, windows = Bigram(), tiny_windows(4, 6)
    log_p = torch.log_softmax(model.table.weight.double(), -1)
    expected = -sum(log_p[a, b].item() for w in windows for a, b in itertools.pairwise(w))
    assert perplexity(model, windows).mean_loss == pytest.approx(expected / 20, rel=1e-5)


def test_progress_and_the_model_is_left_as_it_was():
    model, seen = tiny_model("llama").train(), []
    model.model.layers[0].eval()
    before = {n: p.clone() for n, p in model.named_parameters()}
    perplexity(model, tiny_windows(5, 9), batch_size=2, progress=lambda *done: seen.append(done))
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert model.training
    assert not model.model.layers[0].training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_not_a_number():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericalError, match=r"(?s)nan.*0 of 6"):
        perplexity(model, tiny_windows())


def test_bad_windows():
    model = tiny_model("llama")
    with pytest.raises(RecipeError, match="2 to 64"):
        perplexity(model, tiny_windows(1, 65))
    with pytest.raises(RecipeError, match="windows of 1 tokens"):
        perplexity(model, tiny_windows(2, 1))
    with pytest.raises(SourceError, match=r"id 96"):
        perplexity(model, torch.tensor([[1, 96]]))


def test_windows_are_the_text_cut_up_and_the_rest_dropped():
    tokenizer = tiny_tokenizer()
    text = "a line\n" * 20
    windows = evaluation_windows(text, tokenizer, 9)
    ids = tokenizer(text)["input_ids"]
    assert windows.shape == (140 // 9, 9)
    assert windows.flatten().tolist() == ids[: 9 * (140 // 9)]
    assert torch.equal(evaluation_windows(text, tokenizer, 9, max_windows=2), windows[:2])
    with pytest.raises(SourceError, match=r"140 .* 141"):
        evaluation_windows(text, tokenizer, 141)
    for bad in ({"sequence_length": 1}, {"sequence_length": 9, "max_windows": 0}):
        with pytest.raises(RecipeError, match="nothing to predict"):
            evaluation_windows(text, tokenizer, **bad)


def test_generate(tmp_path, capfd):
    folder = save_tiny(tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.temperature = 0.7  # must not be warned about when it is not used
    tokenizer = load_tokenizer(folder)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = generate(model, tokenizer, "some words", max_new_tokens=12)
    assert capfd.readouterr().err == ""
    ids = tokenizer("some words", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    assert text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert generate(model, tokenizer, "some words", 12, Sampling(seed=7)) == text

    def draw(seed: int) -> str:
        return generate(model, tokenizer, "some words", 30, Sampling(temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    for bad in (
        {"prompt": ""},
        {"prompt": "a", "max_new_tokens": 0},
    ):
        with pytest.raises(RecipeError, match="give a"):
            generate(model, tokenizer, **bad)


def test_an_encoder_has_no_causal_perplexity() -> None:
    model = tiny_architecture("bert")
    with pytest.raises(ArchitectureError, match="BertLMHeadModel is an encoder"):
        perplexity(model, tiny_windows(2, 8))
