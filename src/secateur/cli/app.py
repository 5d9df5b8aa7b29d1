"""The verbs, put together. Nothing heavy is imported until a verb runs."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

import secateur
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
    epilog="Exit codes: 0 done, 1 the run failed, 2 bad usage or recipe, 3 a verification failed.",
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

    app.command("prune")(prune.prune)
    app.command("structure")(structure.structure)
    app.command("chain")(chain.chain)
    app.command("plan")(plan.plan)
    app.command("retrain")(retrain.retrain)
    app.command("distill")(distill.distill)
    app.command("eval")(evaluate.evaluate)
    app.command("inspect")(inspect.inspect)
    app.command("methods")(methods.methods)
    app.command("compress")(compress.compress)
    app.command("decompress")(decompress.decompress)
    app.command("generate")(generate.generate)
    app.command("bench")(bench.bench)
    app.command("sweep")(sweep.sweep)
    app.command("report")(report.report)
    app.command("diagnose")(diagnose.diagnose)
    app.command("demo")(demo.demo)


def main() -> None:
    """Run a command; every error raised on purpose ends in a message and its exit code."""
    add_verbs()
    try:
        app()
    except SecateurError as error:
        tell(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo(
            "\ninterrupted; the same command with --resume goes on with prune, structure, retrain, "
            "distill and chain, without it with a sweep",
            err=True,
        )
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def tell(error: SecateurError) -> None:
    """Tell an error: for people on stderr, and for programs on stdout where --json was given."""
    if "--json" in sys.argv:
        kind = type(error).__name__
        told = {"kind": kind, "what": error.what, "where": error.where, "remedy": error.remedy}
        typer.echo(json.dumps({"error": told}))
    typer.echo(f"error: {error}", err=True)
