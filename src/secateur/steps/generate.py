"""Generates text with a checkpoint, compressed or not: one text, or a conversation.

A `Conversation` holds the model, and generates piece by piece with the fastest available loop.
"""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from secateur.errors import RecipeError, first_line
from secateur.models.checkpoint import parse_json
from secateur.models.configuration import MTP, read_configuration, type_of
from secateur.models.sources import resolve
from secateur.models.tokenizer import load_tokenizer
from secateur.recipes.deploy import ChatRecipe, GenerateRecipe
from secateur.recipes.keywords import recipe_of, takes_options_of
from secateur.reporting.evaluate import GenerateResult
from secateur.runs.environment import choose_device
from secateur.runtime.decode import Decoder, SteppedGeneration, continued
from secateur.runtime.grammar import Grammars, json_text
from secateur.runtime.layer_forms import longest, refuse_options, why_not
from secateur.runtime.load import load
from secateur.runtime.mtp import ModuleDecoder
from secateur.runtime.packed import device_for
from secateur.runtime.sampling import TextStream, end_tokens, sampling_in, sampling_with
from secateur.runtime.speculative import Drafter, open_drafter, speculated

POSITIONS = "max_position_embeddings"


NEW_TOKENS = 256
"""The default maximum length of a text."""


ROOM_TOKENS = 4096
"""Room for a conversation, if the model has as many positions. Memory is used when it fills."""


ONE_CALL = "fused decode loop"


Message = dict[str, str]
"""A line of a conversation: `role` (system, user or assistant) and `content`."""


@takes_options_of(GenerateRecipe)
def generate(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    json_schema: str | Path | Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> GenerateResult:
    """Continue a prompt with the fastest loop that the model and the device allow.

    Args:
        model: folder (compressed or not), hub id, GGUF file or named sample.
        prompt: the text to continue; with a chat template the message to answer.
        max_new_tokens: maximum number of new tokens.
        json_schema: a JSON schema that the text follows, or its file; needs the extra `structured`.
        tell: receives the text piece by piece.
        **options: the other options.

    Raises:
        SecateurError: what, where, and what to do.
    """
    own = {"model": model, "max_new_tokens": max_new_tokens}
    recipe, _ = recipe_of(GenerateRecipe, own, options)
    return Conversation(recipe, json_schema).say(prompt, tell)


class Conversation:
    """A conversation with a model. Without a chat template, the model continues each message.

    Args:
        recipe: the model, and how it answers.
        json_schema: a JSON schema that answers follow, or its file; or None.

    Attributes:
        taken: the options that come from the model's `generation_config.json`.

    Raises:
        SecateurError: the model cannot be read, or has no chat template and one is needed.
    """

    def __init__(
        self,
        recipe: GenerateRecipe | ChatRecipe,
        json_schema: str | Path | Mapping[str, Any] | None = None,
    ) -> None:
        model, draft, trust = recipe.model, recipe.draft, recipe.trust_remote_code
        chat, system = getattr(recipe, "chat", None), recipe.system
        if "" in recipe.stop:
            raise RecipeError("a stop text is empty", remedy="give at least one character")
        self.schema = None if json_schema is None else json_text(_schema_of(json_schema))
        self.name, self.max_new_tokens, self.stop = model, recipe.max_new_tokens, recipe.stop
        self.device = choose_device(recipe.device, recipe.only_cpu)
        self.folder = resolve(model, trust_remote_code=trust).folder
        self.device = device_for(self.folder, recipe.device, self.device)
        self.positions = positions_in(self.folder)
        self.tokenizer: Any = load_tokenizer(self.folder)
        self.model: Any = None
        self.load_seconds = 0.0
        self.decoder: Decoder | None = None
        self.drafter: Drafter | None = None
        self.kv_cache = recipe.kv_cache
        self.draft = None if draft is None else resolve(draft, trust_remote_code=trust).folder
        defaults, given = sampling_in(self.folder), recipe.drawing()
        self.sampling = sampling_with(defaults, given)
        if not self.sampling.temperature:  # 0, or not given
            _refuse_idle(given)
        self.taken = {name: x for name, x in defaults.items() if given.get(name) is None}
        self.start: list[Message] = []
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        self.chat = has_template if chat is None else chat
        if system is not None:
            if chat is False:
                raise RecipeError(
                    "a system message needs the chat template", remedy="leave --no-chat out"
                )
            self.chat = True
            self.start = [{"role": "system", "content": _check_text(system)}]
        if self.chat and not has_template:
            raise RecipeError(
                "the tokenizer has no chat template",
                where=str(self.folder),
                remedy="leave --chat and --system out: the model then continues the prompt",
            )
        if self.chat:  # refuses a system message that the template refuses
            self._written([*self.start, {"role": "user", "content": "Hello"}])
        self.messages: list[Message] = [*self.start]

    def say(self, prompt: str, tell: Callable[[str], None] = lambda text: None) -> GenerateResult:
        """Answer a message, or continue a text; both stay in the conversation.

        Args:
            prompt: the message, or the text.
            tell: receives the answer piece by piece.

        Raises:
            RecipeError: the prompt is empty or no text, or does not fit the model.
        """
        if not _check_text(prompt).strip():
            raise RecipeError("the prompt is empty", remedy="give at least one word")
        new_tokens, chat = self.max_new_tokens, self.chat
        messages = [*self.messages, {"role": "user", "content": prompt}]
        self._check_length(new_tokens or 1)
        read = self._written(messages) if chat else prompt
        ids = self.tokenizer(read, return_tensors="pt", add_special_tokens=not chat)["input_ids"][0]
        if len(ids) == 0:
            raise RecipeError(
                "the prompt has no token", remedy="give a prompt of at least one word"
            )
        self._check_length(len(ids) + (new_tokens or 1))
        self._load()
        if new_tokens is None:
            new_tokens = min(NEW_TOKENS, (self.positions or NEW_TOKENS + len(ids)) - len(ids))
        stream, begun = TextStream(self.tokenizer, self.stop, tell), time.perf_counter()
        try:
            loop, drafted = self._run(ids, new_tokens, stream)
        finally:
            stream.finish()
        self.messages = [*messages, {"role": "assistant", "content": stream.text}]
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
            **drafted,
        )

    def forget(self) -> None:
        """Forget the conversation except the system message."""
        self.messages = [*self.start]

    def _load(self) -> None:
        """Load the weights if they are not loaded yet."""
        if self.model is None:
            started = time.perf_counter()
            self.model = load(self.folder, device=self.device)
            self.load_seconds = time.perf_counter() - started
            self.positions = getattr(self.model.config, POSITIONS, None)

    def _written(self, messages: Sequence[Message]) -> str:
        """Return a conversation in the model's format, up to the start of its answer."""
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

    def _check_length(self, tokens: int) -> None:
        """Refuse more tokens than the model has positions."""
        most = self.positions
        if most is not None and tokens > most:
            raise RecipeError(
                f"prompt and new tokens are {tokens}, and the model has {most} positions",
                where="--max-new-tokens",
                remedy=f"use a smaller number; prompt and new tokens together are at most {most}",
            )

    def _run(
        self, ids: Int64[Tensor, " tokens"], new_tokens: int, stream: TextStream
    ) -> tuple[str, dict[str, int]]:
        """Generate until the text ends.

        Returns:
            The loop used, and why it is not the fast one; and with a draft, how many tokens it has
            proposed and how many of them were accepted.
        """
        ends = end_tokens(self.model)
        if (self.chat or self.schema) and self.tokenizer.eos_token_id is not None:
            ends |= {self.tokenizer.eos_token_id}
        grammar = Grammars(self.tokenizer, ends).read(self.schema) if self.schema else None
        steps, loop = self._steps(len(ids) + new_tokens)
        how: dict[str, Any] = {"sampling": self.sampling, "stop": ends, "grammar": grammar}
        drafter, proposed, accepted = self.drafter, 0, 0
        if isinstance(steps, Decoder) and drafter is not None:
            proposed, accepted = drafter.proposed, drafter.accepted
            text = speculated(steps, drafter, ids, new_tokens, **how)
        else:
            text = continued(steps, ids, new_tokens, **how)
        try:
            for token in text:
                if not stream.add(token):
                    break
        finally:
            text.close()
            if isinstance(steps, SteppedGeneration):
                steps.close()
        if drafter is None:
            return loop, {}
        return loop, {
            "proposed": drafter.proposed - proposed,
            "accepted": drafter.accepted - accepted,
        }

    def _steps(self, tokens: int) -> tuple[Decoder | SteppedGeneration, str]:
        """What computes a text of so many tokens, and its name."""
        reason, mtp = (
            why_not(self.model, tokens),
            self.draft is not None and type_of(self.draft) == MTP,
        )
        if reason is not None:
            refuse_options(reason, kv_cache=self.kv_cache, draft=None if mtp else self.draft)
            if not mtp:
                return SteppedGeneration(self.model), f"transformers: {reason}"
        if self.decoder is None or self.decoder.capacity < tokens:
            most = longest(self.model.config) or ROOM_TOKENS
            room = max(tokens, min(ROOM_TOKENS, most, self.positions or tokens))
            if reason is None:
                self.decoder = Decoder(self.model, room, continues=True, cache=self.kv_cache)
            else:
                self.decoder = ModuleDecoder(self.model, room)
            if self.draft is not None:
                given = self.draft, self.folder, self.decoder.slots, self.tokenizer
                self.drafter = open_drafter(*given)
        return self.decoder, ONE_CALL if reason is None else f"transformers with MTP: {reason}"


def _refuse_idle(given: Mapping[str, Any]) -> None:
    """Refuse options that choose among likely tokens where the most likely one is always taken."""
    nothing = {"top_k": (None, 0), "top_p": (None, 1), "min_p": (None, 0)}
    idle = [name for name, usual in nothing.items() if given.get(name) not in usual]
    if idle:
        raise RecipeError(
            f"{' and '.join(idle)}: at temperature 0 the most likely token is always taken",
            remedy="give a temperature above 0, such as 0.7, or leave them out",
        )


def _schema_of(given: str | Path | Mapping[str, Any]) -> Any:
    """A JSON schema, or that of a file."""
    if isinstance(given, Mapping):
        return given
    try:
        found = parse_json(Path(given).read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the JSON schema cannot be read: {first_line(error)}",
            where=str(given),
            remedy="give a JSON file",
        ) from None
    if not isinstance(found, dict):
        raise RecipeError("a JSON schema is an object", where=str(given))
    return found


def _check_text(prompt: str) -> str:
    """Return the same text if UTF-8 can encode it."""
    if not isinstance(prompt, str):
        raise RecipeError(
            f"the prompt is {reprlib.repr(prompt)}, not text",
            remedy="give one text; several prompts are several calls, and `secateur serve` "
            "answers many at once",
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"the prompt is not text at character {error.start}: it has half of a surrogate pair",
            remedy="give the prompt as UTF-8",
        ) from None
    return prompt


def positions_in(folder: Path) -> int | None:
    """The number of positions in the model's configuration."""
    value = read_configuration(folder).get(POSITIONS)
    return value if type(value) is int else None
