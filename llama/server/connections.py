"""Connections whose clients do nothing: they are cut, for each holds a socket, and sockets run out.

uvicorn bounds how long a connection may be idle between two requests. It does not bound how long a client may take to
send the head of a request, nor how long it may leave an answer unread that has been written to the end.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from llama.server.config import ServerConfig

_INTERVAL = 5.0  # seconds, where the timeouts allow it


class Standstill:
    """Remembers since when each connection has stood still."""

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._since: dict[H11Protocol, tuple[Any, float]] = {}

    def cut(self, connections: Iterable[H11Protocol], now: float) -> None:
        """Look at all connections there are, and cut those that have stood still for too long."""
        before, self._since = self._since, {}
        for connection in connections:
            state, timeout = self._state(connection)
            if state is None:
                continue
            known, since = before.get(connection, (None, now))
            self._since[connection] = state, since if state == known else now
            if state == known and now - since > timeout:
                connection.transport.abort()

    def _state(self, connection: H11Protocol) -> tuple[Any, float]:
        """(what changes as soon as the client does something, how long it may take); None for the server's turn."""
        unread = connection.transport.get_write_buffer_size()
        if unread:
            return unread, self._config.send_timeout
        request = connection.cycle
        if request is None or request.response_complete:
            return ("next", request), self._config.body_timeout
        return None, 0.0


async def cut_standing(connections: set[H11Protocol], config: ServerConfig) -> None:
    """For ever."""
    standstill = Standstill(config)
    interval = min(_INTERVAL, config.send_timeout / 4, config.body_timeout / 4)
    while True:
        await asyncio.sleep(interval)
        standstill.cut(list(connections), asyncio.get_running_loop().time())
