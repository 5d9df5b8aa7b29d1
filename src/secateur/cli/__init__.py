"""The command line: one file per verb; each parses, calls a workflow, and renders."""

from secateur.cli.app import main

__all__ = ["main"]
