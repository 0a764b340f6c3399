"""/v1/responses: chat in OpenAI's newer form. An answer is a list of items, told by named events; the whole answer is
what the last event of the same stream carries."""

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from itertools import accumulate
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama.api.outputs import Logprob, Piece
from llama.server.bodies import json_response, read_body
from llama.server.errors import ApiError, Dialect
from llama.server.openai.answers import ToldCalls, new_id, top_of, value_of
from llama.server.openai.chat import submit_chat
from llama.server.openai.responses_body import ResponsesRequest
from llama.server.service import Answer, Record, Service
from llama.server.streaming import EventStream, unless_gone
from llama.text.reasoning import CLOSE
from llama.text.tool_calls import ToolCallDelta

Event = dict[str, Any]
_FAILURES = frozenset({"context_length_exceeded", "rate_limit_exceeded"})
# What the chat that a body becomes calls its fields, and what the body calls them.
_PARAMS = {"messages": "input", "response_format": "text"}
_PLACES = {"response_format.json_schema": "text.format", "response_format": "text.format"}


def responses_endpoint(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def responses(request: Request) -> Response:
        """Answer a conversation, as items."""
        body = await read_body(request, service, ResponsesRequest)
        record = request.state.record
        if not body.stream:
            return json_response(await unless_gone(request, answer_response(body, service, record)))
        answer = await unless_gone(request, _answer(body, service, record))
        writer = _Writer(body, service)
        return EventStream(writer.numbered(writer.events(answer)), [answer], Dialect.OPENAI, failed=writer.failed)

    return responses


async def _answer(body: ResponsesRequest, service: Service, record: Record) -> Answer:
    try:
        return await service.answer(await submit_chat(body.chat(), service), record)
    except ApiError as error:
        raise _as_sent(error) from None


def _as_sent(error: ApiError) -> ApiError:
    """The same, with the names that the body has."""
    if error.param in ("response_format", "structured_outputs"):
        for place, sent in _PLACES.items():
            error.message_openai = error.message_openai.replace(place, sent)
    error.param = error.param and _PARAMS.get(error.param, error.param)
    return error


async def answer_response(body: ResponsesRequest, service: Service, record: Record) -> dict[str, Any]:
    """The complete answer. Raises ApiError."""
    writer = _Writer(body, service)
    async with await _answer(body, service, record) as answer:
        try:
            told = [event async for event in writer.events(answer)]
        except ApiError as error:
            raise _as_sent(error) from None
    whole: dict[str, Any] = told[-1]["response"]
    return whole


class _Writer:
    """The events of one answer."""

    def __init__(self, body: ResponsesRequest, service: Service) -> None:
        self._body = body
        self._tokenizer = service.llm.llm.tokenizer
        self._defaults = service.defaults
        self._model = body.model or service.config.name
        self._id, self._created = new_id("resp"), time.time()
        self._output: list[dict[str, Any]] = []  # items that have begun, the last one perhaps still open
        self._is_open = False
        self._num_events = self._num_calls = 0
        self._held: list[Event] = []  # log-probabilities of tokens that may yet become text or a call

    async def numbered(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        async with aclosing(events):
            async for event in events:
                yield self._with_number(event)

    def _with_number(self, event: Event) -> Event:
        self._num_events += 1
        return {**event, "sequence_number": self._num_events - 1}

    def failed(self, error: ApiError) -> Event:
        """The last event of an answer that broke off."""
        code = error.name if error.name in _FAILURES else "server_error"
        response = self._response("failed") | {"error": {"code": code, "message": _as_sent(error).message_openai}}
        return self._with_number({"type": "response.failed", "response": response})

    async def events(self, answer: Answer) -> AsyncGenerator[Event, None]:
        yield {"type": "response.created", "response": self._response("in_progress")}
        yield {"type": "response.in_progress", "response": self._response("in_progress")}
        reason, told = None, ToldCalls()
        async for piece in answer.pieces():
            reason = piece.finish_reason or reason
            if piece.reasoning_content:
                for event in self._thought(piece.reasoning_content):
                    yield event
            text = told.text_of(piece)
            logprobs = self._of_text(piece)
            if self._open_type == "message" or (text if not self._num_calls else text.strip()):
                for event in self._text(piece.text, logprobs):
                    yield event
            for delta in piece.tool_call_deltas:
                for event in self._call(delta):
                    yield event
            if self._open_type == "function_call" and told.num_whole == self._num_calls:
                for event in self._close():
                    yield event
        status = "incomplete" if reason == "length" else "completed"
        for event in self._close(status):
            yield event
        response = self._response(status, answer)
        yield {"type": f"response.{status}", "response": response}

    # Items

    def _open(self, item: dict[str, Any]) -> Event:
        self._output.append(item)
        self._is_open = True
        empty: dict[str, Any] = {"content": []} if "content" in item else {"arguments": ""}
        return self._about_item("added", item | empty)

    def _about_item(self, what: str, item: dict[str, Any]) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": len(self._output) - 1, "item": item}

    @property
    def _open_type(self) -> str | None:
        """Of the item that is open, if one is."""
        return self._output[-1]["type"] if self._is_open else None

    def _thought(self, text: str) -> list[Event]:
        events = []
        if not self._is_open:
            part = {"type": "reasoning_text", "text": ""}
            item = {"id": new_id("rs"), "type": "reasoning", "summary": [], "status": "in_progress"}
            events = [self._open(item | {"content": [part]})]
            events.append({"type": "response.content_part.added", **self._place(), "part": dict(part)})
        self._output[-1]["content"][0]["text"] += text
        return [*events, {"type": "response.reasoning_text.delta", **self._place(), "delta": text}]

    def _of_text(self, piece: Piece) -> list[Event]:
        """The log-probabilities that a piece's text is told with: of the tokens in which it stands, and behind the last
        text of those that end the answer. Those of thoughts and calls are not told."""
        self._held += self._logprobs(piece.token_ids, piece.logprobs)
        is_last = piece.finish_reason is not None and not piece.tool_call_deltas
        is_thought = self._open_type == "reasoning" and not piece.text
        if is_thought or not (piece.text or piece.tool_call_deltas or is_last):
            return []
        held, text = self._held, piece.text.encode()
        spelled = [bytes(entry["bytes"]) for entry in held]
        begin = self._begin_of(text, b"".join(spelled))
        ends = [*accumulate(map(len, spelled))]
        first = sum(end <= begin for end in ends)
        behind = len(held) if begin < 0 else sum(end < begin + len(text) for end in ends) + bool(text)
        self._held = held[behind:]
        return held[first : len(held) if is_last else behind]

    def _begin_of(self, text: bytes, held: bytes) -> int:
        """Where a text stands in what was held back: in front, behind the end of a thought, or behind calls. -1: it is
        spelled otherwise."""
        if self._open_type == "message":
            return held.find(text)
        if self._num_calls:
            return held.rfind(text)
        behind = held.find(CLOSE.encode()) + len(CLOSE) if CLOSE.encode() in held else 0
        return max(held.find(text), held.find(text, behind))

    def _text(self, text: str, logprobs: list[Event]) -> list[Event]:
        events = self._close() if self._open_type == "reasoning" else []
        if not self._is_open:
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"id": new_id("msg"), "type": "message", "role": "assistant", "status": "in_progress"}
            events.append(self._open(item | {"content": [part]}))
            events.append({"type": "response.content_part.added", **self._place(), "part": dict(part, logprobs=[])})
        part = self._output[-1]["content"][0]
        part["text"] += text
        part["logprobs"].extend(logprobs)
        told = [_without_bytes(entry) for entry in logprobs]
        if not text and not logprobs:
            return events
        delta = {"type": "response.output_text.delta", **self._place(), "delta": text, "logprobs": told}
        return [*events, delta]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _close(self, status: str = "completed") -> list[Event]:
        """The end of the item that is open, if one is."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self._output[-1] = self._output[-1] | {"status": status}
        if item["type"] == "function_call":
            kind = "response.function_call_arguments.done"
            told = {"name": item["name"], "arguments": item["arguments"]}
            return [{"type": kind, **self._call_place(), **told}, self._about_item("done", item)]
        part = item["content"][0]
        done: dict[str, Any] = {"type": f"response.{part['type']}.done", **self._place(), "text": part["text"]}
        if "logprobs" in part:
            done["logprobs"] = [_without_bytes(entry) for entry in part["logprobs"]]
        return [
            done,
            {"type": "response.content_part.done", **self._place(), "part": part},
            self._about_item("done", item),
        ]

    def _call(self, delta: ToolCallDelta) -> list[Event]:
        self._num_calls += delta.name is not None
        if self._body.parallel_tool_calls is False and delta.index > 0:
            return self._close() if self._open_type == "function_call" else []
        events = []
        if delta.name is not None:
            ids = {"id": new_id("fc"), "type": "function_call", "call_id": new_id("call"), "name": delta.name}
            events = [*self._close(), self._open(ids | {"arguments": "", "status": "in_progress"})]
        if delta.arguments:
            self._output[-1]["arguments"] += delta.arguments
            kind = "response.function_call_arguments.delta"
            events.append({"type": kind, **self._call_place(), "delta": delta.arguments})
        return events

    def _call_place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob]] | None) -> list[Event]:
        count = self._body.top_logprobs or 0
        return [
            self._entry(token, entries[token])
            | {"top_logprobs": [self._entry(other, entry) for other, entry in top_of(entries, count)]}
            for token, entries in zip(token_ids, logprobs or (), strict=False)
        ]

    def _entry(self, token: int, entry: Logprob) -> dict[str, Any]:
        spelled = [] if self._tokenizer is None else list(self._tokenizer.token_bytes(token))
        return {"token": entry.decoded_token or f"token_id:{token}", "logprob": value_of(entry), "bytes": spelled}

    # The response

    def _response(self, status: str, answer: Answer | None = None) -> dict[str, Any]:
        body, defaults = self._body, self._defaults
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(self._created),
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": body.reasoning or {"effort": None, "summary": None},
            "store": False,
            "temperature": defaults.temperature if body.temperature is None else body.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_p": defaults.top_p if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if answer is None else _usage(answer),
            "metadata": body.metadata or {},
        }


def _usage(answer: Answer) -> dict[str, Any]:
    usage = answer.usage()
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens or 0},
        "total_tokens": usage.total_tokens,
    }


def _without_bytes(entry: dict[str, Any]) -> dict[str, Any]:
    """As the events have it; in the finished part the bytes are told too."""
    top = [{k: v for k, v in other.items() if k != "bytes"} for other in entry["top_logprobs"]]
    return {"token": entry["token"], "logprob": entry["logprob"], "top_logprobs": top}
