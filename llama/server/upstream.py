"""One HTTP request to a replica, over a connection of its own."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterable
from types import TracebackType

import h11

Headers = Iterable[tuple[bytes, bytes]]

# Of a connection and not of what it carries (RFC 9110, 7.6.1); `date` comes anew.
_OF_CONNECTION = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"te", b"upgrade", b"date"})
_READ_BYTES = 1 << 16


def carried(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Those that are passed on."""
    return [(name, value) for name, value in headers if name not in _OF_CONNECTION]


class UpstreamLostError(ConnectionError):
    """The replica ended before its answer did."""


class Upstream:
    """As an asynchronous context manager it closes the connection on exit, which ends the request."""

    def __init__(self, address: bytes) -> None:
        self._address = address
        self._http = h11.Connection(h11.CLIENT)

    async def __aenter__(self) -> "Upstream":
        """OSError where nobody listens."""
        self._loop = asyncio.get_running_loop()
        # Not a StreamReader: that forgets what has come as soon as a write fails, and a replica may answer before it
        # has read a body.
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.setblocking(False)
        try:
            await self._loop.sock_connect(self._socket, self._address)
        except BaseException:
            self._socket.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def give_up(self) -> None:
        """End the connection from this side: whoever waits for an answer hears that it broke off."""
        with contextlib.suppress(OSError):  # it has ended by itself
            self._socket.shutdown(socket.SHUT_RDWR)

    async def begin(self, method: str, target: bytes, headers: Headers) -> None:
        kept = carried(headers)
        if not any(name == b"host" for name, _ in kept):
            kept.append((b"host", b"replica"))
        await self._send(h11.Request(method=method, target=target, headers=kept))

    async def body(self, data: bytes, more: bool) -> None:
        if data:
            await self._send(h11.Data(data=data))
        if not more:
            await self._send(h11.EndOfMessage())

    async def answer(self) -> AsyncIterator[h11.Response | h11.Data]:
        """The head, then the body as it comes. UpstreamLostError if it breaks off."""
        try:
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    self._http.receive_data(await self._loop.sock_recv(self._socket, _READ_BYTES))
                elif isinstance(event, h11.Response | h11.Data):
                    yield event
                elif isinstance(event, h11.EndOfMessage):
                    return
                elif isinstance(event, h11.ConnectionClosed):
                    raise UpstreamLostError("its answer broke off")
        except (OSError, h11.RemoteProtocolError):
            raise UpstreamLostError("its answer broke off") from None

    async def exchange(self, method: str, target: bytes, headers: Headers, body: bytes = b"") -> tuple[int, bytes]:
        """A whole request -> status and body of its whole answer."""
        length = [(b"content-length", str(len(body)).encode())] if body else []
        try:
            await self.begin(method, target, [*headers, *length])
            await self.body(body, False)
        except OSError:
            pass  # what it said before it closed the connection is its answer
        status, parts = 0, []
        async for event in self.answer():
            if isinstance(event, h11.Response):
                status = event.status_code
            else:
                parts.append(bytes(event.data))
        return status, b"".join(parts)

    async def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            await self._loop.sock_sendall(self._socket, data)
