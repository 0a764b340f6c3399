"""What servers have in common, whatever is behind them: uvicorn's settings, signals, room for connections. No torch."""

import asyncio
import contextlib
import re
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from urllib.parse import unquote

import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from llama.server.config import BACKLOG, ServerConfig

MAX_HEADER_BYTES = 64 * 1024
FLUSH_SECONDS = 5  # for answers that are complete to reach their clients
_MAX_FILES = 65_536
_SCHEME_AND_HOST = re.compile(rb"https?://[^/]*", re.IGNORECASE)


def settings(app: ASGIApp, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        by_target(app),
        http="h11",  # it bounds the headers; httptools does not
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        timeout_keep_alive=config.timeout_keep_alive,  # type: ignore[arg-type]
        timeout_graceful_shutdown=FLUSH_SECONDS,
        backlog=BACKLOG,
    )


def by_target(app: ASGIApp) -> ASGIApp:
    """`app`, asked for the path where a proxy sends the whole URL as target (RFC 9112, 3.2.2), and not asked where the
    server itself is meant (OPTIONS *, RFC 9110, 9.3.7)."""

    async def ask(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and scope["raw_path"] == b"*":
            await Response(status_code=204)(scope, receive, send)
            return
        if scope["type"] == "http" and (head := _SCHEME_AND_HOST.match(scope["raw_path"])):
            path = scope["raw_path"][head.end() :] or b"/"
            scope = {**scope, "raw_path": path, "path": unquote(path.decode("ascii"))}
        await app(scope, receive, send)

    return ask


def stop_signals() -> list[signal.Signals]:
    """Those by which a server is told to stop. A closed terminal sends SIGHUP; under nohup that is ignored and stays
    so."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if is_ignored else [signal.SIGHUP])]


class StoppableServer(uvicorn.Server):
    _loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def stop(self) -> None:
        """Begin to stop; a second call ends everything at once."""
        raise NotImplementedError

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        assert self._loop is not None
        # Shells send it behind the kernel's own, and systemd behind SIGTERM: no second call is meant.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._loop.call_soon_threadsafe(self.stop)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but no signal is raised again after a clean stop: that is not a failure."""
        if threading.current_thread() is not threading.main_thread():  # only there may signals be listened to
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def allow_many_connections() -> None:
    """Most systems start a process with room for a thousand open files, and let it have more if it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
