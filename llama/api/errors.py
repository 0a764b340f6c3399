"""Every error that a caller of this package may want to tell apart. Runs without torch."""

import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class ParameterError(ValueError):
    """A field with a value that is not legal. `param` is the field's name, None where it is not one field's fault.

    The field is one of SamplingParams or of a configuration, or an argument of the call: prompt, messages, tools,
    tool_choice, lora.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def refusal(name: str, legal: str, value: Any, place: str = "") -> ParameterError:
    """For a value that is not legal; `place` is where in the field it stands, as it follows the field's name."""
    return ParameterError(f"{name}{place} must be {legal}, got {reprlib.repr(value)}", name)


def checked_integer(name: str, value: Any, low: int, high: int | None = None, *, place: str = "", why: str = "") -> int:
    """The value as Python's own integer. ParameterError unless it is one, NumPy's among them, within the bounds, which
    `why` explains."""
    legal = (f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}") + why
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise refusal(name, legal, value, place)
    number = int(value)
    if number < low or (high is not None and number > high):
        raise refusal(name, legal, value, place)
    return number


def is_one_of(value: Any, words: Sequence[str | None]) -> bool:
    """Whether it is one of these; an array would compare itself to them element by element."""
    return isinstance(value, str | None) and value in words


class ConfigError(ValueError):
    """A configuration that is malformed, absurd, or not a Llama's."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit its config.json."""


class AdapterError(ValueError):
    """An adapter that is missing, damaged, unsupported, or made for another model."""


class ChatTemplateError(ParameterError):
    """The template refused the messages, or did not finish within its limits."""

    def __init__(self, message: str, param: str | None = "messages") -> None:
        super().__init__(message, param)


class ContextLengthError(ParameterError):
    """A request needs more tokens than the context holds: `num_tokens` of `max_model_len`."""

    def __init__(self, message: str, num_tokens: int, max_model_len: int, param: str | None = None) -> None:
        super().__init__(message, param)
        self.num_tokens = num_tokens
        self.max_model_len = max_model_len

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.num_tokens, self.max_model_len, self.param)


class QueueFullError(RuntimeError):
    """Too many requests, or too many prompt tokens, wait already. `retry_after` is a guess in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.retry_after)


class WorkerLostError(RuntimeError):
    """The system twice ended or starved the process that worked on a request: nothing is wrong with the request, it can
    be asked again. `retry_after` is a guess in seconds."""

    def __init__(self, message: str = "the process that worked on the request was lost: ask again") -> None:
        super().__init__(message)
        self.retry_after = 5


class EngineClosedError(RuntimeError):
    """The engine takes no new requests: it is draining or closed."""


class EngineDeadError(RuntimeError):
    """The engine cannot go on; make a new one."""


def is_failure(error: BaseException) -> bool:
    """Whether something went wrong: an Exception, or a panic of a native library, which is a BaseException alone."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def panics_caught(what: str) -> Iterator[None]:
    """A panic of a native library, which most code would let through, becomes a RuntimeError about `what`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or not is_failure(error):
            raise
        raise RuntimeError(f"{what} failed: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def blamed_on(param: str) -> Iterator[None]:
    """A ValueError from inside that names no field becomes a ParameterError of this one."""
    try:
        yield
    except ParameterError as error:
        error.param = error.param or param
        raise
    except ValueError as error:
        raise ParameterError(str(error), param) from None


def of_each(name: str, values: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """`work` of each value. Where there are several, a ValueError says with which of them it has to do."""
    done: list[R] = []
    for i, value in enumerate(values):
        try:
            done.append(work(value))
        except ValueError as error:
            if len(values) > 1:
                error.args = (f"{name}[{i}]: {error}",)
            raise
    return done
