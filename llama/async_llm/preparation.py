"""Lanes: the threads on which requests are rendered, encoded and given their grammars before the engine has them.

There is a lane for what is quick, one for long prompts and one for grammars, each with threads of its own: what a
stranger sends may hold its own kind up, never the others. Whoever waits for a thread may leave at any time and leaves
nothing behind; a preparation that a thread has begun goes on, and its result is dropped.
"""

import contextlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from typing import Any, TypeVar

from llama.api.errors import EngineClosedError, QueueFullError

PATIENCE_SECONDS = 60.0  # for a thread to become free
_RETRY_SECONDS = 5  # what one hostile grammar takes
_LONG_CHARACTERS = 1 << 16  # about 50 ms to encode
_NODE_CHARACTERS = 16  # what a JSON value costs beyond its text
_KNOWN_GRAMMARS = 64  # half of what a compiler keeps, so that those known here are compiled there

T = TypeVar("T")


class Lane:
    """At most `num_threads` pieces of work at once, the others wait in order. Threads start when they are needed."""

    def __init__(self, name: str, num_threads: int, patience: float = PATIENCE_SECONDS) -> None:
        self._name = name
        self._num_threads = num_threads
        self._patience = patience
        self._changed = threading.Condition()
        self._waiting: OrderedDict[Future[Any], tuple[Callable[[], Any], float]] = OrderedDict()
        self._begun: set[Future[Any]] = set()
        self._threads: list[threading.Thread] = []
        self._num_idle = 0
        self._is_stopped = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """The future has the work's result or exception: QueueFullError where no thread was free in time,
        EngineClosedError once the lane is stopped. Cancelling it takes back work that has not begun."""
        future: Future[T] = Future()
        with self._changed:
            if self._is_stopped:
                future.set_exception(_closed())
                return future
            if self._num_idle <= len(self._waiting) and len(self._threads) < self._num_threads:
                thread = threading.Thread(target=self._run, name=f"llama-{self._name}", daemon=True)
                thread.start()
                self._threads.append(thread)
            self._waiting[future] = work, time.monotonic()
            self._changed.notify()
        future.add_done_callback(self._forget)
        return future

    def stop(self) -> None:
        """Whoever waits for a result gets EngineClosedError now; the threads end after what they do. Does not wait."""
        with self._changed:
            self._is_stopped = True
            futures = [*self._waiting, *self._begun]
            self._changed.notify_all()
        for future in futures:
            _settle(future, error=_closed())

    def join(self, timeout: float) -> None:
        """Wait, after stop(), until the threads have ended, or for `timeout` seconds: they are not worth more."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _forget(self, future: "Future[Any]") -> None:
        with self._changed:
            self._waiting.pop(future, None)
            self._begun.discard(future)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            future, work = job
            try:
                result = work()
            except BaseException as error:  # whatever it was, the one who waits must hear of it
                _settle(future, error=error)
            else:
                _settle(future, result)
                del result
            del job, future, work  # an idle thread keeps nothing alive

    def _next(self) -> tuple["Future[Any]", Callable[[], Any]] | None:
        """None once the lane is stopped."""
        while True:
            with self._changed:
                self._num_idle += 1
                while not (self._waiting or self._is_stopped):
                    self._changed.wait()
                self._num_idle -= 1
                if self._is_stopped:
                    return None
                future, (work, since) = self._waiting.popitem(last=False)
                if future.done():
                    continue
                self._begun.add(future)
            if time.monotonic() - since <= self._patience:
                return future, work
            message = f"the request waited for more than {self._patience:g} s to be prepared"
            _settle(future, error=QueueFullError(message, _RETRY_SECONDS))


class Lanes:
    """Which lane a request takes. A grammar that was compiled lately is no reason to wait behind others."""

    def __init__(self) -> None:
        self.quick = Lane("quick", 4)
        self.long = Lane("long", 2)
        self.grammars = Lane("grammars", 2)
        self._known: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, size: int, grammar: str | None) -> Lane:
        """`size` in characters or tokens; `grammar`: see `grammar_key`."""
        if grammar is not None:
            with self._lock:
                if grammar not in self._known:
                    return self.grammars
                self._known.move_to_end(grammar)
        return self.long if size >= _LONG_CHARACTERS else self.quick

    def compiled(self, grammar: str | None) -> None:
        """A request with that grammar has been prepared."""
        if not grammar:
            return
        with self._lock:
            self._known[grammar] = None
            if len(self._known) > _KNOWN_GRAMMARS:
                self._known.popitem(last=False)

    def stop(self) -> None:
        for lane in self._all:
            lane.stop()

    def join(self, timeout: float) -> None:
        for lane in self._all:
            lane.join(timeout)

    @property
    def _all(self) -> tuple[Lane, ...]:
        return self.quick, self.long, self.grammars


def size_of(*values: Any) -> int:
    """About how many characters JSON values have, never much more than what makes a request long."""
    size, stack = 0, list(values)
    while stack and size < _LONG_CHARACTERS:
        value = stack.pop()
        size += _NODE_CHARACTERS
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping | list | tuple):
            size += len(value)
            if len(value) < _LONG_CHARACTERS:
                stack.extend(value)
                stack.extend(value.values() if isinstance(value, Mapping) else ())
    return size


def grammar_key(response_format: Any, tools: Any = None, tool_choice: Any = "auto") -> str | None:
    """What tells one grammar from another; None where no grammar is wanted, "" for one that is never known."""
    wanted = []
    if response_format and response_format != {"type": "text"}:
        wanted.append(response_format)
    if tools and tool_choice not in ("auto", "none"):
        wanted.append([tools, tool_choice])
    if not wanted:
        return None
    try:
        return json.dumps(wanted) if size_of(wanted) < _LONG_CHARACTERS else ""
    except (TypeError, ValueError, RecursionError):
        return ""


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine is closed")


def _settle(future: "Future[Any]", result: Any = None, error: BaseException | None = None) -> None:
    """Nobody may wait any more."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
