"""The short way for rows whose cuts lie among few tokens, found from the maxima of groups of 32 tokens.

A group's maximum is one of its tokens, so the maxima bound from below how many tokens reach a depth, and from above
what the tokens past it can weigh. That gives a bin of depths beyond which nothing is kept. Where few groups reach it,
their tokens are the candidates, and `count` and `choose` need not look at the row, but for its mass with top_p alone.
Without that the row's token is drawn here, if its candidates can be sorted.
"""

import triton
import triton.language as tl

from llama.kernels.gpu.sampling.draw import count_token, draw_among
from llama.kernels.gpu.sampling.filters import (
    BINS,
    DRAWN,
    FEW,
    MANY,
    bin_of,
    count_bins,
    edge_of,
    find_cut,
    is_alive,
    is_filtered,
    pack,
)
from llama.kernels.gpu.sampling.rules import depths, is_finite, row_maximum

# At most so many groups are few.
FEW_GROUPS = tl.constexpr(512)


@triton.jit
def _last_bin(rules, row, counts):
    """The last bin that can hold a token which is kept, from the number of groups whose maximum lies in each bin."""
    top_k = tl.load(rules.top_k + row)
    top_p = tl.load(rules.top_p + row)
    bins = tl.arange(0, BINS)
    upto = tl.cumsum(counts)
    last = BINS - 1
    if top_k > 0:
        last = tl.minimum(tl.sum((upto < top_k).to(tl.int32)), BINS - 1)
    else:
        if top_p < 1:
            groups = counts.to(tl.float32)
            most = groups * tl.exp(-edge_of(bins))
            # All but a group's maximum may lie just past the bin; groups past the bin may be as heavy as their maxima.
            beyond = 32 * (upto.to(tl.float32) * tl.exp(-edge_of(bins + 1)) + tl.sum(most) - tl.cumsum(most))
            least = tl.sum(tl.where(bins < BINS - 1, groups * tl.exp(-edge_of(bins + 1)), 0.0))
            light = beyond * 1.001 + least * 1e-4 <= (1 - top_p) * least
            last = tl.minimum(tl.sum(1 - light.to(tl.int32)), BINS - 1)
    return last, tl.sum(tl.where(bins <= last, counts, 0))


@triton.jit(do_not_specialize=["splits", "num_groups", "has_state"])
def few_groups_kernel(
    rules,
    work,  # out: progress, candidates, num_candidates, and group_ids for itself; of rows DRAWN what `finish` has
    source,
    stride,
    splits,
    num_groups,
    has_state,  # whether to count a token here
    VOCAB: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    MAX_GROUPS: tl.constexpr,
    ID_BITS: tl.constexpr,
    SORTED: tl.constexpr,
):
    AT_ONCE: tl.constexpr = 32
    row = tl.program_id(0).to(tl.int64)
    maximum = row_maximum(work.maxima, row, splits, MAX_SPLITS)
    progress = MANY + 0
    if is_filtered(rules, row, VOCAB) & is_finite(maximum):
        temperature = tl.load(rules.temperature + row)
        min_p = tl.load(rules.min_p + row)
        groups = tl.arange(0, MAX_GROUPS)
        group_ids = work.group_ids + row * num_groups
        peaks = tl.load(work.group_maxima + row * num_groups + groups, mask=groups < num_groups, other=-float("inf"))
        depth = depths(peaks, maximum, temperature)
        last, count = _last_bin(rules, row, count_bins(depth, min_p, MAX_GROUPS))
        if count <= FEW_GROUPS:
            progress = FEW + 0
            chosen = (is_alive(depth, min_p) & (bin_of(depth) <= last)).to(tl.int32)
            tl.store(group_ids + tl.cumsum(chosen) - 1, groups, mask=chosen != 0)
            tl.debug_barrier()  # what other threads of this program have just written is read below
            candidates = work.candidates + row * VOCAB
            found = 0
            for start in range(0, count, AT_ONCE):
                at = start + tl.arange(0, AT_ONCE)
                group = tl.load(group_ids + at, mask=at < count, other=num_groups)
                ids = group[:, None] * 32 + tl.arange(0, 32)[None, :]
                logits = tl.load(source + row * stride + ids, mask=ids < VOCAB, other=-float("inf")).to(tl.float32)
                below = depths(logits, maximum, temperature)
                kept = (is_alive(below, min_p) & (bin_of(below) <= last)).to(tl.int32)
                counts = tl.sum(kept, axis=1)
                place = found + (tl.cumsum(counts) - counts)[:, None] + tl.cumsum(kept, axis=1) - 1
                tl.store(candidates + place, pack(below, ids, ID_BITS), mask=kept != 0)
                found += tl.sum(counts)
            tl.store(work.num_candidates + row, found)
            needs_mass = (tl.load(rules.top_k + row) <= 0) & (tl.load(rules.top_p + row) < 1)
            # To search, too, would take more registers than there are for two programs of a multiprocessor.
            if (found <= (SORTED if SORTED > 0 else VOCAB)) & (needs_mass == 0):
                progress = DRAWN + 0
                tl.debug_barrier()
                nothing = tl.zeros((), tl.int64)
                cut = find_cut(rules, row, candidates, found, 0, nothing, nothing, SORTED, True, ID_BITS)
                score = tl.full((), -float("inf"), tl.float32)
                token = tl.full((), VOCAB, tl.int32)
                token = draw_among(rules, row, candidates, found, cut, score, token, VOCAB, ID_BITS)
                tl.store(work.token_ids + row, token.to(tl.int64))
                tl.store(work.is_bad + row, False)
                tl.store(work.cuts + row, cut)
                count_token(rules, row, token, tl.zeros((), tl.int32), has_state, VOCAB)
    tl.store(work.progress + row, progress)
