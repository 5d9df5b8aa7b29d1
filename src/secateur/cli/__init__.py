"""The command line: one file per verb. Each parses, calls a workflow, and prints the result."""

from secateur.cli.app import main

__all__ = ["main"]
