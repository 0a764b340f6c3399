"""Request: what an engine is asked for, encoded and checked. One value from every face to the scheduler; no torch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama.api.errors import ContextLengthError, ParameterError
from llama.api.params import SamplingParams
from llama.engine.adapters import NO_ADAPTER, Adapter
from llama.engine.config import EngineConfig


class TokenMatcher(Protocol):
    """A grammar at work on one completion; it follows the generated tokens alone."""

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Write the allowed next tokens: token t is bit t % 32 of words[t // 32]."""

    def advance(self, token_id: int) -> None:
        """Take an allowed token."""

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""

    def fork(self) -> "TokenMatcher":
        """An independent matcher in the same state."""


class Taps(Protocol):
    """What a request reads and changes inside the network; `llama.model.capture.RequestTaps` is one."""

    salt: bytes  # of the changes, in the keys of the prefix cache; empty where there are none
    first_change: float  # the first position that they change
    sequence: Any  # what the model needs of it

    def first_missing(self, index: int) -> int:
        """The first position that completion `index` must compute even where the prefix cache has it."""

    def take(self, index: int, values: Mapping[str, Any], stop: int | None = None) -> None:
        """What a step computed for completion `index`: point -> (positions, values). Positions from `stop` on hold
        drafts that were refused."""

    is_kept: bool  # what it reads was written to a file before: it need not be computed

    def finish(
        self, request_id: str, num_tokens: Sequence[int], is_whole: bool = True
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What was captured of the prompt and of each completion, which has so many tokens in the end."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """`Engine.request` makes it; each is added once. The engine does not read the fields from `prompt` to
    `begins_in_thought`."""

    request_id: str
    prompt_token_ids: NDArray[np.int32]
    params: SamplingParams
    adapter: Adapter = NO_ADAPTER
    new_matcher: Callable[[], TokenMatcher] | None = None  # of the grammar that holds the answer
    taps: Taps | None = None
    score_from: int = 1  # prompt_logprobs begin with the token at this position
    prompt: str | None = None
    tools: Mapping[str, Any] = field(default_factory=dict)  # whose calls are to be found: name -> schema of arguments
    certain_calls: Collection[str] = ()  # those that the grammar holds to their form from their first characters on
    begins_in_thought: bool | None = None  # or may begin with one (False); None: no thought is looked for
    prediction_token_ids: Sequence[int] = ()  # what the answer may be like
    negative_token_ids: Sequence[int] = ()  # what guidance_scale leads away from; none = the prompt's last token


def checked_ids(token_ids: Sequence[int], vocab_size: int) -> NDArray[np.int32]:
    """A prompt as an array. ParameterError for what is no token id."""
    if not len(token_ids):
        raise ParameterError("prompt is empty: at least one token is needed")
    if all(map(_is_whole, set(map(type, token_ids)))) and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return np.array(token_ids, np.int32)
    wrong: Any = next(t for t in token_ids if not _is_whole(type(t)) or not 0 <= t < vocab_size)
    raise ParameterError(f"prompt_token_ids must be integers in [0, {vocab_size - 1}], got {wrong!r}")


def _is_whole(kind: type) -> bool:
    return issubclass(kind, Integral) and not issubclass(kind, bool)


def check_room(prompt_len: int, max_tokens: int | None, context_len: int, *, at_least: bool = False) -> None:
    """ContextLengthError if so many new tokens, or with None a single one, do not fit behind the prompt.
    `at_least`: the prompt may be longer than `prompt_len`."""
    wanted = prompt_len + (max_tokens or 1)
    if wanted > context_len:
        answer = "an answer" if max_tokens is None else f"max_tokens={max_tokens}"
        count = f"at least {prompt_len}" if at_least else prompt_len
        raise ContextLengthError(
            f"the prompt has {count} tokens and the context is {context_len} (max_model_len): "
            f"no room is left for {answer}",
            wanted,
            context_len,
        )


def check_params(params: SamplingParams, vocab_size: int, config: EngineConfig) -> None:
    """ParameterError for a token id that the vocabulary does not have, and for a priority where there are none."""
    if params.priority and config.scheduling_policy != "priority":
        told = f"priority must be 0 where scheduling_policy is {config.scheduling_policy}, got {params.priority}"
        raise ParameterError(told, "priority")
    prediction = () if isinstance(params.prediction, str) else params.prediction or ()
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias or ()),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("prediction", prediction),
        ("negative_prompt", () if isinstance(params.negative_prompt, str) else params.negative_prompt or ()),
    ):
        for token in ids:
            if token >= vocab_size:
                raise ParameterError(f"{name} must hold token ids in [0, {vocab_size - 1}], got {token}", name)


def with_logprobs(params: SamplingParams, most: int, vocab_size: int) -> SamplingParams:
    """As numbers that the vocabulary has. ParameterError for more than `most`, unless that is -1."""
    asked = {name: getattr(params, name) for name in ("logprobs", "prompt_logprobs")}
    for name, number in asked.items():
        if number is not None and most != -1 and not 0 <= number <= most:
            what = f"{name} must be an integer from 0 to {most} (max_logprobs), got {number}"
            raise ParameterError(what, name)
    numbers: dict[str, Any] = {
        name: vocab_size if number == -1 else min(number, vocab_size)
        for name, number in asked.items()
        if number is not None
    }
    return params if all(asked[name] == number for name, number in numbers.items()) else replace(params, **numbers)
