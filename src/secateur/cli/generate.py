"""`secateur generate`: generate one text, or hold a conversation on a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from secateur.cli.verb import command

if TYPE_CHECKING:
    from secateur.recipes.generate import GenerateRecipe
    from secateur.workflows.judge.generate import Conversation

__all__ = ["generate"]

HELP = "/new forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


def run(recipe: GenerateRecipe, *, as_json: bool) -> None:
    """Continue a prompt, or chat, on the CPU. Packed linears stay packed."""
    from secateur.runtime.sampling import Sampling
    from secateur.workflows.judge.generate import Conversation

    # a bad number is an error before any work
    sampling = Sampling(recipe.temperature, recipe.top_k, recipe.top_p, recipe.seed)
    prompt = recipe.prompt
    talk = prompt is None and sys.stdin.isatty() and not as_json
    conversation = Conversation(
        recipe.model,
        max_new_tokens=recipe.max_new_tokens,
        sampling=sampling,
        stop=recipe.stop,
        chat=recipe.chat,
        system=recipe.system,
        trust_remote_code=recipe.trust_remote_code,
    )
    if talk:
        converse(conversation)
    else:
        answer(conversation, sys.stdin.read().rstrip("\n") if prompt is None else prompt, as_json)


def answer(conversation: Conversation, prompt: str, as_json: bool) -> None:
    """Write one text while it is generated, then its speed; with --json everything at the end."""
    if as_json:
        from secateur.cli.rendering import print_result

        print_result(conversation.say(prompt), as_json=True)
        return
    begun = conversation.chat

    def tell(text: str) -> None:
        nonlocal begun
        write(text if begun else prompt + text)
        begun = True

    made = conversation.say(prompt, tell)
    write("\n")
    print(made.account, file=sys.stderr)


def converse(conversation: Conversation) -> None:
    """Read messages from the terminal and answer them until the input ends."""
    import_line_editing()
    kind = "a conversation" if conversation.chat else "each line is a text to continue"
    print(f"{conversation.session.name}: {kind}. {HELP}", file=sys.stderr)
    while True:
        try:
            prompt = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if prompt == "/quit":
            return
        if prompt == "/new":
            conversation.forget()
        elif prompt.startswith("/"):
            print(HELP, file=sys.stderr)
        elif prompt:
            reply(conversation, prompt)


def reply(conversation: Conversation, prompt: str) -> None:
    """Answer one message. Ctrl-C stops the answer. An error does not end the conversation."""
    from secateur.errors import RecipeError

    try:
        made = conversation.say(prompt, write)
    except KeyboardInterrupt:
        print("\n(stopped; the conversation does not keep this answer)", file=sys.stderr)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        write("\n")
        print(made.account, file=sys.stderr)


def write(text: str) -> None:
    """Write text and flush it."""
    sys.stdout.write(text)
    sys.stdout.flush()


def import_line_editing() -> Any:
    """Import readline, if Python has it, so that `input` can edit and recall lines."""
    try:
        import readline
    except ImportError:
        return None
    return readline


generate = command("generate", run, streams=True)
