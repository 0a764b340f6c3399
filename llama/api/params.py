"""SamplingParams: what a request asks of its tokens, every value checked where it is given. Runs without torch."""

import functools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any, Literal, TypeVar

from llama.api.errors import ParameterError, checked_integer, is_one_of, refusal
from llama.api.neutral import SAMPLING, is_neutral
from llama.api.structured import StructuredOutputsParams

MAX_SEED = 2**53 - 1  # of the seeds that are used and come back: JavaScript has no larger integers
MAX_TOKENS = 2**63 - 1
MAX_LOGPROBS = 20  # that an engine gives without being told to give more
MAX_COMPLETIONS = 128
_MAX_SCALE = 1e30  # of guidance: times a difference of log-probabilities it is still a finite float32

# Names that users of other libraries type, and what they are called here.
_CALLED = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "eos_token_id": "stop_token_ids",
    "top_logprobs": "logprobs",
}
# What they say that is said otherwise here.
_INSTEAD = {
    "do_sample": "temperature=0 is greedy decoding, and any higher temperature samples",
    "max_length": "max_tokens counts the new tokens alone",
    "min_length": "min_tokens counts the new tokens alone",
    "guided_decoding": "structured_outputs constrains the output",
}
_FORMATS: dict[str, tuple[str, type, str] | None] = {  # type -> the key that goes with it, and what that holds
    "json_object": None,
    "json_schema": ("json_schema", Mapping, "a JSON schema"),
    "regex": ("regex", str, "a regular expression"),
}
_Class = TypeVar("_Class", bound=type[Any])


def _named_refusals(cls: _Class) -> _Class:
    """Class decorator: a name of another library's is refused with ours, before anything else is looked at."""
    generated: Callable[..., None] = cls.__init__
    ours = {option.name for option in fields(cls)}

    @functools.wraps(generated)
    def init(self: Any, **given: Any) -> None:
        for name in sorted(given.keys() - ours):
            if name in _CALLED:
                raise ParameterError(f"{name} is called {_CALLED[name]} here", name)
            if not is_neutral(given[name], SAMPLING.get(name, ())):
                if name in _INSTEAD or name in SAMPLING:
                    hint = _INSTEAD.get(name)
                    raise ParameterError(f"{name}={given[name]!r} is not offered{f': {hint}' if hint else ''}", name)
                raise TypeError(f"{cls.__name__} has no field {name}; it has {', '.join(sorted(ours))}")
            del given[name]
        generated(self, **given)

    cls.__init__ = init
    return cls


def _option(default: Any, help: str) -> Any:
    """A field whose line of help the command line shows."""
    return field(default=default, metadata={"help": help})


@_named_refusals
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next tokens are chosen. Every value is checked; a ParameterError names the field and what is legal.

    The order in which the rules apply, with formulas, is told in `llama.kernels.cpu.sampling`. seed=None draws fresh
    entropy, and so does -1; other negative seeds count modulo 2**64. The seed used comes back with the output. It is
    below 2**53: a larger one is mixed down. max_tokens=None means the rest of the context.
    """

    n: int = _option(1, "completions per prompt")
    temperature: float = _option(1.0, "0 = greedy, up to 5")
    top_p: float = _option(1.0, "keep the most probable tokens up to this share, 1 = off")
    top_k: int = _option(0, "keep that many tokens, 0 = off")
    min_p: float = _option(0.0, "keep tokens at least this probable relative to the best")
    repetition_penalty: float = _option(1.0, "divide the logits of tokens already seen, 1 = off")
    frequency_penalty: float = _option(0.0, "subtract this for each time a token was generated")
    presence_penalty: float = _option(0.0, "subtract this if a token was generated")
    logit_bias: Mapping[int, float] | None = _option(None, "add to the logits of these token ids")
    seed: int | None = _option(None, "makes the answer repeatable")
    max_tokens: int | None = _option(256, "the most tokens of an answer, none = the rest of the context")
    min_tokens: int = _option(0, "no end before that many tokens")
    stop: str | SequenceOf[str] = _option((), "end before any of these texts")
    stop_token_ids: SequenceOf[int] = _option((), "end at any of these token ids")
    bad_words: str | SequenceOf[str] = _option((), "words that must not occur, at a text's beginning or behind a space")
    allowed_token_ids: SequenceOf[int] | None = _option(None, "the only token ids that may occur")
    include_stop_str_in_output: bool = _option(False, "keep the text that stopped the answer")
    ignore_eos: bool = _option(False, "continue after the model's own end")
    skip_special_tokens: bool = _option(True, "leave special tokens out of the text")
    detokenize: bool = _option(True, "make text of the tokens")
    truncate_prompt_tokens: int | None = _option(
        None, "keep that many of the prompt's last tokens, -1 = as many as leave room for max_tokens"
    )
    logprobs: int | None = _option(None, "log-probabilities of that many top tokens, -1 = of all")
    prompt_logprobs: int | None = _option(None, "the same for the prompt's tokens")
    logprobs_mode: Literal["raw", "processed"] = _option("raw", "processed: after penalties, temperature and filters")
    flat_logprobs: bool = False  # both as a FlatLogprobs, which has arrays and reads as the list of dicts
    response_format: Mapping[str, Any] | None = _option(None, 'constrain the answer, such as {"type": "json_object"}')
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = _option(  # noqa: RUF009
        None, 'the same as vLLM has it, such as {"choice": ["yes", "no"]}'
    )
    # f(prompt_ids, output_ids, logits [vocab]) -> logits, in this order, behind penalties and masks, before temperature
    logits_processors: SequenceOf[Callable[..., Any]] | None = ()
    guidance_scale: float | None = _option(None, "classifier-free guidance away from negative_prompt, 1 = off")
    negative_prompt: str | SequenceOf[int] | None = _option(
        None, "what guidance_scale leads away from (the prompt's last token)"
    )
    prediction: str | SequenceOf[int] | None = _option(None, "what the answer may be like: a text to draft from")
    speculative: bool = _option(True, "verify drafts of the next tokens, if the engine has a speculative_config")
    cache_salt: str | None = _option(None, "share the prefix cache with requests of the same salt alone")
    priority: int = _option(0, "lower ones run first, where the engine's scheduling_policy is priority")

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("n", checked_integer("n", self.n, 1, MAX_COMPLETIONS))
        put("temperature", _number("temperature", self.temperature, 0, 5))
        put("top_p", _number("top_p", self.top_p, 0, 1))
        put("top_k", max(0, checked_integer("top_k", self.top_k, -1)))
        put("min_p", _number("min_p", self.min_p, 0, 1))
        put("repetition_penalty", _positive("repetition_penalty", self.repetition_penalty))
        put("frequency_penalty", _number("frequency_penalty", self.frequency_penalty, -2, 2))
        put("presence_penalty", _number("presence_penalty", self.presence_penalty, -2, 2))
        put("logit_bias", _bias(self.logit_bias))
        put("seed", _seed(self.seed))
        put(
            "max_tokens",
            None if self.max_tokens is None else checked_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS),
        )
        put("min_tokens", checked_integer("min_tokens", self.min_tokens, 0, MAX_TOKENS))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise refusal("min_tokens", f"at most max_tokens ({self.max_tokens})", self.min_tokens)
        put("stop", _texts("stop", self.stop))
        put("bad_words", _texts("bad_words", self.bad_words))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", _allowed(self.allowed_token_ids))
        ids = _listed("stop_token_ids", self.stop_token_ids, "token ids")
        checked = [checked_integer("stop_token_ids", each, 0, place=": each id") for each in ids]
        put("stop_token_ids", tuple(dict.fromkeys(checked)))
        for name in ("prediction", "negative_prompt"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_text(name, value)
            elif value is not None:
                ids = _listed(name, value, "token ids, or a text")
                put(name, tuple(checked_integer(name, each, 0, place=": each id") for each in ids))
        self._check_processors()
        for option in fields(self):
            if isinstance(option.default, bool) and not isinstance(getattr(self, option.name), bool):
                raise refusal(option.name, "True or False", getattr(self, option.name))
        if self.stop and not self.detokenize:
            raise ParameterError("stop needs detokenize=True: stop strings are looked for in the text", "stop")
        if self.truncate_prompt_tokens is not None:
            put("truncate_prompt_tokens", checked_integer("truncate_prompt_tokens", self.truncate_prompt_tokens, -1))
            if self.truncate_prompt_tokens == 0:
                raise refusal("truncate_prompt_tokens", "an integer of at least 1, or -1", 0)
        put("priority", checked_integer("priority", self.priority, -(2**31), 2**31 - 1))
        if self.cache_salt is not None:
            if not isinstance(self.cache_salt, str) or not self.cache_salt:
                raise refusal("cache_salt", "a text that is not empty, or None", self.cache_salt)
            _check_text("cache_salt", self.cache_salt)
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            put(name, None if wanted is None else checked_integer(name, wanted, -1, MAX_TOKENS))
        if not is_one_of(self.logprobs_mode, ("raw", "processed")):
            raise refusal("logprobs_mode", '"raw" or "processed"', self.logprobs_mode)
        put("response_format", _response_format(self.response_format))
        if self.structured_outputs is not None:
            put("structured_outputs", StructuredOutputsParams.of(self.structured_outputs))
            if self.response_format is not None:
                both = "structured_outputs and response_format both constrain the answer: give one of them"
                raise ParameterError(both, "structured_outputs")

    def _check_processors(self) -> None:
        functions = _listed("logits_processors", self.logits_processors, "functions")
        if not all(map(callable, functions)):
            raise refusal("logits_processors", "a list of functions", self.logits_processors)
        object.__setattr__(self, "logits_processors", tuple(functions))
        if self.guidance_scale is None:
            if self.negative_prompt is not None:
                raise ParameterError("negative_prompt needs guidance_scale", "negative_prompt")
            return
        scale = _number("guidance_scale", self.guidance_scale, -_MAX_SCALE, _MAX_SCALE)
        if self.negative_prompt is not None and not self.negative_prompt:
            raise refusal("negative_prompt", "a text or token ids that are not empty", self.negative_prompt)
        if self.n > 1:
            raise ParameterError(f"guidance_scale needs n=1, got n={self.n}", "guidance_scale")
        object.__setattr__(self, "guidance_scale", scale)

    @property
    def is_guided(self) -> bool:
        """Its tokens are drawn from the logits of two prompts."""
        return self.guidance_scale not in (None, 1.0)

    @property
    def constraint(self) -> Mapping[str, Any] | None:
        """What the answer is held to, whichever field says so."""
        if isinstance(self.structured_outputs, StructuredOutputsParams):
            return self.structured_outputs.constraint
        return self.response_format

    @property
    def constrained_by(self) -> str | None:
        """The field that says so."""
        if self.constraint is None:
            return None
        return "response_format" if self.structured_outputs is None else "structured_outputs"


def over_defaults(defaults: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """A checkpoint's `defaults` with the fields that a request names. Raises ParameterError.

    Its max_tokens may lie below the checkpoint's min_tokens: that is no mistake of a request which names none."""
    most = given.get("max_tokens")
    if most is not None and "min_tokens" not in given:
        given = {**given, "min_tokens": min(defaults.min_tokens, most)}
    return replace(defaults, **given)


def _finite(value: Any) -> float | None:
    """A real number as a float; None for anything else, bool, NaN and infinities among it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int beyond any float
        return None
    return number if math.isfinite(number) else None


def _number(name: str, value: Any, low: float, high: float, place: str = "") -> float:
    number = _finite(value)
    if number is None or not low <= number <= high:
        raise refusal(name, f"a number from {low} to {high}", value, place)
    return number


def _positive(name: str, value: Any) -> float:
    number = _finite(value)
    if number is None or number <= 0:
        raise refusal(name, "a number above 0", value)
    return number


def _seed(value: Any) -> int | None:
    seed = -1 if value is None else checked_integer("seed", value, -(2**63), 2**64 - 1)
    return None if seed == -1 else seed % 2**64


def _listed(name: str, values: Any, what: str) -> list[Any]:
    if values is None:
        return []
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise refusal(name, f"a list of {what}", values)
    try:
        return list(values)
    except TypeError:  # a tensor or array of one number
        raise refusal(name, f"a list of {what}", values) from None


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else _listed(name, value, "strings, or one string")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ParameterError(f"{name} must hold strings that are not empty, got {reprlib.repr(text)}", name)
        _check_text(name, text)
    return tuple(texts)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        told = f"got a lone surrogate in {reprlib.repr(text)}"
        raise ParameterError(f"{name} must hold valid text, {told}", name) from None


def _allowed(value: Any) -> tuple[int, ...]:
    ids = _listed("allowed_token_ids", value, "token ids")
    if not ids:
        raise refusal("allowed_token_ids", "a list of at least one token id", value)
    return tuple(dict.fromkeys(checked_integer("allowed_token_ids", each, 0, place=": each id") for each in ids))


def _bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise refusal("logit_bias", "a mapping of token ids to numbers from -100 to 100", value)
    bias = {checked_integer("logit_bias", each, 0, place=": each token id"): value[each] for each in value}
    return {each: _number("logit_bias", number, -100, 100, f"[{each}]") for each, number in bias.items()} or None


def _response_format(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise refusal("response_format", 'a mapping with a "type"', value)
    kind = value.get("type")
    if is_one_of(kind, ("text",)) and len(value) == 1:
        return None
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise refusal("response_format", 'one of "text", "json_object", "json_schema", "regex"', kind, '["type"]')
    content = _FORMATS[kind]
    legal = {"type"} if content is None else {"type", content[0]}
    if value.keys() - legal:
        unknown = sorted(value.keys() - legal, key=str)[0]
        raise ParameterError(f"response_format of type {kind} has no key {unknown!r}", "response_format")
    if content is not None:
        key, holds, what = content
        given = value.get(key)
        is_empty = holds is str and is_one_of(given, ("",))
        if is_empty or not isinstance(given, holds):
            why = ", and an empty one allows no text" if is_empty else ""
            raise refusal("response_format", what + why, given, f'["{key}"]')
    return dict(value)
