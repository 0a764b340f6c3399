"""SpeculativeConfig: where drafts of the next tokens come from, and how many a step verifies. Runs without torch.

The keys are vLLM's. What a method does not use is refused, as is a method that this engine does not have.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama.api.errors import ParameterError, refusal

MOST_DRAFTS = 32
LONGEST_NGRAM = 16  # each size up to prompt_lookup_max is looked up and kept apart
# disable_by_batch_size by the type of the device. A CPU computes a few rows in little more time than one, a GPU many.
BATCH_SIZES = {"cpu": 8, "cuda": 64}


# Names of vLLM's that a method takes, beside those that all take.
_KEYS = {"ngram": ("prompt_lookup_min", "prompt_lookup_max"), "draft_model": ("model", "quantization")}
_ALL_TAKE = ("method", "num_speculative_tokens", "disable_by_batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    method: str
    num_speculative_tokens: int = 4  # the most drafts of one sequence in one step
    model: str | None = None  # the draft model's folder
    quantization: str | None = None  # the draft model's, as LLM(quantization=...) is the model's
    prompt_lookup_min: int = 1  # an n-gram that short is looked up, if none that is longer has been seen before
    prompt_lookup_max: int = 4
    disable_by_batch_size: int | None = None  # no drafts where more sequences decode; None = BATCH_SIZES

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "SpeculativeConfig":
        """Raises ParameterError for what is not legal."""
        if not isinstance(given, Mapping):
            raise refusal(_NAME, 'a mapping such as {"method": "ngram", "num_speculative_tokens": 4}', given)
        method = given.get("method")
        if not isinstance(method, str) or method not in _KEYS:
            raise refusal(_NAME, '"ngram" or "draft_model"', method, '["method"]')
        values = {name: value for name, value in given.items() if value is not None}
        legal = (*_ALL_TAKE, *_KEYS[method])
        for name in sorted(values.keys() - set(legal), key=str):
            told = f"speculative_config has no key {name!r} with method {method}; it has {', '.join(legal)}"
            raise ParameterError(told, _NAME)
        for name, least, most in (
            ("num_speculative_tokens", 1, MOST_DRAFTS),
            ("prompt_lookup_min", 1, LONGEST_NGRAM),
            ("prompt_lookup_max", 1, LONGEST_NGRAM),
            ("disable_by_batch_size", 1, 65536),
        ):
            value = values.get(name, least)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise refusal(_NAME, f"an integer from {least} to {most}", value, f'["{name}"]')
        if method == "draft_model" and not (isinstance(values.get("model"), str) and values["model"]):
            raise refusal(_NAME, "the folder of the draft model", values.get("model"), '["model"]')
        shortest = values.get("prompt_lookup_min", 1)
        longest = values.setdefault("prompt_lookup_max", max(4, shortest))
        if shortest > longest:
            raise refusal(_NAME, f"at most prompt_lookup_max ({longest})", shortest, '["prompt_lookup_min"]')
        return cls(**values)


_NAME = "speculative_config"
