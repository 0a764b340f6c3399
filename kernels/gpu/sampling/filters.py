"""min_p, top_k and top_p without a sort of the row: where its cut lies, first to a bin of depths, then exactly.

A token's depth is (maximum - logit) / temperature, its mass exp(-depth) as an integer multiple of 2^-40. Depth and id
packed into one integer order the tokens of a row totally, as the filters want it: less deep first, ties by lower id.
Every cut is the largest packed value that is kept. Sums are over integers, hence exact in any order: a cut depends
neither on how a row is split nor on its neighbours, atomics do no harm, and whether the tokens near it are sorted or
searched changes nothing.
"""

import triton
import triton.language as tl

from llama.kernels.gpu.sampling.rules import depths, is_finite, load_tile, row_maximum

# Depth bins: 1/16 wide to depth 12, then 1/4 wide to 27.75, about where an integer mass becomes 0, then the rest.
BINS = tl.constexpr(256)
_FINE_BINS = tl.constexpr(192)
_FINE = tl.constexpr(16.0)
_COARSE = tl.constexpr(4.0)
_FINE_DEPTH = tl.constexpr(12.0)

# How far `few_groups` comes with a row: not at all, to its candidates, or to its token.
MANY = tl.constexpr(0)
FEW = tl.constexpr(1)
DRAWN = tl.constexpr(2)

# A row with at most this many tokens above the lowest cut leaves them all to `finish`: `choose` computes no noise.
_FEW = tl.constexpr(1024)

ONE = tl.constexpr(1099511627776.0)  # 2^40, the mass of the best token
NO_CUT = tl.constexpr(2**62)


@triton.jit
def masses(depth):
    return (tl.exp(-depth) * ONE).to(tl.int64)


@triton.jit
def pack(depth, ids, ID_BITS: tl.constexpr):
    """Non-negative floats order as their bit patterns do."""
    return (depth.to(tl.int32, bitcast=True).to(tl.int64) << ID_BITS) | ids


@triton.jit
def unpack_depth(packed, ID_BITS: tl.constexpr):
    return (packed >> ID_BITS).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def is_alive(depth, min_p):
    return (depth < float("inf")) & (tl.exp(-depth) >= min_p)


@triton.jit
def is_filtered(rules, row, VOCAB: tl.constexpr):
    top_k = tl.load(rules.top_k + row)
    cut = ((top_k > 0) & (top_k < VOCAB)) | (tl.load(rules.top_p + row) < 1) | (tl.load(rules.min_p + row) > 0)
    return cut & (tl.load(rules.temperature + row) != 0)


@triton.jit
def bin_of(depth):
    fine = depth * _FINE
    coarse = _FINE_BINS + (depth - _FINE_DEPTH) * _COARSE
    return tl.minimum(tl.where(depth < _FINE_DEPTH, fine, coarse), BINS - 1.0).to(tl.int32)


@triton.jit
def edge_of(index):
    """The least depth of a bin."""
    x = index.to(tl.float32)
    return tl.where(index < _FINE_BINS, x / _FINE, _FINE_DEPTH + (x - _FINE_BINS) / _COARSE)


@triton.jit
def count_bins(depth, min_p, SIZE: tl.constexpr):
    """How many of SIZE tokens lie in each bin, alive ones alone."""
    alive = is_alive(depth, min_p)
    counts = tl.histogram(tl.where(alive, bin_of(depth), BINS - 1), BINS)
    return counts - tl.where(tl.arange(0, BINS) == BINS - 1, SIZE - tl.sum(alive.to(tl.int32)), 0)


@triton.jit(do_not_specialize=["splits", "tiles"])
def count_kernel(
    rules,
    work,  # added to: histogram, and the mass of the row in totals
    source,
    stride,
    splits,
    tiles,  # per split
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    maximum = row_maximum(work.maxima, row, splits, MAX_SPLITS)
    if is_filtered(rules, row, VOCAB) & is_finite(maximum) & (tl.load(work.progress + row) == MANY):
        temperature = tl.load(rules.temperature + row)
        min_p = tl.load(rules.min_p + row)
        weighs = tl.load(rules.top_k + row) <= 0
        bins = tl.arange(0, BINS)
        counts = tl.zeros((BINS,), tl.int32)
        mass = tl.zeros((), tl.int64)
        for tile in range(tiles):
            _, logits = load_tile(source, stride, row, (split * tiles + tile) * TILE, VOCAB, TILE)
            depth = depths(logits, maximum, temperature)
            alive = is_alive(depth, min_p)
            if weighs:
                mass += tl.sum(tl.where(alive, masses(depth), 0))
            counts += count_bins(tl.reshape(depth, (TILE,), can_reorder=True), min_p, TILE)
        tl.atomic_add(work.histogram + row * BINS + bins, counts, mask=counts != 0, sem="relaxed")
        tl.atomic_add(work.totals + row * 2, mass, sem="relaxed")


@triton.jit
def bracket(rules, work, row):
    """-> first and last bin that a cut of top_k or top_p can lie in, and the number of tokens in the bins before.

    All in bins before is kept, all in bins after dropped. top_k's bin follows from the counts. For top_p, the mass of a
    bin is bounded by its edges, summed from either end of the row, with more slack than float32 sums need.
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(work.histogram + row * BINS + bins)
    upto = tl.cumsum(counts)
    top_k = tl.load(rules.top_k + row)
    top_p = tl.load(rules.top_p + row)

    begin = BINS + 0
    end = BINS - 1
    if top_k > 0:
        end = tl.minimum(tl.sum((upto < top_k).to(tl.int32)), BINS - 1)
        begin = end
        if top_p < 1:
            begin = 0
    else:
        if top_p < 1:
            total = tl.load(work.totals + row * 2).to(tl.float32) / ONE
            goal = tl.maximum(top_p * total, 1e-6)
            most = counts.to(tl.float32) * tl.exp(-edge_of(bins))
            least = tl.where(bins < BINS - 1, counts.to(tl.float32) * tl.exp(-edge_of(bins + 1)), 0.0)
            most_upto = tl.cumsum(most)
            least_upto = tl.cumsum(least)
            # Bounds of the mass before a bin's last token, from above, and before its first, from below.
            above = total * 1.0001 - (tl.sum(least) - least_upto) * 0.999
            below = total * 0.9999 - (tl.sum(most) - most_upto + most) * 1.001
            above = tl.minimum(most_upto * 1.001, above)
            below = tl.maximum((least_upto - least) * 0.999, below)
            begin = tl.sum((above < goal).to(tl.int32))
            end = tl.sum((below < goal).to(tl.int32)) - 1
    if tl.sum(tl.where(bins <= end, counts, 0)) <= _FEW:
        begin = 0
    return begin, end, tl.sum(tl.where(bins < begin, counts, 0))


@triton.jit
def _search(candidates, count, low, high, before, goal, BY_MASS: tl.constexpr, ID_BITS: tl.constexpr):
    """The largest c in [low, high] for which `before` + the mass (or number) of candidates below c is less than goal.

    It must be so for c = low. Sixteen places are tried in each pass over the candidates.
    """
    PLACES: tl.constexpr = 16
    CHUNK: tl.constexpr = 512
    while low < high:
        places = low + (high - low + PLACES - 1) // PLACES * (1 + tl.arange(0, PLACES).to(tl.int64))
        places = tl.minimum(places, high)
        sums = tl.zeros((PLACES,), tl.int64) + before
        for start in range(0, count, CHUNK):
            at = start + tl.arange(0, CHUNK)
            packed = tl.load(candidates + at, mask=at < count, other=NO_CUT)
            weights = tl.full((CHUNK,), 1, tl.int64)
            if BY_MASS:
                weights = masses(unpack_depth(packed, ID_BITS))
            below = packed[None, :] < places[:, None]
            sums += tl.sum(tl.where(below, weights[None, :], 0), axis=1)
        low = tl.max(tl.where(sums < goal, places, low))
        high = tl.min(tl.where(sums < goal, high, places - 1))
    return low


@triton.jit
def _goal(top_p, mass):
    """The mass that top_p asks for; in float32, so that 0.4 of 3000 equals is 1200 of them."""
    return tl.maximum((top_p * mass.to(tl.float32)).to(tl.int64), 1)


@triton.jit
def _sorted_cut(
    candidates, count, top_k, top_p, num_above, mass, mass_above, SORTED: tl.constexpr, ID_BITS: tl.constexpr
):
    """What `_searched_cut` gives, of at most SORTED candidates, by a sort and one cumulative sum."""
    place = tl.arange(0, SORTED)
    is_used = place < count
    packed = tl.sort(tl.load(candidates + place, mask=is_used, other=NO_CUT))
    weights = tl.where(is_used, masses(unpack_depth(packed, ID_BITS)), 0)
    before = mass_above + tl.cumsum(weights) - weights
    cut = tl.zeros((), tl.int64) + (1 << 31 + ID_BITS)
    if top_k > 0:
        if num_above + count >= top_k:
            cut = tl.max(tl.where(is_used & (num_above + place < top_k), packed, 0))
        cut |= (1 << ID_BITS) - 1
        mass = tl.sum(tl.where(packed <= cut, weights, 0))
    if top_p < 1:
        goal = _goal(top_p, mass)
        if mass_above + tl.sum(tl.where(packed < cut, weights, 0)) >= goal:
            cut = tl.max(tl.where(is_used & (before < goal), packed, 0))
    return cut


@triton.jit
def _searched_cut(candidates, count, top_k, top_p, num_above, mass, mass_above, ID_BITS: tl.constexpr):
    zero = tl.zeros((), tl.int64)
    cut = zero + (1 << 31 + ID_BITS)  # more than any token's
    if top_k > 0:
        cut = _search(candidates, count, zero, cut, zero + num_above, top_k, False, ID_BITS)
        cut |= (1 << ID_BITS) - 1  # whatever is as deep as the top_k-th token is kept
        if top_p < 1:
            mass = zero
            for start in range(0, count, 512):
                at = start + tl.arange(0, 512)
                packed = tl.load(candidates + at, mask=at < count, other=NO_CUT)
                mass += tl.sum(tl.where(packed <= cut, masses(unpack_depth(packed, ID_BITS)), 0))
    if top_p < 1:
        cut = _search(candidates, count, zero, cut, mass_above, _goal(top_p, mass), True, ID_BITS)
    return cut


@triton.jit
def find_cut(
    rules,
    row,
    candidates,
    count,
    num_above,  # further tokens of the row, less deep than any candidate
    mass,  # int64, of the row, where it has top_p and no top_k
    mass_above,  # int64, of the tokens above, where it has top_p
    SORTED: tl.constexpr,  # up to so many candidates are sorted: a power of two, or 0
    FITS: tl.constexpr,  # there are no more
    ID_BITS: tl.constexpr,
):
    """The largest packed value that top_k and top_p keep, of the row's `count` candidates."""
    top_k = tl.load(rules.top_k + row)
    top_p = tl.load(rules.top_p + row)
    cut = tl.zeros((), tl.int64) + (1 << 31 + ID_BITS)
    if (top_k > 0) | (top_p < 1):
        if SORTED == 0:
            cut = _searched_cut(candidates, count, top_k, top_p, num_above, mass, mass_above, ID_BITS)
        elif FITS:
            cut = _sorted_cut(candidates, count, top_k, top_p, num_above, mass, mass_above, SORTED, ID_BITS)
        else:
            if count <= SORTED:
                cut = _sorted_cut(candidates, count, top_k, top_p, num_above, mass, mass_above, SORTED, ID_BITS)
            else:
                cut = _searched_cut(candidates, count, top_k, top_p, num_above, mass, mass_above, ID_BITS)
    return cut
