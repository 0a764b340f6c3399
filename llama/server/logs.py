"""Logging that cannot stop a server: a bounded queue, which a thread of its own writes to standard error.

A pipe that nobody reads, or a full disk, costs log lines and nothing else. Lines without room are dropped and counted;
how many they were is told with the next line that is written. Imports nothing heavy.
"""

import logging
import os
import queue
import sys
import threading

_MAX_LINES = 10_000
_STDERR = 2


class LogQueue(logging.Handler):
    """Each record becomes a line of text where it is logged, and is written later."""

    def __init__(self, descriptor: int = _STDERR, max_lines: int = _MAX_LINES) -> None:
        super().__init__()
        self.num_dropped = 0
        self._descriptor = descriptor
        self._lines: queue.Queue[str | None] = queue.Queue(max_lines)
        self._thread = threading.Thread(target=self._write_all, name="llama-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except Exception:  # no room, or a record that cannot be formatted; nobody could be told otherwise than by a log
            self.num_dropped += 1

    def stop(self, timeout: float) -> None:
        """Wait until everything is written, or for `timeout` seconds."""
        try:
            self._lines.put(None, timeout=timeout)
        except queue.Full:
            return
        self._thread.join(timeout)

    def _write_all(self) -> None:
        num_told = 0
        while (line := self._lines.get()) is not None:
            num_dropped = self.num_dropped
            if num_dropped > num_told:
                line += f"\n{num_dropped - num_told} log lines were dropped"
            try:
                self._write(f"{line}\n".encode(errors="backslashreplace"))
                num_told = num_dropped
            except OSError:
                self.num_dropped += 1

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]


class CountedMessages(logging.Filter):
    """Counts one message of a logger instead of writing it each time."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.count = 0
        self._message = message

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg != self._message:
            return True
        self.count += 1
        return False


def open_standard_streams() -> None:
    """A descriptor from 0 to 2 that is closed would be given to the next socket, and a client would read the log."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    # Python has no stream where it found them closed, and libraries write to them all the same.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(_STDERR, "w", closefd=False)


def log_to_stderr() -> LogQueue:
    """Messages as they are: the access log's lines are JSON already."""
    log = LogQueue()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[log])
    logging.captureWarnings(True)
    for name in ("llama", "llama.access"):
        logging.getLogger(name).setLevel(logging.INFO)
    return log
