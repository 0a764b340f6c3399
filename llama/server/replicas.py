"""Several engines on one machine: each a server in a process of its own, behind a socket that has no file.

Requests go to the one with the fewest that are not yet answered; one that hangs comes last. What a replica is told, and
what it says, are typed JSON messages. A replica lives as long as the connection to the process that started it. No
torch.
"""

import asyncio
import contextlib
import logging
import selectors
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama import child_process
from llama.engine.wire import Message, receive
from llama.server.config import BACKLOG, ServerConfig
from llama.server.upstream import Upstream

logger = logging.getLogger(__name__)

_PROGRAM = Path(__file__).with_name("replica_process.py")
_EXIT_SECONDS = 5.0
_PROBE_SECONDS = 1.0  # between two questions whether it lives
_SILENCE_SECONDS = 5.0  # after which it gets no request that another can take


class ReplicaLostError(RuntimeError):
    """A replica could not start, or all have ended."""


@dataclass(eq=False)
class Replica:
    number: int
    process: "subprocess.Popen[bytes]"
    control: socket.socket
    address: bytes
    num_requests: int = 0  # that it has and has not yet answered
    is_silent: bool = False  # it does not answer now
    is_given_up: bool = False  # nor has it for as long as a step may take
    upstreams: set[Upstream] = field(default_factory=set)

    def __str__(self) -> str:
        return f"replica {self.number} (process {self.process.pid})"

    @property
    def ending(self) -> str | None:
        """How its process ended; None while it has not."""
        code = self.process.poll()
        if code is None:
            return None
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{self} {how}"

    @property
    def trouble(self) -> str | None:
        """How its process ended, or that it hangs."""
        return self.ending or (f"{self} does not answer" if self.is_silent else None)

    async def told_ending(self) -> str:
        """Why its connection ended. How its process did, the system may not have told yet."""
        if self.is_given_up:
            return f"{self} does not answer"
        for _ in range(20):
            if (ending := self.ending) is not None:
                return ending
            await asyncio.sleep(0.05)
        return f"replica {self.number} closed its connection"


class Replicas:
    """As a context manager it ends all of them on exit."""

    def __init__(self) -> None:
        self.all: list[Replica] = []

    @classmethod
    def start(
        cls,
        count: int,
        model: str,
        arguments: Mapping[str, Any],
        config: ServerConfig,
        *,
        loras: Mapping[str, str],
        limits: Mapping[str, Any],
    ) -> "Replicas":
        """`arguments` are LLM's, `limits` AsyncLLM's own. Returns when all can answer; ReplicaLostError where one
        cannot."""
        settings = asdict(config) | {"lora_dir": None if config.lora_dir is None else str(config.lora_dir.resolve())}
        told = {"count": count, "model": model, "arguments": dict(arguments), "config": settings}
        told |= {"loras": dict(loras), "limits": dict(limits)}
        replicas = cls()
        try:
            for number in range(count):
                replicas.all.append(_start(number))
            for replica in replicas.all:
                replica.control.sendall(Message({**told, "number": replica.number}, {}).encoded())
            replicas._wait()
        except BaseException:
            replicas.kill()
            raise
        return replicas

    def _wait(self) -> None:
        """For all at once: one that ends early must not be found after the slowest."""
        with selectors.DefaultSelector() as selector:
            for replica in self.all:
                selector.register(replica.control, selectors.EVENT_READ, replica)
            while selector.get_map():
                for key, _ in selector.select():
                    _check_started(key.data)
                    selector.unregister(key.fileobj)

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.all if replica.process.poll() is None]

    @contextlib.asynccontextmanager
    async def idlest(self) -> AsyncIterator[tuple[Replica, Upstream]]:
        """The replica with the fewest requests that can be reached, and a connection to it. ReplicaLostError where
        there is none."""
        async with contextlib.AsyncExitStack() as stack:
            yield await self._reach(stack)

    @contextlib.asynccontextmanager
    async def watched(self, patience: float) -> AsyncIterator[None]:
        """Meanwhile replicas that hang are noticed, and after `patience` seconds their requests fail."""
        tasks = [asyncio.ensure_future(_watch(replica, patience)) for replica in self.all]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _reach(self, stack: contextlib.AsyncExitStack) -> tuple[Replica, Upstream]:
        known = (replica for replica in self.alive if not replica.is_given_up)
        for replica in sorted(known, key=lambda replica: (replica.is_silent, replica.num_requests)):
            replica.num_requests += 1
            try:
                upstream = await stack.enter_async_context(Upstream(replica.address))
            except OSError:
                replica.num_requests -= 1
                continue
            except BaseException:
                replica.num_requests -= 1
                raise
            replica.upstreams.add(upstream)
            stack.callback(_answered, replica, upstream)
            return replica, upstream
        troubles = [trouble for replica in self.all if (trouble := replica.trouble) is not None]
        raise ReplicaLostError("; ".join(troubles) or "no replica can be reached")

    def stop(self) -> None:
        """Have each finish what it has, refuse all else, and exit."""
        for replica in self.alive:
            replica.process.terminate()

    def kill(self) -> None:
        for replica in self.all:
            replica.process.kill()
            replica.process.wait()
            replica.control.close()

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _start(number: int) -> Replica:
    ours, theirs = socket.socketpair()
    with theirs, socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # the system gives it a name that no other has
        listener.listen(BACKLOG)
        process = child_process.start(_PROGRAM, [theirs.fileno(), listener.fileno()])
        return Replica(number, process, ours, listener.getsockname())


def _check_started(replica: Replica) -> None:
    message = receive(replica.control)
    if message is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            replica.process.wait(_EXIT_SECONDS)
        raise ReplicaLostError(replica.ending or f"replica {replica.number} closed its connection")
    if "error" in message.content:
        raise ReplicaLostError(f"replica {replica.number}: {message.content['error']}")


def _answered(replica: Replica, upstream: Upstream) -> None:
    replica.num_requests -= 1
    replica.upstreams.discard(upstream)


async def _watch(replica: Replica, patience: float) -> None:
    """Runs until cancelled. A process that was stopped, or a thread that holds the interpreter's lock, lets others
    connect and says nothing."""
    while True:
        await asyncio.sleep(_PROBE_SECONDS)
        answer = asyncio.ensure_future(_ping(replica))
        try:
            await asyncio.wait([answer], timeout=_SILENCE_SECONDS)
            if not answer.done():
                replica.is_silent = True
                logger.warning("%s has said nothing for %g seconds", replica, _SILENCE_SECONDS)
                await asyncio.wait([answer], timeout=patience)
            if not answer.done():
                replica.is_given_up = True
                logger.error("%s does not answer: its requests failed", replica)
                for upstream in replica.upstreams:
                    upstream.give_up()
            with contextlib.suppress(OSError):
                await answer
                if replica.is_silent:
                    replica.is_silent = replica.is_given_up = False
                    logger.warning("%s answers again", replica)
        finally:
            answer.cancel()


async def _ping(replica: Replica) -> None:
    async with Upstream(replica.address) as upstream:
        await upstream.exchange("OPTIONS", b"*", ())
