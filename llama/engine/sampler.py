"""The host side of sampling: what each row of the engine wants, as the tensors that `ops.sample` takes.

SamplerTable keeps one entry per row (the place of a running sequence) and makes SamplerRows of any choice of rows. As
long as that choice stays the same only the noise keys are new in a step; nothing here looks at logits or draws.
Seeds end here: the ops see two key words per row, mixed from (seed, position).
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llama.api.params import MAX_SEED, SamplingParams
from llama.engine.device import to_device
from llama.kernels.types import LOGPROBS_OFF, LOGPROBS_PROCESSED, LOGPROBS_RAW, SamplerRows, SamplerState

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FEW_ROWS = 4  # up to here Python's integers are faster than NumPy's calls
_LONGEST = 1 << 40  # more tokens than any context has; a sum with it fits into 64 bits
_MODES = {"raw": LOGPROBS_RAW, "processed": LOGPROBS_PROCESSED}
# Beyond these float32 would round a temperature or a penalty to 0 or infinity; no logit tells the difference.
_SMALLEST, _LARGEST = 1e-30, 1e30


def splitmix64(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


def child_seed(seed: int, index: int) -> int:
    """The seed of completion `index` of a request with `seed`: at most MAX_SEED, and then that of a request's only
    completion is the request's own."""
    if index == 0:
        return seed if seed <= MAX_SEED else splitmix64(seed) & MAX_SEED
    return splitmix64(seed ^ splitmix64(index)) & MAX_SEED


class Seeds:
    """Seeds for requests that bring none: fresh entropy, or, given a seed, the same ones in the same order each run."""

    def __init__(self, seed: int | None) -> None:
        self._state = seed

    def next(self) -> int:
        if self._state is None:
            return secrets.randbits(53)
        self._state = (self._state + _GOLDEN) & _MASK64
        return splitmix64(self._state) & MAX_SEED


def noise_keys(seeds: NDArray[np.uint64], positions: NDArray[np.integer[Any]]) -> NDArray[np.int32]:
    """The key words [rows, 2] of the tokens drawn at absolute `positions` under `seeds`, the low word first."""
    if len(seeds) <= _FEW_ROWS:
        pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
        mixed = np.array([splitmix64(seed ^ splitmix64((at + _GOLDEN) & _MASK64)) for seed, at in pairs], "<u8")
    else:
        mixed = positions.astype(np.uint64)
        mixed += np.uint64(_GOLDEN)
        _splitmix64(mixed)
        mixed ^= seeds
        _splitmix64(mixed)
    return mixed.astype("<u8", copy=False).view("<i4").reshape(-1, 2)


def _splitmix64(z: NDArray[np.uint64]) -> None:
    """`splitmix64` in place."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)


# What a padding row holds: greedy, every rule off.
_PADDING = {
    "temperature": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "penalty_rows": -1,
    "top_k": 0,
    "logprobs_modes": LOGPROBS_OFF,
}


class SamplerTable:
    """One entry per row of the engine, and the penalty state of the rows that need one.

    dtype is that of the sampler's arithmetic: float64 for float64 logits, else float32.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.vocab_size = vocab_size
        self.state: SamplerState | None = None  # made with the first row that has a penalty
        self._device = torch.device(device)
        self._eos_token_ids = frozenset(token for token in eos_token_ids if token < vocab_size)
        self._float = np.float64 if dtype == torch.float64 else np.float32
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        floats = [(name, self._float) for name in names]
        integers = [("penalty_rows", np.int32), ("top_k", np.int32), ("logprobs_modes", np.int8)]
        self._entries = np.zeros(max_num_seqs, [*floats, *integers])
        self._num_logprobs = np.full(max_num_seqs, -1)
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._ban_until = np.zeros(max_num_seqs, np.int64)  # stop ids are banned at positions below
        self._bias: list[dict[int, float]] = [{} for _ in range(max_num_seqs)]
        self._banned: list[dict[int, float]] = [{} for _ in range(max_num_seqs)]  # the bias while stop ids are banned

        # The last choice of rows, and what was made for it.
        self._chosen_ids: bytes | None = None
        self._chosen_seeds = self._seeds[:0]
        self._chosen_ban_until: NDArray[np.int64] | None = None  # None: stop ids are banned in none of them
        self._chosen_bans: bytes | None = None
        self._chosen_entries = self._entries[:0]
        self._flags: dict[str, Any] = {}  # what SamplerRows knows of its tensors' content
        self._tensors: dict[str, Any] | None = None
        self._greedy: SamplerRows | None = None  # where no row has noise or a mask: none of it changes in a step
        self._bias_tensors: dict[str, Any] = {}
        self._written: NDArray[Any] | None = None  # the entries that the arrays of `write` hold

    def set_row(
        self,
        row: int,
        params: SamplingParams,
        seed: int,
        prompt_token_ids: Sequence[int] | NDArray[np.integer[Any]],
        output_token_ids: Sequence[int] | NDArray[np.integer[Any]] = (),
    ) -> None:
        """Gives `row` to a sequence that has this prompt and has generated these tokens so far."""
        penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        penalised, sampled = penalties != (1.0, 0.0, 0.0), params.temperature > 0
        entry = self._entries[row]
        entry["temperature"] = max(params.temperature, _SMALLEST) if sampled else 0
        entry["top_p"] = params.top_p if sampled else 1
        entry["min_p"] = params.min_p if sampled else 0
        entry["top_k"] = params.top_k if sampled and params.top_k < self.vocab_size else 0
        entry["repetition_penalty"] = min(max(params.repetition_penalty, _SMALLEST), _LARGEST)
        entry["frequency_penalty"], entry["presence_penalty"] = params.frequency_penalty, params.presence_penalty
        entry["penalty_rows"] = row if penalised else -1
        entry["logprobs_modes"] = LOGPROBS_OFF if params.logprobs is None else _MODES[params.logprobs_mode]
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._seeds[row] = seed

        bans = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_token_ids)
        min_tokens = min(params.min_tokens, _LONGEST)
        self._ban_until[row] = len(prompt_token_ids) + min_tokens if min_tokens and bans else 0
        self._bias[row] = dict(params.logit_bias or {})
        self._banned[row] = self._bias[row] | dict.fromkeys(bans, -np.inf)
        if penalised:
            if self.state is None:
                self.state = SamplerState(len(self._entries), self.vocab_size, self._device)
            prompt, output = (torch.from_numpy(np.array(ids, np.int64)) for ids in (prompt_token_ids, output_token_ids))
            self.state.set_row(row, prompt, output)
        self._chosen_ids = None

    def rows(
        self,
        row_ids: NDArray[np.integer[Any]],
        positions: NDArray[np.integer[Any]],
        masks: NDArray[np.int32] | None = None,
    ) -> SamplerRows:
        """What `ops.sample` needs to draw the token at positions[i] of row row_ids[i], for all i.

        masks [rows, ceil(vocab / 32)] are grammar bit masks, all bits set for rows without a grammar.
        """
        self._choose(row_ids, positions, masks)
        if masks is None and self._greedy is not None:
            return self._greedy
        if self._tensors is None:
            entries = self._chosen_entries
            self._tensors = {name: to_device(entries[name], self._device) for name in entries.dtype.names or ()}
        keys = to_device(noise_keys(self._chosen_seeds, positions), self._device)
        mask = None if masks is None else to_device(masks, self._device)
        rows = SamplerRows(keys=keys, mask=mask, **self._tensors, **self._bias_tensors, **self._flags)
        if masks is None and rows.all_greedy:
            self._greedy = rows
        return rows

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape of one row and dtype of the arrays that `write` fills."""
        dtypes = self._entries.dtype
        return {"keys": ((2,), np.int32)} | {name: ((), dtypes[name].type) for name in dtypes.names or ()}

    def write(
        self,
        row_ids: NDArray[np.integer[Any]],
        positions: NDArray[np.integer[Any]],
        arrays: Mapping[str, NDArray[Any]],
    ) -> dict[str, Any] | None:
        """Put what `rows` would hold into arrays that are the same in every call; behind it they hold padding rows. ->
        the other fields of `rows`.

        None if some row has a bias, which has no fixed place: then only `rows` can tell.
        """
        self._choose(row_ids, positions)
        if self._bias_tensors["bias_ids"] is not None:
            return None
        count = len(row_ids)
        if self._written is not self._chosen_entries:
            for name, neutral in _PADDING.items():
                arrays[name][:count] = self._chosen_entries[name]
                arrays[name][count:] = neutral
            self._written = self._chosen_entries
        arrays["keys"][:count] = noise_keys(self._chosen_seeds, positions)
        return self._flags

    def _choose(
        self,
        row_ids: NDArray[np.integer[Any]],
        positions: NDArray[np.integer[Any]],
        masks: NDArray[np.int32] | None = None,
    ) -> None:
        """Look up all that stays while the same rows are asked for, and the bias, which may end at a position."""
        if row_ids.tobytes() != self._chosen_ids:
            entries = self._chosen_entries = self._entries[row_ids]
            self._flags = {
                "num_logprobs": int(self._num_logprobs[row_ids].max(initial=-1)),
                "any_penalty": bool((entries["penalty_rows"] >= 0).any()),
                "any_filter": bool(((entries["top_k"] > 0) | (entries["top_p"] < 1) | (entries["min_p"] > 0)).any()),
                "all_greedy": not entries["temperature"].any(),
                "any_processed": bool((entries["logprobs_modes"] == LOGPROBS_PROCESSED).any()),
            }
            self._tensors = self._greedy = None
            self._chosen_seeds = self._seeds[row_ids]
            ban_until = self._ban_until[row_ids]
            self._chosen_ban_until = ban_until if ban_until.any() else None
            self._chosen_bans = None
            self._chosen_ids = row_ids.tobytes()
        if self._chosen_ban_until is None and self._chosen_bans is not None:
            return
        bans = np.zeros(len(row_ids), np.bool_)
        if self._chosen_ban_until is not None:
            bans = positions < self._chosen_ban_until
            if masks is not None:
                for i in np.flatnonzero(bans):
                    bans[i] = self._leaves_any(int(row_ids[i]), masks[i])
        self._set_bias(row_ids, bans)

    def _leaves_any(self, row: int, mask: NDArray[np.int32]) -> bool:
        """Whether the mask allows anything but what is banned in the row: a text that its grammar has completed can
        only end, also before min_tokens."""
        banned = np.array([token for token, value in self._banned[row].items() if value == -np.inf], np.uint32)
        left = mask.astype(np.uint32)
        np.bitwise_and.at(left, banned >> 5, ~(np.uint32(1) << (banned & 31)))
        return bool(left.any())

    def _set_bias(self, row_ids: NDArray[np.integer[Any]], bans: NDArray[np.bool_]) -> None:
        """Makes the bias tensors, unless they hold these bans already."""
        if bans.tobytes() == self._chosen_bans:
            return
        self._chosen_bans = bans.tobytes()
        self._greedy = None
        pairs = zip(row_ids.tolist(), bans.tolist(), strict=True)
        biases = [self._banned[row] if banned else self._bias[row] for row, banned in pairs]
        arrays: dict[str, NDArray[Any] | None] = dict.fromkeys(("bias_starts", "bias_ids", "bias_values"))
        if any(biases):
            arrays["bias_starts"] = np.cumsum([0, *map(len, biases)], dtype=np.int32)
            arrays["bias_ids"] = np.array([token_id for bias in biases for token_id in bias], np.int32)
            arrays["bias_values"] = np.array([value for bias in biases for value in bias.values()], self._float)
        self._bias_tensors = {
            name: None if array is None else to_device(array, self._device) for name, array in arrays.items()
        }
