"""Runs code and patterns of unknown origin in a process that can be killed.

Nothing inside a Python process stops an endless loop or a string that doubles forty times, and a thread cannot be
killed. A worker process has a deadline, a memory limit and no way to open files. It starts with the first request and
serves one request at a time, from any thread. Both sides exchange JSON, nothing else. Large requests have a process of
their own, so that small ones do not wait behind them.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.text.sandbox.child import HEADER_BYTES

MEMORY_BYTES = 2**30
_START_SECONDS = 60.0  # of a Python process on a machine that is busy with something else
LOW_PRIORITY = 10  # a niceness: the engine computes on all cores and waits for the slowest one
_LARGE_BYTES = 2**17  # of a request
_LARGEST_ANSWER = 2**28
_CHILD = Path(__file__).with_name("child.py")


class WorkerError(Exception):
    """The request failed: the message is the other side's own, or says which limit was exceeded."""


class WorkerLimitError(WorkerError):
    """The request took too long, or ended its process."""


class Worker:
    """Calls the function that `module.start(setup)` returns. `close`, or the garbage collector, ends its processes."""

    def __init__(self, module: str, setup: Mapping[str, Any], *, deadline_seconds: float, niceness: int = 0) -> None:
        """`niceness` is added to the process's own, as by `nice`."""
        self._niceness = niceness
        self._module = module
        self._setup = dict(setup)
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()  # held while the process has a request
        self._making = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None
        self._for_large: Worker | None = None

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Raises WorkerError, or ValueError for a request that is not JSON."""
        data = _encoded(request)
        worker = self._large() if len(data) > _LARGE_BYTES else self
        with worker._lock:
            if worker._process is None or worker._process.poll() is not None:
                worker._start()
            return worker._exchange(data, self._deadline_seconds)

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

    def _start(self) -> None:
        self._stop()
        if not sys.executable:
            raise RuntimeError("a Python process has to be started, and sys.executable is not set")
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
        self._end = weakref.finalize(self, _end, self._process)
        first = {"path": sys.path, "module": self._module, "memory_bytes": MEMORY_BYTES, "niceness": self._niceness}
        try:
            self._exchange(_encoded(first), _START_SECONDS)
            self._exchange(_encoded(self._setup), self._deadline_seconds)
        except BaseException:  # without its setup it cannot serve
            self._stop()
            raise

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _exchange(self, data: bytes, seconds: float) -> Any:
        assert self._process is not None and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(len(data).to_bytes(HEADER_BYTES, "big") + data)
            self._process.stdin.flush()
            answer = json.loads(_read_frame(self._process.stdout.fileno(), time.monotonic() + seconds))
        except TimeoutError:
            self._stop()
            raise WorkerLimitError(f"it did not finish within {seconds:g} s") from None
        except (OSError, EOFError):
            self._stop()
            raise WorkerLimitError("it ended the process that ran it") from None
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


def _read_frame(descriptor: int, deadline: float) -> bytes:
    length = int.from_bytes(_read_exactly(descriptor, HEADER_BYTES, deadline), "big")
    if length > _LARGEST_ANSWER:
        raise EOFError
    return _read_exactly(descriptor, length, deadline)


def _read_exactly(descriptor: int, count: int, deadline: float) -> bytes:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    data = bytearray()
    while len(data) < count:
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poll.poll(remaining * 1000):
            raise TimeoutError
        chunk = os.read(descriptor, min(count - len(data), 2**20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()
