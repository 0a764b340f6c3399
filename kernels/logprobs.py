"""Log-probabilities: tensors where they were computed, NumPy's arrays once they have come to the host. No torch."""

from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")  # a tensor or an array


class Logprobs(NamedTuple, Generic[T]):
    """Log-probabilities of one token per row and of the row's most probable tokens, ties by lower id first."""

    logprob: T  # [rows]
    rank: T  # [rows] int64, 1 + number of tokens with a strictly greater logit
    top_ids: T  # [rows, k] int64; -1 where fewer than k tokens have any probability
    top_logprobs: T  # [rows, k] descending; -inf where the id is -1
