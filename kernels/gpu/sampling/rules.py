"""A row's logits after the rules that change them, and how rows are cut into tiles.

`scan` alone applies the rules; where there are any it leaves the changed logits in float32 for the other kernels, which
otherwise read the logits as they came. All kernels are compiled without fused multiply-adds, so that they agree on
every bit of what they compute twice.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.checks import INTERPRETED
from llama.kernels.gpu.launch import cdiv, next_power_of_2
from llama.kernels.types import SamplerRows, SamplerState

# Logits that one program holds at a time, and the programs that a launch aims at: a row of a small batch is split over
# many, since one program alone moves only a fraction of what memory can.
TILE = 1024
PROGRAMS = 2048
_MOST_SORTED = 1024  # four of them lie in each thread's registers

_BIASES = tl.constexpr(128)  # whose ids are read together


def split_rows(rows: int, vocab: int) -> tuple[int, int]:
    """-> splits, which are the programs of each row, and how many of the row's tiles each of them walks."""
    num_tiles = cdiv(vocab, TILE)
    tiles = cdiv(num_tiles, max(1, PROGRAMS // max(rows, 1)))
    return cdiv(num_tiles, tiles), tiles


def max_splits(vocab: int) -> int:
    """A power of two, the same for any number of rows."""
    return next_power_of_2(cdiv(vocab, TILE))


def id_bits(vocab: int) -> int:
    """They hold any id of any tile."""
    return (cdiv(vocab, TILE) * TILE - 1).bit_length()


def sort_size(vocab: int) -> int:
    """Up to how many of a row's tokens near its cuts are sorted, a power of two; the cuts among more are searched for.

    0: all are, which the interpreter does in milliseconds where a sort takes seconds.
    """
    return 0 if INTERPRETED else next_power_of_2(min(max(vocab, 32), _MOST_SORTED))


class Rules(NamedTuple):
    """Where a kernel finds the logits and the rows' parameters. What a call does not have is any tensor of its type."""

    logits: Tensor
    logits_stride: int
    penalty_rows: Tensor
    keys: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    bias_starts: Tensor
    bias_ids: Tensor
    bias_values: Tensor
    mask: Tensor
    prompt_mask: Tensor
    counts: Tensor


_TENSORS = Rules._fields[2:]  # under the names that SamplerRows and SamplerState have for them


def gather_rules(logits: Tensor, rows: SamplerRows, state: SamplerState | None) -> tuple[Rules, dict[str, int]]:
    """-> rules, and which of the optional ones exist. These flags are arguments, not constants: a first request with a
    bias must not wait for a compiler."""
    penalties = state if rows.any_penalty else None
    unused = {name: rows.temperature if name == "bias_values" else rows.penalty_rows for name in _TENSORS}
    found = {name: getattr(rows if hasattr(rows, name) else penalties, name, None) for name in _TENSORS}
    tensors = unused | {name: tensor for name, tensor in found.items() if tensor is not None}
    has = {"has_bias": rows.bias_ids, "has_state": penalties, "has_mask": rows.mask}
    return Rules(logits, logits.stride(0), **tensors), {name: int(value is not None) for name, value in has.items()}


@triton.jit
def tile_ids(first, TILE: tl.constexpr):
    """TILE consecutive token ids as [TILE / 32, 32]: one row per word of a bit mask."""
    return first + tl.arange(0, TILE // 32)[:, None] * 32 + tl.arange(0, 32)[None, :]


@triton.jit
def _bits(words, first, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """The tile's bits of one row's mask, as 0 and 1."""
    at = first // 32 + tl.arange(0, TILE // 32)[:, None]
    return (tl.load(words + at, mask=at * 32 < VOCAB, other=0) >> tl.arange(0, 32)[None, :]) & 1


@triton.jit
def load_tile(source, stride, row, first, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Ids and values in float32 of one tile of a row; -inf past the vocabulary."""
    ids = tile_ids(first, TILE)
    return ids, tl.load(source + row * stride + ids, mask=ids < VOCAB, other=-float("inf")).to(tl.float32)


@triton.jit
def _biased(rules, row, first, ids, logits, TILE: tl.constexpr):
    """Logits of one tile plus the row's biases. Their ids are read many at a time; those of the tile, mostly few, are
    added one by one."""
    end = tl.load(rules.bias_starts + row + 1)
    for start in range(tl.load(rules.bias_starts + row), end, _BIASES):
        entries = start + tl.arange(0, _BIASES)
        tokens = tl.load(rules.bias_ids + entries, mask=entries < end, other=-1)
        left = tl.where((tokens >= first) & (tokens < first + TILE), entries, end)
        entry = tl.min(left)
        while entry < end:
            token = tl.load(rules.bias_ids + entry)
            logits = tl.where(ids == token, logits + tl.load(rules.bias_values + entry), logits)
            left = tl.where(left > entry, left, end)
            entry = tl.min(left)
    return logits


@triton.jit
def load_changed(rules, row, first, has_bias, has_state, has_mask, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """Ids and logits of one tile after bias, penalties and mask, in this order."""
    ids, logits = load_tile(rules.logits, rules.logits_stride, row, first, VOCAB, TILE)
    WORDS: tl.constexpr = (VOCAB + 31) // 32

    if has_bias != 0:
        logits = _biased(rules, row, first, ids, logits, TILE)

    if has_state != 0:
        penalty_row = tl.load(rules.penalty_rows + row).to(tl.int64)
        if penalty_row >= 0:
            counts = tl.load(rules.counts + penalty_row * VOCAB + ids, mask=ids < VOCAB, other=0)
            repetition = tl.load(rules.repetition_penalty + row)
            if repetition != 1:
                seen = (_bits(rules.prompt_mask + penalty_row * WORDS, first, VOCAB, TILE) != 0) | (counts > 0)
                scaled = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
                logits = tl.where(seen, scaled, logits)
            frequency = tl.load(rules.frequency_penalty + row)
            presence = tl.load(rules.presence_penalty + row)
            logits -= frequency * counts.to(tl.float32)
            logits -= tl.where(counts > 0, presence, 0.0)

    if has_mask != 0:
        # Subtracting infinity, where writing it would hide a NaN or +inf.
        allowed = _bits(rules.mask + row * WORDS, first, VOCAB, TILE) != 0
        logits = tl.where(allowed, logits, logits - float("inf"))
    return ids, logits


@triton.jit
def row_maximum(maxima, row, splits, MAX_SPLITS: tl.constexpr):
    """The largest changed logit of a row, from its splits'. Infinite or finite: whether the row is bad or not."""
    split = tl.arange(0, MAX_SPLITS)
    return tl.max(tl.load(maxima + row * splits + split, mask=split < splits, other=-float("inf")))


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def depths(logits, maximum, temperature):
    """How far each token lies below the row's best in units of the temperature, >= 0: -log of its mass."""
    return tl.abs(maximum - logits) / temperature  # the bits of -0.0 would come last, not first
