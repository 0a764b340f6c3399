"""One address in front of several replicas: each request goes, as it comes, to the one with the fewest.

What a replica answers is passed on as it is, streams included. Here are answered only what concerns all of them:
/health, /ready and /metrics. A request whose replica is lost fails; nothing is sent twice. No torch.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
from types import SimpleNamespace
from typing import Any

import h11
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llama.server.config import ServerConfig
from llama.server.errors import dialect_of, unavailable
from llama.server.logs import LogQueue
from llama.server.replicas import Replica, ReplicaLostError, Replicas
from llama.server.stopping import StoppableServer, allow_many_connections, settings
from llama.server.upstream import Upstream, UpstreamLostError, carried

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.5
_LOG_SECONDS = 1.0
_LATER_SECONDS = 1.0  # that a replica's answer may come behind another's


class Front:
    """The ASGI application."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        own = {"/health": self._health, "/ready": self._ready, "/metrics": self._metrics}.get(scope["path"])
        if own is not None and scope["method"] in ("GET", "HEAD"):
            await (await own(scope))(scope, receive, send)
            return
        began: list[h11.Response] = []
        try:
            async with self._replicas.idlest() as (_, upstream):
                await _pass(upstream, scope, receive, send, began)
        except (ReplicaLostError, UpstreamLostError) as error:
            logger.error("a request's replica was lost: %s", error)
            await _tell(scope, receive, send, began)

    async def _health(self, scope: Scope) -> Response:
        """200 while any replica is there and answers."""
        troubles = [replica.trouble for replica in self._replicas.all]
        rows = [{"replica": i, "status": trouble or "ok"} for i, trouble in enumerate(troubles)]
        status = "dead" if all(troubles) else "degraded" if any(troubles) else "ok"
        return _json({"status": status, "replicas": rows}, 503 if all(troubles) else 200)

    async def _ready(self, scope: Scope) -> Response:
        """200 while any replica takes requests."""
        found = await self._ask_all(scope)
        status = "ready" if any(code == 200 for code, _ in found.values()) else "not ready"
        rows = [{"replica": number, "status": code} for number, (code, _) in found.items()]
        return _json({"status": status, "replicas": rows}, 200 if status == "ready" else 503)

    async def _metrics(self, scope: Scope) -> Response:
        """Those of each replica, with its number as a label."""
        found = await self._ask_all(scope)
        refused = next(((code, body) for code, body in found.values() if code != 200), None)
        if refused is not None:
            return Response(refused[1], refused[0], media_type="application/json")
        texts = {number: body.decode() for number, (_, body) in found.items()}
        return Response(labelled(texts), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _ask_all(self, scope: Scope) -> dict[int, tuple[int, bytes]]:
        """Replica -> status and body of its answer to this GET. Those that hang are left out: none waits for them."""

        # A body is not sent on.
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]

        async def ask(replica: Replica) -> tuple[int, bytes]:
            async with Upstream(replica.address) as upstream:
                return await upstream.exchange("GET", _target(scope), headers)

        asked = {asyncio.ensure_future(ask(replica)): replica.number for replica in self._replicas.alive}
        try:
            for first in asyncio.as_completed(asked):
                with contextlib.suppress(Exception):
                    await first
                    await asyncio.wait(asked, timeout=_LATER_SECONDS)
                    break
            return {number: a.result() for a, number in asked.items() if a.done() and a.exception() is None}
        finally:
            for answer in asked:
                answer.cancel()
            await asyncio.gather(*asked, return_exceptions=True)


def labelled(texts: dict[int, str]) -> bytes:
    """Prometheus' text of each replica -> one, in which each sample has the label `replica`."""
    families: dict[str, Metric] = {}
    for number, text in texts.items():
        for family in text_string_to_metric_families(text):
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples += [
                sample._replace(labels={**sample.labels, "replica": str(number)}) for sample in family.samples
            ]
    registry: Any = SimpleNamespace(collect=families.values)
    return generate_latest(registry)


async def _pass(upstream: Upstream, scope: Scope, receive: Receive, send: Send, began: list[h11.Response]) -> None:
    """A request to a replica and its answer back, until either side is done. `began` gets the answer's head."""

    async def forth() -> None:
        """Returns when the client has gone."""
        is_taken = True
        while (message := await receive())["type"] != "http.disconnect":
            if is_taken:
                try:
                    await upstream.body(message.get("body", b""), message.get("more_body", False))
                except OSError:
                    is_taken = False  # it has answered already, or is lost: its answer tells

    async def back() -> None:
        async for event in upstream.answer():
            if isinstance(event, h11.Response):
                began.append(event)
                headers = carried(event.headers)
                await send({"type": "http.response.start", "status": event.status_code, "headers": headers})
            else:
                await send({"type": "http.response.body", "body": bytes(event.data), "more_body": True})
        await send({"type": "http.response.body"})

    with contextlib.suppress(OSError):  # a replica that can no longer be written to: its answer tells
        await upstream.begin(scope["method"], _target(scope), scope["headers"])
    tasks = asyncio.ensure_future(forth()), asyncio.ensure_future(back())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[1].done():
            tasks[1].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _tell(scope: Scope, receive: Receive, send: Send, began: list[h11.Response]) -> None:
    """The client, that its request failed. An answer that has begun and is no stream breaks off."""
    error, dialect = (
        unavailable("The replica that had the request was lost, please try again"),
        dialect_of(scope["path"]),
    )
    if not began:
        response = _json(error.body(dialect), error.status_in(dialect), error.headers)
        await response(scope, receive, send)
    elif dict(began[0].headers).get(b"content-type", b"").startswith(b"text/event-stream"):
        event = b"data: " + _dump(error.event(dialect)) + b"\n\n"
        await send({"type": "http.response.body", "body": event})


def _target(scope: Scope) -> bytes:
    query = scope["query_string"]
    path: bytes = scope["raw_path"]
    return path + b"?" + query if query else path


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _json(value: Any, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(_dump(value), status, headers, media_type="application/json")


class FrontServer(StoppableServer):
    def __init__(self, replicas: Replicas, config: ServerConfig) -> None:
        self._replicas = replicas
        self._is_stopping = False
        self._patience = config.step_deadline
        self._seconds = config.shutdown_timeout + config.step_deadline
        self.exit_code = 0
        super().__init__(settings(Front(replicas), config))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        watch = asyncio.create_task(self._watch())
        try:
            async with self._replicas.watched(self._patience):
                await super().serve(sockets)
        finally:
            watch.cancel()

    def stop(self) -> None:
        """Have the replicas finish what they have; a second call ends everything at once."""
        if self._is_stopping:
            self._replicas.kill()
            self.force_exit = self.should_exit = True
            return
        logger.info("stopping: %d requests run or wait", sum(r.num_requests for r in self._replicas.all))
        self._is_stopping = True
        self._replicas.stop()

    async def _watch(self) -> None:
        """Log which replicas end; end with the last one."""
        told: set[int] = set()
        until = None
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for replica in self._replicas.all:
                if (ending := replica.ending) is not None and replica.number not in told:
                    told.add(replica.number)
                    if not self._is_stopping:
                        logger.critical("%s: its requests failed", ending)
            if self._is_stopping:
                now = asyncio.get_running_loop().time()
                until = until or now + self._seconds
                if now > until:
                    logger.error("stopping without the replicas that do not end")
                    self._replicas.kill()
            if not self._replicas.alive:
                self.exit_code = 0 if self._is_stopping else os.EX_SOFTWARE
                self.should_exit = True
                return


def serve_replicas(replicas: Replicas, config: ServerConfig, taken: socket.socket, log: LogQueue) -> int:
    """Serve until told to stop -> the exit code: 70 if all replicas have ended."""
    allow_many_connections()
    with replicas:
        server = FrontServer(replicas, config)
        asyncio.run(server.serve([taken]))
    log.stop(_LOG_SECONDS)
    return server.exit_code
