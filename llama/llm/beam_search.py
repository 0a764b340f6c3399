"""Beam search as transformers does it (`num_beams`, early_stopping=False), with vLLM's names.

Every step asks the engine for the logits of all live beams; what their tokens have in common is in the prefix cache.
"""

import reprlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from llama.api.errors import ParameterError, checked_integer, refusal

MOST_PENALTY = 10  # length ** penalty stays a float at any length


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """The `beam_width` best sequences by sum of log-probabilities / length ** length_penalty, the length counting the
    new tokens. No sampling: temperature must be 0."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            checked_integer(name, getattr(self, name), 1)
        if not isinstance(self.ignore_eos, bool):
            raise refusal("ignore_eos", "True or False", self.ignore_eos)
        penalty = self.length_penalty
        if isinstance(penalty, bool) or not isinstance(penalty, Real) or not abs(penalty) <= MOST_PENALTY:
            raise refusal("length_penalty", f"a number from -{MOST_PENALTY} to {MOST_PENALTY}", penalty)
        is_number = isinstance(self.temperature, Real) and not isinstance(self.temperature, bool)
        if not is_number or self.temperature != 0:
            told = f"beam search samples nothing: temperature must be 0, got {reprlib.repr(self.temperature)}"
            raise ParameterError(told, "temperature")


@dataclass(slots=True)
class BeamSearchSequence:
    tokens: list[int]  # the prompt's too
    cum_logprob: float
    text: str = ""  # of the new tokens
    finish_reason: str | None = None  # "stop" behind an end of text, which is the last token, or "length"


@dataclass(slots=True)
class BeamSearchOutput:
    sequences: list[BeamSearchSequence]  # the best first


@dataclass(slots=True)
class _Search:
    """One prompt's: `live` beams and `done` ones with their scores, both the best first."""

    prompt: list[int]
    max_tokens: int
    live: list[tuple[float, list[int]]]
    done: list[tuple[float, BeamSearchSequence]] = field(default_factory=list)
    is_over: bool = False

    def take(self, logits: Sequence[Tensor], params: BeamSearchParams, eos: Collection[int]) -> None:
        """One more token for each live beam, from its logits [vocab]."""
        width = params.beam_width
        kept = max(2, 1 + len(eos)) * width
        length = len(self.live[0][1]) + 1
        sums = torch.stack([score + row.log_softmax(-1) for (score, _), row in zip(self.live, logits, strict=True)])
        best = sums.flatten().topk(min(kept, sums.numel()))
        is_last = length == self.max_tokens
        live: list[tuple[float, list[int]]] = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            beam, token = divmod(place, sums.shape[1])
            tokens = [*self.live[beam][1], token]
            if not is_last and token not in eos:
                live.append((score, tokens))
            elif rank < width:
                reason = "stop" if token in eos else "length"
                sequence = BeamSearchSequence([*self.prompt, *tokens], score, finish_reason=reason)
                self.done.append((score / length**params.length_penalty, sequence))
        self.done = sorted(self.done, key=lambda one: -one[0])[:width]
        self.live = live[:width]
        if self.live and len(self.done) == width:  # none of those that live can become better, if the length stays
            self.is_over = self.live[0][0] / length**params.length_penalty <= self.done[-1][0]
        self.is_over |= is_last or not self.live


def search(
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    *,
    eos_token_ids: Collection[int],
    context_len: int,
    logits_of: Callable[[list[tuple[int, list[int]]]], list[Tensor]],
) -> list[BeamSearchOutput]:
    """`logits_of` gives those behind each of several (number of the prompt, tokens), float32 or float64."""
    eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
    searches = [_Search(p, min(params.max_tokens, context_len - len(p)), [(0.0, [])]) for p in prompts]
    while open_ := [(number, one) for number, one in enumerate(searches) if not one.is_over]:
        logits = iter(logits_of([(number, one.prompt + tokens) for number, one in open_ for _, tokens in one.live]))
        for _, one in open_:
            one.take([next(logits) for _ in one.live], params, eos)
    return [BeamSearchOutput([sequence for _, sequence in one.done]) for one in searches]
