"""Ctrl-C, time limits (signal.alarm) and other signals between steps, never inside one."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

# Those whose handlers people write in Python, in the order in which they take effect: nothing hides a Ctrl-C.
SIGNALS = (
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGINT,
)


class Held:
    """The handler of signals that wait."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: dict[int, Any] = {}
        self._lets_through = False

    def hold(self) -> None:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler) and not isinstance(handler, Held):  # an outer block's: it waits for the end of that
                self._handlers[number] = handler
                signal.signal(number, self)

    def __call__(self, number: int, frame: Any) -> None:
        if self._lets_through:
            self._handlers[number](number, frame)
        else:
            self._arrived.setdefault(number, frame)

    def deliver(self) -> None:
        """What has arrived takes effect now, all of it, though a handler raises."""
        if self._arrived:
            number = next(number for number in SIGNALS if number in self._arrived)
            frame = self._arrived.pop(number)
            try:
                self._handlers[number](number, frame)
            finally:
                self.deliver()

    def letting_through(self, values: Iterable[T]) -> Iterator[T]:
        """The values; while a caller's code makes the next one, signals take effect at once."""
        iterator = iter(values)
        while True:
            try:
                self._lets_through = True
                self.deliver()
                value = next(iterator)
            except StopIteration:
                return
            finally:
                self._lets_through = False
            yield value

    def release(self) -> None:
        self._lets_through = True
        try:
            self._put_back(list(self._handlers))
        finally:
            self.deliver()

    def _put_back(self, numbers: list[int]) -> None:
        """Each of them, though a handler that is back already raises."""
        if numbers:
            try:
                signal.signal(numbers[0], self._handlers[numbers[0]])
            finally:
                self._put_back(numbers[1:])


@contextmanager
def interrupts_held() -> Iterator[Held]:
    """A handler that raises inside a step would leave scheduler and cache half written, or pass for a failure of the
    model: it is called when the block is left, or at `deliver`. This goes for those SIGNALS that have a handler in
    Python; where blocks lie in one another, for the outermost. Threads other than the main one get no signals. To enter
    and leave takes some ten microseconds, so that a loop has one block around it."""
    held = Held()
    try:
        if threading.current_thread() is threading.main_thread():
            held.hold()
        yield held
    finally:
        held.release()
