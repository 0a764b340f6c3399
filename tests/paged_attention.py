"""Problems of paged attention on any device, and their answers in float64, written out plainly.

Whatever no sequence uses is NaN: whole blocks, the places behind a context's end, and what a block table points to past
the blocks that it needs.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llama.kernels.types import CosSin, KVLayer, Ragged


@dataclass(frozen=True)
class Problem:
    q: Tensor
    kv_layer: KVLayer
    ragged: Ragged
    scale: float

    def run(self, paged_attention: Any) -> Tensor:
        return paged_attention(self.q, self.kv_layer, self.ragged, self.scale)

    @property
    def context_lens(self) -> Tensor:
        return self.ragged.context_lens

    def only(self, *sequences: int) -> "Problem":
        """The same sequences without the others; caches and block tables stay what they are."""
        starts = self.ragged.query_starts.tolist()
        lengths = [starts[s + 1] - starts[s] for s in sequences]
        ragged = replace(
            self.ragged,
            block_tables=self.ragged.block_tables[list(sequences)],
            query_starts=_starts(lengths, self.q.device),
            context_lens=self.context_lens[list(sequences)],
            num_decodes=sum(s < self.ragged.num_decodes for s in sequences),
        )
        return replace(self, q=torch.cat([self.q[starts[s] : starts[s + 1]] for s in sequences]), ragged=ragged)

    def rows(self, sequence: int) -> slice:
        starts = self.ragged.query_starts
        return slice(int(starts[sequence]), int(starts[sequence + 1]))


def as_runs(problem: Problem, run_len: int) -> Problem:
    """The same queries, as runs."""
    return replace(problem, ragged=replace(problem.ragged, num_decodes=0, run_len=run_len))


def each_alone(problem: Problem) -> Problem:
    """The same queries, each a decode of its own in the blocks of its sequence."""
    ragged = problem.ragged
    lens = ragged.query_starts.diff().long()
    starts = torch.arange(len(problem.q) + 1, dtype=torch.int32, device=problem.q.device)
    behind = torch.repeat_interleave(ragged.context_lens - ragged.query_starts[1:], lens)
    apart = replace(
        ragged,
        block_tables=ragged.block_tables.repeat_interleave(lens, 0),
        query_starts=starts,
        context_lens=behind + starts[1:],
        num_decodes=len(problem.q),
    )
    return replace(problem, ragged=apart)


def _starts(lengths: list[int], device: Any) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


def make_problem(
    queries: list[int],
    contexts: list[int],
    *,
    num_decodes: int = 0,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    spread: float = 2.0,
    seed: int = 0,
) -> Problem:
    """Sequence i asks queries[i] queries against contexts[i] keys, in blocks that lie in no order.

    `spread` scales q: the larger, the more a few keys decide the softmax.
    """
    generator = torch.Generator(device).manual_seed(seed)
    needed = [-(-context // block_size) for context in contexts]
    total = sum(needed) + 2
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    tables = torch.full((len(contexts), max(needed) + 1), int(order[-1]), dtype=torch.int32)
    shape = (total, block_size, heads[1], head_dim)
    caches = [torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2)]
    used = 0
    for row, (count, context) in enumerate(zip(needed, contexts, strict=True)):
        tables[row, :count] = order[used : used + count]
        used += count
        for cache in caches:
            blocks = torch.full((count, *shape[1:]), torch.nan, dtype=dtype, device=device)
            blocks.flatten(0, 1)[:context] = torch.randn(
                context, heads[1], head_dim, generator=generator, dtype=torch.float32, device=device
            ).to(dtype)
            cache[tables[row, :count].long().to(device)] = blocks
    q = torch.randn(sum(queries), heads[0], head_dim, generator=generator, dtype=torch.float32, device=device)
    ragged = Ragged(
        block_tables=tables.to(device),
        query_starts=_starts(queries, device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        slots=torch.empty(0, dtype=torch.int64, device=device),
        num_decodes=num_decodes,
        block_size=block_size,
    )
    return Problem((q * spread).to(dtype), KVLayer(*caches), ragged, head_dim**-0.5)


def answer(problem: Problem) -> Tensor:
    """Softmax in float64, one sequence and one KV head after the other; 0 for an empty context."""
    out = torch.zeros(problem.q.shape, dtype=torch.float64, device=problem.q.device)
    block_size, kv_heads = problem.kv_layer.k.shape[1:3]
    group = problem.q.shape[1] // kv_heads
    for sequence, context in enumerate(problem.context_lens.tolist()):
        rows = problem.rows(sequence)
        queries = rows.stop - rows.start
        if context == 0 or queries == 0:
            continue
        blocks = problem.ragged.block_tables[sequence, : -(-context // block_size)].long()
        past = torch.arange(context - queries, context, device=out.device)
        hidden = torch.arange(context, device=out.device) > past[:, None]
        for head in range(kv_heads):
            k, v = (
                cache[blocks, :, head].flatten(0, 1)[:context].double()
                for cache in (problem.kv_layer.k, problem.kv_layer.v)
            )
            heads = slice(head * group, (head + 1) * group)
            scores = torch.einsum("qgd,kd->gqk", problem.q[rows, heads].double(), k) * problem.scale
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[rows, heads] = torch.einsum("gqk,kd->qgd", weights, v)
    return out


def only_slots(slots: Tensor, block_size: int) -> Ragged:
    """Tokens that go to `slots` and belong to nobody: all that rope_and_store reads."""
    none = torch.empty(0, dtype=torch.int32, device=slots.device)
    return Ragged(none.view(0, 0), none.new_zeros(1), none, slots, num_decodes=0, block_size=block_size)


def rotation(angles: Tensor) -> CosSin:
    """By angles [tokens, head_dim / 2], as rope_and_store takes it."""
    both = torch.cat((-angles, angles), dim=1)[:, None]
    return both.cos(), both.sin()


def projected(problem: Problem, seed: int = 0) -> tuple[Tensor, CosSin, Problem]:
    """q, k and v of a problem of decodes, what they are rotated by, and the problem with the slots of its last keys."""
    ragged, lens = problem.ragged, problem.context_lens.long()
    last = (lens - 1).clamp(min=0)
    blocks = ragged.block_tables.gather(1, (last // ragged.block_size)[:, None])[:, 0].long()
    slots = torch.where(lens > 0, blocks * ragged.block_size + last % ragged.block_size, -1)
    (tokens, heads, head_dim), kv_heads = problem.q.shape, problem.kv_layer.k.shape[2]
    device, generator = problem.q.device, torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(device, problem.q.dtype)
    angles = (torch.rand(tokens, head_dim // 2, generator=generator) * 6).to(device)
    return qkv, rotation(angles), replace(problem, ragged=replace(ragged, slots=slots, is_disjoint=True))
