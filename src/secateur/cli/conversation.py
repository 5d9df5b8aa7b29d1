"""`secateur generate` continues one text; `secateur chat` holds a conversation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from secateur.cli.verb import print_result
from secateur.errors import RecipeError

if TYPE_CHECKING:
    from secateur.recipes.deploy import ChatRecipe, GenerateRecipe
    from secateur.steps.generate import Conversation

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def generate(recipe: GenerateRecipe, as_json: bool) -> None:
    """Continue a prompt on the CPU: text while it is generated, then the speed.

    With `as_json` everything is written at the end.
    """
    conversation = _open(recipe, chat=recipe.chat)
    prompt = recipe.prompt
    if prompt is None:
        if sys.stdin.isatty():
            print(
                "Write the text and end it with Ctrl-D; `secateur chat` holds a conversation.",
                file=sys.stderr,
            )
        prompt = sys.stdin.read().rstrip("\n")
    if as_json:
        print_result(conversation.say(prompt), as_json=True)
        return
    _print_defaults(conversation)
    begun = conversation.chat

    def show(text: str) -> None:
        nonlocal begun
        _write(text if begun else prompt + text)
        begun = True

    made = conversation.say(prompt, show)
    _write("\n")
    print(made.account, file=sys.stderr)


def chat(recipe: ChatRecipe, as_json: bool) -> None:
    """Answer line by line until the input ends."""
    conversation = _open(recipe)
    typed = sys.stdin.isatty()
    if typed:
        _import_line_editing()
        kind = "" if conversation.chat else "no chat template: each line is a text to continue. "
        print(f"{recipe.model}: {kind}{HELP}", file=sys.stderr)
    if not as_json:
        _print_defaults(conversation)
    while (line := _next_line(typed)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            conversation.forget()
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            _reply(conversation, line, as_json)


def _open(recipe: GenerateRecipe | ChatRecipe, chat: bool | None = None) -> Conversation:
    """Load the model. `chat`: whether to use its chat template; None: if there is one."""
    from secateur.runtime.sampling import sampling_with
    from secateur.steps.generate import Conversation

    sampling_with({}, recipe.drawing())  # a bad number is an error before any work
    return Conversation(
        recipe.model,
        max_new_tokens=recipe.max_new_tokens,
        sampling=recipe.drawing(),
        stop=recipe.stop,
        chat=chat,
        system=recipe.system,
        trust_remote_code=recipe.trust_remote_code,
    )


def _import_line_editing() -> Any:
    """Import readline, if Python has it, so that `input` can edit and recall lines."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _print_defaults(conversation: Conversation) -> None:
    """Say on stderr which sampling options come from the model."""
    if conversation.taken:
        taken = ", ".join(f"{name} {value}" for name, value in conversation.taken.items())
        print(f"from the model's generation_config.json: {taken}", file=sys.stderr)


def _next_line(typed: bool) -> str | None:
    """The next line of the input; None at its end."""
    try:
        if typed:
            return input("> ").strip()
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
    return line.strip() if line else None


def _reply(conversation: Conversation, prompt: str, as_json: bool) -> None:
    """Answer one message. Ctrl-C stops the answer. An error does not end the conversation."""
    try:
        made = conversation.say(prompt, (lambda text: None) if as_json else _write)
    except KeyboardInterrupt:
        print("\n(stopped; the conversation does not keep this answer)", file=sys.stderr)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        if as_json:
            print_result(made, as_json=True)
            return
        _write("\n")
        print(made.account, file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
