"""Log-probabilities of one token per row, its rank and the row's best tokens, raw or of the distribution drawn from.

Two launches: every split of a row finds its maximum, sum of exponentials, number of greater values and best tokens (one
read of the logits, each best token one more pass over registers); one program per row merges them. Splits have a fixed
size, so that a row's sum does not depend on the batch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.gpu.launch import Launcher, cdiv
from llama.kernels.gpu.sampling.draw import count_token
from llama.kernels.gpu.sampling.filters import NO_CUT, is_alive, pack
from llama.kernels.gpu.sampling.rules import TILE, Rules, depths, id_bits, load_tile, max_splits, row_maximum
from llama.kernels.logprobs import Logprobs
from llama.kernels.types import LOGPROBS_OFF, LOGPROBS_PROCESSED, LOGPROBS_RAW

_OFF = tl.constexpr(LOGPROBS_OFF)
_RAW = tl.constexpr(LOGPROBS_RAW)
_PROCESSED = tl.constexpr(LOGPROBS_PROCESSED)


@triton.jit
def _pack_value(values, ids, ID_BITS: tl.constexpr):
    """One integer per token, ascending: greater values first, ties by lower id."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)  # -0.0 ties with 0.0
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((0x7FFFFFFF - ascending.to(tl.int64)) << ID_BITS) | ids


@triton.jit
def _unpack_value(packed, ID_BITS: tl.constexpr):
    ascending = (0x7FFFFFFF - (packed >> ID_BITS)).to(tl.int32)
    return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _drawn_values(
    rules,
    draw,
    row,
    first,
    splits,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ID_BITS: tl.constexpr,
):
    """What a processed row's softmax is of: changed logits if greedy, else -depth within the support."""
    ids, logits = load_tile(draw.source, draw.stride, row, first, VOCAB, TILE)
    temperature = tl.load(rules.temperature + row)
    if temperature != 0:
        depth = depths(logits, row_maximum(draw.maxima, row, splits, MAX_SPLITS), temperature)
        kept = is_alive(depth, tl.load(rules.min_p + row)) & (pack(depth, ids, ID_BITS) <= tl.load(draw.cuts + row))
        logits = tl.where(kept, -depth, -float("inf"))
    return ids, logits


@triton.jit(do_not_specialize=["splits", "num_splits", "num_top"])
def logprob_parts_kernel(
    rules,
    draw,  # where DRAWN
    token_ids,
    parts,  # out
    splits,  # of the draw
    num_splits,
    num_top,
    DRAWN: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ID_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    first = split * TILE
    mode = _RAW + 0
    if DRAWN:
        mode = tl.load(draw.modes + row).to(tl.int32)
    if mode != _OFF:
        token = tl.load(token_ids + row).to(tl.int32)
        value = tl.load(rules.logits + row * rules.logits_stride + token).to(tl.float32)
        ids, x = load_tile(rules.logits, rules.logits_stride, row, first, VOCAB, TILE)
        if DRAWN and mode == _PROCESSED:
            near, own = _drawn_values(rules, draw, row, token // 32 * 32, splits, VOCAB, 32, MAX_SPLITS, ID_BITS)
            value = tl.max(tl.where(near == token, own, -float("inf")))
            ids, x = _drawn_values(rules, draw, row, first, splits, VOCAB, TILE, MAX_SPLITS, ID_BITS)
        at = row * num_splits + split
        maximum = tl.max(x)
        tl.store(parts.own + row, value)
        tl.store(parts.maxima + at, maximum)
        tl.store(parts.sums + at, tl.where(maximum > -float("inf"), tl.sum(tl.exp(x - maximum)), 0.0))
        tl.store(parts.greater + at, tl.sum((x > value).to(tl.int32)))
        packed = _pack_value(x, ids, ID_BITS)
        last = tl.full((), -1, tl.int64)
        for place in range(num_top):
            last = tl.min(tl.where(packed > last, packed, NO_CUT))
            tl.store(parts.best + at * num_top + place, last)


@triton.jit(do_not_specialize=["num_splits", "num_top", "has_state"])
def logprob_merge_kernel(
    rules,
    draw,  # where DRAWN
    token_ids,
    parts,
    logprobs,  # [rows] out
    ranks,  # [rows] out
    top_ids,  # [rows, num_top] out
    top_logprobs,  # [rows, num_top] out
    num_splits,
    num_top,
    has_state,  # whether to count the token here
    DRAWN: tl.constexpr,
    VOCAB: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ID_BITS: tl.constexpr,
):
    CHUNK: tl.constexpr = 1024
    row = tl.program_id(0).to(tl.int64)
    mode = _RAW + 0
    if DRAWN:
        mode = tl.load(draw.modes + row).to(tl.int32)
        count_token(rules, row, tl.load(token_ids + row), tl.load(draw.is_bad + row).to(tl.int32), has_state, VOCAB)
    if mode == _OFF:
        tl.store(logprobs + row, 0.0)
        tl.store(ranks + row, 0)
        for place in range(num_top):
            tl.store(top_ids + row * num_top + place, -1)
            tl.store(top_logprobs + row * num_top + place, -float("inf"))
    else:
        split = tl.arange(0, MAX_SPLITS)
        maxima = tl.load(parts.maxima + row * num_splits + split, mask=split < num_splits, other=-float("inf"))
        exponentials = tl.load(parts.sums + row * num_splits + split, mask=split < num_splits, other=0.0)
        maximum = tl.max(maxima)
        log_sum = tl.log(tl.sum(exponentials * tl.exp(maxima - maximum)))
        tl.store(logprobs + row, tl.load(parts.own + row) - maximum - log_sum)
        counts = tl.load(parts.greater + row * num_splits + split, mask=split < num_splits, other=0)
        tl.store(ranks + row, 1 + tl.sum(counts).to(tl.int64))

        best = parts.best + row * num_splits * num_top
        last = tl.full((), -1, tl.int64)
        for place in range(num_top):
            following = tl.full((CHUNK,), NO_CUT, tl.int64)
            for start in range(0, num_splits * num_top, CHUNK):
                at = start + tl.arange(0, CHUNK)
                packed = tl.load(best + at, mask=at < num_splits * num_top, other=NO_CUT)
                following = tl.minimum(following, tl.where(packed > last, packed, NO_CUT))
            last = tl.min(following)
            value = _unpack_value(last, ID_BITS)
            token = tl.where(value > -float("inf"), last & ((1 << ID_BITS) - 1), -1)
            tl.store(top_ids + row * num_top + place, token)
            tl.store(top_logprobs + row * num_top + place, value - maximum - log_sum)


_launch_parts = Launcher(logprob_parts_kernel)
_launch_merge = Launcher(logprob_merge_kernel)


class Draw(NamedTuple):
    """What `sample` leaves behind for the log-probabilities of its tokens."""

    source: Tensor  # [rows, vocab], the changed logits
    stride: int
    is_bad: Tensor  # [rows]
    modes: Tensor  # [rows]
    maxima: Tensor  # [rows, splits] of the changed logits
    cuts: Tensor  # [rows], the largest packed value kept


class Parts(NamedTuple):
    """What the splits of each row leave for the merge."""

    own: Tensor  # [rows] float32, the token's value
    maxima: Tensor  # [rows, splits] float32
    sums: Tensor  # [rows, splits] float32, of exp(value - the split's maximum)
    greater: Tensor  # [rows, splits] int32, values above the token's
    best: Tensor  # [rows, splits, num_top] int64, packed values

    @classmethod
    def allocate(cls, rows: int, splits: int, num_top: int, device: torch.device) -> "Parts":
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            own=empty(rows, dtype=torch.float32),
            maxima=empty(rows, splits, dtype=torch.float32),
            sums=empty(rows, splits, dtype=torch.float32),
            greater=empty(rows, splits, dtype=torch.int32),
            best=empty(rows, splits, num_top, dtype=torch.int64),
        )


def compute_logprobs(
    rules: Rules,
    token_ids: Tensor,
    num_top: int,
    draw: Draw | None = None,
    draw_splits: int = 1,
    counts: bool = False,
) -> Logprobs[Tensor]:
    """Of the rules' logits as they came; after a draw, of what each row's mode asks for.

    `counts`: the tokens are counted here, for the penalties of the next step.
    """
    (rows, vocab), device = rules.logits.shape, token_ids.device
    logprobs = Logprobs(
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.int64, device=device),
        torch.empty(rows, num_top, dtype=torch.int64, device=device),
        torch.empty(rows, num_top, dtype=torch.float32, device=device),
    )
    if rows == 0:
        return logprobs
    num_splits = cdiv(vocab, TILE)
    parts = Parts.allocate(rows, num_splits, num_top, device)
    drawn = draw or Draw(rules.logits, 0, token_ids, token_ids, parts.maxima, token_ids)
    inputs, numbers = (rules, drawn, token_ids, parts), (num_splits, num_top)
    sizes = {"DRAWN": draw is not None, "VOCAB": vocab, "num_warps": 4}
    sizes |= {"MAX_SPLITS": max_splits(vocab), "ID_BITS": id_bits(vocab)}
    _launch_parts((rows, num_splits), *inputs, draw_splits, *numbers, TILE=TILE, enable_fp_fusion=False, **sizes)
    _launch_merge((rows,), *inputs, *logprobs, *numbers, int(counts), **sizes)
    return logprobs
