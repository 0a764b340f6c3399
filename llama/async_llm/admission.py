"""Seats: how many requests, and how many prompt tokens, may be in an engine and before it at once.

Thread-safe: event loops take seats, the step thread gives them back.
"""

import math
import threading
import time
from concurrent.futures import Future

from llama.api.errors import QueueFullError

_RETRY_LIMIT = 60  # seconds


class Seat:
    """One admitted request. `waiting_tokens` are its prompt's tokens until its first token came."""

    __slots__ = ("taken", "waiting_tokens")

    def __init__(self) -> None:
        self.taken = True
        self.waiting_tokens = 0


class Seats:
    """`num_requests` may be alive (running or waiting); `num_tokens` prompt tokens may wait for their first answer. A
    prompt longer than that is still taken when no other waits, so that a limit never shuts out a legal prompt."""

    def __init__(self, num_requests: int, num_tokens: int) -> None:
        self.num_requests = num_requests
        self.num_tokens = num_tokens
        self.taken = 0
        self.waiting_tokens = 0
        self._lock = threading.Lock()
        self._on_empty: list[Future[None]] = []
        self._last_end = 0.0
        self._interval = 1.0  # seconds between ends of requests, a moving average

    def check(self, num_coming: int = 0) -> None:
        """Raises QueueFullError if no seat is free now, or none will be once those that come have theirs."""
        taken = max(self.taken, num_coming)
        if taken >= self.num_requests:
            raise QueueFullError(
                f"{taken} requests run or wait, and no more than {self.num_requests} may", self._retry_after()
            )

    def take(self) -> Seat:
        """A seat for a request whose prompt is not yet encoded. Raises QueueFullError."""
        with self._lock:
            self.check()
            if not self.taken:
                self._last_end = time.monotonic()
            self.taken += 1
            return Seat()

    def wait_with(self, seat: Seat, prompt_tokens: int) -> None:
        """Count the seat's prompt as waiting. Raises QueueFullError, and then the seat is still to be given back."""
        with self._lock:
            if self.waiting_tokens and self.waiting_tokens + prompt_tokens > self.num_tokens:
                raise QueueFullError(
                    f"{self.waiting_tokens} prompt tokens wait; {prompt_tokens} more would exceed {self.num_tokens}",
                    self._retry_after(),
                )
            seat.waiting_tokens = prompt_tokens
            self.waiting_tokens += prompt_tokens

    def began(self, seat: Seat) -> None:
        """The seat's first token has come: its prompt waits no longer."""
        if seat.waiting_tokens:
            with self._lock:
                self.waiting_tokens -= seat.waiting_tokens
                seat.waiting_tokens = 0

    def give_back(self, seat: Seat) -> None:
        self.began(seat)
        with self._lock:
            if not seat.taken:
                return
            seat.taken = False
            self.taken -= 1
            now = time.monotonic()
            self._interval += 0.2 * (now - self._last_end - self._interval)
            self._last_end = now
            waiters, self._on_empty = ([], self._on_empty) if self.taken else (self._on_empty, [])
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)

    def when_empty(self) -> "Future[None]":
        """Done as soon as no seat is taken."""
        future: Future[None] = Future()
        with self._lock:
            if self.taken:
                self._on_empty.append(future)
                return future
        future.set_result(None)
        return future

    def _retry_after(self) -> int:
        return min(_RETRY_LIMIT, max(1, math.ceil(self._interval)))
