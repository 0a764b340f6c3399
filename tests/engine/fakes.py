"""A model without weights: the next token is a hash of the seed and of everything that the sequence's blocks hold.

It reads its context through the block tables that the plans have told so far, so that a mixed-up row, block, position
or copy changes the tokens. `expected` is what a sequence must give, computed from its tokens alone.
"""

from hashlib import blake2b

import numpy as np

from llama.engine.plan import LAST_SAMPLED, LogprobArrays, Plan, StepResult
from llama.engine.request import SamplingParams, Sequence

UNWRITTEN = -9


def next_token(token_ids, seed: int, vocab_size: int) -> int:
    tokens = np.asarray(token_ids, np.int64).tobytes()
    return int.from_bytes(blake2b(tokens + seed.to_bytes(8, "little"), digest_size=8).digest(), "little") % vocab_size


def expected(prompt, seed: int, count: int, vocab_size: int, ends=()) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed, vocab_size))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt) :]


def fake_logprobs(token_ids: list[int]) -> LogprobArrays:
    """A token's fake log-probability is minus itself, with one top entry that is token 0."""
    tokens = np.array(token_ids, np.int64)
    return LogprobArrays(
        -tokens.astype(float), tokens + 1, np.zeros((len(tokens), 1), np.int64), np.zeros((len(tokens), 1))
    )


class FakeRunner:
    def __init__(self, *, num_rows: int, num_blocks: int, block_size: int, max_model_len: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.cache = np.full((num_blocks, block_size), UNWRITTEN, np.int64)
        self.table = np.full((num_rows, -(-max_model_len // block_size)), -1, np.int64)
        self.last_tokens = np.full(num_rows, -1, np.int64)
        self.seeds = np.zeros(num_rows, np.int64)
        self.is_bad = lambda row: False

    def execute(self, plan: Plan) -> StepResult:
        rows, columns, blocks = plan.table_updates
        self.table[rows, columns] = blocks
        for join in plan.joins:
            self.seeds[join.row] = join.seed
        assert (plan.query_lens[: plan.num_decodes] == 1).all()
        assert plan.query_lens.sum() == plan.num_tokens and len(set(plan.rows.tolist())) == len(plan.rows)
        seq_of_token = np.repeat(np.arange(len(plan.rows)), plan.query_lens)
        starts = np.cumsum(plan.query_lens) - plan.query_lens
        positions = (
            np.arange(plan.num_tokens) - starts[seq_of_token] + (plan.context_lens - plan.query_lens)[seq_of_token]
        )
        row_of_token = plan.rows[seq_of_token]
        tokens = np.where(plan.token_ids == LAST_SAMPLED, self.last_tokens[row_of_token], plan.token_ids)
        assert (tokens >= 0).all()
        self.cache[self.table[row_of_token, positions // self.block_size], positions % self.block_size] = tokens

        sampled = []
        contexts = [self._context(row_of_token[s], positions[s] + 1) for s in plan.sample_sources]
        for row, position, context in zip(plan.sample_rows, plan.sample_positions, contexts, strict=True):
            assert position == len(context)
            sampled.append(next_token(context, int(self.seeds[row]), self.vocab_size))
        self.last_tokens[plan.sample_rows] = sampled
        for source, target in plan.copies:
            self.cache[target] = self.cache[source]
        scores = None
        if plan.prompt_sources is not None:
            following = [self._context(row_of_token[s], positions[s] + 1) for s in plan.prompt_sources]
            assert all((context != UNWRITTEN).all() for context in following)
            scores = fake_logprobs(plan.prompt_targets)
        bad = np.array([self.is_bad(int(row)) for row in plan.sample_rows], bool)
        return StepResult(np.array(sampled, np.int64), bad, fake_logprobs(sampled), scores)

    def _context(self, row: int, length: int) -> np.ndarray:
        blocks = self.table[row, : -(-length // self.block_size)]
        return self.cache[blocks].reshape(-1)[:length]


def sequences_of(request_id, arrival, prompt, params: SamplingParams | None = None, *, seed=0, max_model_len=10**6):
    """The completions of one request, as the engine makes them; completion i has seed + i."""
    params = params or SamplingParams()
    limit = min(max_model_len, len(prompt) + (params.max_tokens or max_model_len))
    sequences = [
        Sequence(request_id, i, arrival, params, seed + i, np.array(prompt, np.int32), limit) for i in range(params.n)
    ]
    if params.prompt_logprobs is not None:
        sequences[0].prompt_logprobs = [None]
    return sequences
