"""What comes back of a request: completions, pieces of a stream, log-probabilities, usage. Runs without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    ABORT = "abort"
    ERROR = "error"


class Logprob(NamedTuple):
    """A token's log-probability and its rank: 1 + the number of tokens that are strictly more probable."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened to one request, in seconds of `time.monotonic()`, and what became of drafts for it."""

    queued: float
    scheduled: float | None = None  # when the first completion was first let in
    first_token: float | None = None
    finished: float | None = None
    num_drafts: int = 0  # times that some were verified for one of its completions
    num_draft_tokens: int = 0  # tokens of these
    num_accepted_tokens: int = 0  # those of them that were right
    num_prediction_tokens: int = 0  # the same two of drafts from `SamplingParams.prediction` alone
    num_accepted_prediction_tokens: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from being queued to the first token."""
        return None if self.first_token is None else self.first_token - self.queued

    @property
    def queue_time(self) -> float | None:
        """Seconds from being queued to being let in."""
        return None if self.scheduled is None else self.scheduled - self.queued

    @property
    def prefill_time(self) -> float | None:
        """Seconds from being let in to the first token."""
        return None if self.scheduled is None or self.first_token is None else self.first_token - self.scheduled

    @property
    def decode_time(self) -> float | None:
        """Seconds from the first token to the last."""
        return None if self.finished is None or self.first_token is None else self.finished - self.first_token

    @property
    def mean_acceptance_length(self) -> float | None:
        """Tokens that a step gave where drafts were verified: 1 is the least, and None stands for no such step."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a request cost; `completion_tokens` counts all of its completions."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    mean_acceptance_length: float | None = None  # as in RequestMetrics
    # Tokens of `SamplingParams.prediction` that were verified as drafts, and were right or not.
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    reasoning_tokens: int | None = None  # of thoughts, up to their closing tag; None where none are looked for

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(slots=True)
class CompletionOutput:
    """One completion: `text` is cut before a stop string, `token_ids` are all tokens up to the one that ended it. A
    thought that precedes the text is `reasoning_content`, where thoughts are looked for (LLM's `reasoning_parser`)."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop string or the id of stop_token_ids; None for the model's own end
    logprobs: list[dict[int, Logprob]] | None = None  # with flat_logprobs=True a FlatLogprobs
    cumulative_logprob: float | None = None
    tool_calls: list[Any] = field(default_factory=list)
    reasoning_content: str | None = None
    seed: int | None = None  # the one used, also where none was asked for
    captured: dict[str, Any] = field(default_factory=dict)  # point -> tensor [positions, ...], of generated tokens


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
    captured: dict[str, Any] = field(default_factory=dict)  # point -> tensor [positions, ...], of the prompt
    finished: bool = False


@dataclass(slots=True)
class Piece:
    """What is new in one completion of a streamed request; `usage` comes with the last piece of the request. Complete
    calls are in `tool_calls`; `tool_call_deltas` also tell what is certain of one that is still being written.

    Not frozen, as TokenOutput is not: a step makes one for each running completion.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    tool_calls: Sequence[Any] = ()
    usage: Usage | None = None
    reasoning_content: str = ""
    tool_call_deltas: Sequence[Any] = ()
