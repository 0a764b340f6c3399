"""Admission: how many requests, and how many prompt tokens, may be in an engine and before it at once.

Thread-safe: event loops admit requests, the step thread releases them.
"""

import math
import threading
import time
from concurrent.futures import Future

from llama.api.errors import QueueFullError

_RETRY_LIMIT = 60  # seconds


class Permit:
    """One admitted request. `waiting_tokens` are its prompt's tokens until its first token came."""

    __slots__ = ("is_held", "waiting_tokens")

    def __init__(self) -> None:
        self.is_held = True
        self.waiting_tokens = 0


class Admission:
    """`max_requests` may be alive (running or waiting); `max_tokens` prompt tokens may wait for their first answer. A
    longer prompt is still admitted when no other waits, so that the limit never refuses a legal prompt for ever."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_requests = 0
        self.num_waiting_tokens = 0
        self._lock = threading.Lock()
        self._on_empty: list[Future[None]] = []
        self._last_end = 0.0
        self._interval = 1.0  # seconds between ends of requests, a moving average

    def check(self, num_coming: int = 0) -> None:
        """Raises QueueFullError if no request can be admitted now, or none once the `num_coming` are."""
        alive = max(self.num_requests, num_coming)
        if alive >= self.max_requests:
            raise QueueFullError(
                f"{alive} requests run or wait, and no more than {self.max_requests} may", self._retry_after()
            )

    def admit(self) -> Permit:
        """For a request whose prompt is not yet encoded. Raises QueueFullError."""
        with self._lock:
            self.check()
            if not self.num_requests:
                self._last_end = time.monotonic()
            self.num_requests += 1
            return Permit()

    def wait_with(self, permit: Permit, prompt_tokens: int) -> None:
        """Count the request's prompt as waiting. Raises QueueFullError, and then the permit is still to be released."""
        with self._lock:
            if self.num_waiting_tokens and self.num_waiting_tokens + prompt_tokens > self.max_tokens:
                raise QueueFullError(
                    f"{self.num_waiting_tokens} prompt tokens wait; {prompt_tokens} more would exceed "
                    f"{self.max_tokens}",
                    self._retry_after(),
                )
            permit.waiting_tokens = prompt_tokens
            self.num_waiting_tokens += prompt_tokens

    def began(self, permit: Permit) -> None:
        """The request's first token has come: its prompt waits no longer."""
        if permit.waiting_tokens:
            with self._lock:
                self.num_waiting_tokens -= permit.waiting_tokens
                permit.waiting_tokens = 0

    def release(self, permit: Permit) -> None:
        """Legal any number of times."""
        self.began(permit)
        with self._lock:
            if not permit.is_held:
                return
            permit.is_held = False
            self.num_requests -= 1
            now = time.monotonic()
            self._interval += 0.2 * (now - self._last_end - self._interval)
            self._last_end = now
            waiters, self._on_empty = ([], self._on_empty) if self.num_requests else (self._on_empty, [])
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)

    def when_empty(self) -> "Future[None]":
        """Done as soon as no request is alive."""
        future: Future[None] = Future()
        with self._lock:
            if self.num_requests:
                self._on_empty.append(future)
                return future
        future.set_result(None)
        return future

    def _retry_after(self) -> int:
        return min(_RETRY_LIMIT, max(1, math.ceil(self._interval)))
