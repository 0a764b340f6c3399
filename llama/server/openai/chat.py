"""/v1/chat/completions."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama.api.outputs import CompletionOutput, Logprob, RequestOutput
from llama.server.bodies import json_response, read_body
from llama.server.errors import Dialect, bad_input
from llama.server.openai.answers import ToldCalls, chunks, frame, new_id, now, scores_of, top_of, usage_of, value_of
from llama.server.openai.sampling import blamed_as_sent, check_logprobs, sampling_params
from llama.server.openai.schema import ChatRequest
from llama.server.service import Answer, Record, Service, Submit
from llama.server.streaming import EventStream, unless_gone
from llama.text.tool_calls import ToolCall, ToolCallDelta

Endpoint = Callable[[Request], Awaitable[Response]]


def chat_endpoint(service: Service) -> Endpoint:
    async def chat(request: Request) -> Response:
        """Answer a conversation."""
        body = await read_body(request, service, ChatRequest)
        record = request.state.record
        if body.stream:
            answer = await unless_gone(request, service.answer(await submit_chat(body, service), record))
            return EventStream(_Writer(body, service).chunks(answer), [answer], Dialect.OPENAI)
        return json_response(await unless_gone(request, answer_chat(body, service, record)))

    return chat


async def answer_chat(body: ChatRequest, service: Service, record: Record) -> dict[str, Any]:
    """The complete answer. Raises ApiError."""
    writer = _Writer(body, service)
    async with await service.answer(await submit_chat(body, service), record) as answer:
        return writer.whole(answer, await answer.whole())


async def submit_chat(body: ChatRequest, service: Service) -> Submit:
    lora = await service.adapter(body.model, body.lora)
    check_logprobs("top_logprobs", body.top_logprobs, service)
    wanted = {"max_tokens": _max_tokens(body), "logprobs": _num_logprobs(body), "prediction": _prediction(body)}
    params = sampling_params(body, service.defaults, **wanted)
    tool_choice: Any = "auto" if body.tool_choice is None else body.tool_choice
    submit = partial(
        service.llm.submit_chat,
        body.messages,
        params,
        body.tools,
        lora,
        tool_choice=tool_choice,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=service.template_kwargs(body.chat_template_kwargs),
    )
    return blamed_as_sent(submit, body)


def _max_tokens(body: ChatRequest) -> int | None:
    """None means the rest of the context."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_input(f"max_tokens={old} and max_completion_tokens={new} contradict each other", "max_tokens")
    return new if old is None else old


def _prediction(body: ChatRequest) -> str | None:
    if body.prediction is None:
        return None
    content = body.prediction.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
    else:
        texts = [content]
    if body.prediction.get("type") != "content" or not all(isinstance(text, str) for text in texts):
        raise bad_input('prediction must be {"type": "content", "content": a text or parts of text}', "prediction")
    return "".join(texts)


def _num_logprobs(body: ChatRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise bad_input("top_logprobs needs logprobs", "top_logprobs")
    return None


class _Writer:
    """The JSON of one answer, complete or in chunks."""

    def __init__(self, body: ChatRequest, service: Service) -> None:
        self._body = body
        self._tokenizer = service.llm.llm.tokenizer
        self._model = body.model or service.config.name
        self._id, self._created = new_id("chatcmpl"), now()

    def whole(self, answer: Answer, output: RequestOutput) -> dict[str, Any]:
        whole = {
            **frame(self._id, "chat.completion", self._model, self._created),
            "choices": [self._choice(completion) for completion in output.outputs],
            "usage": self._usage(answer),
        }
        if self._body.prompt_logprobs is not None:
            whole["prompt_logprobs"] = scores_of(output, self._body.prompt_logprobs)
        return whole | self._prompt_ids(answer)

    def _prompt_ids(self, answer: Answer) -> dict[str, Any]:
        return {"prompt_token_ids": answer.prompt_token_ids} if self._body.return_token_ids else {}

    def _usage(self, answer: Answer) -> dict[str, Any]:
        return usage_of([answer.usage()], has_prediction=self._body.prediction is not None)

    def _choice(self, completion: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        if completion.tool_calls:
            message["tool_calls"] = _calls(completion.tool_calls, self._body)
            message["content"] = completion.text or None
        if completion.reasoning_content is not None:
            message["reasoning_content"] = completion.reasoning_content
            message["content"] = completion.text or None
        choice = {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.token_ids, completion.logprobs),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
            "seed": completion.seed,
        }
        return choice | ({"token_ids": completion.token_ids} if self._body.return_token_ids else {})

    def chunks(self, answer: Answer) -> AsyncGenerator[Any]:
        head = frame(self._id, "chat.completion.chunk", self._model, self._created)
        options, first = self._body.stream_options, self._prompt_ids(answer)
        return chunks(self._choices(answer), head, options, lambda: self._usage(answer), first)

    async def _choices(self, answer: Answer) -> AsyncGenerator[dict[str, Any]]:
        """Ids and log-probabilities of a piece are in the last chunk that it becomes. The roles come with the first
        token: clients measure the time to it by the first chunk."""
        outputs = answer.output.outputs
        told = [ToldCalls() for _ in outputs]
        roles = [_delta(completion.index, {"role": "assistant", "content": ""}) for completion in outputs]
        async for piece in answer.pieces():
            while roles:
                yield roles.pop(0)
            if piece.reasoning_content:  # never beside content: some clients read one of them
                yield _delta(piece.index, {"reasoning_content": piece.reasoning_content})
            text, calls = told[piece.index].text_of(piece), _call_deltas(piece.tool_call_deltas, self._body)
            deltas: list[dict[str, Any]] = [{"content": text}] if text else []
            deltas += [{"tool_calls": [call]} for call in calls]
            for delta in deltas[:-1]:
                yield _delta(piece.index, delta)
            choice = _delta(piece.index, deltas[-1] if deltas else {})
            if piece.logprobs is not None:
                choice["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs)
            if piece.finish_reason is not None:
                choice["finish_reason"] = piece.finish_reason
                choice["stop_reason"] = piece.stop_reason
                choice["seed"] = outputs[piece.index].seed
            has_ids = self._body.return_token_ids and piece.token_ids
            if has_ids:
                choice["token_ids"] = piece.token_ids
            if deltas or piece.logprobs or has_ids or piece.finish_reason is not None:
                yield choice

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[dict[int, Logprob]] | None
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        count = self._body.top_logprobs or 0
        content = []
        for token, entries in zip(token_ids, logprobs, strict=False):
            top = [self._entry(other, entry) for other, entry in top_of(entries, count)]
            content.append({**self._entry(token, entries[token]), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, entry: Logprob) -> dict[str, Any]:
        spelled = None if self._tokenizer is None else list(self._tokenizer.token_bytes(token))
        text = None if self._body.return_tokens_as_token_ids else entry.decoded_token
        return {"token": text or f"token_id:{token}", "logprob": value_of(entry), "bytes": spelled}


def _calls(calls: Sequence[ToolCall], body: ChatRequest) -> list[dict[str, Any]]:
    if body.parallel_tool_calls is False:
        calls = calls[:1]
    return [_call(call.name, call.arguments_json) for call in calls]


def _call_deltas(deltas: Sequence[ToolCallDelta], body: ChatRequest) -> list[dict[str, Any]]:
    """Each call has one id, told with its name."""
    return [
        {"index": d.index}
        | ({"function": {"arguments": d.arguments}} if d.name is None else _call(d.name, d.arguments))
        for d in deltas
        if body.parallel_tool_calls is not False or d.index == 0
    ]


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": new_id("call"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
