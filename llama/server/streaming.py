"""Long answers: server-sent events, and plain answers that are cancelled when the client disconnects."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama.api.errors import is_failure
from llama.server.bodies import dump
from llama.server.errors import ApiError, Dialect, internal
from llama.server.service import Answer

logger = logging.getLogger(__name__)

DONE = "[DONE]"
_SILENCE = object()
T = TypeVar("T")

Events = AsyncGenerator[Any, None]


class EventStream(Response):
    """Each event is a JSON value, or DONE; its type, if it has one, names it. When the client disconnects or reads
    nothing for the config's send_timeout, the answers that the events come from are closed, which ends their requests.
    An error is the last event: `failed` makes it, by default the dialect's own."""

    def __init__(
        self,
        events: Events,
        answers: Sequence[Answer],
        dialect: Dialect,
        failed: Callable[[ApiError], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events
        self._answers = answers
        self._failed = failed or (lambda error: error.event(dialect))
        self._request_id = answers[0].request_id
        self._config = answers[0].config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.ensure_future(self._write(send))
        leaver = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((writer, leaver), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                with suppress(TimeoutError):  # told already
                    writer.result()
        finally:
            for answer in self._answers:
                answer.close()
            await _cancelled(writer, leaver)

    async def _write(self, send: Send) -> None:
        async def write(body: bytes, more: bool = True) -> None:
            async with asyncio.timeout(self._config.send_timeout):
                await send({"type": "http.response.body", "body": body, "more_body": more})

        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for event in events if self._config.keep_alive is None else self._or_silence(events):
                    await write(_line(event))
            except TimeoutError:
                logger.info("request %s: its reader stopped reading", self._request_id)
                raise
            except BaseException as error:
                if not is_failure(error):
                    raise
                if not isinstance(error, ApiError):
                    logger.exception("request %s failed", self._request_id)
                refusal = error if isinstance(error, ApiError) else internal(self._request_id)
                await write(_line(self._failed(refusal)))
            await write(b"", more=False)

    async def _or_silence(self, events: Events) -> Events:
        """The events, and SILENCE whenever none has come for the config's keep_alive seconds."""
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                done, _ = await asyncio.wait((coming,), timeout=self._config.keep_alive)
                if not done:
                    yield _SILENCE
                    continue
                if (event := coming.result()) is None:
                    return
                yield event
                coming = asyncio.ensure_future(anext(events, None))
        finally:
            await _cancelled(coming)


def _line(event: Any) -> bytes:
    """A comment has no blank line behind it: some parsers take one for an event without data."""
    if event is _SILENCE:
        return b": keep-alive\n"
    if event is DONE:
        return b"data: " + event.encode() + b"\n\n"
    name = b"event: " + event["type"].encode() + b"\n" if "type" in event else b""
    return name + b"data: " + dump(event) + b"\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. If the client disconnects first, the work is cancelled, which ends its request: ApiError."""
    worker = asyncio.ensure_future(work)
    leaver = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((worker, leaver), return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ApiError(499, 3008, "Aborted: the client has gone")
    finally:
        await _cancelled(worker, leaver)


async def interleaved(sources: list[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of several iterators as they come, each with the number of its source."""
    if len(sources) == 1:
        async for item in sources[0]:
            yield 0, item
        return
    pending: dict[asyncio.Future[T | None], int] = {
        asyncio.ensure_future(anext(source, None)): i for i, source in enumerate(sources)
    }
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                i = pending.pop(future)
                result = future.result()
                if result is not None:
                    pending[asyncio.ensure_future(anext(sources[i], None))] = i
                    yield i, result
    finally:
        await _cancelled(*pending)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: "asyncio.Future[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
