"""/v1/completions: continues text or token ids. With echo and logprobs it scores a prompt for evaluation harnesses."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from llama.api.errors import ParameterError
from llama.api.outputs import CompletionOutput, Logprob, Piece
from llama.api.params import SamplingParams
from llama.async_llm.async_llm import Stream
from llama.server.bodies import json_response, read_body
from llama.server.errors import Dialect, bad_input
from llama.server.openai.answers import chunks, frame, new_id, now, scores_of, top_of, usage_of, value_of
from llama.server.openai.sampling import blamed_as_sent, check_logprobs, sampling_params
from llama.server.openai.schema import CompletionRequest
from llama.server.service import Answer, Record, Service, Submit
from llama.server.streaming import EventStream, interleaved, unless_gone
from llama.text.tokenizer import IncrementalDecoder, Tokenizer

_MAX_TOKENS = 16  # OpenAI's default of this route

Endpoint = Callable[[Request], Awaitable[Response]]
Entries = Sequence[dict[int, Logprob] | None]


def completions_endpoint(service: Service) -> Endpoint:
    async def completions(request: Request) -> Response:
        """Continue one prompt or several."""
        body = await read_body(request, service, CompletionRequest)
        record = request.state.record
        if body.stream:
            answers = await unless_gone(request, _answers(await _submits(body, service), service, record))
            return EventStream(_chunks(answers, body, service), answers, Dialect.OPENAI)
        return json_response(await unless_gone(request, answer_completion(body, service, record)))

    return completions


async def answer_completion(body: CompletionRequest, service: Service, record: Record) -> dict[str, Any]:
    """The complete answer. Raises ApiError."""
    async with AsyncExitStack() as stack:
        answers = await _answers(await _submits(body, service), service, record)
        for answer in answers:
            stack.callback(answer.close)
        return await _whole(answers, body, service)


async def _answers(submits: list[Submit], service: Service, record: Record) -> list[Answer]:
    """All or none."""
    answers: list[Answer] = []
    try:
        for submit in submits:
            answers.append(await service.answer(submit, record))
    except BaseException:
        for answer in answers:
            answer.close()
        raise
    return answers


async def _submits(body: CompletionRequest, service: Service) -> list[Submit]:
    lora = await service.adapter(body.model, body.lora)
    params = _params(body, service)
    prompts = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in body.prompt]
    submits = [blamed_as_sent(partial(service.llm.submit, prompt, params, lora), body) for prompt in prompts]
    return [partial(_one_of, submit, i) for i, submit in enumerate(submits)] if len(submits) > 1 else [*submits]


async def _one_of(submit: Submit, i: int, **more: Any) -> Stream:
    """What is wrong with a prompt is told with its number; all else the prompts of a request have in common."""
    try:
        return await submit(**more)
    except ParameterError as error:
        if error.param == "prompt":
            error.args = (f"prompt[{i}]: {error}",)
        raise


def _params(body: CompletionRequest, service: Service) -> SamplingParams:
    check_logprobs("logprobs", body.logprobs, service)
    if body.best_of not in (None, body.n or 1):
        raise bad_input("best_of is not supported: it must be absent or equal n", "best_of")
    if body.suffix:
        raise bad_input("suffix is not supported", "suffix")
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise bad_input("max_tokens=0 needs echo", "max_tokens")
    asked = [body.prompt_logprobs, body.logprobs if body.echo else None]
    numbers = [number for number in asked if number is not None]
    return sampling_params(
        body,
        service.defaults,
        max_tokens=max(1, max_tokens),
        logprobs=body.logprobs,
        prompt_logprobs=-1 if -1 in numbers else max(numbers, default=None),
    )


async def _whole(answers: list[Answer], body: CompletionRequest, service: Service) -> dict[str, Any]:
    for answer in answers:
        await answer.whole()
    choices = []
    for i, answer in enumerate(answers):
        for completion in answer.output.outputs:
            choice = _Choice(i, completion, answer, body, service.llm.llm.tokenizer)
            piece = Piece(
                completion.index,
                completion.text,
                completion.token_ids,
                completion.logprobs,
                completion.finish_reason,
                completion.stop_reason,
            )
            choices.append(choice.part(piece))
    head = frame(new_id("cmpl"), "text_completion", body.model or service.config.name, now())
    return {**head, "choices": choices, "usage": _usage(answers, body)}


def _chunks(answers: list[Answer], body: CompletionRequest, service: Service) -> AsyncGenerator[Any]:
    head = frame(new_id("cmpl"), "text_completion", body.model or service.config.name, now())
    return chunks(_choices(answers, body, service), head, body.stream_options, lambda: _usage(answers, body))


async def _choices(answers: list[Answer], body: CompletionRequest, service: Service) -> AsyncGenerator[dict[str, Any]]:
    choices: dict[tuple[int, int], _Choice] = {}
    async for i, piece in interleaved([answer.pieces() for answer in answers]):
        choice = choices.get((i, piece.index))
        if choice is None:
            completion = answers[i].output.outputs[piece.index]
            choice = choices[i, piece.index] = _Choice(i, completion, answers[i], body, service.llm.llm.tokenizer)
        part = choice.part(piece)
        if part["text"] or part["logprobs"] or part.get("token_ids") or part["finish_reason"] is not None:
            yield part


def _usage(answers: list[Answer], body: CompletionRequest) -> dict[str, Any]:
    usages = [answer.usage() for answer in answers]
    if body.max_tokens == 0:  # the engine writes at least one, which nobody sees
        usages = [replace(usage, completion_tokens=0) for usage in usages]
    return usage_of(usages)


class _Choice:
    """The JSON of one completion of one prompt, in one part or many."""

    def __init__(
        self,
        prompt_index: int,
        completion: CompletionOutput,
        answer: Answer,
        body: CompletionRequest,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._index = prompt_index * (body.n or 1) + completion.index
        self._completion = completion
        self._answer = answer
        self._body = body
        self._tokenizer = tokenizer
        self._offset = 0
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer, skip_special_tokens=False)
        self._is_first = True

    def part(self, piece: Piece) -> dict[str, Any]:
        text, token_ids = piece.text, piece.token_ids
        entries: Entries | None = piece.logprobs
        more: dict[str, Any] = {}
        if self._body.max_tokens == 0:
            text, token_ids, entries = "", [], [] if entries is not None else None
        if self._body.return_token_ids:
            more["token_ids"] = token_ids
        if self._is_first:
            more |= self._of_prompt()
            if self._body.echo:
                text = self._prompt_text() + text
                token_ids = self._answer.prompt_token_ids + token_ids
                if self._body.logprobs is not None:
                    entries = [*(self._answer.output.prompt_logprobs or ()), *(entries or ())]
        self._is_first = False
        choice: dict[str, Any] = {
            "index": self._index,
            "text": text,
            "logprobs": None if entries is None else self._logprobs(token_ids, entries),
            "finish_reason": piece.finish_reason,
        }
        if piece.finish_reason is not None:
            choice |= {"stop_reason": piece.stop_reason, "seed": self._completion.seed}
        return choice | more

    def _of_prompt(self) -> dict[str, Any]:
        """What is told of the prompt beside the text."""
        told: dict[str, Any] = {}
        if self._body.return_token_ids:
            told["prompt_token_ids"] = self._answer.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            told["prompt_logprobs"] = scores_of(self._answer.output, self._body.prompt_logprobs)
        return told

    def _prompt_text(self) -> str:
        """As it came, or what was kept of it."""
        prompt = self._answer.output.prompt
        if self._tokenizer is None:
            return prompt or ""
        kept = self._tokenizer.decode(self._answer.prompt_token_ids, skip_special_tokens=False)
        is_whole = prompt is not None and kept.endswith(prompt)
        if prompt is None or not (is_whole or self._body.truncate_prompt_tokens is None):
            return kept
        if is_whole:  # what the tokenizer has put in front is no part of the text: its tokens lie at 0
            self._offset = len(prompt) - len(kept)
        return prompt

    def _logprobs(self, token_ids: Sequence[int], entries: Entries) -> dict[str, Any]:
        tokens = [self._spelled(token) for token in token_ids]
        offsets = []
        for token in token_ids:
            offsets.append(max(0, self._offset))
            self._offset += 0 if self._decoder is None else len(self._decoder.push([token]))
        return {
            "tokens": tokens,
            "token_logprobs": [
                None if entry is None else value_of(entry[token])
                for token, entry in zip(token_ids, entries, strict=False)
            ],
            "top_logprobs": [
                None if entry is None else self._top(t, entry) for t, entry in zip(token_ids, entries, strict=False)
            ],
            "text_offset": offsets,
        }

    def _top(self, token: int, entries: dict[int, Logprob]) -> dict[str, float]:
        """The most probable tokens and the actual one."""
        shown = dict(top_of(entries, self._body.logprobs or 0)) | {token: entries[token]}
        return {self._spelled(other): value_of(entry) for other, entry in shown.items()}

    def _spelled(self, token: int) -> str:
        """A name that no other token shares, also where it is a part of a character."""
        if self._tokenizer is None or self._body.return_tokens_as_token_ids:
            return f"token_id:{token}"
        spelled = self._tokenizer.token_bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
