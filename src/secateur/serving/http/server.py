"""Runs the application in uvicorn, and stops it without losing what runs."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from secateur.errors import RecipeError

BACKLOG = 128
OF_THE_PORT = (errno.EADDRINUSE, errno.EACCES)
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Raises:
        RecipeError: the port is taken, or the address is not of this machine.
    """
    if not host:  # the system would take every address
        raise RecipeError("the address is empty", where="--host", remedy="127.0.0.1, or 0.0.0.0")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        if getattr(error, "errno", None) in OF_THE_PORT:
            where, remedy = "--port", "choose another --port; 0 takes a free one"
        else:
            where, remedy = "--host", "127.0.0.1 is this machine alone, 0.0.0.0 is every address"
        raise RecipeError(
            f"cannot listen on {host}, port {port}: {error}", where=where, remedy=remedy
        ) from error


class StoppableServer(uvicorn.Server):
    """Stops at SIGTERM or Ctrl-C: what runs ends, everything else is refused.

    A second signal ends it at once.

    Args:
        app: the application.
        on_stop: called at the first signal, before anything ends.
        stop_seconds: how long what runs may go on.
    """

    def __init__(self, app: ASGIApp, on_stop: Callable[[], None], stop_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=max(1, round(stop_seconds)),
                lifespan="on",
            )
        )
        self.on_stop = on_stop

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs. It ends by itself, so none is raised again."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, and at the second signal at once."""
        if self.should_exit:
            self.force_exit = True
        self.stop()

    def stop(self) -> None:
        """Refuse new requests, and end when the running ones have ended."""
        self.should_exit = True
        self.on_stop()
