"""Chat templates are programs that came with a file from the network, so they run in a process that can be killed.

jinja2's sandbox keeps a template from Python's internals, but nothing inside a Python process stops a loop that never
ends or a string that doubles forty times. The worker process has a deadline, a memory limit, and no way to open files.
It starts with the first rendering and serves one rendering at a time (about a millisecond each).
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
from typing import Any, Self

from llama.text.chat.worker import HEADER_BYTES

DEADLINE_SECONDS = 5.0
_START_SECONDS = 60.0  # of a Python process on a machine that is busy with something else
MAX_CHARACTERS = 16 * 2**20
MEMORY_BYTES = 2**30
_WORKER = Path(__file__).with_name("worker.py")


class ChatTemplateError(ValueError):
    """The template refused the messages, or did not finish within its limits."""


class Sandbox:
    """Renders named templates, from any thread. `close`, or the garbage collector, ends the process."""

    def __init__(self, templates: Mapping[str, str], *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self._setup = {"templates": dict(templates), "max_characters": MAX_CHARACTERS}
        self._deadline_seconds = deadline_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises ChatTemplateError with the template's own message, or saying which limit it exceeded."""
        try:
            request = json.dumps({"template": template, "variables": variables}).encode()
        except (TypeError, RecursionError) as error:
            raise ValueError(f"messages, tools and template arguments must be JSON values: {error}") from None
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            return self._ask(request, self._deadline_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._stop()
        if not sys.executable:
            raise RuntimeError("chat templates run in a Python process of their own, and sys.executable is not set")
        # Isolated and without site: the worker takes the paths of this process, and starts in a tenth of a second.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt from the terminal is not for the worker
        )
        self._end = weakref.finalize(self, _end, self._process)
        start = {"path": sys.path, "memory_bytes": MEMORY_BYTES}
        self._ask(json.dumps(start).encode(), _START_SECONDS)
        try:
            self._ask(json.dumps(self._setup).encode(), self._deadline_seconds)
        except ChatTemplateError:  # it does not compile: without templates there is nothing to keep running
            self._stop()
            raise

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _ask(self, request: bytes, seconds: float) -> str:
        assert self._process is not None and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(len(request).to_bytes(HEADER_BYTES, "big") + request)
            self._process.stdin.flush()
            answer = json.loads(_read_frame(self._process.stdout.fileno(), time.monotonic() + seconds))
        except TimeoutError:
            self._stop()
            raise ChatTemplateError(f"the chat template did not finish within {seconds:g} s") from None
        except (OSError, EOFError):
            self._stop()
            raise ChatTemplateError("the chat template ended the process that renders it") from None
        except BaseException:  # interrupted in the middle of a frame: the next rendering starts afresh
            self._stop()
            raise
        if "error" in answer:
            raise ChatTemplateError(f"chat template: {answer['error']}")
        return str(answer["text"])


def _read_frame(descriptor: int, deadline: float) -> bytes:
    header = _read_exactly(descriptor, HEADER_BYTES, deadline)
    length = int.from_bytes(header, "big")
    if length > 16 * MAX_CHARACTERS:
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
