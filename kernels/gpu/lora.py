"""Low-rank adapters of many requests in one batch: y[t] += B[i] (A[i] x[t]), i the adapter of token t, if it has one.

Two launches per module, whatever adapters the batch mixes; fused modules (q, k, v) are slices of one launch.

    shrink    h = A x      reads slices rank in elements of A per adapter of 16 tokens, and those tokens' x
    expand    y += B h     reads out rank elements of B likewise, reads and writes those tokens' y

16 tokens in a row are a tile: what a matrix instruction multiplies at least. The first token of a tile with an adapter
leads: its program does the work of all tokens of the tile that share the adapter, so an adapter is read once per tile.
Programs without a leader end at once. The grid follows from the number of tokens alone and no index is read on the
host: one CUDA graph holds for every mix. Rows of a matrix product do not see one another, `in` is always split the same
way, and the parts are added in order: a token's bits do not depend on its neighbours.

float32 accumulation; h is rounded to the model's dtype when it is complete, y + B h once. Rows of y without an adapter
are neither read nor written.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.checks import check_tensors, require
from llama.kernels.gpu.launch import Launcher, cdiv, next_power_of_2
from llama.kernels.types import TokenAdapters

_TOKENS = 16
# What a program of shrink adds up. Decoding has few tokens, so it is `in` that must keep the device busy.
_SPLIT = 1024
# Programs of a tile share its adapters; with this many tiles or more, one program has them all.
_TILES_ALONE = 256


@triton.jit
def _leads(tile_adapters, candidate, TOKENS: tl.constexpr):
    """-> the candidate's adapter, and whether it is the first of its tile that has it. Adapter 0 has no leader."""
    index = tl.arange(0, TOKENS)
    adapter = tl.sum(tl.where(index == candidate, tile_adapters, 0), axis=0)
    first = tl.min(tl.where(tile_adapters == adapter, index, TOKENS), axis=0)
    return adapter, (adapter > 0) & (first == candidate)


@triton.jit(do_not_specialize=["num_tokens", "jobs"])
def _shrink_kernel(
    h,  # [splits, tokens, SLICES, RANK] float32
    x,
    a,  # [adapters, SLICES, RANK, IN]
    indices,
    num_tokens,
    jobs,
    x_stride,
    IN: tl.constexpr,
    SLICES: tl.constexpr,
    RANK: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_RANK - 1) // BLOCK_RANK
    job = tl.program_id(0) % jobs
    tokens = (tl.program_id(0) // jobs).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    tile_adapters = tl.load(indices + tokens, mask=tokens < num_tokens, other=0)
    part = tl.program_id(1)
    ranks = part % RANK_BLOCKS * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    piece = part // RANK_BLOCKS % SLICES
    split = part // (RANK_BLOCKS * SLICES)
    columns = tl.arange(0, BLOCK_IN)
    end = tl.minimum((split + 1) * SPLIT, IN)

    for candidate in range(job, TOKENS, jobs):
        adapter, leads = _leads(tile_adapters, candidate, TOKENS)
        if leads:
            mine = tile_adapters == adapter
            x_rows = x + tokens[:, None] * x_stride
            a_rows = a + ((adapter - 1).to(tl.int64) * SLICES + piece) * (RANK * IN) + ranks[:, None] * IN
            total = tl.zeros([TOKENS, BLOCK_RANK], tl.float32)
            for first in range(split * SPLIT, end, BLOCK_IN):
                inside = (first + columns < end)[None, :]
                values = tl.load(x_rows + first + columns[None, :], mask=mine[:, None] & inside, other=0.0)
                weights = tl.load(a_rows + first + columns[None, :], mask=(ranks < RANK)[:, None] & inside, other=0.0)
                total = tl.dot(values, tl.trans(weights), total, input_precision="ieee")
            places = ((split * num_tokens.to(tl.int64) + tokens) * SLICES + piece)[:, None] * RANK + ranks[None, :]
            tl.store(h + places, total, mask=mine[:, None] & (ranks < RANK)[None, :])


@triton.jit
def _embedding_kernel(h, token_ids, a, indices, VOCAB: tl.constexpr, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    adapter = tl.load(indices + token)
    if adapter > 0:
        ranks = tl.arange(0, BLOCK_RANK)
        row = (adapter - 1).to(tl.int64) * VOCAB + tl.load(token_ids + token)
        values = tl.load(a + row * RANK + ranks, mask=ranks < RANK, other=0.0)
        tl.store(h + token * RANK + ranks, values.to(tl.float32), mask=ranks < RANK)


@triton.jit(do_not_specialize=["num_tokens", "jobs"])
def _expand_kernel(
    y,
    h,  # [SPLITS, tokens, SLICES, RANK] float32
    b,  # [adapters, OUT, RANK]
    indices,
    num_tokens,
    jobs,
    y_stride,
    SLICE_STARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):
    SLICES: tl.constexpr = len(SLICE_STARTS) - 1
    OUT: tl.constexpr = SLICE_STARTS[SLICES]
    job = tl.program_id(0) % jobs
    tokens = (tl.program_id(0) // jobs).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    tile_adapters = tl.load(indices + tokens, mask=tokens < num_tokens, other=0)
    # Every slice has blocks of its own, so that a block's columns have one h.
    part = tl.program_id(1)
    piece = 0
    low = 0
    high = SLICE_STARTS[1]
    before = 0
    for i in tl.static_range(1, SLICES):
        before += (SLICE_STARTS[i] - SLICE_STARTS[i - 1] + BLOCK_OUT - 1) // BLOCK_OUT
        here = part >= before
        piece = tl.where(here, i, piece)
        low = tl.where(here, SLICE_STARTS[i] - before * BLOCK_OUT, low)
        high = tl.where(here, SLICE_STARTS[i + 1], high)
    columns = low + part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)

    for candidate in range(job, TOKENS, jobs):
        adapter, leads = _leads(tile_adapters, candidate, TOKENS)
        if leads:
            mine = tile_adapters == adapter
            b_rows = b + (adapter - 1).to(tl.int64) * (OUT * RANK) + columns[:, None] * RANK
            delta = tl.zeros([TOKENS, BLOCK_OUT], tl.float32)
            for first in tl.static_range(0, RANK, BLOCK_RANK):
                ranks = first + tl.arange(0, BLOCK_RANK)
                places = (tokens * SLICES + piece)[:, None] * RANK + ranks[None, :]
                mask = mine[:, None] & (ranks < RANK)[None, :]
                inner = tl.load(h + places, mask=mask, other=0.0)
                for split in range(1, SPLITS):
                    step = split * num_tokens.to(tl.int64) * (SLICES * RANK)
                    inner += tl.load(h + step + places, mask=mask, other=0.0)
                weights = tl.load(b_rows + ranks[None, :], mask=(columns < high)[:, None] & (ranks < RANK)[None, :],
                                  other=0.0)  # fmt: skip
                delta = tl.dot(inner.to(weights.dtype), tl.trans(weights), delta, input_precision="ieee")
            target = y + tokens[:, None] * y_stride + columns[None, :]
            mask = mine[:, None] & (columns < high)[None, :]
            result = tl.load(target, mask=mask, other=0.0).to(tl.float32) + delta
            tl.store(target, result.to(y.dtype.element_ty), mask=mask)


_launch_shrink = Launcher(_shrink_kernel)
_launch_expand = Launcher(_expand_kernel)


def _grid(num_tokens: int, parts: int) -> tuple[tuple[int, int], int]:
    """-> grid, programs that share a tile's adapters."""
    tiles = cdiv(num_tokens, _TOKENS)
    jobs = min(_TOKENS, cdiv(_TILES_ALONE, tiles))
    return (tiles * jobs, parts), jobs


def _rank_block(rank: int) -> int:
    return min(64, max(16, next_power_of_2(rank)))


def _check(op: str, adapters: TokenAdapters, **tensors: Tensor) -> None:
    check_tensors(op, **tensors, indices=adapters.indices)
    for name in {"a", "b", "h"}.intersection(tensors):
        require(tensors[name].is_contiguous(), f"{op}: {name} must be contiguous")


def lora_shrink(x: Tensor, a: Tensor, adapters: TokenAdapters) -> Tensor:
    """See `ops.lora_shrink`. -> [splits x tokens, slices, rank] float32; rows without an adapter are not set."""
    _check("lora_shrink", adapters, x=x, a=a)
    tokens, (slices, rank, in_features) = x.shape[0], a.shape[1:]
    splits = cdiv(in_features, _SPLIT)
    h = torch.empty((splits * tokens, slices, rank), dtype=torch.float32, device=x.device)
    if h.numel() == 0:
        return h
    block_rank = _rank_block(rank)
    grid, jobs = _grid(tokens, cdiv(rank, block_rank) * slices * splits)
    _launch_shrink(
        grid,
        h,
        x,
        a,
        adapters.indices,
        tokens,
        jobs,
        x.stride(0),
        IN=in_features,
        SLICES=slices,
        RANK=rank,
        SPLIT=_SPLIT,
        TOKENS=_TOKENS,
        BLOCK_IN=256 // a.element_size(),
        BLOCK_RANK=block_rank,
        num_warps=2 if block_rank == 16 else 4,
        num_stages=4,
    )
    return h


def lora_embedding(token_ids: Tensor, a: Tensor, adapters: TokenAdapters) -> Tensor:
    """See `ops.lora_embedding`. -> [tokens, 1, rank] float32; rows without an adapter are not set."""
    _check("lora_embedding", adapters, a=a, token_ids=token_ids)
    tokens, (vocab, rank) = len(token_ids), a.shape[1:]
    h = torch.empty((tokens, 1, rank), dtype=torch.float32, device=a.device)
    if h.numel() == 0:
        return h
    block = next_power_of_2(rank)
    _embedding_kernel[(tokens,)](
        h, token_ids, a, adapters.indices, VOCAB=vocab, RANK=rank, BLOCK_RANK=block, num_warps=1
    )
    return h


def lora_expand(h: Tensor, y: Tensor, b: Tensor, adapters: TokenAdapters, slice_starts: tuple[int, ...]) -> None:
    """See `ops.lora_expand`."""
    _check("lora_expand", adapters, y=y, h=h, b=b)
    tokens, rank = y.shape[0], b.shape[2]
    if y.numel() == 0:
        return
    require(h.dtype == torch.float32, f"lora_expand: h must be float32, as lora_shrink gives it, got {h.dtype}")
    require(h.shape[0] % tokens == 0, f"lora_expand: h has {h.shape[0]} rows for {tokens} tokens")
    block_rank = _rank_block(rank)
    block_out = 8192 // (block_rank * b.element_size())
    parts = sum(cdiv(end - start, block_out) for start, end in pairwise(slice_starts))
    grid, jobs = _grid(tokens, parts)
    _launch_expand(
        grid,
        y,
        h,
        b,
        adapters.indices,
        tokens,
        jobs,
        y.stride(0),
        SLICE_STARTS=tuple(slice_starts),
        SPLITS=h.shape[0] // tokens,
        RANK=rank,
        TOKENS=_TOKENS,
        BLOCK_OUT=block_out,
        BLOCK_RANK=block_rank,
        num_warps=4,
    )
