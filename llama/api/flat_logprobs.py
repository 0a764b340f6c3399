"""FlatLogprobs: the log-probabilities of many positions in four arrays instead of a dict for each. Runs without torch.

Dicts cost microseconds for each entry; arrays do not, however many entries a position has. It reads as the list of
dicts that it stands for, each of which is made when it is asked for.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from llama.api.outputs import Logprob


class FlatEntry(NamedTuple):
    """Of one position: the token itself first, then the most probable others."""

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.floating[Any]]
    ranks: NDArray[np.int64]


_NOTHING = FlatEntry(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int64))


class FlatLogprobs(Sequence[dict[int, Logprob] | None]):
    """vLLM's class, with arrays: position i has the entries start_indices[i] : end_indices[i] of `token_ids`,
    `logprobs`, `ranks` and `decoded_tokens`. A position without entries (a prompt's first) reads as None.

    `decode` gives the text of a token, None = there is none.
    """

    def __init__(
        self, entries: Iterable[FlatEntry | None] = (), decode: Callable[[int], str | None] = lambda token: None
    ) -> None:
        self._parts = [entry or _NOTHING for entry in entries]
        self._decode = decode

    def extend(self, other: "FlatLogprobs") -> None:
        self._parts += other._parts

    @property
    def end_indices(self) -> NDArray[np.int64]:
        return np.cumsum([len(part.token_ids) for part in self._parts], dtype=np.int64)

    @property
    def start_indices(self) -> NDArray[np.int64]:
        return self.end_indices - np.array([len(part.token_ids) for part in self._parts], np.int64)

    @property
    def token_ids(self) -> NDArray[np.int64]:
        return np.concatenate([_NOTHING.token_ids, *(part.token_ids for part in self._parts)])

    @property
    def logprobs(self) -> NDArray[np.floating[Any]]:
        return np.concatenate([_NOTHING.logprobs, *(part.logprobs for part in self._parts)])

    @property
    def ranks(self) -> NDArray[np.int64]:
        return np.concatenate([_NOTHING.ranks, *(part.ranks for part in self._parts)])

    @property
    def decoded_tokens(self) -> list[str | None]:
        return [self._decode(token) for token in self.token_ids.tolist()]

    @property
    def cumulative_logprob(self) -> float:
        """The sum over the tokens themselves."""
        return sum(float(part.logprobs[0]) for part in self._parts if len(part.logprobs))

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[dict[int, Logprob] | None]:
        return map(self._dict, self._parts)

    @overload
    def __getitem__(self, place: int) -> dict[int, Logprob] | None: ...
    @overload
    def __getitem__(self, place: slice) -> "FlatLogprobs": ...
    def __getitem__(self, place: int | slice) -> "dict[int, Logprob] | FlatLogprobs | None":
        if isinstance(place, slice):
            return FlatLogprobs(self._parts[place], self._decode)
        return self._dict(self._parts[place])

    def __eq__(self, other: object) -> bool:
        """Whether the lists of dicts are equal."""
        return isinstance(other, Sequence) and list(self) == list(other)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle or copy has the texts of its tokens, not the tokenizer."""
        texts = {token: self._decode(token) for token in set(self.token_ids.tolist())}
        return FlatLogprobs, (self._parts, texts.get)

    def __repr__(self) -> str:
        return f"FlatLogprobs({len(self)} positions, {sum(len(part.token_ids) for part in self._parts)} entries)"

    def _dict(self, part: FlatEntry) -> dict[int, Logprob] | None:
        columns = zip(part.token_ids.tolist(), part.logprobs.tolist(), part.ranks.tolist(), strict=True)
        return {token: Logprob(logprob, rank, self._decode(token)) for token, logprob, rank in columns} or None
