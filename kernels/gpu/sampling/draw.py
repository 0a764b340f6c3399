"""The kernels that turn logits into tokens. Rows are split over programs; a row's splits meet between launches.

    scan     changed logits -> maximum per split, in a greedy row with its lowest id, and maxima of groups of 32 tokens.
             NaN counts as infinite. A greedy row needs no more.
    few_groups  (few_groups.py) rows with filters: the candidates, where few groups can hold them, and all that
             `finish` does, if they can be sorted, but for top_p alone, which needs the mass of the row.
    count    (filters.py) other rows with filters: tokens per bin of depth, and the mass of the row.
    choose   tokens surely kept: the best of noise - depth per split. Tokens near a cut, which only exact sums can
             decide: a list of candidates per row, in any order.
    finish   one program per row: the exact cut within the candidates, the winner, its count.

Sums are over integers and all else are maxima, hence exact in any order: a row's token depends neither on how the row
is split nor on its neighbours.
"""

import triton
import triton.language as tl

from llama.kernels.gpu.sampling.filters import (
    BINS,
    DRAWN,
    MANY,
    NO_CUT,
    bin_of,
    bracket,
    find_cut,
    is_alive,
    is_filtered,
    masses,
    pack,
    unpack_depth,
)
from llama.kernels.gpu.sampling.noise import gumbel
from llama.kernels.gpu.sampling.rules import depths, is_finite, load_changed, load_tile, row_maximum

# Above all noise: a token that lies deeper than this below a score does not reach it.
_MOST_NOISE = tl.constexpr(16.64)


@triton.jit(do_not_specialize=["splits", "tiles", "keeps", "has_bias", "has_state", "has_mask"])
def scan_kernel(
    rules,
    work,  # out: maxima, argmaxima, group_maxima, changed; zeros in histogram, totals, num_candidates
    splits,
    tiles,  # per split
    keeps,  # whether `changed` is wanted
    has_bias,
    has_state,
    has_mask,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    GROUPS: tl.constexpr = TILE // 32
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if split == 0:
        tl.store(work.histogram + row * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))
        tl.store(work.totals + row * 2 + tl.arange(0, 2), tl.zeros((2,), tl.int64))
        tl.store(work.num_candidates + row, 0)

    greedy = tl.load(rules.temperature + row) == 0
    best = -float("inf")
    best_id = VOCAB + 0
    for tile in range(tiles):
        first = (split * tiles + tile) * TILE
        ids, logits = load_changed(rules, row, first, has_bias, has_state, has_mask, VOCAB, TILE)
        if keeps != 0:
            tl.store(work.changed + row * VOCAB + ids, logits, mask=ids < VOCAB)
        logits = tl.where(logits != logits, float("inf"), logits)
        peaks = tl.max(logits, axis=1)
        tl.store(work.group_maxima + row * splits * tiles * GROUPS + first // 32 + tl.arange(0, GROUPS), peaks)
        maximum = tl.max(peaks)
        if greedy & (maximum > best):
            best_id = tl.min(tl.where(logits == maximum, ids, VOCAB))
        best = tl.maximum(best, maximum)
    tl.store(work.maxima + row * splits + split, best)
    tl.store(work.argmaxima + row * splits + split, best_id)


@triton.jit(do_not_specialize=["splits", "tiles"])
def choose_kernel(
    rules,
    work,  # out: best_scores, best_ids; added to: totals, candidates, num_candidates
    source,
    stride,
    splits,
    tiles,  # per split
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ID_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    maximum = row_maximum(work.maxima, row, splits, MAX_SPLITS)
    temperature = tl.load(rules.temperature + row)
    if (temperature != 0) & is_finite(maximum):
        begin = BINS + 0
        end = BINS + 0
        min_p = 0.0
        weighs = False
        place_of_mass = 1
        if is_filtered(rules, row, VOCAB):
            min_p = tl.load(rules.min_p + row)
            if tl.load(work.progress + row) != MANY:
                begin = 0
                end = -1
                place_of_mass = 0
                weighs = (tl.load(rules.top_k + row) <= 0) & (tl.load(rules.top_p + row) < 1)
                tiles = tl.where(weighs, tiles, 0)
            else:
                begin, end, _ = bracket(rules, work, row)
                weighs = (begin > 0) & (begin < BINS)
        best = -float("inf")
        best_id = VOCAB + 0
        mass = tl.zeros((), tl.int64)
        for tile in range(tiles):
            first = (split * tiles + tile) * TILE
            ids, logits = load_tile(source, stride, row, first, VOCAB, TILE)
            depth = depths(logits, maximum, temperature)
            alive = is_alive(depth, min_p)
            place = bin_of(depth)

            kept = alive & (place < begin)
            if weighs:
                mass += tl.sum(tl.where(kept | (alive & (end < 0)), masses(depth), 0))
            if best + tl.min(tl.where(kept, depth, float("inf"))) < _MOST_NOISE:
                score = tl.where(kept, gumbel(ids, rules.keys, row) - depth, -float("inf"))
                highest = tl.max(score)
                if highest > best:
                    best = highest
                    best_id = tl.min(tl.where(score == highest, ids, VOCAB))

            chosen = (alive & (place >= begin) & (place <= end)).to(tl.int32)
            counts = tl.sum(chosen, axis=1)
            count = tl.sum(counts)
            if count > 0:
                at = tl.atomic_add(work.num_candidates + row, count, sem="relaxed") + tl.cumsum(counts) - counts
                at = at[:, None] + tl.cumsum(chosen, axis=1) - 1
                tl.store(work.candidates + row * VOCAB + at, pack(depth, ids, ID_BITS), mask=chosen != 0)

        tl.store(work.best_scores + row * splits + split, best)
        tl.store(work.best_ids + row * splits + split, best_id)
        tl.atomic_add(work.totals + row * 2 + place_of_mass, mass, sem="relaxed")


@triton.jit
def count_token(rules, row, token, is_bad, has_state, VOCAB: tl.constexpr):
    """Counts a generated token where the row has penalties. Rows may share a penalty row."""
    if has_state != 0:
        penalty_row = tl.load(rules.penalty_rows + row).to(tl.int64)
        if (penalty_row >= 0) & (is_bad == 0):
            tl.atomic_add(rules.counts + penalty_row * VOCAB + token, 1, sem="relaxed")


@triton.jit
def draw_among(rules, row, candidates, count, cut, score, token, VOCAB: tl.constexpr, ID_BITS: tl.constexpr):
    """The best of the row's candidates up to `cut`, or `token`, whose score is known, if none is better."""
    for start in range(0, count, 1024):
        place = start + tl.arange(0, 1024)
        packed = tl.load(candidates + place, mask=place < count, other=NO_CUT)
        ids = (packed & ((1 << ID_BITS) - 1)).to(tl.int32)
        scores = gumbel(ids, rules.keys, row) - unpack_depth(packed, ID_BITS)
        scores = tl.where((packed <= cut) & (place < count), scores, -float("inf"))
        best = tl.max(scores)
        best_id = tl.min(tl.where(scores == best, ids, VOCAB))
        if (best > score) | ((best == score) & (best_id < token)):
            score = best
            token = best_id
    return token


@triton.jit(do_not_specialize=["splits", "has_state"])
def finish_kernel(
    rules,
    work,  # out: token_ids, is_bad, cuts
    splits,
    has_state,  # whether to count the token here
    VOCAB: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ID_BITS: tl.constexpr,
    SORTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    progress = MANY + 0
    if is_filtered(rules, row, VOCAB):
        progress = tl.load(work.progress + row)
    if progress == DRAWN:
        return
    maximum = row_maximum(work.maxima, row, splits, MAX_SPLITS)
    temperature = tl.load(rules.temperature + row)
    bad = 1 - is_finite(maximum).to(tl.int32)
    token = tl.zeros((), tl.int32)
    cut = tl.full((), NO_CUT, tl.int64)
    split = tl.arange(0, MAX_SPLITS)
    at = row * splits + split
    if bad == 0:
        if temperature == 0:
            peaks = tl.load(work.maxima + at, mask=split < splits, other=-float("inf"))
            ids = tl.load(work.argmaxima + at, mask=split < splits, other=VOCAB)
            token = tl.min(tl.where(peaks == maximum, ids, VOCAB))
        else:
            scores = tl.load(work.best_scores + at, mask=split < splits, other=-float("inf"))
            ids = tl.load(work.best_ids + at, mask=split < splits, other=VOCAB)
            score = tl.max(scores)
            token = tl.min(tl.where(scores == score, ids, VOCAB))
            count = tl.load(work.num_candidates + row)
            if count > 0:
                candidates = work.candidates + row * VOCAB
                _, _, num_above = bracket(rules, work, row)
                mass = tl.load(work.totals + row * 2)
                mass_above = tl.load(work.totals + row * 2 + 1)
                cut = find_cut(rules, row, candidates, count, num_above, mass, mass_above, SORTED, False, ID_BITS)
                token = draw_among(rules, row, candidates, count, cut, score, token, VOCAB, ID_BITS)
    tl.store(work.token_ids + row, token.to(tl.int64))
    tl.store(work.is_bad + row, bad != 0)
    tl.store(work.cuts + row, cut)
    count_token(rules, row, token, bad, has_state, VOCAB)
