"""The command line: one function per verb in `commands.py`; each calls a workflow."""

from secateur.cli.app import main

__all__ = ["main"]
