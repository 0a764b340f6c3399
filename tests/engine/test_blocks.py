"""BlockPool: exact ids, what the prefix cache finds and forgets, and its invariants under random use."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from llama.engine import blocks as blocks_module
from llama.engine.blocks import BlockPool, PrefixPath, prefix_root

ROOT = prefix_root(b"model", b"")


def packed(*token_ids: int) -> bytes:
    return np.array(token_ids, np.int32).tobytes()


def publish(pool: BlockPool, blocks: list[int], tokens: bytes, root: bytes = ROOT) -> PrefixPath:
    path = PrefixPath(root)
    pool.publish(path, blocks, tokens)
    return path


def test_blocks_go_out_in_order_and_come_back_last_in_first_out():
    pool = BlockPool(4, 2)
    assert pool.allocate(3) == [0, 1, 2]
    pool.free([0, 1])
    assert pool.num_available == 3
    assert pool.allocate(3) == [0, 1, 3]
    pool.check([[2], [0, 1, 3]])
    with pytest.raises(AssertionError, match="1 blocks asked, 0 available"):
        pool.allocate(1)


def test_shared_blocks_are_freed_by_their_last_owner():
    pool = BlockPool(2, 1)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.free(blocks)
    assert pool.num_available == 0
    pool.check([blocks])
    pool.free(blocks)
    assert pool.num_available == 2


def test_check_finds_a_leak_and_a_double_owner():
    pool = BlockPool(2, 1)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="lost"):
        pool.check([])
    with pytest.raises(AssertionError, match="1 refs, 2 owners"):
        pool.check([blocks, blocks])


def test_published_content_is_found_up_to_the_first_difference():
    pool = BlockPool(8, 2)
    blocks = pool.allocate(3)
    publish(pool, blocks, packed(1, 2, 3, 4, 5, 6))
    assert pool.match(ROOT, packed(1, 2, 3, 4, 5, 6), 3) == blocks
    assert pool.match(ROOT, packed(1, 2, 3, 4, 5, 6), 2) == blocks[:2]
    assert pool.match(ROOT, packed(1, 2, 3, 4, 9, 6), 3) == blocks[:2]
    assert pool.match(ROOT, packed(9, 2, 3, 4, 5, 6), 3) == []
    assert pool.match(ROOT, packed(3, 4), 1) == []  # a block is known behind its prefix alone
    assert pool.match(prefix_root(b"model", b"adapter"), packed(1, 2), 1) == []
    assert pool.match(prefix_root(b"other", b""), packed(1, 2), 1) == []
    assert pool.match(prefix_root(b"model", b"", "salt"), packed(1, 2), 1) == []


def test_a_salt_that_spells_a_block_does_not_lead_behind_it():
    pool = BlockPool(8, 2)
    first = packed(0x61626364, 0x65666768)
    publish(pool, pool.allocate(2), first + packed(1, 2))
    publish(pool, pool.allocate(2), first + packed(3, 4))  # a branch: both second blocks are known by their keys
    assert len(pool.match(ROOT, first + packed(3, 4), 2)) == 2
    assert pool.match(prefix_root(b"model", b"", first.decode()), packed(3, 4), 1) == []


def test_branches_behind_one_prefix():
    pool = BlockPool(8, 1)
    first, second, third = pool.allocate(3), pool.allocate(3), pool.allocate(3 - 1)
    publish(pool, first, packed(1, 2, 3))
    publish(pool, second, packed(1, 5, 3))
    publish(pool, third, packed(1, 6))
    assert pool.match(ROOT, packed(1, 2, 3), 3) == first
    assert pool.match(ROOT, packed(1, 5, 3), 3) == [first[0], *second[1:]]
    assert pool.match(ROOT, packed(1, 6, 3), 3) == [first[0], third[1]]
    pool.check([first, second, third])


def test_equal_content_is_published_once():
    pool = BlockPool(4, 1)
    first, second = pool.allocate(2), pool.allocate(2)
    publish(pool, first, packed(1, 2))
    publish(pool, second, packed(1, 2))
    pool.free(second)
    assert pool.num_cached == 0  # nothing of the second pair is worth keeping
    pool.free(first)
    assert pool.num_cached == 2
    assert pool.match(ROOT, packed(1, 2), 2) == first


def test_least_recently_used_goes_first_and_the_end_of_a_prefix_before_its_beginning():
    pool = BlockPool(4, 1)
    old, new = pool.allocate(2), pool.allocate(2)
    publish(pool, old, packed(1, 2))
    publish(pool, new, packed(3, 4))
    pool.free(old)
    pool.free(new)
    pool.share(old)
    pool.free(old)  # now `new` is the older one
    assert pool.allocate(1) == [new[1]]
    assert pool.match(ROOT, packed(3, 4), 2) == new[:1]
    assert pool.allocate(2) == [old[1], new[0]]
    assert pool.match(ROOT, packed(1, 2), 2) == old[:1]


def test_what_lies_behind_an_evicted_block_is_found_again_once_its_prefix_is_back():
    pool = BlockPool(4, 1)
    blocks = pool.allocate(3)
    publish(pool, blocks, packed(1, 2, 3))
    pool.unpublish(blocks[:1])
    assert pool.match(ROOT, packed(1, 2, 3), 3) == []
    again = pool.allocate(1)
    publish(pool, again, packed(1))
    assert pool.match(ROOT, packed(1, 2, 3), 3) == [again[0], *blocks[1:]]
    pool.check([blocks, again])


def test_an_equal_block_before_the_tip_may_be_evicted():
    """Its content is missing from then on, and nothing that is found is wrong."""
    pool = BlockPool(4, 1)
    theirs, ours = pool.allocate(1), pool.allocate(2)
    publish(pool, theirs, packed(1))
    path = publish(pool, ours, packed(1, 2))  # behind theirs, which holds what ours[0] holds
    pool.free(theirs)
    others = pool.allocate(2)
    assert pool.is_current(path) and path.length == 2
    assert pool.match(ROOT, packed(1, 2), 2) == []
    pool.check([ours, others])
    publish(pool, others[:1], packed(1))
    assert pool.match(ROOT, packed(1, 2), 2) == [others[0], ours[1]]


def test_a_path_whose_tip_is_gone_is_published_anew():
    pool = BlockPool(4, 1)
    theirs, ours = pool.allocate(1), pool.allocate(2)
    publish(pool, theirs, packed(1))
    path = publish(pool, ours[:1], packed(1))
    assert path.tip == theirs[0]
    pool.unpublish(theirs)
    assert not pool.is_current(path)
    path.restart()
    pool.publish(path, ours, packed(1, 2))
    assert pool.match(ROOT, packed(1, 2), 2) == ours
    pool.check([theirs, ours])


def test_blocks_that_are_still_published_stay_so_when_their_path_is_published_anew():
    pool = BlockPool(8, 1)
    ours, theirs = pool.allocate(3), pool.allocate(1)
    publish(pool, ours[:2], packed(1, 2))
    pool.publish(pool.path(ROOT, ours[:2]), theirs, packed(3))
    path = pool.path(ROOT, ours[:2])
    pool.publish(path, ours[2:], packed(3))
    assert path.tip == theirs[0]
    pool.unpublish(ours[:1])
    pool.unpublish(theirs)
    path.restart()
    pool.publish(path, ours, packed(1, 2, 3))
    pool.check([ours, theirs])
    assert pool.match(ROOT, packed(1, 2, 3), 3) == ours


def test_tokens_are_compared_when_keys_are_equal(monkeypatch):
    monkeypatch.setattr(blocks_module, "_key", lambda parent, tokens: b"the same")
    pool = BlockPool(4, 1)
    first, second = pool.allocate(1), pool.allocate(1)
    publish(pool, first, packed(1))
    path = publish(pool, second, packed(2))
    assert (path.length, pool.match(ROOT, packed(2), 1)) == (0, [])
    assert pool.match(ROOT, packed(1), 1) == first


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(2, 1, enable_prefix_caching=False)
    blocks = pool.allocate(2)
    publish(pool, blocks, packed(1, 2))
    assert pool.match(ROOT, packed(1, 2), 2) == []
    pool.free(blocks)
    assert (pool.num_cached, pool.num_available) == (0, 2)


def test_a_prompt_without_hits_costs_two_hashes(monkeypatch):
    """One to look it up and one to publish it, however long it is."""
    calls = []
    key = blocks_module._key
    monkeypatch.setattr(blocks_module, "_key", lambda *args: calls.append(1) or key(*args))
    pool = BlockPool(1000, 16)
    for token in range(4):
        tokens = np.full(10_000, token, np.int32).tobytes()
        assert pool.match(ROOT, tokens, 625) == []
        publish(pool, pool.allocate(100), tokens[: 100 * 64])
    assert len(calls) == 8


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        BlockPool(*sizes)


class PoolMachine(RuleBasedStateMachine):
    """Sequences of few different tokens come, match, grow, publish, are unpublished and go.

    `content` says, for each block, the root and all tokens up to its end that its last owner put there.
    """

    @initialize(block_size=st.integers(1, 3))
    def start(self, block_size):
        self.pool = BlockPool(12, block_size)
        self.some_withdrawn = False
        self.content: dict[int, tuple] = {}
        self.sequences: list[tuple[bytes, list[int], list[int], PrefixPath]] = []  # root, tokens, blocks, path

    def pieces(self, tokens):
        size = self.pool.block_size
        return [tuple(tokens[: end + size]) for end in range(0, len(tokens) - size + 1, size)]

    @rule(root=st.sampled_from([b"a", b"b"]), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=15))
    def come(self, root, tokens):
        tokens = tokens[: len(tokens) // self.pool.block_size * self.pool.block_size]
        pieces = self.pieces(tokens)
        hits = self.pool.match(root, packed(*tokens), len(pieces))
        assert [self.content[block] for block in hits] == [(root, piece) for piece in pieces[: len(hits)]]
        missing = len(pieces) - len(hits)
        if missing + self.pool.count_idle(hits) > self.pool.num_available:
            return
        self.pool.share(hits)
        self.some_withdrawn |= missing > self.pool.num_available - self.pool.num_cached
        path = self.pool.path(root, hits)
        blocks = hits + self.pool.allocate(missing)
        self.content |= {block: (root, piece) for block, piece in zip(blocks, pieces, strict=True)}
        self.sequences.append((root, tokens, blocks, path))

    @rule(data=st.data())
    def publish_more(self, data):
        if not self.sequences:
            return
        root, tokens, blocks, path = data.draw(st.sampled_from(self.sequences))
        if not self.pool.is_current(path):
            path.restart()
        stop = data.draw(st.integers(path.length, len(blocks)))
        size = self.pool.block_size
        self.pool.publish(path, blocks[path.length : stop], packed(*tokens[path.length * size : stop * size]))
        assert path.length == stop
        found = self.pool.match(root, packed(*tokens), stop)
        assert [self.content[block] for block in found] == [
            (root, piece) for piece in self.pieces(tokens)[: len(found)]
        ]
        # Blocks before the tip that the sequence does not own may be evicted, and its own ones unpublished by another
        # owner; then they are missing until somebody brings them.
        assert len(found) == stop or self.some_withdrawn

    @rule(data=st.data())
    def unpublish(self, data):
        if self.sequences:
            _, _, blocks, _ = data.draw(st.sampled_from(self.sequences))
            gone = blocks[data.draw(st.integers(0, len(blocks))) :]
            self.pool.unpublish(gone)
            self.some_withdrawn = True
            for root, tokens, _, _ in self.sequences:
                assert not set(gone) & set(self.pool.match(root, packed(*tokens), len(self.pieces(tokens))))

    @rule(data=st.data())
    def go(self, data):
        if self.sequences:
            place = data.draw(st.integers(0, len(self.sequences) - 1))
            self.pool.free(self.sequences.pop(place)[2])

    @invariant()
    def is_consistent(self):
        if hasattr(self, "pool"):
            self.pool.check(blocks for _, _, blocks, _ in self.sequences)

    def teardown(self):
        for _, _, blocks, _ in getattr(self, "sequences", ()):
            self.pool.free(blocks)
        if hasattr(self, "pool"):
            assert self.pool.num_used == 0
            self.pool.check([])


class TestPool(PoolMachine.TestCase):
    settings = settings(max_examples=30, stateful_step_count=50, deadline=None)


@pytest.mark.slow
class TestPoolAtLength(PoolMachine.TestCase):
    settings = settings(max_examples=300, stateful_step_count=100, deadline=None)
