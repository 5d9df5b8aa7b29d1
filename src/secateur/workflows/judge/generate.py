"""Generates text with a checkpoint, compressed or not: one text, or a conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.reporting.results.evaluate import GenerateResult
from secateur.runtime.sampling import sampling_with
from secateur.workflows.judge.session import Message, TextSession


def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    chat: bool | None = None,
    system: str | None = None,
    trust_remote_code: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> GenerateResult:
    """Continue a prompt on the CPU with the fastest loop that the model allows.

    Args:
        model: folder (compressed or not), hub id, GGUF file or named sample.
        prompt: the text to continue; with a chat template the message to answer.
        max_new_tokens: maximum number of new tokens.
        temperature: 0 always takes the most likely token; above 0 draws. This and the next four
            are the model's own (`generation_config.json`) where they are None.
        top_k: draw from this many of the most likely tokens; 0 for all.
        top_p: draw from the most likely tokens that together have this probability.
        min_p: draw from tokens of at least this share of the largest probability.
        repetition_penalty: above 1, tokens of prompt and text become less likely.
        presence_penalty: subtracted from the logits of tokens of the text.
        frequency_penalty: the same, once for each time that they occurred.
        seed: seed of the draw.
        stop: the text ends before the first of these.
        chat: use the tokenizer's chat template; None uses it if there is one.
        system: a system message before the prompt, with a chat template.
        trust_remote_code: whether code that comes with the checkpoint may run.
        tell: receives the text piece by piece.

    Raises:
        SecateurError: what, where, and what to do.
    """
    conversation = Conversation(
        str(model),
        max_new_tokens=max_new_tokens,
        sampling={
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": seed,
        },
        stop=stop,
        chat=chat,
        system=system,
        trust_remote_code=trust_remote_code,
    )
    return conversation.say(prompt, tell)


class Conversation:
    """A conversation with a model. Without a chat template, the model continues each message.

    Args:
        model: folder (compressed or not), hub id, GGUF file or named sample.
        max_new_tokens: maximum number of tokens in an answer; None for 256, or for the number of
            free positions if that is less.
        sampling: options of `Sampling`; where None or missing, those of the model.
        stop: an answer ends before the first of these.
        chat: use the tokenizer's chat template; None uses it if there is one.
        system: a system message at the beginning.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Attributes:
        taken: the options that come from the model's `generation_config.json`.

    Raises:
        SecateurError: the model cannot be read, or has no chat template and one is needed.
    """

    def __init__(
        self,
        model: str,
        *,
        max_new_tokens: int | None = None,
        sampling: Mapping[str, Any] | None = None,
        stop: Sequence[str] = (),
        chat: bool | None = None,
        system: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise RecipeError(
                f"max_new_tokens {max_new_tokens}", remedy="give at least one new token"
            )
        if "" in stop:
            raise RecipeError("a stop text is empty", remedy="give at least one character")
        self.session = TextSession(model, trust_remote_code=trust_remote_code)
        self.max_new_tokens, self.stop = max_new_tokens, stop
        given = dict(sampling or {})
        self.sampling = sampling_with(self.session.defaults, given)
        if self.sampling.temperature == 0:
            refuse_idle(given)
        self.taken = {
            name: value for name, value in self.session.defaults.items() if given.get(name) is None
        }
        self.start: list[Message] = []
        self.chat = self.session.has_chat_template if chat is None else chat
        if system is not None:
            if chat is False:
                raise RecipeError(
                    "a system message needs the chat template", remedy="leave --no-chat out"
                )
            self.chat = True
            self.start = [{"role": "system", "content": check_text(system)}]
        if self.chat:  # refuses a missing template, or a system message that the template refuses
            self.session.conversation([*self.start, {"role": "user", "content": "Hello"}])
        self.messages: list[Message] = [*self.start]

    def say(self, prompt: str, tell: Callable[[str], None] = lambda text: None) -> GenerateResult:
        """Answer a message, or continue a text; both stay in the conversation.

        Args:
            prompt: the message, or the text.
            tell: receives the answer piece by piece.

        Raises:
            RecipeError: the prompt is empty or no text, or does not fit the model.
        """
        if not prompt.strip():
            raise RecipeError("the prompt is empty", remedy="give at least one word")
        check_text(prompt)
        asked = [*self.messages, {"role": "user", "content": prompt}]
        made = self.session.write(
            prompt,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            messages=asked if self.chat else None,
            stop=self.stop,
            tell=tell,
        )
        self.messages = [*asked, {"role": "assistant", "content": made.text}]
        return made

    def forget(self) -> None:
        """Forget the conversation except the system message."""
        self.messages = [*self.start]


def refuse_idle(given: Mapping[str, Any]) -> None:
    """Refuse options that choose among likely tokens where the most likely one is always taken.

    Raises:
        RecipeError: names them.
    """
    nothing = {"top_k": (None, 0), "top_p": (None, 1), "min_p": (None, 0)}
    idle = [name for name, usual in nothing.items() if given.get(name) not in usual]
    if idle:
        raise RecipeError(
            f"{' and '.join(idle)}: at temperature 0 the most likely token is always taken",
            remedy="give a temperature above 0, such as 0.7, or leave them out",
        )


def check_text(prompt: str) -> str:
    """Return the same text if UTF-8 can encode it.

    Raises:
        RecipeError: the text holds half of a surrogate pair.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"the prompt is not text at character {error.start}: it has half of a surrogate pair",
            remedy="give the prompt as UTF-8",
        ) from None
    return prompt
