"""What is asked and what is answered: SamplingParams, Sequence and the outputs. Runs without torch.

Sequence is the only mutable state of a request, and the scheduler owns it. Everything else here is a value.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


# Names that users of other libraries type; each error says what ours is called.
FOREIGN_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "do_sample": "temperature=0 for greedy decoding",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "num_beams": "n (beam search is not offered)",
    "max_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
}


def _number(name: str, value: Any, low: float, high: float, *, exclusive_low: bool = False) -> float:
    legal = f"{'(' if exclusive_low else '['}{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number in {legal}, got {value!r}")
    if not math.isfinite(value) or value < low or value > high or (exclusive_low and value == low):
        raise ValueError(f"{name} must be in {legal}, got {value!r}")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    legal = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be {legal}, got {value!r}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be {legal}, got {value!r}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Every value is checked; NaN and infinities are refused.

    The order in which they apply, with formulas, is told in `kernels.sample`. `seed=None` draws fresh entropy and the
    seed used comes back with the output. `max_tokens=None` means the rest of the context.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 256
    min_tokens: int = 0
    stop: str | SequenceOf[str] = ()
    stop_token_ids: SequenceOf[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: Literal["raw", "processed"] = "raw"
    response_format: Mapping[str, Any] | None = None

    def __init_subclass__(cls) -> None:
        raise TypeError("SamplingParams is final")

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "n", _integer("n", self.n, 1, 128))
        put(self, "temperature", _number("temperature", self.temperature, 0, 5))
        put(self, "top_p", _number("top_p", self.top_p, 0, 1))
        put(self, "top_k", max(0, _integer("top_k", self.top_k, -1)))
        put(self, "min_p", _number("min_p", self.min_p, 0, 1))
        penalty = _number("repetition_penalty", self.repetition_penalty, 0, math.inf, exclusive_low=True)
        put(self, "repetition_penalty", penalty)
        put(self, "frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2, 2))
        put(self, "presence_penalty", _number("presence_penalty", self.presence_penalty, -2, 2))
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 0, MAX_LOGPROBS)
        if self.logprobs_mode not in ("raw", "processed"):
            raise ValueError(f'logprobs_mode must be "raw" or "processed", got {self.logprobs_mode!r}')
        for name in ("include_stop_str_in_output", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        put(self, "stop", self._checked_stop())
        put(self, "stop_token_ids", tuple(_integer("stop_token_ids", t, 0) for t in self.stop_token_ids))
        put(self, "logit_bias", self._checked_bias())

    def _checked_stop(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold non-empty strings, got {text!r}")
        return stop

    def _checked_bias(self) -> dict[int, float] | None:
        if not self.logit_bias:
            return None
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map token ids to numbers in [-100, 100], got {self.logit_bias!r}")
        return {
            _integer("logit_bias id", t, 0): _number(f"logit_bias[{t}]", b, -100, 100)
            for t, b in self.logit_bias.items()
        }


class Logprob(NamedTuple):
    """A token's log-probability and its rank: 1 + the number of tokens that are strictly more probable."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class TokenOutput:
    """What one step adds to one completion; the token that ended it (end of text, stop id) is in `token_ids`.

    Not frozen: hundreds are made in every step, and a frozen dataclass costs four times as much to make.
    """

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the id of stop_token_ids that ended it; None for the model's own end
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # with the first output of index 0 only
    num_cached_tokens: int = 0


class Adapter(NamedTuple):
    """A LoRA adapter as the engine sees it: its slot in the stacked weights (0 = none) and a digest of its content."""

    slot: int = 0
    digest: bytes = b""


NO_ADAPTER = Adapter()


class TokenMatcher(Protocol):
    """A grammar at work on one completion; it follows the generated tokens alone."""

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Write the allowed next tokens: token t is bit t % 32 of words[t // 32]."""

    def advance(self, token_id: int) -> None:
        """Take an allowed token."""

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""

    def fork(self) -> "TokenMatcher":
        """A matcher of its own in the same state."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request on its way through the engine. The scheduler alone changes it.

    It waits (row -1), runs (it owns a row and its blocks), and may be sent back to wait; in the end it is finished.
    """

    request_id: str
    index: int
    arrival: int  # requests are served in this order
    params: SamplingParams
    seed: int
    prompt: NDArray[np.int32]  # shared by all completions of the request
    limit: int  # the most tokens, prompt included
    adapter: Adapter = NO_ADAPTER
    matcher: TokenMatcher | None = None
    followers: "list[Sequence]" = field(default_factory=list)  # they fork from this one once its prompt is computed

    output_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # gathered so far; None once handed out or not asked
    num_cached_tokens: int = -1  # -1 = it has never run
    row: int = -1
    ready_after: int = -1  # the step whose result must be known before the sequence may run again
    finished: bool = False

    @property
    def order(self) -> tuple[int, int]:
        return (self.arrival, self.index)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.prompt) + len(self.output_token_ids)

    def tokens_between(self, start: int, stop: int) -> NDArray[np.int32]:
        """The known tokens at positions start : stop."""
        split = len(self.prompt)
        if stop <= split:
            return self.prompt[start:stop]
        outputs = np.array(self.output_token_ids[max(0, start - split) : stop - split], np.int32)
        return np.concatenate([self.prompt[start:split], outputs]) if start < split else outputs

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Some of the prompt's log-probabilities are still to be computed."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to one request, in seconds of `time.monotonic()`."""

    queued: float
    first_token: float | None = None
    finished: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from being queued to the first token."""
        return None if self.first_token is None else self.first_token - self.queued


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request cost; `completion_tokens` counts all of its completions."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class CompletionOutput:
    """One completion: `text` is cut before a stop string, `token_ids` are all tokens up to the one that ended it."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or the id of stop_token_ids; None for the model's own end
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    tool_calls: list[Any] = field(default_factory=list)
    seed: int | None = None  # the one used, also where none was asked for


@dataclass(slots=True)
class RequestOutput:
    """A request with all of its completions, in the order of their index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = False


@dataclass(slots=True)
class Piece:
    """What is new in one completion of a streamed request; `usage` comes with the last piece of the request.

    Not frozen, as TokenOutput is not: a step makes one for each running completion.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    tool_calls: SequenceOf[Any] = ()
    usage: Usage | None = None
