"""Runs code and patterns of unknown origin in a process that can be killed.

Nothing inside a Python process stops an endless loop or a string that doubles forty times, and a thread cannot be
killed. A worker process has a deadline, a memory limit and no way to open files. It starts with the first request and
serves one request at a time, from any thread. Both sides exchange JSON, nothing else. Large requests have a process of
their own, so that small ones do not wait behind them.

The deadline is of the process's own processor time, and a process that ends is given another try: what the system does
to it is not the request's fault.
"""

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.api.errors import WorkerLostError
from llama.text.sandbox.child import HEADER_BYTES

logger = logging.getLogger(__name__)

MEMORY_BYTES = 2**30
_START_SECONDS = 15.0  # of processor time, for a Python process and its imports
_PATIENCE = 10  # times a deadline: how long a request may wait for that much processor time
_LOOKS = 20  # at the process's time during a deadline
LOW_PRIORITY = 10  # a niceness: the engine computes on all cores and waits for the slowest one
_LARGE_BYTES = 2**17  # of a request
_LARGEST_ANSWER = 2**28
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGXCPU})
_CHILD = Path(__file__).with_name("child.py")


class WorkerError(Exception):
    """The request failed: the message is the other side's own, or says which limit was exceeded."""


class WorkerLimitError(WorkerError):
    """The request took too long, or ended its process."""


class _LostError(Exception):
    """The process ended, or had no processor time: another one may do better. `is_own`: it ended itself."""

    def __init__(self, message: str, is_own: bool = False) -> None:
        super().__init__(message)
        self.is_own = is_own


class Worker:
    """Calls the function that `module.start(setup)` returns. `close`, or the garbage collector, ends its processes."""

    def __init__(self, module: str, setup: Mapping[str, Any], *, deadline_seconds: float, niceness: int = 0) -> None:
        """`deadline_seconds` of processor time; `niceness` is added to the process's own, as by `nice`."""
        self._niceness = niceness
        self._module = module
        self._setup = dict(setup)
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()  # held while the process has a request
        self._making = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None
        self._for_large: Worker | None = None
        self._num_lost = 0

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Raises WorkerError, ValueError for a request that is not JSON, and WorkerLostError where the system twice
        ended or starved the process."""
        data = _encoded(request)
        worker = self._large() if len(data) > _LARGE_BYTES else self
        with worker._lock:
            return worker._ask(data)

    @property
    def num_lost(self) -> int:
        """Processes that ended, or were ended for want of processor time, while they were needed."""
        return self._num_lost + (0 if self._for_large is None else self._for_large._num_lost)

    def close(self) -> None:
        """The next request would start another process."""
        for worker in (self, self._for_large):
            if worker is not None:
                with worker._lock:
                    worker._stop()

    def _large(self) -> "Worker":
        with self._making:
            if self._for_large is None:
                self._for_large = Worker(
                    self._module, self._setup, deadline_seconds=self._deadline_seconds, niceness=LOW_PRIORITY
                )
            return self._for_large

    def _ask(self, data: bytes) -> Any:
        try:
            return self._try(data)
        except _LostError as lost:
            first = lost
        logger.warning("a worker process of %s %s: its request is tried once more", self._module, first)
        try:
            return self._try(data)
        except _LostError as second:
            logger.error("a worker process of %s %s, after another that %s", self._module, second, first)
            if first.is_own and second.is_own:
                raise WorkerLimitError("it ended the process that ran it") from None
            raise WorkerLostError() from None

    def _try(self, data: bytes) -> Any:
        try:
            if self._process is not None and self._process.poll() is not None:
                logger.warning(
                    "a worker process of %s %s: starting another", self._module, _how_it_ended(self._process)
                )
                self._num_lost += 1
                self._stop()
            if self._process is None:
                self._start()
            return self._exchange(data, self._deadline_seconds)
        except (_LostError, WorkerLostError):
            self._num_lost += 1
            raise

    def _start(self) -> None:
        if not sys.executable:
            raise RuntimeError("a Python process has to be started, and sys.executable is not set")
        try:
            # Isolated and without site: it takes the paths of this process, and is up in a tenth of a second.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # An interrupt from the terminal is not for the worker. A session of its own would make its niceness
                # useless: Linux divides the processor among sessions first.
                process_group=0,
            )
        except OSError as error:  # no room for a process or its pipes
            raise _LostError(f"could not be started: {error.strerror}") from None
        self._end = weakref.finalize(self, _end, self._process)
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # a process that was stopped reads nothing
        first = {"path": sys.path, "module": self._module, "memory_bytes": MEMORY_BYTES, "niceness": self._niceness}
        try:
            try:
                self._exchange(_encoded(first), _START_SECONDS)
            except WorkerLimitError as error:
                raise _LostError(f"did not start: {error}") from None
            except _LostError as lost:
                raise _LostError(str(lost)) from None  # there was no request yet
            self._exchange(_encoded(self._setup), self._deadline_seconds)
        except BaseException:  # without its setup it cannot serve
            self._stop()
            raise

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _exchange(self, data: bytes, seconds: float) -> Any:
        process = self._process
        assert process is not None and process.stdin and process.stdout
        try:
            clock = _Clock(process.pid, seconds)
            _write(process.stdin.fileno(), len(data).to_bytes(HEADER_BYTES, "big") + data, clock)
            answer = json.loads(_read_frame(process.stdout.fileno(), clock))
        except TimeoutError:
            self._stop()
            raise WorkerLimitError(f"it did not finish within {seconds:g} s") from None
        except (OSError, EOFError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)  # before it is killed: how did it end?
            self._stop()
            raise _LostError(_how_it_ended(process), is_own=_ended_itself(process)) from None
        except BaseException:  # interrupted inside a frame: the next request needs a new process
            self._stop()
            raise
        if "error" in answer:
            raise WorkerError(str(answer["error"]))
        return answer["value"]


def _encoded(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


class _Clock:
    """Waits for one answer. Only the process's own processor time counts as its time: others may keep it waiting."""

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid = pid
        self._seconds = seconds
        self._began = self._moved = time.monotonic()
        self._began_at = self._used = _processor_seconds(pid)

    def wait(self, descriptor: int, event: int) -> None:
        """Until there is something to read, or room to write. Raises TimeoutError once the process has used its time,
        _LostError if it has none at all, WorkerLostError if it has too little: another one would not have more."""
        poll = select.poll()
        poll.register(descriptor, event)
        while not poll.poll(1000 * self._seconds / _LOOKS):
            used, now = _processor_seconds(self._pid), time.monotonic()
            if used - self._began_at >= self._seconds:
                raise TimeoutError
            if used > self._used:
                self._used, self._moved = used, now
            if now - self._moved > self._seconds:
                raise _LostError(f"had no processor time for {self._seconds:g} s")
            if now - self._began > _PATIENCE * self._seconds:
                had = f"{used - self._began_at:.2g} s of processor time in {now - self._began:.2g} s"
                logger.error("a worker process had %s: the machine is too busy", had)
                raise WorkerLostError()


def _processor_seconds(pid: int) -> float:
    """That the process has used in all its threads: the clock whose number clock_getcpuclockid(3) gives."""
    return time.clock_gettime(~pid << 3 | 2)


def _write(descriptor: int, data: bytes, clock: _Clock) -> None:
    view = memoryview(data)
    while view:
        clock.wait(descriptor, select.POLLOUT)
        with contextlib.suppress(BlockingIOError):
            view = view[os.write(descriptor, view[: 2**20]) :]


def _read_frame(descriptor: int, clock: _Clock) -> bytes:
    length = int.from_bytes(_read_exactly(descriptor, HEADER_BYTES, clock), "big")
    if length > _LARGEST_ANSWER:
        raise WorkerLimitError(f"its answer has {length} bytes, more than {_LARGEST_ANSWER}")
    return _read_exactly(descriptor, length, clock)


def _read_exactly(descriptor: int, count: int, clock: _Clock) -> bytes:
    data = bytearray()
    while len(data) < count:
        clock.wait(descriptor, select.POLLIN)
        chunk = os.read(descriptor, min(count - len(data), 2**20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _ended_itself(process: subprocess.Popen[bytes]) -> bool:
    """By an exit or a crash of its own, as opposed to a signal from outside."""
    assert process.returncode is not None
    return process.returncode >= 0 or -process.returncode in _CRASHES


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"was ended by signal {-code}" if code < 0 else f"exited with code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()
