"""Runs sequences through Transformer the way an engine does: chunks, decodes and scattered blocks in one batch."""

import random

import torch
from torch import Tensor

from llama.model.batch import Batch
from llama.model.kv_cache import KVCache
from llama.model.transformer import Transformer


class Pages:
    """A KV cache whose unused slots hold NaN, with block tables in shuffled order."""

    def __init__(self, model: Transformer, lengths: list[int], block_size: int, *, seed: int = 0) -> None:
        self.model = model
        self.block_size = block_size
        counts = [-(-length // block_size) for length in lengths]
        total = sum(counts) + 1
        self.kv = KVCache(model.config, total, block_size, dtype=model.dtype, device=model.device)
        self.kv.data.fill_(float("nan"))
        blocks = list(range(total))
        random.Random(seed).shuffle(blocks)
        unused = blocks.pop()
        self.tables = []
        for count in counts:
            mine, blocks = blocks[:count], blocks[count:]
            self.tables.append(mine + [unused] * (max(counts) - count))
        self.computed = [0] * len(lengths)

    def step(self, chunks: list[tuple[int, list[int]]], logit_rows: list[int] | None = None) -> Tensor:
        """Compute (sequence, its next tokens) pairs in one batch, decodes first -> logits."""
        chunks = sorted(chunks, key=lambda chunk: len(chunk[1]) != 1)
        ids, positions, slots, starts, context = [], [], [], [0], []
        for sequence, tokens in chunks:
            for token in tokens:
                position = self.computed[sequence]
                block = self.tables[sequence][position // self.block_size]
                ids.append(token)
                positions.append(position)
                slots.append(block * self.block_size + position % self.block_size)
                self.computed[sequence] += 1
            starts.append(len(ids))
            context.append(self.computed[sequence])
        batch = Batch(
            token_ids=torch.tensor(ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            block_tables=torch.tensor(self.tables, dtype=torch.int32)[[sequence for sequence, _ in chunks]],
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(context, dtype=torch.int32),
            slots=torch.tensor(slots, dtype=torch.int64),
            num_decodes=sum(len(tokens) == 1 for _, tokens in chunks),
            block_size=self.block_size,
            logit_rows=None if logit_rows is None else torch.tensor(logit_rows, dtype=torch.int64),
        )
        return self.model(batch, self.kv)
