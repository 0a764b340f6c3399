"""Service: one AsyncLLM with its names, adapters and metrics. The routes of both dialects submit requests to it."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from llama.api.errors import EngineClosedError, EngineDeadError, ParameterError, QueueFullError, is_failure
from llama.api.outputs import FinishReason, Piece, RequestOutput, Usage
from llama.api.params import SamplingParams
from llama.async_llm.async_llm import AsyncLLM, Stream
from llama.engine.sequence import BROKEN_GRAMMAR
from llama.model.capture import Capture
from llama.server.adapters import AdapterRegistry
from llama.server.config import CLOUDFLARE_PREFIX, ServerConfig
from llama.server.errors import (
    ApiError,
    Dialect,
    aborted,
    bad_input,
    bodies_too_large,
    from_refusal,
    grammar_failed,
    internal,
    no_such_model,
)
from llama.server.logs import CountedMessages, LogQueue
from llama.server.metrics import Metrics

logger = logging.getLogger(__name__)

Submit = Callable[..., Awaitable[Stream]]  # AsyncLLM.submit or submit_chat with its arguments


class Record:
    """What the access log says about a request beyond its route, and the bytes that it holds. Never a text."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.body_bytes = 0
        self.num_captures = 0
        self.code: int | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.finish_reasons: list[str] = []


class Service:
    def __init__(self, llm: AsyncLLM, config: ServerConfig, log: LogQueue | None = None) -> None:
        """`log`: where the process logs to, for the count of dropped lines."""
        self.llm = llm
        self.config = config
        self.capture: Capture | None = None  # of every request, where the server is a batch
        self.num_in_flight = 0  # POST requests that were let in and are not yet answered
        self.num_body_bytes = 0  # that they hold
        self.parsing = asyncio.Semaphore(1)  # of large bodies
        self.invalid_requests = CountedMessages("Invalid HTTP request received.")  # uvicorn's, a line for each
        self.metrics = Metrics(
            llm.metrics,
            config.name,
            gauges={
                "adapter_bytes": ("Of the adapters that are loaded.", lambda: llm.llm.engine.adapters.nbytes),
                "grammar_bytes": ("Of the compiled grammars that are kept.", lambda: llm.llm.inputs.grammar_bytes),
                "graph_bytes": ("Of the recorded steps.", lambda: llm.llm.engine.graph_bytes),
            },
            counters={
                "workers_lost": (
                    "Processes of templates and grammars that the system ended.",
                    lambda: llm.llm.inputs.num_lost_workers,
                ),
                "invalid_http_requests": ("What was no HTTP.", lambda: self.invalid_requests.count),
                "log_lines_dropped": ("Log lines for which there was no room.", lambda: log.num_dropped if log else 0),
            },
        )
        self.adapters = AdapterRegistry(llm, config)
        if config.default_chat_template_kwargs:
            self._try_template()

    @property
    def defaults(self) -> SamplingParams:
        """The checkpoint's sampling parameters, for what a request leaves out."""
        return self.llm.llm.inputs.defaults

    def template_kwargs(self, given: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The variables of the chat template that a request gives, and the server's for the others."""
        return {**(self.config.default_chat_template_kwargs or {}), **(given or {})}

    def _try_template(self) -> None:
        """ParameterError if the chat template does not read the server's variables."""
        try:
            hello = [{"role": "user", "content": "Hello"}]
            self.llm.llm.inputs.render(hello, chat_template_kwargs=self.template_kwargs(None))
        except ParameterError as error:
            name = "default_chat_template_kwargs"
            raise ParameterError(f"{name}: {error}", name) from None

    @property
    def is_ready(self) -> bool:
        llm = self.llm
        return not (llm.is_dead or llm.is_draining) and llm.seconds_in_step < self.config.step_deadline

    def refusal_now(self) -> ApiError | None:
        """What any request would be refused with now: a full queue, a server that stops, a dead engine."""
        try:
            self.llm.check_accepts(self.num_in_flight)
        except (QueueFullError, EngineClosedError, EngineDeadError) as error:
            return from_refusal(error)
        return None

    def hold(self, num_bytes: int, record: Record) -> None:
        """Count a body's bytes until its request is answered. ApiError if all bodies together have too many."""
        if self.num_body_bytes + num_bytes > self.config.max_bodies_bytes:
            raise bodies_too_large(self.config.max_bodies_bytes)
        self.num_body_bytes += num_bytes
        record.body_bytes += num_bytes

    def refused(self, error: ApiError, dialect: Dialect, record: Record) -> None:
        """Count the error in the metrics and put its code into the access log."""
        record.code = error.code
        self.metrics.refused(error.status_in(dialect), error.code)

    def knows(self, model: str) -> bool:
        return self.config.serves(model) or _plain(model) in self.adapters.names()

    async def adapter(self, model: str | None, lora: str | None) -> str | None:
        """The adapter meant by `model` and `lora`, loaded; None for the base model. Raises ApiError."""
        if model is None or self.config.serves(model):
            return None if lora is None else await self.adapters.take(lora)
        name = _plain(model)
        if name not in self.adapters.names():
            raise no_such_model(model)
        if lora not in (None, name):
            raise bad_input(f"model names the adapter '{name}' and lora another one", "lora")
        return await self.adapters.take(name, "model")

    async def answer(self, submit: Submit, record: Record) -> "Answer":
        """Begin to answer. When this returns, the engine has accepted the request. Raises ApiError."""
        began = time.monotonic()
        try:
            stream = await (submit() if self.capture is None else self._captured(submit, record, self.capture))
        except BaseException as error:
            if not is_failure(error):
                raise
            raise _refusal(error, record) from None
        return Answer(stream, self, record, began)

    @staticmethod
    def _captured(submit: Submit, record: Record, capture: Capture) -> Awaitable[Stream]:
        """With a capture, kept under the record's request id, with a number behind it where one has several prompts."""
        record.num_captures += 1
        number = f".{record.num_captures - 1}" if record.num_captures > 1 else ""
        return submit(capture=capture, request_id=record.request_id + number)


def _refusal(error: BaseException, record: Record) -> ApiError:
    """A variable for it where it is raised would be a circle, which keeps the prompt alive."""
    refusal = from_refusal(error)
    if refusal is None:
        logger.error("request %s failed", record.request_id, exc_info=error)
    return refusal or internal(record.request_id)


def _plain(model: str) -> str:
    return model.removeprefix(CLOUDFLARE_PREFIX)


class Answer:
    """A request that the engine has accepted. As a context manager it ends the request on exit."""

    def __init__(self, stream: Stream, service: Service, record: Record, began: float) -> None:
        self.request_id = record.request_id
        self.config = service.config
        self._stream = stream
        self._metrics = metrics = service.metrics
        self._record = record
        self._began = began
        self._running = set(range(stream.request.params.n))
        self.num_prompt_tokens = len(stream.request.prompt_token_ids)
        record.prompt_tokens += self.num_prompt_tokens
        metrics.prompt_tokens.observe(self.num_prompt_tokens)
        metrics.completions.observe(stream.request.params.n)
        if stream.request.params.max_tokens is not None:
            metrics.max_tokens.observe(stream.request.params.max_tokens)

    async def __aenter__(self) -> "Answer":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the request if it still runs: what its client has left counts as aborted, with the tokens that it has
        cost."""
        if self._running:
            for _ in self._running:
                self._ended(FinishReason.ABORT)
            self._spent(self.usage().completion_tokens)
            self._running.clear()
        self._stream.close()

    @property
    def output(self) -> RequestOutput:
        """All that has come so far."""
        assert self._stream.reply is not None
        return self._stream.reply.output

    @property
    def prompt_token_ids(self) -> list[int]:
        token_ids: list[int] = self._stream.request.prompt_token_ids.tolist()
        return token_ids

    async def pieces(self) -> AsyncIterator[Piece]:
        """New pieces as they come. A completion that failed raises ApiError after its last piece."""
        last: dict[int, float] = {}
        try:
            async for piece in self._stream:
                self._observe(piece, last)
                yield piece
                self._check(piece)
        except ApiError:
            raise
        except BaseException as error:  # as where the engine has died, which is logged where it happened
            if not is_failure(error):
                raise
            raise _refusal(error, self._record) from None

    async def whole(self) -> RequestOutput:
        """The complete answer. Raises ApiError if a completion failed."""
        async for _ in self.pieces():
            pass
        return self.output

    def usage(self) -> Usage:
        """What the answer has cost so far."""
        assert self._stream.reply is not None
        return self._stream.reply.usage()

    def _check(self, piece: Piece) -> None:
        if piece.finish_reason is FinishReason.ABORT:
            raise aborted()
        if piece.finish_reason is FinishReason.ERROR:
            if piece.stop_reason == BROKEN_GRAMMAR:
                params = self._stream.request.params
                raise grammar_failed(params.constrained_by or "tools")
            logger.error("request %s ended with an error, as %s", self._record.request_id, self._stream.request_id)
            raise internal(self._record.request_id)

    def _observe(self, piece: Piece, last: dict[int, float]) -> None:
        now, count = time.monotonic(), len(piece.token_ids)
        if count and piece.index in last:
            for _ in range(count):
                self._metrics.inter_token_latency.observe((now - last[piece.index]) / count)
        elif count and not last:
            self._metrics.time_to_first_token.observe(now - self._began)
        if count:
            last[piece.index] = now
        if piece.finish_reason is not None:
            self._running.discard(piece.index)
            self._ended(piece.finish_reason)
        if piece.usage is not None:
            self._spent(piece.usage.completion_tokens)
            self._metrics.e2e_latency.observe(now - self._began)
            output = self.output
            self._metrics.timed(output.metrics, max(len(c.token_ids) for c in output.outputs))

    def _ended(self, reason: FinishReason) -> None:
        self._metrics.ended(reason)
        self._record.finish_reasons.append(str(reason))

    def _spent(self, num_tokens: int) -> None:
        self._record.completion_tokens += num_tokens
        self._metrics.generation_tokens.observe(num_tokens)
