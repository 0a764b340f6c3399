"""What applies to every HTTP request: request ids, API keys, the last exception handler, the access log.

A plain ASGI wrapper: no request or response body is ever copied here.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.api.errors import is_failure
from llama.server.bodies import json_response
from llama.server.errors import ApiError, dialect_of, headers_too_large, internal, unauthorized
from llama.server.service import Record, Service
from llama.server.stopping import MAX_HEADER_BYTES
from llama.text import heap

logger = logging.getLogger(__name__)
access = logging.getLogger("llama.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN_PATHS = frozenset({"/", "/health", "/ready"})


class RequestMiddleware:
    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = [_digest(key) for key in service.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        record = Record(given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record
        began, status = time.monotonic(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            if refusal is None:
                await self._pass(scope, receive, send_on, record)
            else:
                dialect = dialect_of(scope["path"])
                self._service.refused(refusal, dialect, record)
                response = json_response(refusal.body(dialect), refusal.status_in(dialect), refusal.headers)
                await response(scope, receive, send_on)
        except asyncio.CancelledError:
            # The server ends at once; to hand this on would only be a traceback for each request.
            logger.info("request %s was cut off", record.request_id)
        except BaseException as error:
            # The server framework answers with 500 and raises again what nobody handled. It does not see a native
            # library's panic, which is no Exception.
            if not is_failure(error):
                raise
            logger.error("request %s failed: %s", record.request_id, type(error).__name__, exc_info=error)
            if not status:
                failure, dialect = internal(record.request_id), dialect_of(scope["path"])
                self._service.refused(failure, dialect, record)
                await json_response(failure.body(dialect), 500)(scope, receive, send_on)
        finally:
            if self._service.config.access_log:
                _log(scope, record, status, time.monotonic() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, record: Record) -> None:
        counted = scope["method"] == "POST"
        self._service.num_in_flight += counted
        try:
            # A HEAD is a GET whose body uvicorn leaves out.
            asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(asked, receive, send)
        finally:
            self._service.num_in_flight -= counted
            self._service.num_body_bytes -= record.body_bytes
            if record.body_bytes >= heap.LARGE_TEXT:
                asyncio.get_running_loop().run_in_executor(None, heap.give_back)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        # The HTTP parser bounds what is incomplete alone.
        if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
            return headers_too_large(MAX_HEADER_BYTES)
        if scope["path"] not in OPEN_PATHS and self._keys and not self._is_authorized(headers):
            return unauthorized()
        if scope["method"] != "POST":
            return None
        # In a crowd even reading what will be refused takes longer than the clients should wait to hear of it.
        return self._service.refusal_now()

    def _is_authorized(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        # All keys are compared, each in constant time.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _log(scope: Scope, record: Record, status: int, seconds: float) -> None:
    if not access.isEnabledFor(logging.INFO):
        return
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": record.request_id,
        "method": scope["method"],
        "path": scope["path"][:256],
        "status": status,
        "seconds": round(seconds, 6),
    }
    if record.code is not None:
        line["code"] = record.code
    if record.prompt_tokens:
        line["prompt_tokens"] = record.prompt_tokens
        line["completion_tokens"] = record.completion_tokens
        line["finish_reasons"] = record.finish_reasons
    access.info(json.dumps(line))
