"""The other ranks of a model that several share: rank 0's process starts them, watches them and ends them.

They are processes of our own and import nothing of the caller's. Where one ends, fails, falls silent or is stuck in a
step, a thread here ends all of them: then no rank waits for another, and the engine says why.
"""

import contextlib
import logging
import queue
import selectors
import signal
import socket
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from llama import child_process
from llama.engine.parallel_runner import RankLostError
from llama.engine.wire import Frames, Message
from llama.model.communicator import MAY_HELP

logger = logging.getLogger(__name__)

T = TypeVar("T")

SILENCE_SECONDS = 15  # without a sign of life
START_SILENCE_SECONDS = 120  # while libraries are imported and weights read
MEET_SECONDS = 120  # from when all are there until their first sum
_TICK_SECONDS = 1.0
_EXIT_SECONDS = 5.0
_PROGRAM = Path(__file__).with_name("rank_process.py")


@dataclass(eq=False)
class Peer:
    """One other rank. Without a `process` it is a thread of this one (tests)."""

    rank: int
    stream: socket.socket
    process: "subprocess.Popen[bytes] | None" = None
    frames: Frames = field(default_factory=Frames)
    answers: "queue.SimpleQueue[dict[str, Any] | None]" = field(default_factory=queue.SimpleQueue)
    silent_ticks: int = 0

    @property
    def is_signalled(self) -> bool:
        """Whether a signal has ended its process."""
        code = None if self.process is None else self.process.poll()
        return code is not None and code < 0

    def ending(self) -> str | None:
        """How its process ended; None while it has not."""
        code = None if self.process is None else self.process.poll()
        if code is None or self.process is None:
            return None
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"rank {self.rank} (process {self.process.pid}) {how}"


class _State:
    """What the watching thread knows. It does not know the Ranks, so that these can be dropped."""

    def __init__(self, peers: Sequence[Peer], step_timeout: float) -> None:
        self.peers = list(peers)
        self.step_timeout = step_timeout
        self.step_began: float | None = None
        self.has_started = self.is_closing = False
        self.lost: str | None = None
        self.listeners: list[Callable[[str], None]] = []
        self.starved: dict[int, int] = {}  # step -> the rank that had no memory for it
        self.hearing = threading.Lock()
        self._lock = threading.Lock()

    def fail(self, why: str) -> None:
        """The first reason counts."""
        with self._lock:
            if self.lost is not None or self.is_closing:
                return
            self.lost = why
        logger.error("the ranks cannot go on: %s", why)
        self.kill()
        for peer in self.peers:
            peer.answers.put(None)
        for listener in self.listeners:
            listener(why)

    def kill(self) -> None:
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.stream.shutdown(socket.SHUT_RDWR)
            if peer.process is not None:
                peer.process.kill()
                peer.process.wait()

    def cause(self, said: str, of: Peer | None = None) -> str:
        """What ended first: a rank that hears of nothing but a closed connection is not it."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            # Ranks whose connection to one that a signal ended has closed may have ended too by now.
            others = sorted((peer for peer in self.peers if peer is not of), key=lambda peer: not peer.is_signalled)
            if (ending := next(filter(None, (peer.ending() for peer in others)), None)) is not None:
                return ending
            time.sleep(0.02)
        return said


class Ranks:
    def __init__(self, peers: Sequence[Peer], step_timeout: float) -> None:
        self._state = _State(peers, step_timeout)
        threading.Thread(target=_watch, args=(self._state,), name="llama-ranks", daemon=True).start()
        self._end = weakref.finalize(self, _end, self._state)  # also when Python exits

    @classmethod
    def start(cls, size: int, step_timeout: float) -> "Ranks":
        """Processes for the ranks 1 to size - 1."""
        peers: list[Peer] = []
        try:
            for rank in range(1, size):
                ours, theirs = socket.socketpair()
                with theirs:
                    process = child_process.start(_PROGRAM, [theirs.fileno()])
                peers.append(Peer(rank, ours, process))
        except BaseException:
            _State(peers, step_timeout).kill()
            raise
        return cls(peers, step_timeout)

    @property
    def lost(self) -> str | None:
        return self._state.lost

    def listen(self, listener: Callable[[str], None]) -> None:
        """`listener` is called, on the watching thread, with the reason why the ranks are lost. It must hold no engine:
        that would keep the ranks from being dropped."""
        self._state.listeners.append(listener)

    def started(self) -> None:
        """From now on a rank must not be silent for long."""
        self._state.has_started = True

    def send(self, data: bytes) -> None:
        for peer in self._state.peers:
            peer.stream.sendall(data)

    def send_all(self, content: dict[str, Any]) -> None:
        self.send(Message(content, {}).encoded())

    def tell(self, make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
        """Send each rank a message of its own -> the answers."""
        for peer in self._state.peers:
            peer.stream.sendall(Message(make(peer.rank), {}).encoded())
        return self.answers()

    def ask(self, message: Message) -> list[dict[str, Any]]:
        self.send(message.encoded())
        return self.answers()

    def answers(self) -> list[dict[str, Any]]:
        """The next one of each rank. RankLostError where one does not come."""
        found = []
        for peer in self._state.peers:
            answer = peer.answers.get()
            if answer is None:
                raise RankLostError(self._state.lost or "the ranks were ended")
            found.append(answer)
        return found

    def starved(self, step: int) -> str | None:
        """Which other rank had no memory for a step that this one has computed. It said so before it said anything else
        in that step, so what it said is here, if not heard yet."""
        for peer in self._state.peers:
            _hear(self._state, peer)
        rank = self._state.starved.pop(step, None)
        return None if rank is None else f"rank {rank}"

    def patient(self, work: Callable[[], T]) -> T:
        """work(), where the ranks meet: it is left alone once they are lost, or take too long."""
        done: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put((work(), None))
            except BaseException as error:
                done.put((None, error))

        threading.Thread(target=run, name="llama-meet", daemon=True).start()
        deadline = time.monotonic() + MEET_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                result, error = done.get(timeout=0.05)
                if error is not None:
                    raise error
                return cast(T, result)
            if self._state.lost is not None:
                raise RankLostError(self._state.lost)
        self._state.fail(f"the ranks did not meet within {MEET_SECONDS:g} seconds; {MAY_HELP}")
        raise RankLostError(str(self._state.lost))

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """What takes longer than the step's deadline in here is given up."""
        self._state.step_began = time.monotonic()
        try:
            yield
        finally:
            self._state.step_began = None

    def failed(self, error: BaseException) -> RankLostError:
        """What ended the ranks, after `error` here: this rank may have heard of it before the watching thread has."""
        said = f"rank 0: {type(error).__name__}: {' '.join(str(error).split())[:1000]}"
        if isinstance(error, Exception):
            deadline = time.monotonic() + 2.0
            while self._state.lost is None and time.monotonic() < deadline:
                time.sleep(0.02)
        self._state.fail(said)
        return RankLostError(self._state.lost or said)

    def close(self) -> None:
        """End the other ranks; any number of times."""
        self._end()


def _watch(state: _State) -> None:
    last_tick = time.monotonic()
    with selectors.DefaultSelector() as selector:
        for peer in state.peers:
            selector.register(peer.stream, selectors.EVENT_READ, peer)
        while state.lost is None and not state.is_closing:
            for key, _ in selector.select(_TICK_SECONDS):
                _hear(state, key.data)
            if time.monotonic() - last_tick >= _TICK_SECONDS:
                # Counted and not measured: a machine that slept, or is overloaded, held this thread as well.
                last_tick = time.monotonic()
                _tick(state)


def _hear(state: _State, peer: Peer) -> None:
    """What has come from a rank. On any thread; it does not wait."""
    with state.hearing:
        try:
            data = peer.stream.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        peer.silent_ticks = 0
        for message in peer.frames.take(data):
            _take(state, peer, message.content)
    if not data and not state.is_closing:
        state.fail(state.cause(f"rank {peer.rank} closed its connection"))


def _take(state: _State, peer: Peer, content: dict[str, Any]) -> None:
    if "error" in content:
        logger.error("rank %d:\n%s", peer.rank, content.get("trace", ""))
        state.fail(state.cause(f"rank {peer.rank}: {content['error']}", of=peer))
    elif "starved" in content:
        state.starved[content["starved"]] = peer.rank
    elif "beat" not in content:
        peer.answers.put(content)


def _tick(state: _State) -> None:
    limit = SILENCE_SECONDS if state.has_started else START_SILENCE_SECONDS
    for peer in state.peers:
        peer.silent_ticks += 1
        if peer.silent_ticks >= limit:
            state.fail(f"rank {peer.rank} has given no sign of life for {limit} seconds")
    began = state.step_began
    if began is not None and time.monotonic() - began > state.step_timeout:
        state.fail(f"a step takes longer than {state.step_timeout:g} seconds (step_timeout)")


def _end(state: _State) -> None:
    """A rank ends by itself when its connection does; one that cannot is killed."""
    state.is_closing, state.lost = True, state.lost or "it was closed"
    for peer in state.peers:
        with contextlib.suppress(OSError):
            peer.stream.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + _EXIT_SECONDS
    for peer in state.peers:
        if peer.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                peer.process.wait(max(0.0, deadline - time.monotonic()))
    state.kill()
    for peer in state.peers:
        peer.stream.close()
        peer.answers.put(None)
