"""The verbs, put together. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import secateur
from secateur.cli.faults import as_told
from secateur.errors import SecateurError

__all__ = ["main"]

app = typer.Typer(
    name="secateur",
    help="The open toolkit for pruning large language models: smaller, faster, and proven.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # "rich" would take a default in brackets for a style
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the run failed, 2 bad usage or recipe, 3 a verification failed, "
    "130 interrupted.",
)


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options that belong to no verb."""


def add_verbs() -> None:
    """Every file of this package that holds a verb enters it here."""
    from secateur.cli import (
        bench,
        chain,
        compress,
        decompress,
        demo,
        diagnose,
        distill,
        evaluate,
        generate,
        inspect,
        methods,
        plan,
        prune,
        report,
        retrain,
        structure,
        sweep,
    )

    verbs: dict[str, Callable[..., None]] = {
        "prune": prune.prune,
        "structure": structure.structure,
        "chain": chain.chain,
        "plan": plan.plan,
        "retrain": retrain.retrain,
        "distill": distill.distill,
        "eval": evaluate.evaluate,
        "inspect": inspect.inspect,
        "methods": methods.methods,
        "compress": compress.compress,
        "decompress": decompress.decompress,
        "generate": generate.generate,
        "bench": bench.bench,
        "sweep": sweep.sweep,
        "report": report.report,
        "diagnose": diagnose.diagnose,
        "demo": demo.demo,
    }
    for name, verb in verbs.items():
        app.command(name)(past_typer(verb))


class Stopped(BaseException):
    """Carries an exception past typer, which would end the process on it with hardly a word."""

    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


def past_typer(verb: Callable[..., None]) -> Callable[..., None]:
    """The same verb; Ctrl-C and the end of an input reach `main`."""

    @functools.wraps(verb)
    def run(*args: object, **options: object) -> None:
        try:
            verb(*args, **options)
        except (KeyboardInterrupt, EOFError) as error:
            raise Stopped(error) from error

    return run


def main() -> None:
    """Run a command; every exception ends in a message and its exit code."""
    try:
        add_verbs()
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt, Stopped) as error:
        told = as_told(error.cause if isinstance(error, Stopped) else error)
        tell(told)
        sys.exit(told.exit_code)


def tell(error: SecateurError) -> None:
    """Tell an error: for people on stderr, and for programs on stdout where --json was given."""
    if "--json" in sys.argv:
        kind = type(error).__name__
        told = {"kind": kind, "what": error.what, "where": error.where, "remedy": error.remedy}
        typer.echo(json.dumps({"error": told}))
    text = f"error: {error}".encode("utf-8", "backslashreplace")  # names may hold lone surrogates
    typer.echo(text.decode(), err=True)
