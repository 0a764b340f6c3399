"""Kept: a cache bounded by bytes. What was used least lately goes first. Safe to use from several threads."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """`size_of` says what a value costs now, in bytes: it may grow while it is kept."""

    def __init__(self, max_bytes: int, size_of: Callable[[str, T], int]) -> None:
        self.max_bytes = max_bytes
        self._size_of = size_of
        self._lock = threading.Lock()
        self._values: OrderedDict[str, T] = OrderedDict()  # least lately used first

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._sum()

    def has(self, key: str) -> bool:
        """Which is a use of it."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return key in self._values

    def get(self, key: str) -> T | None:
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            self._make_room()
            return self._values[key]

    def put(self, key: str, value: T) -> None:
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            self._make_room()

    def _make_room(self) -> None:
        """The last one stays, whatever it costs."""
        excess = self._sum() - self.max_bytes
        while excess > 0 and len(self._values) > 1:
            excess -= self._size_of(*self._values.popitem(last=False))

    def _sum(self) -> int:
        return sum(self._size_of(key, value) for key, value in self._values.items())
