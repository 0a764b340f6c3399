"""Rendering, encoding and compiling grammars off the event loop, before the engine has a request.

Quick work, long prompts and grammars have threads of their own: a slow request delays requests of its kind, never the
others. A caller that waits may be cancelled at any time; work that a thread has begun then goes on, and its result is
dropped.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any, TypeVar

from llama.api.errors import EngineClosedError, QueueFullError, is_one_of
from llama.text.kept import Kept

PATIENCE_SECONDS = 60.0  # for a thread to become free
_RETRY_SECONDS = 5  # what one hostile grammar takes
_LONG_CHARACTERS = 1 << 16  # about 50 ms to encode
_NODE_CHARACTERS = 16  # what a JSON value costs beyond its text
_KNOWN_CHARACTERS = 2**17  # of grammars: half of what a compiler keeps, so that those known here are compiled there

T = TypeVar("T")


class Preparation:
    """Runs work in three executors: `quick`, `long` and `grammars`."""

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self.quick = ThreadPoolExecutor(4, "llama-quick")
        self.long = ThreadPoolExecutor(2, "llama-long")
        self.grammars = ThreadPoolExecutor(2, "llama-grammars")
        self._patience = patience
        self._lock = threading.Lock()
        self._pending: set[Future[Any]] = set()
        self._known = Kept[None](_KNOWN_CHARACTERS, lambda grammar, _: len(grammar) + _NODE_CHARACTERS)
        self._is_stopped = False

    def submit(self, work: Callable[[], T], size: int = 0, grammar: str | None = None) -> "Future[T]":
        """The future has the work's result or exception: QueueFullError where no thread was free in time,
        EngineClosedError once stopped, also while the work runs. Cancelling it drops work that has not begun.

        `size` in characters or tokens; `grammar`: see `grammar_key`."""
        future: Future[T] = Future()
        job = [(future, work)]  # emptied as soon as it is begun or cancelled: an executor keeps its arguments

        def forget(done: "Future[T]") -> None:
            job.clear()
            with self._lock:
                self._pending.discard(done)

        with self._lock:
            if self._is_stopped:
                future.set_exception(_closed())
                return future
            self._pending.add(future)
            self._executor(size, grammar).submit(self._run, job, grammar, time.monotonic())
        future.add_done_callback(forget)
        return future

    def _executor(self, size: int, grammar: str | None) -> ThreadPoolExecutor:
        if grammar is not None and not self._known.has(grammar):
            return self.grammars  # else compiled lately: no reason to wait behind others
        return self.long if size >= _LONG_CHARACTERS else self.quick

    def _run(self, job: list[tuple["Future[T]", Callable[[], T]]], grammar: str | None, submitted: float) -> None:
        try:
            future, work = job.pop()
        except IndexError:  # cancelled
            return
        try:
            if time.monotonic() - submitted > self._patience:
                message = f"the request waited for more than {self._patience:g} s to be prepared"
                raise QueueFullError(message, _RETRY_SECONDS)
            result = work()
            self._remember(grammar)
            _settle(future, result)
        except BaseException as error:  # whatever it was, the caller that waits must get it
            _settle(future, error=error)
            del future  # or the error's traceback would keep it, and all that the work held, alive

    def _remember(self, grammar: str | None) -> None:
        """A request with that grammar has been prepared."""
        if grammar:
            self._known.put(grammar, None)

    @property
    def num_pending(self) -> int:
        """Requests that are being prepared or wait for it."""
        return len(self._pending)

    def stop(self) -> None:
        """Callers that wait get EngineClosedError now; the threads end after what they do. Does not wait."""
        with self._lock:
            self._is_stopped = True
            pending = list(self._pending)
        for future in pending:
            _settle(future, error=_closed())
        for executor in (self.quick, self.long, self.grammars):
            executor.shutdown(wait=False, cancel_futures=True)


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


def grammar_key(constraint: Any, tools: Any = None, tool_choice: Any = "auto") -> str | None:
    """What tells one grammar from another; None where no grammar is wanted, "" for one that is never known."""
    wanted = []
    if constraint and constraint != {"type": "text"}:
        wanted.append(constraint)
    is_free = is_one_of(tool_choice, ("auto",))
    has_tools = isinstance(tools, Sequence) and bool(tools) and not is_one_of(tool_choice, ("none",))
    if has_tools and (wanted or not is_free or _any_strict(tools)):
        wanted.append([tools, tool_choice])
    if not wanted:
        return None
    try:
        return json.dumps(wanted) if size_of(wanted) < _LONG_CHARACTERS else ""
    except (TypeError, ValueError, RecursionError):
        return ""


def _any_strict(tools: Any) -> bool:
    """Whether calls of some tool are held to its schema by a grammar, as `llama.text.grammar.is_strict` says."""
    listed = [tool for tool in tools if isinstance(tool, Mapping)] if isinstance(tools, list | tuple) else []
    functions = [tool.get("function", tool) for tool in listed]
    return any(isinstance(function, Mapping) and function.get("strict") is True for function in functions)


def _closed() -> EngineClosedError:
    return EngineClosedError("the engine is closed")


def _settle(future: "Future[Any]", result: Any = None, error: BaseException | None = None) -> None:
    """Set the future unless it is done."""
    with contextlib.suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
