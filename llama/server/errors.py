"""Errors that clients see, in the words of each dialect.

Their messages are written here or come from the ValueErrors of our own checks; never an exception's repr.
"""

from enum import Enum, auto
from typing import Any

from llama.api.errors import (
    ContextLengthError,
    EngineClosedError,
    EngineDeadError,
    ParameterError,
    QueueFullError,
    WorkerLostError,
)

BAD_INPUT = 5006


class Dialect(Enum):
    CLOUDFLARE = auto()
    OPENAI = auto()


def dialect_of(path: str) -> Dialect:
    """The dialect of a path; unknown paths have one too."""
    of_openai = ("/v1/", "/tokenize", "/detokenize")
    is_openai = path.startswith(of_openai) or (path.startswith("/client/v4/accounts/") and "/ai/v1/" in path)
    return Dialect.OPENAI if is_openai else Dialect.CLOUDFLARE


class ApiError(Exception):
    """An error that is sent to the client. `code` is Cloudflare's; `kind`, `param` and `name` are OpenAI's type, param
    and code. `status_openai` and `message_openai` where the two dialects differ."""

    def __init__(
        self,
        status: int,
        code: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        name: str | None = None,
        status_openai: int | None = None,
        message_openai: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.kind = kind
        self.param = param
        self.name = name
        self.status_openai = status_openai or status
        self.message_openai = message_openai or message
        self.headers = headers or {}

    def status_in(self, dialect: Dialect) -> int:
        return self.status_openai if dialect is Dialect.OPENAI else self.status

    def body(self, dialect: Dialect) -> dict[str, Any]:
        if dialect is Dialect.OPENAI:
            return {
                "error": {"message": self.message_openai, "type": self.kind, "param": self.param, "code": self.name}
            }
        return {**self.event(dialect), "success": False, "result": {}, "messages": []}

    def event(self, dialect: Dialect) -> dict[str, Any]:
        """The same as an event of a stream."""
        if dialect is Dialect.OPENAI:
            return self.body(dialect)
        return {"errors": [{"message": self.message, "code": self.code}]}


def bad_input(what: str, param: str | None = None) -> ApiError:
    return ApiError(400, BAD_INPUT, f"AiError: Bad input: Error: {what}", param=param, message_openai=what)


def no_such_model(model: str) -> ApiError:
    return ApiError(
        400,
        5007,
        f"No such model {model[:200]} or task",
        param="model",
        name="model_not_found",
        status_openai=404,
        message_openai=f"The model `{model[:200]}` does not exist",
    )


def no_adapters() -> ApiError:
    message = "LoRA unsupported: the server was started without adapters"
    return ApiError(405, 5005, message, param="lora", status_openai=400)


def unauthorized() -> ApiError:
    return ApiError(
        401,
        10000,
        "Authentication error",
        kind="authentication_error",
        name="invalid_api_key",
        message_openai="Incorrect or missing API key: send it as 'Authorization: Bearer KEY'",
        headers={"www-authenticate": "Bearer"},
    )


def body_too_large(limit: int) -> ApiError:
    return ApiError(
        413, 3006, f"Request is too large: the body may have {limit} bytes", headers={"connection": "close"}
    )


def bodies_too_large(limit: int) -> ApiError:
    message = (
        f"Capacity temporarily exceeded, please try again: the requests that are not yet answered hold {limit} bytes"
    )
    headers = {"retry-after": "1", "connection": "close"}
    return ApiError(429, 3040, message, kind="rate_limit_error", name="rate_limit_exceeded", headers=headers)


def headers_too_large(limit: int) -> ApiError:
    message = f"Request is too large: its headers may have {limit} bytes"
    return ApiError(431, 3006, message, headers={"connection": "close"})


def body_encoded(encoding: str) -> ApiError:
    what = f"the body's Content-Encoding {encoding[:40]!r} is not supported: send it as it is"
    return ApiError(415, BAD_INPUT, f"AiError: Bad input: Error: {what}", message_openai=what)


def body_too_slow(seconds: float) -> ApiError:
    return ApiError(
        408, 3007, f"Timeout: the body did not arrive within {seconds:g} s", headers={"connection": "close"}
    )


def aborted() -> ApiError:
    return ApiError(408, 3008, "Aborted: the request was ended before its answer was complete", kind="aborted")


def no_route(path: str) -> ApiError:
    return ApiError(404, 7003, f"Could not route to {path[:200]}, perhaps your object identifier is invalid?")


def no_method(method: str, headers: dict[str, str]) -> ApiError:
    return ApiError(405, 7001, f"Method {method[:20]} not available for that URI.", headers=headers)


def json_mode_failed() -> ApiError:
    return ApiError(400, 5024, "JSON Mode couldn't be met")


def grammar_failed(param: str) -> ApiError:
    message = f"{param}: following it exceeded a limit while the answer was written: ask for something simpler"
    return ApiError(400, 5024, "JSON Mode couldn't be met", param=param, message_openai=message)


def internal(request_id: str) -> ApiError:
    return ApiError(
        500, 3043, f"Internal server error (request id {request_id})", kind="server_error", name="internal_error"
    )


def unavailable(message: str, retry_after: int = 5) -> ApiError:
    """Nothing is wrong with the request."""
    headers = {"retry-after": str(retry_after)}
    return ApiError(503, 3040, message, kind="server_error", name="unavailable", headers=headers)


def from_refusal(error: BaseException) -> ApiError | None:
    """From an exception that AsyncLLM refuses a request with; None for a failure of ours."""
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(error.retry_after)}
        message = f"Capacity temporarily exceeded, please try again: {error}"
        return ApiError(429, 3040, message, kind="rate_limit_error", name="rate_limit_exceeded", headers=headers)
    if isinstance(error, WorkerLostError):
        return unavailable("The process that worked on the request was lost, please try again", error.retry_after)
    if isinstance(error, EngineClosedError):
        return unavailable("The server is shutting down")
    if isinstance(error, EngineDeadError):
        return unavailable("The engine is dead: the server has to be restarted")
    if isinstance(error, ContextLengthError):
        return _context_exceeded(error)
    if isinstance(error, ValueError):
        return bad_input(str(error), error.param if isinstance(error, ParameterError) else None)
    return None


def _context_exceeded(error: ContextLengthError) -> ApiError:
    return ApiError(
        413,
        5021,
        f"The estimated number of input and maximum output tokens ({error.num_tokens}) exceeded this model context "
        f"window limit ({error.max_model_len}).",
        param=error.param,
        name="context_length_exceeded",
        status_openai=400,
        message_openai=str(error),
    )
