"""A connection whose requests have heads of bounded size, and have to send them in time."""

from __future__ import annotations

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from secateur.serving.http.requests import ApiError

HEAD_BYTES = 64 << 10
"""The longest head of a request: its address and headers."""

ARRIVAL_SECONDS = 30.0
"""The longest time for the head of a request to arrive, and for its body."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection, which has no such bounds itself.

    Attributes:
        late: closes the connection unless it is cancelled in time; None while no head is awaited.
        head_bytes: of a head that has not ended.
        fault: why the connection is closed.
    """

    head_seconds = ARRIVAL_SECONDS
    late: TimerHandle | None = None
    head_bytes = 0
    fault: ApiError | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self.late = self.loop.call_later(self.head_seconds, self.close_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self.wait_no_more()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Wait for the rest of a head."""
        super().on_message_begin()
        if self.late is None:
            self.late = self.loop.call_later(self.head_seconds, self.close_late)

    def wait_no_more(self) -> None:
        """The head has come, or nobody waits for it any more."""
        if self.late is not None:
            self.late.cancel()
        self.late, self.head_bytes = None, 0

    def close_late(self) -> None:
        """Close a connection whose head took too long."""
        self.fault = ApiError(408, f"the headers took longer than {self.head_seconds:g} seconds")
        self.send_400_response("")

    def data_received(self, data: bytes) -> None:
        """Read a part of a request, and count what comes of a head after its first part."""
        waited = self.late is not None
        super().data_received(data)
        if waited and self.late is not None and not self.transport.is_closing():
            self.head_bytes += len(data)
            if self.head_bytes > HEAD_BYTES:
                self.fault = ApiError(431, f"the headers are longer than {HEAD_BYTES:,} bytes")
                self.send_400_response("")

    def on_headers_complete(self) -> None:
        """Answer the request."""
        self.wait_no_more()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Say what is wrong, as JSON, and close the connection."""
        self.wait_no_more()
        response = (self.fault or ApiError(400, "this is no HTTP request")).response()
        response.headers["Connection"] = "close"
        lines = [b"%s: %s\r\n" % header for header in response.raw_headers]
        head = b"".join([STATUS_LINE[response.status_code], *lines, b"\r\n"])
        self.transport.write(head + bytes(response.body))
        self.transport.close()
