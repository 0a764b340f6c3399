"""BlockPool: who owns which block of the paged KV cache, and which full blocks can be used again. Ids only, no tensors.

A block is used (owners counted), cached (no owner, but its content is published) or free. used + cached + free = total.
Free and cached blocks are one queue in two parts: free ones go first, then cached ones, least recently used first.

The prefix cache is a trie of published blocks, compared by their tokens. A block's key is a BLAKE2 chain over (model,
adapter, all tokens up to its end). The first block published after another one is its heir and is found through it;
only roots and branches are looked up by key: a prompt that meets nothing it knows costs two hashes, not one per block.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

NONE = -1  # in place of a block id


class Salt(NamedTuple):
    """What makes content differ from what the same tokens give otherwise, from a sequence's `block` (a number) on."""

    block: int
    content: bytes

    def of(self, block: int, tokens: bytes) -> bytes:
        return tokens + self.content if block == self.block else tokens


NO_SALT = Salt(-1, b"")


def prefix_root(model: bytes, adapter: bytes, salt: str | None = None) -> bytes:
    """What the chain of keys starts from: content computed by other weights is other content, and with a salt it is
    found with that salt alone."""
    root = blake2b(len(model).to_bytes(8, "little") + model + adapter, digest_size=32).digest()
    # Another function than that of the chain: no salt leads into the middle of somebody's prompt.
    return root if salt is None else blake2b(root + salt.encode(), digest_size=32, person=b"salt").digest()


def _key(parent: bytes, tokens: bytes) -> bytes:
    return blake2b(parent + tokens, digest_size=32).digest()


@dataclass(slots=True)
class PrefixPath:
    """How far one sequence's blocks are published. The tip is the published block with the content of the last of them:
    the sequence's own or, where another one was first, an equal one that it does not own and that may disappear."""

    root: bytes
    length: int = 0  # blocks
    tip: int = NONE
    stamp: int = 0  # of the tip when it was the tip
    salt: Salt = NO_SALT
    is_private: bool = False  # nothing of it is published any more

    def restart(self) -> None:
        self.length, self.tip = 0, NONE


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.is_closed = False  # for now: nothing is found, and new paths are private
        self._width = 4 * block_size  # bytes of a block's tokens (int32)
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        # The trie. A block is published while it has tokens; it is the heir of its parent or it is in the index.
        self._index: dict[bytes, int] = {}
        self._tokens: list[bytes | None] = [None] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks  # made when first needed
        self._parents = [NONE] * num_blocks  # of heirs only
        self._heirs = [NONE] * num_blocks
        self._stamps = [0] * num_blocks  # raised when the block's content stops being published

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_cached(self) -> int:
        """Blocks without an owner whose content can be used again."""
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks of arbitrary content, one owner each; the caller has checked num_available."""
        assert 0 <= count <= self.num_available, f"{count} blocks asked, {self.num_available} available"
        while len(self._free) < count:
            self._withdraw(next(iter(self._cached)))
        blocks = self._free[: -count - 1 : -1]
        del self._free[len(self._free) - count :]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for each block; cached ones come back into use."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1

    def count_idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks have no owner: sharing them lowers num_available by as many."""
        return sum(self._refs[block] == 0 for block in blocks)

    def free(self, blocks: Sequence[int]) -> None:
        """One owner less for each block of a sequence, given in its order: the end of a prefix is evicted before its
        beginning."""
        refs = self._refs
        for block in reversed(blocks):
            refs[block] -= 1
            if refs[block]:
                continue
            if self._tokens[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def match(self, root: bytes, tokens: bytes, max_blocks: int, salt: Salt = NO_SALT) -> list[int]:
        """The published blocks, at most `max_blocks`, that hold the beginning of `tokens` (int32 each). Takes none."""
        found: list[int] = []
        if not self.enable_prefix_caching or self.is_closed:
            return found
        parent = NONE
        for index in range(max_blocks):
            piece = tokens[index * self._width : (index + 1) * self._width]
            parent = self._child(root, parent, salt.of(index, piece))[0]
            if parent == NONE:
                break
            found.append(parent)
        return found

    def path(self, root: bytes, blocks: Sequence[int], salt: Salt = NO_SALT) -> PrefixPath:
        """The path of a sequence that begins with matched blocks."""
        if not blocks:
            return PrefixPath(root, salt=salt, is_private=self.is_closed)
        return PrefixPath(root, len(blocks), blocks[-1], self._stamps[blocks[-1]], salt)

    def is_current(self, path: PrefixPath) -> bool:
        """False: the tip's content is published no more; restart the path and publish from its beginning."""
        return path.tip == NONE or self._stamps[path.tip] == path.stamp

    def publish(self, path: PrefixPath, blocks: Sequence[int], tokens: bytes) -> None:
        """Extend a current path by full blocks and their tokens; content that is published already stays as it is."""
        assert len(tokens) == len(blocks) * self._width and self.is_current(path)
        if not self.enable_prefix_caching or path.is_private:
            return
        published, heirs, parents, width = self._tokens, self._heirs, self._parents, self._width
        tip, start = path.tip, -width
        for block in blocks:
            start += width
            if published[block] is not None:  # since before the path was restarted
                tip = block
                continue
            piece = path.salt.of(path.length + start // width, tokens[start : start + width])
            if tip != NONE and heirs[tip] == NONE:
                heirs[tip], parents[block], published[block] = block, tip, piece
                tip = block
                continue
            known, key = self._child(path.root, tip, piece)
            if known == NONE:
                assert key is not None
                if key in self._index:  # other tokens under an equal key: what follows cannot be published
                    break
                self._index[key] = known = block
                self._keys[block], self._tokens[block] = key, piece
            tip = known
        else:
            path.length, path.tip = path.length + len(blocks), tip
            path.stamp = self._stamps[tip] if tip != NONE else 0

    def unpublish(self, blocks: Sequence[int]) -> None:
        """Take blocks of a sequence, given in its order, out of the prefix cache; their owners keep them."""
        for block in reversed(blocks):
            if self._tokens[block] is not None:
                self._withdraw(block)

    def unpublish_all(self) -> None:
        """Empty the prefix cache; owned blocks stay their owners'."""
        for block in range(self.num_blocks):
            if self._tokens[block] is not None:
                self._withdraw(block)

    def _child(self, root: bytes, parent: int, tokens: bytes) -> tuple[int, bytes | None]:
        """The published block with these tokens behind `parent`, and its key where that had to be made."""
        if parent != NONE:
            heir = self._heirs[parent]
            if heir != NONE and self._tokens[heir] == tokens:
                return heir, None
            root = self._key_of(parent)
        key = _key(root, tokens)
        block = self._index.get(key, NONE)
        if block != NONE and self._tokens[block] != tokens:
            block = NONE
        return block, key

    def _key_of(self, block: int) -> bytes:
        without = []
        while (key := self._keys[block]) is None:
            without.append(block)
            block = self._parents[block]
        for heir in reversed(without):
            tokens = self._tokens[heir]
            assert tokens is not None
            key = self._keys[heir] = _key(key, tokens)
        return key

    def _withdraw(self, block: int) -> None:
        """End a block's publication; its heir is indexed by its key, or withdrawn as well if an equal block is."""
        next_block = block
        while next_block != NONE:
            block, next_block = next_block, NONE
            heir = self._heirs[block]
            if heir != NONE:
                key = self._key_of(heir)
                self._heirs[block] = self._parents[heir] = NONE
                if self._index.setdefault(key, heir) != heir:
                    next_block = heir
            own_key = self._keys[block]
            if self._parents[block] != NONE:
                self._heirs[self._parents[block]] = self._parents[block] = NONE
            elif own_key is not None and self._index.get(own_key) == block:
                del self._index[own_key]
            self._tokens[block] = self._keys[block] = None
            self._stamps[block] += 1
            if self._refs[block] == 0:
                del self._cached[block]
                self._free.append(block)

    def check(self, owners: Iterable[Iterable[int]]) -> None:
        """Prove the invariants against the blocks of every owner. AssertionError says what is wrong."""
        counts = Counter(block for owned in owners for block in owned)
        free = set(self._free)
        assert len(free) == len(self._free) and self.num_used == len(counts), "a block is free twice or lost"
        for block in range(self.num_blocks):
            assert self._refs[block] == counts[block], (
                f"block {block}: {self._refs[block]} refs, {counts[block]} owners"
            )
            places = (counts[block] > 0) + (block in free) + (block in self._cached)
            assert places == 1, f"block {block} is in {places} places"
            assert block not in free or self._tokens[block] is None, f"block {block} is free but published"
            self._check_published(block)
        for key, block in self._index.items():
            assert self._keys[block] == key and self._parents[block] == NONE, f"block {block} is wrongly indexed"

    def _check_published(self, block: int) -> None:
        tokens, parent, heir = self._tokens[block], self._parents[block], self._heirs[block]
        if tokens is None:
            assert parent == heir == NONE and self._keys[block] is None, f"block {block} has remains of a publication"
            return
        assert len(tokens) >= self._width
        assert heir == NONE or self._parents[heir] == block, f"the heir of block {block} has another parent"
        if parent == NONE:
            key = self._keys[block]
            assert key is not None and self._index.get(key) == block, f"block {block} cannot be found"
        else:
            assert self._heirs[parent] == block, f"block {block} is not its parent's heir"
            assert self._key_of(block) == _key(self._key_of(parent), tokens), f"block {block} has a wrong key"
