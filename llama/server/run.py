"""Running a server: signals, draining, and watching over steps and connections.

The first SIGTERM, SIGINT or SIGHUP makes /ready answer 503 and new requests be refused; what runs may end within the
shutdown timeout, the rest ends with an error; then the port closes. A second signal ends the process at once. A step
of the engine that hangs does not keep it.
"""

import asyncio
import contextlib
import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

from llama.api.params import SamplingParams
from llama.async_llm.async_llm import AsyncLLM
from llama.server.app import create_app
from llama.server.config import ServerConfig
from llama.server.logs import LogQueue
from llama.server.service import Service
from llama.server.stopping import StoppableServer, allow_many_connections, settings

logger = logging.getLogger(__name__)

_DEAD_FLUSH_SECONDS = 2  # for the errors that they end with, once the engine is dead
_DEAD_EXIT_SECONDS = 3.0  # after which whatever still runs is not waited for
_LOG_SECONDS = 1.0  # for the last log lines
_STALL_INTERVAL = 5.0  # seconds, where the timeouts allow it


class Server(StoppableServer):
    """uvicorn's server, stopped by draining the engine."""

    def __init__(self, service: Service, *, is_replica: bool = False) -> None:
        self._service = service
        self._is_replica = is_replica
        self._draining: asyncio.Task[None] | None = None
        self._hangs = False
        self.exit_code = 0
        self.is_ending = threading.Event()  # because the engine is dead
        super().__init__(settings(create_app(service), service.config))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watchdog = asyncio.create_task(self._watch())
        uvicorn_log = logging.getLogger("uvicorn.error")
        uvicorn_log.addFilter(self._service.invalid_requests)
        stalled = asyncio.create_task(_close_stalled(self.server_state.connections, self._service.config))
        try:
            await super().serve(sockets)
        finally:
            uvicorn_log.removeFilter(self._service.invalid_requests)
            for task in (watchdog, stalled, self._draining):
                if task is not None:
                    task.cancel()
            if not (self.force_exit or self._hangs):
                await self._service.llm.close()

    def stop(self) -> None:
        if self._draining is not None:
            # Of a replica's two calls, one is its front's, and one may be that of whoever stops all processes.
            if not self._is_replica:
                self.force_exit = self.should_exit = True
            return
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        llm, config = self._service.llm, self._service.config
        logger.info("stopping: %d requests run or wait", llm.num_requests)
        try:
            async with asyncio.timeout(config.shutdown_timeout + config.step_deadline):
                await llm.drain(config.shutdown_timeout)
        except TimeoutError:
            self._hangs = True
            logger.error("stopping without the engine: its step does not end")
        self.should_exit = True

    async def _watch(self) -> None:
        """Log all stacks once for each step that takes longer than the deadline; end with a dead engine."""
        llm, config, is_told = self._service.llm, self._service.config, False
        while True:
            await asyncio.sleep(min(1.0, config.step_deadline / 4))
            is_late = llm.seconds_in_step > config.step_deadline
            if is_late and not is_told:
                logger.error(
                    "a step of the engine has been running for more than %g s\n%s", config.step_deadline, _stacks()
                )
            is_told = is_late
            if llm.is_dead and config.exit_on_engine_death:
                logger.critical("the engine is dead: exiting with code %d", os.EX_SOFTWARE)
                self.exit_code = os.EX_SOFTWARE
                self.is_ending.set()
                self.config.timeout_graceful_shutdown = _DEAD_FLUSH_SECONDS
                self.should_exit = True
                return


class _StalledConnections:
    """Closes connections whose clients do nothing: each holds a socket, and sockets run out.

    uvicorn bounds how long a connection may be idle between two requests. It does not bound how long a client may take
    to send the head of a request, nor how long it may leave an answer unread that has been written to the end.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._since: dict[Any, tuple[Any, float]] = {}

    def close(self, connections: Iterable[Any], now: float) -> None:
        """Of all open connections, those that have been stalled for too long."""
        before, self._since = self._since, {}
        for connection in connections:
            state, timeout = self._state(connection)
            if state is None:
                continue
            known, since = before.get(connection, (None, now))
            self._since[connection] = state, since if state == known else now
            if state == known and now - since > timeout:
                connection.transport.abort()

    def _state(self, connection: Any) -> tuple[Any, float]:
        """(what changes as soon as the client does something, how long it may take); None for the server's turn."""
        unread = connection.transport.get_write_buffer_size()
        if unread:
            return unread, self._config.send_timeout
        request = connection.cycle
        if request is None or request.response_complete:
            return ("next", request), self._config.body_timeout
        return None, 0.0


async def _close_stalled(connections: set[Any], config: ServerConfig) -> None:
    """Runs until cancelled. `connections` are uvicorn's H11Protocols."""
    stalled = _StalledConnections(config)
    interval = min(_STALL_INTERVAL, config.send_timeout / 4, config.body_timeout / 4)
    while True:
        await asyncio.sleep(interval)
        stalled.close(list(connections), asyncio.get_running_loop().time())


def serve(llm: AsyncLLM, config: ServerConfig, taken: socket.socket, log: LogQueue, *, is_replica: bool = False) -> int:
    """Serve until told to stop -> the exit code: 70 if the engine died. A dead engine's process ends in any case."""
    allow_many_connections()
    read_vocabulary(llm)
    server = Server(Service(llm, config, log), is_replica=is_replica)
    threading.Thread(target=_end_if_dead, args=(server, log), name="llama-end", daemon=True).start()
    asyncio.run(server.serve([taken]))
    log.stop(_LOG_SECONDS)
    if server.exit_code:
        os._exit(server.exit_code)  # a thread that hangs would keep the interpreter from ending
    return 0


def _end_if_dead(server: Server, log: LogQueue) -> None:
    """The event loop itself may hang: a dead engine's process does not wait for it."""
    server.is_ending.wait()
    time.sleep(_DEAD_EXIT_SECONDS)
    log.stop(_LOG_SECONDS)
    os._exit(server.exit_code)


def _stacks() -> str:
    """The stacks of all threads, written by faulthandler, which asks nothing of them."""
    with open(os.memfd_create("stacks"), "w+b") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace").rstrip()


def read_vocabulary(llm: AsyncLLM) -> None:
    """llguidance reads it for the first grammar, which takes a second or two in which no other thread can run: better
    now than when requests stream. Those who ask for a grammar hear why if it cannot be done."""
    with contextlib.suppress(ValueError):
        llm.llm.inputs.request([0], SamplingParams(response_format={"type": "regex", "regex": "x"}), None)
