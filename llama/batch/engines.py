"""Lines to engines in processes of their own, which may be lost: another takes the place of one, and what it had under
way is asked again. Knows nothing of how they are started: what is given does that.

A line that was under way when a process ended may be what ended it. It goes to its next engine with a sixteenth of the
company each time, at last alone, and after MAX_LOSSES processes it has failed: a line that ends every process costs few
of them, and no other line.
"""

import asyncio
import heapq
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from llama.batch.lines import Line

MAX_LOSSES = 4
_MAX_START_LOSSES = 3  # in a row: then loading is what ends the processes


class EngineLostError(Exception):
    """The engine's process, or its machine, has ended."""


class RemoteEngine(Protocol):
    """An engine in another process. Both raise EngineLostError; `load` what LLM raises as well."""

    async def load(self) -> None: ...

    async def answer(self, line: Line) -> dict[str, Any]: ...

    def end(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Place:
    """An engine that is loaded, and how many lines each line on it bears beside itself."""

    engine: RemoteEngine
    limits: "Counter[int]" = field(default_factory=Counter)
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def busy(self) -> int:
        return self.limits.total()


class Engines:
    """Answers lines on `count` engines that `start` makes, each with at most `room` lines at a time. An async context:
    as soon as one engine is loaded lines are answered."""

    def __init__(self, start: Callable[[], RemoteEngine], count: int, room: int) -> None:
        self._start = start
        self._count = count
        self._room = room
        self._ready: list[_Place] = []
        self._waiting: list[tuple[int, int, int, asyncio.Future[_Place]]] = []  # lines that were lost come first
        self._numbers = itertools.count()
        self._keepers: list[asyncio.Task[None]] = []
        self._failure: BaseException | None = None

    @property
    def max_in_flight(self) -> int:
        return self._count * self._room

    async def __aenter__(self) -> "Engines":
        self._keepers = [asyncio.create_task(self._keep()) for _ in range(self._count)]
        return self

    async def __aexit__(self, *_: object) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    async def __call__(self, line: Line) -> dict[str, Any]:
        """The output line. Raises what an engine raised while it was loaded."""
        for losses in range(MAX_LOSSES):
            limit = max(1, self._room >> 4 * losses)
            place = await self._take(losses, limit)
            try:
                return await place.engine.answer(line)
            except EngineLostError:
                self._lose(place)
            finally:
                place.limits -= Counter({limit: 1})
                self._admit()
        return line.failed("engine_lost", f"{MAX_LOSSES} processes ended while they answered this line")

    def _take(self, losses: int, limit: int) -> Awaitable[_Place]:
        future = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            future.set_exception(self._failure)
            return future
        heapq.heappush(self._waiting, (-losses, next(self._numbers), limit, future))
        self._admit()
        return future

    def _admit(self) -> None:
        """Give the waiting lines their engines, the least busy first, as long as the next one may go to it."""
        while self._waiting:
            _, _, limit, future = self._waiting[0]
            if not future.done():  # else its caller was cancelled
                place = min(self._ready, key=lambda each: each.busy, default=None)
                if place is None or place.busy >= min([limit, *place.limits]):
                    return
                place.limits[limit] += 1
                future.set_result(place)
            heapq.heappop(self._waiting)

    def _lose(self, place: _Place) -> None:
        if place in self._ready:
            self._ready.remove(place)
            place.lost.set()

    async def _keep(self) -> None:
        """One engine loaded, for ever."""
        losses = 0
        try:
            while True:
                engine = self._start()
                try:
                    await engine.load()
                    self._ready.append(place := _Place(engine))
                    self._admit()
                    losses = 0
                    await place.lost.wait()
                except EngineLostError as error:
                    losses += 1
                    if losses == _MAX_START_LOSSES:
                        raise RuntimeError(f"{losses} processes ended while they loaded the model: {error}") from None
                finally:
                    engine.end()
        except Exception as error:
            self._failure = error
            for *_, future in self._waiting:
                if not future.done():
                    future.set_exception(error)
