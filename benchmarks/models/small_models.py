"""Trains three small decoders of different families on real text, as a bench for presets.

    python -m benchmarks.models.small_models FOLDER --text c4.jsonl wiki.txt

A preset that is tuned on one model is a preset for one model. These three differ in what matters
to pruning: norms, biases, what comes between a linear and the residual stream, experts.

* `gemma`: scaled and tied embeddings, norms of queries and keys, norms after attention and
  feed-forward, a sliding window in two of three layers, a start token.
* `qwen`: biases of queries, keys and values, four query heads for two of keys and values.
* `experts`: eight experts in each layer, two for each token.

They have 4 layers of 96 channels and 512 tokens (a byte-level BPE that is trained here). **A model
must have used its capacity**, or pruning costs nothing and the bench says nothing: 4 layers of 128
channels with 2048 tokens, trained for 400 steps to 5.43 nats (unigrams 6.59), lost 0.002 nats by
50 % zeros. So does a GPT-2 of this size, which is why there is none. Those of the size `wide` have
256 channels: every row is a multiple of 256 weights long, as the smallest types of llama.cpp need.
Without `--text` they read the
standard library of the Python that runs this. Documents are cut into pieces of about 2000 characters; of ten pieces, eight train,
one calibrates and one judges. AdamW, bfloat16 products where they are faster, 8 windows of 256
tokens a step, one thread. The seeds are fixed.

Every 50 steps the state is kept in FOLDER, so that a stopped training goes on. A model that is
finished is not trained again. The folder stays out of git.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.hardware import heading
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from secateur.calibration.documents import read_documents
from secateur.machine import fast_matmuls
from secateur.models.skeleton import quiet_transformers

LENGTH, BATCH, POSITIONS = 256, 8, 512
SAVE_EVERY = 50
PIECE = 2000
START, END = "<s>", "</s>"

MODELS = ("gemma", "qwen", "experts")
VOCABULARY, LAYERS = 512, 4
SIZES = {"small": (96, 1200), "wide": (256, 1600)}
"""Channels, and steps of training."""


def configuration(name: str, width: int) -> Any:
    """One of the four models."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 8 * width // 768 * 256,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS, "bos_token_id": 0, "eos_token_id": 1,
        "tie_word_embeddings": True,
    }  # fmt: skip
    head = width // 4
    if name == "gemma":
        kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(LAYERS)]
        return transformers.Gemma3TextConfig(
            **sizes, head_dim=head, query_pre_attn_scalar=head, sliding_window=64, layer_types=kinds
        )
    if name == "qwen":
        return transformers.Qwen2Config(**sizes)
    return transformers.Qwen3MoeConfig(
        **sizes, head_dim=head, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=width,
        norm_topk_prob=True,
    )  # fmt: skip


def pieces(sources: list[str]) -> Iterator[str]:
    """The documents of all sources, cut at line ends into pieces of about `PIECE` characters."""
    if sources:
        documents: Iterable[str] = (x for source in sources for x in read_documents(source))
    else:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        documents = (x.read_text(encoding="utf-8", errors="ignore") for x in files)
    for document in documents:
        held = ""
        for line in document.splitlines(keepends=True):
            held += line
            if len(held) >= PIECE:
                yield held
                held = ""
        if len(held) > PIECE // 10:
            yield held


def write_texts(folder: Path, sources: list[str]) -> None:
    """Write `train.jsonl`, `calibration.jsonl` and `judged.jsonl`."""
    parts: dict[str, list[str]] = {"train": [], "calibration": [], "judged": []}
    for number, piece in enumerate(pieces(sources)):
        part = {4: "calibration", 9: "judged"}.get(number % 10, "train")
        parts[part].append(piece)
    for name, texts in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[START, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    return inner


def own_tokenizer(
    folder: Path, texts: list[str], *, start: bool
) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a model; the gemma's puts a start token in front."""
    file = folder / "tokenizer.json"
    if not file.exists():
        make_tokenizer(texts).save(str(file))
    inner = Tokenizer.from_file(str(file))
    if start:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, 0)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=START, eos_token=END, model_max_length=POSITIONS,
        unk_token=END, pad_token=END,
    )  # fmt: skip


def as_loaded(tokenizer: Any, config: Any) -> Any:
    """The tokenizer as transformers reads it for this family, which may split otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)


def stream_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """All tokens of all texts in a row, an end token after each."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for text in ids for token in (*text, 1)])


def rate(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step: a short warm-up, then half a cosine to a twentieth."""
    warm = min(1.0, (step + 1) / 40)
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def windows_of(stream: Tensor, step: int, start: bool) -> Tensor:
    """The windows of a step; they depend only on its number."""
    draw = torch.Generator().manual_seed(step)
    places = torch.randint(len(stream) - LENGTH, (BATCH,), generator=draw).tolist()
    windows = torch.stack([stream[place : place + LENGTH] for place in places])
    if start:
        windows[:, 0] = 0
    return windows


def train(config: Any, name: str, folder: Path, stream: Tensor, steps: int, peak: float) -> Any:
    """Train a model, or go on with a training that stopped."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    file, first = folder / f"{name}.pt", 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        first = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    begun, device = time.perf_counter(), torch.device("cpu")
    for step in range(first, steps):
        windows = windows_of(stream, step, start=name == "gemma")
        optimizer.param_groups[0]["lr"] = rate(step, steps, peak)
        with fast_matmuls(device):
            loss = model(input_ids=windows, labels=windows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0:
            state = {"step": step + 1, "model": model.state_dict(),
                     "optimizer": optimizer.state_dict()}  # fmt: skip
            torch.save(state, file.with_suffix(".unfinished"))
            file.with_suffix(".unfinished").rename(file)
            seconds = time.perf_counter() - begun
            print(f"{name} {step + 1}/{steps}: {loss.item():.3f} nats, {seconds:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def judged_loss(model: Any, stream: Tensor, start: bool, windows: int = 64) -> float:
    """Nats per token on text that was not trained on."""
    cut = stream[: windows * LENGTH].view(windows, LENGTH).clone()
    if start:
        cut[:, 0] = 0
    losses = [model(input_ids=x, labels=x, use_cache=False).loss.item() for x in cut.split(8)]
    return sum(losses) / len(losses)


def unigram(stream: Tensor, judged: Tensor) -> float:
    """Nats per token of a model that knows only how frequent each token is."""
    counts = torch.bincount(stream, minlength=int(judged.max()) + 1).double() + 1
    return float(-(counts / counts.sum()).log()[judged].mean())


def main() -> None:
    """Train what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", nargs="*", default=[], help="files; else Python's own sources")
    parser.add_argument("--only", nargs="*", default=[*MODELS], choices=MODELS)
    parser.add_argument("--size", default="small", choices=[*SIZES])
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "judged.jsonl").exists():
        write_texts(args.folder, args.text)
    print(heading())
    width, steps = SIZES[args.size]
    texts = {x: read_documents(str(args.folder / f"{x}.jsonl")) for x in ("train", "judged")}
    for name in args.only:
        made, start = args.folder / name, name == "gemma"
        if made.exists():
            continue
        tokenizer = own_tokenizer(args.folder, list(texts["train"]), start=start)
        config = configuration(name, width)
        tokenizer = as_loaded(tokenizer, config)
        stream, judged = (stream_of(tokenizer, list(texts[x])) for x in ("train", "judged"))
        model = train(config, name, args.folder, stream, steps, args.rate)
        loss, floor = judged_loss(model, judged, start), unigram(stream, judged)
        print(f"{name}: {loss:.3f} nats on text it has not seen, unigrams {floor:.3f}", flush=True)
        partial = args.folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with quiet_transformers():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        facts = {"loss": loss, "unigrams": floor, "steps": steps, "tokens": len(stream)}
        (partial / "trained.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
        partial.rename(made)
        (args.folder / f"{name}.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
