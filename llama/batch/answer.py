"""From a line to its output line, by the code that answers the same request over HTTP."""

from collections.abc import Awaitable, Callable
from typing import Any

from llama.async_llm.async_llm import AsyncLLM
from llama.batch.lines import Line, body_of
from llama.model.capture import Capture
from llama.server.bodies import validated
from llama.server.config import ServerConfig
from llama.server.errors import ApiError, Dialect, bad_input
from llama.server.openai.chat import answer_chat
from llama.server.openai.completions import answer_completion
from llama.server.openai.responses import answer_response
from llama.server.openai.responses_body import ResponsesRequest
from llama.server.openai.schema import ChatRequest, CompletionRequest
from llama.server.service import Record, Service

_ENDPOINTS: dict[str, tuple[type[Any], Callable[..., Awaitable[dict[str, Any]]]]] = {
    "/v1/chat/completions": (ChatRequest, answer_chat),
    "/v1/completions": (CompletionRequest, answer_completion),
    "/v1/responses": (ResponsesRequest, answer_response),
}


class Answerer:
    """Answers lines, any number at a time. With a `seed`, a line that names none has one made of it and the custom_id,
    so that its answer depends on neither order nor neighbours. What `capture` keeps has the output line's id."""

    def __init__(
        self, llm: AsyncLLM, config: ServerConfig, seed: int | None = None, capture: Capture | None = None
    ) -> None:
        self._service = Service(llm, config)
        self._service.capture = capture
        self._seed = seed

    @property
    def max_in_flight(self) -> int:
        """Lines to ask at a time, so that others wait when one ends."""
        return 2 * self._service.llm.llm.engine.config.max_num_seqs

    async def __call__(self, line: Line) -> dict[str, Any]:
        """The output line. Raises EngineDeadError where no other line can be answered either."""
        assert line.body is not None
        schema, endpoint = _ENDPOINTS[line.url]
        try:
            body = validated(body_of(line, self._seed), schema)
            if body.stream:
                raise bad_input("stream must be false or absent in a batch", "stream")
            answer = await endpoint(body, self._service, Record(line.id))
        except ApiError as error:
            return self._refused(line, error)
        return line.answered(200, answer)

    def _refused(self, line: Line, error: ApiError) -> dict[str, Any]:
        status = error.status_in(Dialect.OPENAI)
        if status < 500:
            return line.answered(status, error.body(Dialect.OPENAI))
        if self._service.llm.is_dead:
            self._service.llm.check_accepts()  # raises
        return line.failed(error.name or error.kind, error.message_openai)
