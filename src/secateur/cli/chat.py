"""`secateur chat`: a conversation on a terminal, or of the lines of a file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from secateur.cli.generate import opened, told_defaults, write
from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.running import ChatRecipe
    from secateur.workflows.judge.generate import Conversation

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"


def _run(recipe: ChatRecipe, *, as_json: bool) -> None:
    """Answer line by line until the input ends."""
    conversation = opened(recipe)
    typed = sys.stdin.isatty()
    if typed:
        _import_line_editing()
        kind = "" if conversation.chat else "no chat template: each line is a text to continue. "
        print(f"{recipe.model}: {kind}{HELP}", file=sys.stderr)
    if not as_json:
        told_defaults(conversation)
    while (line := _next_line(typed)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            conversation.forget()
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            _reply(conversation, line, as_json)


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
    from secateur.errors import RecipeError

    try:
        made = conversation.say(prompt, (lambda text: None) if as_json else write)
    except KeyboardInterrupt:
        print("\n(stopped; the conversation does not keep this answer)", file=sys.stderr)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        if as_json:
            from secateur.cli.rendering import print_result

            print_result(made, as_json=True)
            return
        write("\n")
        print(made.account, file=sys.stderr)


def _import_line_editing() -> Any:
    """Import readline, if Python has it, so that `input` can edit and recall lines."""
    try:
        import readline
    except ImportError:
        return None
    return readline


chat = command("chat", _run, streams=True)
