"""The recipes of the verbs that run a model (`generate`, `chat`, `serve`), and of those that give
and take models (`export`, `import`, `push`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from secateur.recipes.options import (
    MAX_SEED,
    Flag,
    Heading,
    Recipe,
    Section,
    SizeOrZero,
    Texts,
    matching,
    text_alone,
)
from secateur.recipes.shared import Device, OutputFolder, Overwriting, RemoteCode

MODELS_OWN = "the model's generation_config.json, else {}"


class _TextLength(Section):
    """How long a text may be."""

    max_new_tokens: Annotated[int | None, Flag(aliases=("max_tokens",), default="256")] = Field(
        None, gt=0
    )
    """Stop after this many tokens."""


class Sampling(Section):
    """How tokens are drawn (`runtime.sampling`); None where it is not given."""

    temperature: Annotated[float | None, Flag(default=MODELS_OWN.format(0))] = Field(None, ge=0)
    """0 always takes the most likely token; higher values sample."""
    top_k: Annotated[int | None, Flag(default=MODELS_OWN.format("all"))] = Field(None, ge=0)
    """Sample only from this many most likely tokens; 0 for all."""
    top_p: Annotated[float | None, Flag(default=MODELS_OWN.format(1))] = Field(None, gt=0, le=1)
    """Sample only from the most likely tokens that add up to this probability."""
    min_p: Annotated[float | None, Flag(default=MODELS_OWN.format(0))] = Field(None, ge=0, le=1)
    """Sample only from tokens of at least this share of the largest probability."""
    repetition_penalty: Annotated[float | None, Flag(default=MODELS_OWN.format(1))] = Field(
        None, gt=0
    )
    """Above 1: tokens of the prompt and the text become less likely. Divides positive logits,
    multiplies negative ones."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens that the text has."""
    frequency_penalty: float = 0.0
    """Subtract this once for each time that the text has the token."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed for sampling."""


class _TokenDrawing(Sampling, _TextLength):
    """How tokens are sampled, and where a text ends."""

    stop: Annotated[Texts, BeforeValidator(text_alone), Flag(value="WORDS")] = ()
    """Stop before the model writes this text; may be repeated."""

    def drawing(self) -> dict[str, Any]:
        """The options of `Sampling`, None where not given."""
        return {name: getattr(self, name) for name in Sampling.model_fields}


class _KeysAndValues(Section):
    """How keys and values of the tokens so far are stored."""

    group = Heading.HOW

    kv_cache: Annotated[
        Literal["bf16", "int8"] | None,
        Flag(aliases=("kv_cache_dtype",), default="bf16, or float32 if the model is"),
    ] = None
    """Type of the KV cache. int8 takes half the memory of bf16."""


class _Drafted(Section):
    """Whether a draft proposes tokens."""

    group = Heading.HOW

    draft: Annotated[
        str | None,
        Flag(aliases=("assistant_model", "model_draft"), value="DRAFT", default="none"),
    ] = None
    """A smaller model with the same vocabulary, or a head of this model: `secateur draft` makes
    both. It proposes tokens, and the model checks several in one call: faster, and with the same
    output (speculative decoding)."""


class _Decoding(Device, _Drafted, _KeysAndValues):
    """How a model runs."""

    @property
    def only_cpu(self) -> str | None:
        """The flag of an option that only our own decoding obeys; None if none was given."""
        given = {"--draft": self.draft, "--kv-cache": self.kv_cache}
        return next((flag for flag, value in given.items() if value is not None), None)


class GenerateRecipe(_Decoding, _TokenDrawing, Recipe):
    """One text."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Folder (compressed or not), hub id, GGUF file, named sample, or a recipe (`*.yaml`)."""
    prompt: Annotated[
        str | None,
        Flag(short="-p", value="WORDS", default="read from stdin"),
    ] = None
    """Text to continue, or with a chat template a message to answer."""
    system: Annotated[str | None, Flag(value="WORDS")] = None
    """System message at the start of the conversation."""
    chat: Annotated[bool | None, Flag(off="no_chat", default="on, if it has one")] = None
    """Use the tokenizer's chat template."""
    json_schema: Annotated[str | None, Flag(value="FILE", default="none")] = None
    """JSON file of a schema that the text follows. Needs the extra `structured`."""


class ChatRecipe(_Decoding, _TokenDrawing, Recipe):
    """One conversation."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Folder (compressed or not), hub id, GGUF file or named sample."""
    system: Annotated[str | None, Flag(value="WORDS")] = None
    """System message at the start of the conversation."""


class _ServingLimits(Section):
    """How much is computed at once, and what a client may ask."""

    group = Heading.HOW

    slots: Annotated[int, Flag(aliases=("max_num_seqs", "parallel"))] = Field(8, ge=1, le=64)
    """Requests that run at once. One call computes tokens of up to eight; more take turns."""
    context_length: Annotated[
        int | None,
        Flag(
            aliases=("max_model_len", "ctx_size"),
            default="the model's positions, at most 4096",
        ),
    ] = Field(None, ge=2)
    """Tokens that a prompt and its answer may have together."""
    queue: int = Field(64, ge=0)
    """Requests that may wait. More are refused with status 429."""
    request_seconds: float = Field(600.0, gt=0)
    """A request ends after this many seconds, waiting included."""
    prefix_cache: Annotated[SizeOrZero, Flag(value="SIZE")] = "256MiB"
    """Memory for the prefix cache; 0: no cache."""


NOT_EMPTY = matching(
    r"\S(.*\S)?", "text without spaces around it; a shell variable that it comes from may be unset"
)


class ServeRecipe(_Decoding, _ServingLimits, Recipe):
    """One server."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="MODEL")]
    """Folder (compressed or not), hub id, GGUF file or named sample."""
    name: Annotated[
        str | None,
        Flag(aliases=("served_model_name",), default="the name of the folder"),
        NOT_EMPTY,
    ] = None
    """The name of the model in the API."""
    host: Annotated[str, Flag(value="ADDRESS"), NOT_EMPTY] = "127.0.0.1"
    """The address to listen on. 0.0.0.0 lets other machines connect; give an API key then."""
    port: int = Field(8000, ge=0, le=65535)
    """The port; 0 takes a free one."""
    api_key: Annotated[
        str | None, Flag(value="KEY", default="SECATEUR_API_KEY, else none"), NOT_EMPTY
    ] = None
    """Clients have to send this key. Other users of this machine can read flags, but not
    environment variables."""


class ExportRecipe(OutputFolder, Recipe):
    """One export."""

    group = Heading.WHAT
    run = Overwriting

    model: Annotated[str, Flag(value="MODEL")]
    """Folder (compressed or not), hub id, GGUF file or named sample."""
    to: Annotated[
        Literal["gguf", "compressed-tensors", "onnx", "openvino"], Flag(value="TARGET")
    ] = "gguf"
    """The target: gguf, compressed-tensors, onnx, openvino."""
    type: Annotated[str | None, Flag(default="the first that the target names")] = None
    """How matrices are stored. gguf: q8_0, f16, bf16, f32, q5_0, q4_0, stored (as the folder has
    them), and with the extra llamacpp its own mixes: q6_k, q5_k_m, q4_k_m, iq4_xs, q3_k_m, q2_k and
    others, most of which lose exact zeros. compressed-tensors: w8a8, w4a16, w8a16. onnx: fp32,
    int8, int4. openvino: q8_0, f16, q4_0."""
    draft_of: Annotated[str | None, Flag(value="MODEL", default="none")] = None
    """The parent of this draft. The export is refused unless both have the same tokenizer and as
    many tokens, which every engine asks of a draft model."""


class _WhatToImport(Section):
    """The model, and what is put on it."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="SOURCE")]
    """Folder or hub id of a model with zeros: plain safetensors, compressed-tensors, or
    torch.nn.utils.prune; a dense model with --masks."""
    masks: Annotated[str | None, Flag(value="FILE", default="none")] = None
    """Safetensors file of masks by the names of tensors, True = kept. They are applied to the
    model."""
    adapter: Annotated[str | None, Flag(value="DIR", default="none")] = None
    """Folder of an adapter that peft trained on the model. It is merged, and the zeros of the model
    stay zero."""


class ImportRecipe(RemoteCode, _WhatToImport, OutputFolder, Recipe):
    """One import."""

    run = Overwriting


REPOSITORY = r"[^/\s]+/[^/\s]+"


class _HowToPublish(Section):
    """Who may see it, and where it goes."""

    group = Heading.OUTPUT

    public: bool = False
    """Make the repository public. Without this it is private."""
    branch: Annotated[str | None, Flag(value="NAME", default="main")] = None
    """Branch of the repository; it is created if there is none."""
    base_model: Annotated[
        str | None,
        Flag(value="REPO", default="the one that the card names"),
        matching(REPOSITORY, "OWNER/NAME"),
    ] = None
    """Base model for the card, OWNER/NAME on the hub."""
    dry_run: bool = False
    """Check everything and show files and card. Nothing is sent."""


class PushRecipe(RemoteCode, _HowToPublish, Recipe):
    """One upload."""

    group = Heading.WHAT

    model: Annotated[str, Flag(value="DIR")]
    """Folder of the model."""
    repo: Annotated[str, Flag(value="REPO"), matching(REPOSITORY, "OWNER/NAME")]
    """Repository on the hub, OWNER/NAME. It is created if there is none."""
