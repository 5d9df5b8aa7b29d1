"""Tiny models with tokenizers for llama.cpp, and what both engines make of them."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from llama_cpp_py_sync import Llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from trained import source_text
from zoo import class_of, config_of

from secateur.exporting.gguf.llama_cpp import load_llama_cpp, silence
from secateur.models.checkpoint import CheckpointReader
from secateur.models.gguf_file import GGUFSource
from secateur.models.skeleton import quiet_transformers

PROMPTS = ("def add(a, b):", "  return 1234", "naïve café\n\n", "I've been told")
WORDS = 320
PIECES = 420


def byte_level(
    special: tuple[str, ...] = ("<|endoftext|>",), **roles: str
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with the rules of SmolLM2; the first special token begins and ends texts."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=[AddedToken(text, special=True) for text in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([source_text()[:20_000]], trainer)
    roles = {"eos_token": special[0], "bos_token": special[0], **roles}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def sentencepiece_model(kind: str = "bpe", **options: Any) -> bytes:
    """A SentencePiece model with byte tokens, trained on the same code: `tokenizer.model`."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(source_text()[:20_000].splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=PIECES,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def save(folder: Path, tokenizer: Any, family: Any, **changes: Any) -> Path:
    """A random model of a family or configuration, its logits far enough apart to have no ties."""
    config = config_of(family) if isinstance(family, str) else family
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    for name, value in {**own, **changes}.items():
        setattr(config.get_text_config(), name, value)
    torch.manual_seed(0)
    model = class_of(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
        # Never chosen: libraries show a sequence of bytes that is no character in several ways.
        bytes_of_pieces = [i for word, i in tokenizer.get_vocab().items() if word[:3] == "<0x"]
        model.get_output_embeddings().weight[bytes_of_pieces] = 0
    with quiet_transformers():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts(file: Path, prompts: tuple[str, ...] = PROMPTS) -> list[tuple[list[int], str]]:
    """Tokens of each prompt and eight greedy ones after it, by llama.cpp."""
    with Llama(str(file), n_ctx=64, type_k="f32", type_v="f32") as engine:
        return [
            (
                list(engine.tokenize(prompt, add_special=True)),
                engine.generate(prompt, max_tokens=8, temperature=0.0, top_k=1, repeat_penalty=1.0),
            )
            for prompt in prompts
        ]


@torch.no_grad()
def expected(
    model: Any, tokenizer: Any, prompts: tuple[str, ...] = PROMPTS
) -> list[tuple[list[int], str]]:
    """The same by transformers."""
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt)["input_ids"]
        out = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        whole = tokenizer.decode(out[0], skip_special_tokens=True)
        found.append((ids, whole.removeprefix(tokenizer.decode(ids, skip_special_tokens=True))))
    return found


def assert_alike(
    file: Path, model: Any, tokenizer: Any, prompts: tuple[str, ...] = PROMPTS
) -> None:
    """Tokens and texts are equal."""
    theirs, ours = texts(file, prompts), expected(model, tokenizer, prompts)
    assert [ids for ids, _ in theirs] == [ids for ids, _ in ours]
    part = "\ufffd"  # the last token may be a part of a character
    assert [text.rstrip(part) for _, text in theirs] == [text.rstrip(part) for _, text in ours]
    assert any(text for _, text in theirs)


def fields(file: Path) -> dict[str, Any]:
    """The metadata of a file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def rewritten(
    file: Path,
    tensors: dict[str, Tensor],
    type: gguf.GGMLQuantizationType,
    arch: str = "quince",
    tensors_of_part: int = 0,
) -> GGUFSource:
    """A file by the package gguf, with matrices of one type; or parts with so many tensors each."""
    writer = gguf.GGUFWriter(file, arch, split_max_tensors=tensors_of_part)
    writer.add_block_count(1)
    for name, weight in tensors.items():
        values = np.ascontiguousarray(weight.numpy())
        if weight.ndim > 1:
            writer.add_tensor(name, gguf.quants.quantize(values, type), raw_dtype=type)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFSource.read(min(file.parent.glob(f"{file.stem}*.gguf")))


def of_quince(folder: Path) -> dict[str, Tensor]:
    """The tensors of a llama as a converter of an unknown family might arrange them: queries, keys
    and values fused, heads in another order, gate and up fused, inputs of the output projection and
    of a neuron in another order, the values transposed.
    """
    reader = CheckpointReader(folder)
    read = {name.removeprefix("model.layers.0."): reader.read(name) for name in reader.entries}
    weight = {name.split(".")[-2]: x for name, x in read.items() if name.endswith(".weight")}
    heads = torch.arange(len(weight["q_proj"])).view(2, -1, 4).swapaxes(0, 1).flatten()
    inputs = torch.arange(weight["down_proj"].shape[1]).view(-1, 8).t().flatten()
    found = {
        "token_embd.weight": weight["embed_tokens"],
        "blk.0.mixed_in.weight": torch.cat(
            [weight["q_proj"][heads], weight["k_proj"], weight["v_proj"]]
        ),
        "blk.0.attn_out.weight": weight["o_proj"],
        "blk.0.both.weight": torch.stack([weight["up_proj"], weight["gate_proj"]], 1).flatten(0, 1),
        "blk.0.last.weight": weight["down_proj"][:, inputs],
        "blk.0.norm.weight": weight["input_layernorm"],
    }
    if "lm_head" in weight:
        found["output.weight"] = weight["lm_head"]
    return found


def predicted(file: Path, states: Tensor, ids: list[int], parent: Path | None = None) -> Tensor:
    """llama.cpp's logits [tokens, vocabulary] of the layer for further tokens (MTP), or of a head.

    Args:
        file: loaded with that layer.
        states: of the parent, float32 [tokens, hidden].
        ids: the token that follows each.
        parent: of a draft head: its context has the embeddings.
    """
    ffi, library = load_llama_cpp()
    with silence(ffi, library):
        options, settings = (
            getattr(library, f"llama_{x}_default_params")() for x in ("model", "context")
        )
        options.n_gpu_layers, options.load_mtp = 0, parent is None
        models = [library.llama_model_load_from_file(str(x).encode(), options)
                  for x in (parent, file) if x]  # fmt: skip
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
        settings.type_k = settings.type_v = settings.flash_attn_type = 0  # float32
        if parent:
            settings.ctx_other = library.llama_init_from_model(models[0], settings)
        else:
            settings.ctx_type = library.LLAMA_CONTEXT_TYPE_MTP
        context = library.llama_init_from_model(models[-1], settings)
        batch = library.llama_batch_init(len(ids), states.shape[1], 1)
        tokens = ffi.new("llama_token[]", ids)
        ffi.memmove(batch.embd, states.contiguous().numpy().tobytes(), 4 * states.numel())
        batch.token, batch.n_tokens = tokens, len(ids)
        for i in range(len(ids)):
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = i, 1, 0, 1
        assert library.llama_decode(context, batch) == 0
        words = library.llama_vocab_n_tokens(library.llama_model_get_vocab(models[-1]))
        raw = bytearray(ffi.buffer(library.llama_get_logits(context), 4 * len(ids) * words))
        batch.token = ffi.NULL
        library.llama_batch_free(batch)
        for one in (context, settings.ctx_other):
            library.llama_free(one)
        for model in models:
            library.llama_model_free(model)
    return torch.frombuffer(raw, dtype=torch.float32).view(len(ids), -1)
