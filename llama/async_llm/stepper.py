"""Stepper: the one thread that touches an engine. Others hand it commands, which it runs between two steps.

Streams are how answers leave the thread: it appends pieces, an event loop takes them, merged, whenever it gets to it.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from llama.api.errors import EngineClosedError, EngineDeadError, is_failure
from llama.api.outputs import Piece, RequestOutput
from llama.async_llm.admission import Admission, Permit
from llama.engine.request import Request
from llama.llm.replies import Replies, Reply, merged

logger = logging.getLogger(__name__)


class Stream:
    """The pieces of one request, for one reader. Iterate it to its end, or close it to abort: so does the end of the
    event loop that it was last read on, or made on."""

    def __init__(self, request: Request, permit: Permit, stepper: "Stepper") -> None:
        self.request = request
        self.permit = permit
        self.loop = asyncio.get_running_loop()
        self.reply: Reply | None = None
        self._stepper = stepper
        self._lock = threading.Lock()
        self._arrived: list[Piece] = []
        self._unread_since: float | None = None
        self._error: Exception | None = None
        self._ended = False
        self._has_news = asyncio.Event()
        self._ready: deque[Piece] = deque()

    @property
    def request_id(self) -> str:
        return self.request.request_id

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Piece:
        while not self._ready:
            with self._lock:
                arrived, self._arrived, self._unread_since = self._arrived, [], None
                ended, error = self._ended, self._error
            if arrived:
                self._ready.extend(merged(arrived))
            elif error is not None:
                raise error
            elif ended:
                raise StopAsyncIteration
            elif (loop := asyncio.get_running_loop()) is not self.loop:
                self.loop, self._has_news = loop, asyncio.Event()  # what has just come woke the other one: look again
            else:
                # A wake-up runs on this loop, so none can come between here and the wait.
                self._has_news.clear()
                await self._has_news.wait()
        return self._ready.popleft()

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def result(self) -> RequestOutput:
        """Read to the end; the whole answer."""
        async for _ in self:
            pass
        assert self.reply is not None
        return self.reply.output

    def close(self) -> None:
        """Abort the request if it still runs. Does not wait; any thread, any number of times."""
        if not self._ended:
            self._stepper.post(lambda: self._stepper.abort(self))

    def put(self, piece: Piece) -> bool:
        """From the step thread. True if the reader has to be woken."""
        with self._lock:
            self._arrived.append(piece)
            self._ended = self._ended or piece.usage is not None
            if self._unread_since is None:
                self._unread_since = time.monotonic()
            return len(self._arrived) == 1

    def end(self, error: Exception | None) -> None:
        """From the step thread: nothing more will come."""
        with self._lock:
            self._ended, self._error = True, self._error or error

    def wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """On this loop. It may no longer be the one that the stream is read on."""
        if loop is self.loop:
            self._has_news.set()

    def unread_for(self, now: float) -> float:
        """Seconds that the oldest piece has waited for the reader."""
        since = self._unread_since
        return 0.0 if since is None else now - since


class Stepper:
    """Owns the engine's thread. Methods marked "command" run on that thread only, through `call` or `post`."""

    def __init__(self, replies: Replies, admission: Admission, slow_reader_timeout: float) -> None:
        self._replies = replies
        self._admission = admission
        self._slow_reader_timeout = slow_reader_timeout
        self._streams: dict[str, Stream] = {}
        self._commands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = threading.Condition()
        self._stopping = self._refuses = False
        self._step_began: float | None = None
        self._killed_by: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="llama-step", daemon=True)

    @property
    def seconds_in_step(self) -> float:
        """How long the present step has been running; 0 between steps. For a watchdog."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def dead(self) -> EngineDeadError | None:
        """The error to raise once the engine is dead, a new one for each caller; None while it is alive."""
        cause = self._killed_by
        if cause is None:
            return None
        is_said = isinstance(cause, EngineDeadError)
        dead = EngineDeadError(str(cause) if is_said else f"the engine died: {type(cause).__name__}: {cause}")
        dead.__cause__ = cause
        return dead

    def call(self, command: Callable[[], Any]) -> "Future[Any]":
        """Run a command on the step thread between two steps; the future has its result or exception."""
        future: Future[Any] = Future()
        with self._changed:
            refusal = self.dead or (EngineClosedError("the engine is closed") if self._stopping else None)
            if refusal is None:
                self._commands.append((command, future))
                self._changed.notify()
        if refusal is not None:
            future.set_exception(refusal)
        return future

    def post(self, command: Callable[[], Any]) -> None:
        """`call` without a result; does nothing if the engine is closed or dead."""
        self.call(command)

    def stop(self) -> None:
        """Tell the thread to abort what still runs and end. Does not wait."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def add(self, stream: Stream, queued: float) -> None:
        """Command: start the stream's request. ValueError if the engine refuses it."""
        if self._refuses:
            raise EngineClosedError("the engine is closed")
        stream.reply = self._replies.add(stream.request, queued)
        self._streams[stream.request_id] = stream

    def abort(self, stream: Stream) -> None:
        """Command: end the stream's request now, also if it never started."""
        if stream.reply is not None:
            self._deliver((stream, piece) for piece in self._replies.abort(stream.reply))
        self._ended(stream)

    def end_all(self) -> None:
        """Command: abort all requests and refuse new ones from now on."""
        self._refuses = True
        for stream in list(self._streams.values()):
            self.abort(stream)

    def _run(self) -> None:
        try:
            while self._run_commands():
                self._step()
            self.end_all()
        except BaseException as error:  # whatever it was, the callers that wait must get it
            self._die(error)

    def _run_commands(self) -> bool:
        """Run the commands that have come; sleep while there is nothing to do. False once stopped."""
        while True:
            with self._changed:
                while not (self._commands or self._stopping or self._replies.engine.has_unfinished):
                    self._changed.wait()
                commands = list(self._commands)
                self._commands.clear()
                stopping = self._stopping
            for command, future in commands:
                _run_command(command, future)
            if stopping:
                return False
            self._replies.engine.check_alive()
            if self._replies.engine.has_unfinished:
                return True

    def _step(self) -> None:
        self._step_began = time.monotonic()
        news = self._replies.step()
        now, self._step_began = time.monotonic(), None
        # What others ask of the same LLM is not for a stream.
        of_streams = [
            (stream, reply, piece) for reply, piece in news if (stream := self._streams.get(reply.request.request_id))
        ]
        self._deliver((stream, piece) for stream, _, piece in of_streams)
        for stream, reply, _ in of_streams:
            self._admission.began(stream.permit)
            if reply.finished:
                self._ended(stream)
            elif stream.loop.is_closed() or stream.unread_for(now) > self._slow_reader_timeout:
                self.abort(stream)  # its reader has gone

    def _deliver(self, news: Iterable[tuple[Stream, Piece]]) -> None:
        _wake(stream for stream, piece in news if stream.put(piece))

    def _ended(self, stream: Stream, error: Exception | None = None) -> None:
        if self._streams.get(stream.request_id) is stream:  # not if it was refused because the id is another's
            del self._streams[stream.request_id]
        stream.end(error)
        self._admission.release(stream.permit)
        _wake([stream])

    def _die(self, error: BaseException) -> None:
        logger.critical("the engine died; every request ends with an error", exc_info=error)
        with self._changed:
            self._killed_by, self._step_began = error, None
            commands = list(self._commands)
            self._commands.clear()
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(self.dead)
        for stream in list(self._streams.values()):
            self._ended(stream, self.dead)


def _run_command(command: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = command()
    except BaseException as error:
        future.set_exception(error)
        if not is_failure(error):
            raise
    else:
        future.set_result(result)


def _wake(streams: Iterable[Stream]) -> None:
    """One call into each event loop, however many of its streams have news."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    for loop, group in by_loop.items():
        with contextlib.suppress(RuntimeError):  # closed: the next step ends its streams
            loop.call_soon_threadsafe(_wake_all, group, loop)


def _wake_all(streams: list[Stream], loop: asyncio.AbstractEventLoop) -> None:
    for stream in streams:
        stream.wake(loop)
