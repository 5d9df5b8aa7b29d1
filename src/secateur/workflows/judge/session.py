"""A loaded model that generates text piece by piece, with the fastest available loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from secateur.errors import RecipeError
from secateur.evaluation.generation import end_tokens
from secateur.models.configuration import read_configuration
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.reporting.results.evaluate import GenerateResult
from secateur.runtime.decode import Decoder, SteppedGeneration, TokenSteps, continued, why_not
from secateur.runtime.load import load
from secateur.runtime.sampling import Sampling, TextStream, sampling_in

POSITIONS = "max_position_embeddings"
NEW_TOKENS = 256
"""The default maximum length of a text."""
ROOM_TOKENS = 4096
"""Room for a conversation, if the model has as many positions. Memory is used when it fills."""
ONE_CALL = "fused decode loop"

Message = dict[str, str]
"""A line of a conversation: `role` (system, user or assistant) and `content`."""


class TextSession:
    """A model in memory.

    Args:
        model: folder (compressed or not), hub id, GGUF file or named sample.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        SecateurError: the model cannot be loaded.
    """

    def __init__(self, model: str, *, trust_remote_code: bool = False) -> None:
        self.name = model
        self.folder = resolve(model, trust_remote_code=trust_remote_code).folder
        self.trust_remote_code = trust_remote_code
        self.load_seconds = 0.0
        self.positions = positions_in(self.folder)
        self.tokenizer: Any = load_tokenizer(self.folder, trust_remote_code=trust_remote_code)
        self.defaults = sampling_in(self.folder)
        self.model: Any = None
        self.decoder: Decoder | None = None

    def load(self) -> None:
        """Load the weights if they are not loaded yet."""
        if self.model is None:
            started = time.perf_counter()
            self.model = load(self.folder, trust_remote_code=self.trust_remote_code)
            self.load_seconds = time.perf_counter() - started
            self.positions = getattr(self.model.config, POSITIONS, None)

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def conversation(self, messages: Sequence[Message]) -> str:
        """Return a conversation in the model's format, up to the start of its answer.

        Raises:
            RecipeError: the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise RecipeError(
                "the tokenizer has no chat template",
                where=str(self.folder),
                remedy="leave --chat and --system out: the model then continues the prompt",
            )
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # templates can raise any exception
            raise RecipeError(
                f"the chat template refuses the messages: {str(error)[:200]}",
                where=str(self.folder),
                remedy="leave --system out, or use --no-chat",
            ) from error

    def write(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None,
        sampling: Sampling,
        messages: Sequence[Message] | None = None,
        stop: Sequence[str] = (),
        tell: Callable[[str], None] = lambda text: None,
    ) -> GenerateResult:
        """Continue a prompt, or answer the last message of a conversation.

        Args:
            prompt: the text to continue, or the last message of a conversation.
            max_new_tokens: maximum number of new tokens; None for 256, or for the number of free
                positions if that is less.
            sampling: how tokens are drawn.
            messages: the conversation, with `prompt` as its last message; None for a plain text.
            stop: the text ends before the first of these.
            tell: receives the text piece by piece.

        Raises:
            RecipeError: the prompt has no token, or prompt and text exceed the model's positions.
        """
        check_length(max_new_tokens or 1, self.positions)
        chat = messages is not None
        read = self.conversation(messages or []) if chat else prompt
        ids = self.tokenizer(read, return_tensors="pt", add_special_tokens=not chat)["input_ids"][0]
        if len(ids) == 0:
            raise RecipeError(
                "the prompt has no token", remedy="give a prompt of at least one word"
            )
        check_length(len(ids) + (max_new_tokens or 1), self.positions)
        self.load()
        if max_new_tokens is None:
            max_new_tokens = min(NEW_TOKENS, (self.positions or NEW_TOKENS + len(ids)) - len(ids))
        stream, begun = TextStream(self.tokenizer, stop, tell), time.perf_counter()
        try:
            loop = self.run(ids, max_new_tokens, sampling, stream, self.end_tokens(chat))
        finally:
            stream.finish()
        times = stream.times
        rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None
        return GenerateResult(
            model=self.name,
            prompt=prompt,
            text=stream.text,
            tokens=len(stream.tokens),
            load_seconds=self.load_seconds,
            first_token_seconds=times[0] - begun if times else None,
            tokens_per_second=rate,
            loop=loop,
            chat=chat,
        )

    def end_tokens(self, chat: bool) -> frozenset[int]:
        """The tokens that end a text: the model's, and the tokenizer's for an answer."""
        own = self.tokenizer.eos_token_id if chat else None
        return end_tokens(self.model) | ({own} if own is not None else set())

    def run(
        self,
        ids: Int64[Tensor, " tokens"],
        max_new_tokens: int,
        sampling: Sampling,
        stream: TextStream,
        ends: frozenset[int],
    ) -> str:
        """Generate until the text ends. Return the loop used, and why it is not the fast one."""
        steps, loop = self.steps(len(ids) + max_new_tokens)
        try:
            for token in continued(steps, ids, max_new_tokens, sampling=sampling, stop=ends):
                if not stream.add(token):
                    break
        finally:
            if isinstance(steps, SteppedGeneration):
                steps.close()
        return loop

    def steps(self, tokens: int) -> tuple[TokenSteps, str]:
        """What computes a text of so many tokens, and its name."""
        reason = why_not(self.model, tokens)
        if reason is not None:
            return SteppedGeneration(self.model), f"transformers: {reason}"
        if self.decoder is None or self.decoder.capacity < tokens:
            room = max(tokens, min(ROOM_TOKENS, self.positions or tokens))
            if why_not(self.model, room) is not None:  # a sliding window
                room = tokens
            self.decoder = Decoder(self.model, room, continues=True)
        return self.decoder, ONE_CALL


def positions_in(folder: Path) -> int | None:
    """The number of positions in the model's configuration."""
    value = read_configuration(folder).get(POSITIONS)
    return value if type(value) is int else None


def check_length(tokens: int, positions: int | None) -> None:
    """Refuse more tokens than the model has positions.

    Raises:
        RecipeError: there are more tokens than positions; the message gives both numbers.
    """
    if positions is not None and tokens > positions:
        raise RecipeError(
            f"prompt and new tokens are {tokens}, and the model has {positions} positions",
            where="--max-new-tokens",
            remedy=f"use a smaller number; prompt and new tokens together are at most {positions}",
        )
