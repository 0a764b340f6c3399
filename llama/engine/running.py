"""Running: the sequences that hold a row and blocks, as a struct of arrays, and what they do with their blocks.

A sequence keeps its row while it runs: it prefills until all its known tokens are computed, then it decodes. `computed`
counts tokens as soon as a step that computes them is scheduled.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from llama.engine.blocks import BlockPool, PrefixPath, Salt
from llama.engine.config import EngineConfig
from llama.engine.plan import NO_UPDATES, Ints
from llama.engine.sequence import Sequence

by_order = attrgetter("order")


class Running:
    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        num_rows = config.max_num_seqs
        self.pool = pool
        self.prefilling: dict[Sequence, None] = {}
        self.decoding: dict[Sequence, None] = {}
        self.computed = np.zeros(num_rows, np.int32)
        self.known = np.zeros(num_rows, np.int32)  # tokens known when the sequence came; it decodes from there on
        self.capacity = np.zeros(num_rows, np.int32)  # tokens that its blocks hold
        self.last = np.zeros(num_rows, np.int32)  # position of the last token that the sequence may have
        self.adapter_indices = np.zeros(num_rows, np.int32)
        self.watched: NDArray[np.bool_] = np.zeros(num_rows, np.bool_)  # it has stop ids, a matcher or processors
        # The last step whose result must be known before the sequence runs on: it drew by what the host knows, or
        # drafts may stand behind its token.
        self.awaited_step = np.full(num_rows, -1, np.int64)
        self.table = np.zeros((num_rows, config.blocks_per_sequence), np.int32)
        self.num_adapters = 0
        self.num_watched = 0
        self.num_speculating = 0  # sequences that may have drafts
        self.num_tapped = 0  # rows whose sequence reads or changes activations
        self.num_departures = 0
        self._paths = [PrefixPath(b"")] * num_rows
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._updates: list[Ints] = []
        self._decodes: tuple[Ints, list[Sequence]] | None = None  # rows and sequences of `decoding`, made when needed

    def __len__(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    def enter(self, sequence: Sequence, blocks: list[int], computed: int, path: PrefixPath) -> None:
        """Give a sequence a row; it owns `blocks`, which hold its first `computed` tokens, and prefills the others."""
        row = sequence.row = self._free_rows.pop()
        self.computed[row] = computed
        self.known[row] = sequence.num_tokens
        self.capacity[row] = 0
        self.last[row] = sequence.limit - 1
        self.adapter_indices[row] = sequence.adapter.index
        self.watched[row] = bool(sequence.params.stop_token_ids) or sequence.needs_last_token
        self.awaited_step[row] = -1
        self.num_adapters += sequence.adapter.index > 0
        if sequence.adapter.index:
            sequence.adapter.num_users += 1
        self.num_watched += bool(self.watched[row])
        self.num_speculating += sequence.speculates
        sequence.num_draft_computed = 0
        self.num_tapped += sequence.taps is not None
        self._paths[row] = path
        self._extend(row, blocks)
        self.prefilling[sequence] = None

    def start_decoding(self, sequence: Sequence) -> None:
        del self.prefilling[sequence]
        self.decoding[sequence] = None
        self._decodes = None

    def match(self, sequence: Sequence, root: bytes, salt: Salt) -> list[int]:
        """The blocks of the prefix cache that a sequence can begin with."""
        # The last token is computed in any case, since its logits are wanted. Where every block of a prompt is a hit,
        # the last one is therefore computed again, into a block of its own.
        max_hits = (min(sequence.num_tokens, sequence.next_to_score) - 1) // self.pool.block_size
        if sequence.taps is not None:
            max_hits = min(max_hits, sequence.taps.first_missing(sequence.index) // self.pool.block_size)
        tokens = sequence.tokens_between(0, max_hits * self.pool.block_size)
        return self.pool.match(root, tokens.tobytes(), max_hits, salt)

    def leave(self, sequence: Sequence) -> None:
        """Take back rows and blocks of a sequence and of the one that guides it."""
        for one in sequence.contexts:
            self._leave(one)

    def _leave(self, sequence: Sequence) -> None:
        row = sequence.row
        self.pool.free(self.blocks(row))
        self.num_adapters -= sequence.adapter.index > 0
        if sequence.adapter.index:
            sequence.adapter.num_users -= 1
        self.num_watched -= bool(self.watched[row])
        self.num_speculating -= sequence.speculates
        self.num_tapped -= sequence.taps is not None
        self.num_departures += 1
        self._updates = [update[:, update[0] != row] for update in self._updates]
        self._free_rows.append(row)
        sequence.row = -1
        if sequence in self.prefilling:
            del self.prefilling[sequence]
        else:
            del self.decoding[sequence]
            self._decodes = None

    def blocks(self, row: int) -> list[int]:
        blocks: list[int] = self.table[row, : self.capacity[row] // self.pool.block_size].tolist()
        return blocks

    def take_updates(self) -> Ints:
        """[3, n] what was added to the block tables since the last call: row, column, block."""
        if not self._updates:
            return NO_UPDATES
        updates = self._updates[0] if len(self._updates) == 1 else np.concatenate(self._updates, axis=1)
        self._updates = []
        return updates

    def decodes(self) -> tuple[Ints, list[Sequence]]:
        """Rows and sequences of all that decode; the same objects as long as they stay the same."""
        if self._decodes is None:
            rows = np.array([sequence.row for sequence in self.decoding], np.int32)
            self._decodes = rows, list(self.decoding)
        return self._decodes

    def decodes_beside(self, oldest_step: int) -> tuple[Ints, list[Sequence]]:
        """The same without those that must not run while steps from `oldest_step` on are in flight: one may bring the
        last token that a sequence can have, or the one that its matcher or its drafts must know."""
        rows, sequences = self.decodes()
        ready = self.computed[rows] < self.last[rows]
        if self.num_watched or self.num_speculating:
            ready &= self.awaited_step[rows] < oldest_step
        if ready.all():
            return rows, sequences
        return rows[ready], [sequences[i] for i in np.flatnonzero(ready)]

    def reserve_decodes(self, rows: Ints, sequences: list[Sequence], preempt: Callable[[Sequence], None]) -> bool:
        """A place for one more token in each of these rows. False where blocks were short: some may have left."""
        full = self.computed[rows] >= self.capacity[rows]
        count = int(np.count_nonzero(full))
        if count == 0:
            return True
        if count <= self.pool.num_available:
            full_rows = rows[full]
            columns = self.capacity[full_rows] // self.pool.block_size
            update = np.array([full_rows, columns, self.pool.allocate(count)], np.int32)
            self.table[full_rows, columns] = update[2]
            self.capacity[full_rows] += self.pool.block_size
            self._updates.append(update)
            return True
        for sequence in sorted((sequences[i] for i in np.flatnonzero(full)), key=by_order):
            if sequence.row >= 0 and self.reserve(sequence, 1, preempt) == 0:
                preempt(sequence)
        return False

    def reserve(self, sequence: Sequence, count: int, preempt: Callable[[Sequence], None]) -> int:
        """Places for `count` more tokens, taken from later sequences where no block is left -> how many there are."""
        row, block_size = sequence.row, self.pool.block_size
        computed = int(self.computed[row])
        missing = -(-(computed + count - int(self.capacity[row])) // block_size)
        while missing > self.pool.num_available:
            last = max((*self.prefilling, *self.decoding), key=by_order)
            if last.order <= sequence.order or last.leader is sequence:
                missing = self.pool.num_available
                break
            preempt(last)
        self._extend(row, self.pool.allocate(max(0, missing)))
        return min(count, int(self.capacity[row]) - computed)

    def reserve_drafts(self, sequence: Sequence, count: int) -> int:
        """Places for up to `count` tokens behind the next one, in blocks that no prompt needs -> how many there are."""
        row, block_size = sequence.row, self.pool.block_size
        taken = int(self.computed[row]) + 1
        missing = -(-(taken + count - int(self.capacity[row])) // block_size)
        spare = self.pool.num_available - self.num_promised_blocks(self.prefilling)
        self._extend(row, self.pool.allocate(max(0, min(missing, spare))))
        return min(count, int(self.capacity[row]) - taken)

    def shrink(self, sequence: Sequence, num_tokens: int) -> None:
        """Give back the blocks behind that many tokens: refused drafts had them. No step in flight may know the row."""
        row, block_size = sequence.row, self.pool.block_size
        kept = -(-num_tokens // block_size)
        if kept * block_size < self.capacity[row]:
            self.pool.free(self.blocks(row)[kept:])
            self.capacity[row] = kept * block_size
            self._updates = [update[:, (update[0] != row) | (update[1] < kept)] for update in self._updates]

    def num_promised_blocks(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that the known tokens of these sequences still need."""
        missing = [int(self.known[sequence.row]) - int(self.capacity[sequence.row]) for sequence in sequences]
        return sum(-(-tokens // self.pool.block_size) for tokens in missing if tokens > 0)

    def fork(self, source: Sequence, sequence: Sequence) -> tuple[int, int] | None:
        """Let a sequence run from where `source`, its leader, will have computed their prompt: full blocks are shared,
        a partial one is to be copied (source block, target block)."""
        blocks = self.blocks(source.row)[: -(-len(sequence.prompt) // self.pool.block_size)]
        path = self._paths[source.row]
        copy = None
        if len(sequence.prompt) % self.pool.block_size:
            partial = blocks.pop()
            copy = partial, self.pool.allocate(1)[0]
        self.pool.share(blocks)
        own = blocks if copy is None else [*blocks, copy[1]]
        self.enter(sequence, own, len(sequence.prompt), replace(path))
        return copy

    def publish(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Put the sequence's full blocks among its first `num_tokens` tokens into the prefix cache -> the new ones."""
        pool, path = self.pool, self._paths[sequence.row]
        if not pool.enable_prefix_caching or path.is_private:
            return []
        if not pool.is_current(path):
            path.restart()
        start, stop = path.length, num_tokens // pool.block_size
        if start >= stop:
            return []
        blocks: list[int] = self.table[sequence.row, start:stop].tolist()
        tokens = sequence.tokens_between(start * pool.block_size, stop * pool.block_size)
        pool.publish(path, blocks, tokens.tobytes())
        return blocks

    def close_cache(self, is_closed: bool) -> None:
        """While it is closed the prefix cache neither gives nor takes; what runs then stays private to its end."""
        self.pool.is_closed = is_closed
        if is_closed:
            self.keep_private()

    def keep_private(self) -> None:
        """What runs now is not published any more."""
        for sequence in (*self.prefilling, *self.decoding):
            self._paths[sequence.row].is_private = True

    def _extend(self, row: int, blocks: list[int]) -> None:
        if not blocks:
            return
        start = int(self.capacity[row]) // self.pool.block_size
        update = np.empty((3, len(blocks)), np.int32)
        update[0], update[1], update[2] = row, range(start, start + len(blocks)), blocks
        self.table[row, start : start + len(blocks)] = update[2]
        self.capacity[row] += len(blocks) * self.pool.block_size
        self._updates.append(update)

    def check(self) -> None:
        """Prove that rows, blocks and counters belong together."""
        sequences = [*self.prefilling, *self.decoding]
        rows = {sequence.row for sequence in sequences}
        assert len(rows) == len(sequences) and rows | set(self._free_rows) == set(range(len(self.computed)))
        for sequence in sequences:
            row = sequence.row
            assert not sequence.finished and self.computed[row] <= self.capacity[row]
            is_decoding = self.computed[row] >= self.known[row]
            is_guided = len(sequence.contexts) > 1 or sequence.leader is not None  # see llama.engine.guidance
            assert (sequence in self.decoding) == (is_decoding and not is_guided), f"row {row} is in the wrong phase"
        assert self.num_adapters == sum(sequence.adapter.index > 0 for sequence in sequences)
        self.pool.check(self.blocks(row) for row in rows)
