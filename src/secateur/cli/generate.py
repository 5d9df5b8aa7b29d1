"""`secateur generate`: continue one text, or answer one message."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.running import ChatRecipe, GenerateRecipe
    from secateur.workflows.judge.generate import Conversation


def _run(recipe: GenerateRecipe, *, as_json: bool) -> None:
    """Continue a prompt on the CPU. Packed linears stay packed."""
    conversation = opened(recipe, chat=recipe.chat)
    prompt = recipe.prompt
    if prompt is None:
        if sys.stdin.isatty():
            print(
                "Write the text and end it with Ctrl-D; `secateur chat` holds a conversation.",
                file=sys.stderr,
            )
        prompt = sys.stdin.read().rstrip("\n")
    _answer(conversation, prompt, as_json)


def opened(recipe: GenerateRecipe | ChatRecipe, chat: bool | None = None) -> Conversation:
    """Load the model of a recipe.

    Args:
        recipe: the model, and how tokens are drawn.
        chat: whether to use the chat template; None: if there is one.
    """
    from secateur.runtime.sampling import sampling_with
    from secateur.workflows.judge.generate import Conversation

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


def _answer(conversation: Conversation, prompt: str, as_json: bool) -> None:
    """Write one text while it is generated, then its speed; with --json everything at the end."""
    if as_json:
        from secateur.cli.rendering import print_result

        print_result(conversation.say(prompt), as_json=True)
        return
    told_defaults(conversation)
    begun = conversation.chat

    def tell(text: str) -> None:
        nonlocal begun
        write(text if begun else prompt + text)
        begun = True

    made = conversation.say(prompt, tell)
    write("\n")
    print(made.account, file=sys.stderr)


def told_defaults(conversation: Conversation) -> None:
    """Say on stderr which sampling options come from the model."""
    if conversation.taken:
        taken = ", ".join(f"{name} {value}" for name, value in conversation.taken.items())
        print(f"from the model's generation_config.json: {taken}", file=sys.stderr)


def write(text: str) -> None:
    """Write text and flush it."""
    sys.stdout.write(text)
    sys.stdout.flush()


generate = command("generate", _run, streams=True)
