"""What servers have in common, whatever is behind them: uvicorn's settings, signals, room for connections. No torch."""

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from llama.server.config import BACKLOG, ServerConfig

MAX_HEADER_BYTES = 64 * 1024
FLUSH_SECONDS = 5  # for answers that are complete to reach their clients
_MAX_FILES = 65_536


def settings(app: Any, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,
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


class StoppableServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but no signal is raised again after a clean stop: that is not a failure."""
        if threading.current_thread() is not threading.main_thread():  # only there may signals be listened to
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
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
