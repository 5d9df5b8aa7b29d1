"""Carries out commands in forks of one process that has imported everything.

Each line of stdin is one command as JSON: its words, a file for its stdout, one for its stderr, and
the streams that are closed. Prints its exit code.
"""

from __future__ import annotations

import json
import os
import sys

import transformers.models.llama.modeling_llama  # noqa: F401

import secateur.cli.commands
import secateur.cli.progress
import secateur.models.hub
import secateur.steps.prune  # noqa: F401
from secateur.cli import main


def serve() -> None:
    """Fork for each command; only the fork leaves the loop."""
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            sys.argv = ["secateur", *asked["words"]]
            for number, name in enumerate(("stdin", "stdout", "stderr")):
                if name in asked:
                    os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT), number)
                if name in asked["closed"]:  # as Python finds them at its start
                    os.close(number)
                    setattr(sys, name, None)
            main()
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
