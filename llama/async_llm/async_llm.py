"""AsyncLLM: LLM for asyncio. Many tasks ask at once; one thread steps the engine; no call blocks the event loop.

    async with AsyncLLM("checkpoints/model") as llm:
        async for piece in llm.chat([{"role": "user", "content": "Hello"}]):
            print(piece.text, end="")

Leaving the loop, closing the generator or cancelling the task aborts the request. Streams may be read on any event
loop; several AsyncLLMs may live in one process.
"""

import asyncio
import atexit
import math
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, Unpack, cast

from torch import Tensor

from llama.api.errors import EngineClosedError, EngineDeadError, QueueFullError, refusal
from llama.api.outputs import Piece
from llama.api.params import SamplingParams
from llama.async_llm.admission import Admission
from llama.async_llm.preparation import Preparation, grammar_key, size_of
from llama.async_llm.stepper import Stepper, Stream
from llama.engine.metrics import EngineMetrics
from llama.engine.request import Request
from llama.llm.engines import ranks_of
from llama.llm.llm import LLM
from llama.llm.loras import LoraInfo, describe, read_lora
from llama.llm.requests import Message, Prompt, Rendering
from llama.llm.taps import tapped
from llama.llm.tool_choice import ToolChoice
from llama.model.capture import Capture
from llama.model.taps import Interventions
from llama.model.transformer import Transformer

__all__ = ["AsyncLLM", "EngineClosedError", "EngineDeadError", "QueueFullError", "Stream"]

T = TypeVar("T")

_EXIT_SECONDS = 10.0  # for the last step when Python exits
_INLINE_CHARACTERS = 2_000  # longer prompts are encoded off the event loop: about a millisecond's worth


class AsyncLLM:
    """`model` and `llm_arguments` as LLM takes them, or an LLM that nothing else uses from then on.

    max_waiting_requests: how many requests may wait beyond the max_num_seqs that run; max_waiting_tokens: how many
    prompt tokens may wait for their first answer; above either, QueueFullError. slow_reader_timeout: seconds that news
    may lie unread before the request is aborted.
    """

    def __init__(
        self,
        model: str | Path | Transformer | LLM,
        tokenizer: str | Path | None = None,
        *,
        max_waiting_requests: int = 1024,
        max_waiting_tokens: int = 1 << 20,
        slow_reader_timeout: float = 60.0,
        **llm_arguments: Any,
    ) -> None:
        for name, limit in (("max_waiting_requests", max_waiting_requests), ("max_waiting_tokens", max_waiting_tokens)):
            if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
                raise refusal(name, "an integer >= 0", limit)
        if not (_is_number(slow_reader_timeout) and slow_reader_timeout > 0):
            raise refusal("slow_reader_timeout", "a number of seconds > 0", slow_reader_timeout)
        if isinstance(model, LLM):
            if tokenizer is not None or llm_arguments:
                raise ValueError(f"an LLM has its arguments already, got {sorted(llm_arguments) or 'a tokenizer'}")
            self.llm = model
        else:
            self.llm = LLM(model, tokenizer, **llm_arguments)
        self._draining = False
        self._pause: Future[None] | None = None  # while requests wait for an idle engine's command
        self._preparation = Preparation()
        self._admission = Admission(self.llm.engine.config.max_num_seqs + max_waiting_requests, max_waiting_tokens)
        self._stepper = Stepper(self.llm.replies, self._admission, slow_reader_timeout)
        if (ranks := ranks_of(self.llm.engine)) is not None:
            ranks.listen(partial(_look, weakref.ref(self._stepper)))
        self._stepper.thread.start()
        # The thread knows the stepper alone, so an AsyncLLM that is dropped takes its thread with it. When Python exits
        # the thread must not be caught inside a step.
        weakref.finalize(self, self._stepper.stop)
        weakref.finalize(self, self._preparation.stop)
        atexit.register(_end, weakref.ref(self._stepper))

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora: str | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncIterator[Piece]:
        """The pieces of the text that continues one prompt, in any form that LLM.generate takes."""
        async with await self.submit(prompt, sampling_params, lora, request_id=request_id) as stream:
            async for piece in stream:
                yield piece

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora: str | None = None,
        *,
        tool_choice: ToolChoice = "auto",
        request_id: str | None = None,
        **rendering: Unpack[Rendering],
    ) -> AsyncIterator[Piece]:
        """The pieces of the answer to one conversation."""
        async with await self.submit_chat(
            messages, sampling_params, tools, lora, tool_choice=tool_choice, request_id=request_id, **rendering
        ) as stream:
            async for piece in stream:
                yield piece

    async def submit(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        lora: str | None = None,
        *,
        request_id: str | None = None,
        clip: bool = True,
        capture: Capture | None = None,
        interventions: Interventions = None,
    ) -> Stream:
        """The stream that generate() reads. The engine has accepted the request when the call returns, so every refusal
        (ValueError, QueueFullError, WorkerLostError, EngineClosedError, EngineDeadError) comes before the first piece.
        The stream must be read to its end or closed. Without `clip`, max_tokens that the context has no room for are a
        ContextLengthError."""
        prepare = partial(self.llm.inputs.request, prompt, sampling_params, lora, request_id=request_id, clip=clip)
        parts = [*prompt.values()] if isinstance(prompt, Mapping) else [prompt]
        size = max((len(part) for part in parts if isinstance(part, str | list | tuple)), default=0)
        size += _size_of_texts(sampling_params)
        ask = self._tapped(prepare, capture, interventions)
        return await self._submit(ask, size, grammar_key(_constraint(sampling_params)))

    async def submit_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora: str | None = None,
        *,
        tool_choice: ToolChoice = "auto",
        request_id: str | None = None,
        clip: bool = True,
        capture: Capture | None = None,
        interventions: Interventions = None,
        **rendering: Unpack[Rendering],
    ) -> Stream:
        """submit() for a conversation, rendered as LLM.chat does it."""
        prepare = partial(
            self.llm.inputs.chat_request,
            messages,
            sampling_params,
            lora,
            tools=tools,
            tool_choice=tool_choice,
            request_id=request_id,
            clip=clip,
            **rendering,
        )
        grammar = grammar_key(_constraint(sampling_params), tools, tool_choice)
        # A template may be slow however short the messages are.
        ask = self._tapped(prepare, capture, interventions)
        return await self._submit(ask, max(_INLINE_CHARACTERS, size_of(messages, tools)), grammar)

    def check_accepts(self, num_coming: int = 0) -> None:
        """Raises what any request would be refused with now: EngineDeadError, EngineClosedError, QueueFullError. A
        server asks before it reads a request. `num_coming`: how many it has let in and not yet answered, some of which
        may not be admitted yet."""
        if (dead := self._stepper.dead) is not None:
            raise dead
        if self._draining:
            raise EngineClosedError("the engine is draining or closed: it takes no new requests")
        self._admission.check(num_coming)

    def _tapped(
        self, prepare: Callable[[], Request], capture: Capture | None, interventions: Interventions
    ) -> Callable[[], Request]:
        if capture is None and interventions is None:
            return prepare
        return lambda: tapped(self.llm.engine, [prepare()], capture, interventions)[0]

    async def _submit(self, prepare: Callable[[], Request], size: int, grammar: str | None) -> Stream:
        queued = time.monotonic()
        await self._not_paused()
        self.check_accepts()
        permit = self._admission.admit()
        stream = None
        try:
            if grammar is None and size < _INLINE_CHARACTERS:
                request = prepare()
            else:
                request = await asyncio.wrap_future(self._preparation.submit(prepare, size, grammar))
            self._admission.wait_with(permit, len(request.prompt_token_ids))
            stream = Stream(request, permit, self._stepper)
            await asyncio.wrap_future(self._stepper.call(partial(self._stepper.add, stream, queued)))
        except BaseException:
            # Also when cancelled, and then the engine may just have taken it.
            if stream is not None:
                stream.close()
            self._admission.release(permit)
            raise
        return stream

    async def load_lora(self, name: str, path: str | Path, replace: bool = False) -> LoraInfo:
        """LLM.load_lora while requests run; the files are read off the event loop."""
        adapter = await asyncio.to_thread(read_lora, self.llm.engine, self.llm.model, name, path, replace)
        await asyncio.wrap_future(self._stepper.call(partial(self.llm.engine.add_adapter, adapter, replace)))
        return describe(adapter)

    async def unload_lora(self, name: str) -> None:
        """LLM.unload_lora while requests run."""
        await asyncio.wrap_future(self._stepper.call(partial(self.llm.engine.adapters.remove, name)))

    async def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], wait: bool = False) -> int:
        """LLM.update_weights. With `wait` the requests that run end first, and new ones begin afterwards."""
        return await self._when_idle(partial(self.llm.update_weights, named_tensors), wait)

    async def sleep(self, wait: bool = False) -> None:
        """LLM.sleep. With `wait` the requests that run end first, and new ones are refused afterwards."""
        await self._when_idle(self.llm.sleep, wait)

    async def wake_up(self) -> None:
        """LLM.wake_up."""
        await asyncio.wrap_future(self._stepper.call(self.llm.wake_up))

    async def _when_idle(self, command: Callable[[], T], wait: bool) -> T:
        """Run a command that needs an idle engine; with `wait`, as soon as it is idle, new requests held back."""
        if not wait:
            return await asyncio.wrap_future(self._stepper.call(command))
        await self._not_paused()
        self._pause = pause = Future[None]()
        try:
            while True:
                await asyncio.wrap_future(self._admission.when_empty())
                # What was admitted in another thread just before is waited for as well.
                idle = self._stepper.call(lambda: None if self.llm.engine.has_unfinished else (command(),))
                if (result := await asyncio.wrap_future(idle)) is not None:
                    return cast(T, result[0])
        finally:
            self._pause = None
            pause.set_result(None)

    async def _not_paused(self) -> None:
        while (pause := self._pause) is not None:
            await asyncio.shield(asyncio.wrap_future(pause))  # a reader that is cancelled ends no other's wait

    def list_loras(self) -> list[LoraInfo]:
        return self.llm.list_loras()

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return self._admission.num_requests

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of requests that have no answer yet."""
        return self._admission.num_waiting_tokens

    @property
    def seconds_in_step(self) -> float:
        """How long the engine's present step has been running, 0 between steps. For a watchdog."""
        return self._stepper.seconds_in_step

    def metrics(self) -> EngineMetrics:
        """The engine's counts, at any time and from any thread: waiting, running, KV blocks, totals."""
        return self.llm.engine.metrics()

    @property
    def is_dead(self) -> bool:
        return self._stepper.dead is not None

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because of drain() or close()."""
        return self._draining

    async def drain(self, timeout: float | None = None) -> None:
        """Refuse new requests from now on and wait until those that were taken have ended; what runs for longer than
        `timeout` seconds is aborted."""
        if timeout is not None and not (_is_number(timeout) and timeout >= 0):
            raise refusal("timeout", "a number of seconds >= 0 or None", timeout)
        self._draining = True
        empty = asyncio.wrap_future(self._admission.when_empty())
        try:
            await asyncio.wait_for(empty, timeout)
        except TimeoutError:
            self._preparation.stop()
            self._stepper.post(self._stepper.end_all)
            await asyncio.wrap_future(self._admission.when_empty())

    async def close(self) -> None:
        """Refuse new requests, abort those that run, end the engine's thread. What was written can still be read."""
        self._draining = True
        self._preparation.stop()
        self._stepper.stop()
        await asyncio.to_thread(self._stepper.thread.join)
        await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _constraint(params: Any) -> Any:
    return params.constraint if isinstance(params, SamplingParams) else None


def _size_of_texts(params: Any) -> int:
    """Of all in them that is encoded as a prompt is."""
    if not isinstance(params, SamplingParams):
        return 0
    texts = [*params.bad_words, params.negative_prompt, params.prediction]
    return sum(len(text) for text in texts if isinstance(text, str))


def _look(reference: "weakref.ref[Stepper]", why: str) -> None:
    """Have the thread see whether its engine lives: it may be waiting for requests."""
    if (stepper := reference()) is not None:
        stepper.post(lambda: None)


def _end(reference: "weakref.ref[Stepper]") -> None:
    stepper = reference()
    if stepper is not None:
        stepper.stop()
        stepper.thread.join(_EXIT_SECONDS)
