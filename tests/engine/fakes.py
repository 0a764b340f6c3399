"""A model without weights: the next token is a hash of the seed and of everything that the sequence's blocks hold.

It reads its context through the block tables that the plans have told so far, so that a mixed-up row, block, position
or copy changes the tokens. `expected` is what a sequence must give, computed from its tokens alone.
"""

from collections import deque
from hashlib import blake2b

import numpy as np
import torch

from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from llama.engine.blocks import BlockPool, _key, prefix_root
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.plan import LAST_SAMPLED, Plan, StepResult
from llama.engine.scheduler import Scheduler
from llama.engine.sequence import Sequence, TokenOutput
from llama.kernels.logprobs import Logprobs
from tests import drafters

UNWRITTEN = -9
NUM_DRAFTS = 6  # of a run, at most
VOCAB = 97  # of a FakeDevice, and of the tiny models


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


def fake_logprobs(token_ids: list[int]) -> Logprobs:
    """A token's fake log-probability is minus itself, with one top entry that is token 0."""
    tokens = np.array(token_ids, np.int64)
    return Logprobs(-tokens.astype(float), tokens + 1, np.zeros((len(tokens), 1), np.int64), np.zeros((len(tokens), 1)))


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
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == len(rows)
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
        drafts = [-1] * len(sampled) if plan.drafts is None else plan.drafts.tolist()
        counts = True  # a token behind a draft that was not drawn does not
        for row, token, draft in zip(plan.sample_rows, sampled, drafts, strict=True):
            if counts:
                self.last_tokens[row] = token
            counts = draft < 0 or (counts and draft == token)
        for source, target in plan.copies:
            self.cache[target] = self.cache[source]
        scores = None
        if plan.prompt_sources is not None:
            following = [self._context(row_of_token[s], positions[s] + 1) for s in plan.prompt_sources]
            assert all((context != UNWRITTEN).all() for context in following)
            scores = fake_logprobs(plan.prompt_targets)
        bad = np.array([self.is_bad(int(row)) for row in plan.sample_rows], bool)
        for i in np.flatnonzero(bad[: plan.num_decodes]):  # what it computed is as bad as what it drew
            position = positions[i]
            self.cache[self.table[plan.rows[i], position // self.block_size], position % self.block_size] = UNWRITTEN
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


class Driver:
    """Scheduler and FakeRunner as an engine would run them, with `lag` steps in flight; checks everything it sees."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 64,
        vocab_size: int = 50,
        eos_token_ids=(),
        enable_prefix_caching: bool = True,
        lag: int = 0,
        drafts: str = "none",
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching=enable_prefix_caching)
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=block_size,
            max_loras=2,
            speculative_config=None if drafts == "none" else {"method": "ngram", "num_speculative_tokens": NUM_DRAFTS},
        )
        self.scheduler = Scheduler(config, self.pool, eos_token_ids=eos_token_ids, vocab_size=vocab_size)
        sizes = {"vocab_size": vocab_size, "max_model_len": max_model_len}
        self.runner = FakeRunner(num_rows=max_num_seqs, num_blocks=num_blocks, block_size=block_size, **sizes)
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.lag, self.drafts = lag, drafts
        self.in_flight: deque[tuple[Plan, StepResult]] = deque()
        self.prompts: dict[str, list[int]] = {}
        self.expected: dict[tuple[str, int], list[int]] = {}
        self.got: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], TokenOutput] = {}
        self.outputs: list[TokenOutput] = []

    def add(self, prompt, params: SamplingParams | None = None, *, seed: int = 0) -> str:
        params = params or SamplingParams(max_tokens=5)
        number = len(self.prompts)
        request_id = f"request {number}"
        self.prompts[request_id] = list(prompt)
        sequences = sequences_of(request_id, number, prompt, params, seed=seed, max_model_len=self.max_model_len)
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self.scheduler.eos_token_ids)
        for s in sequences:
            tokens = expected(prompt, s.seed, s.limit - len(prompt), self.vocab_size, ends)
            self.expected[request_id, s.index] = tokens
            self.got[request_id, s.index] = []
            if self.drafts != "none":
                s.ngrams = drafters.KINDS[self.drafts](tokens)
                s.ngrams.outputs = s.output_token_ids
                s.ngrams.lengths = {1: drafters.Always(NUM_DRAFTS)}
        self.scheduler.add(sequences)
        return request_id

    def step(self) -> Plan | None:
        """Schedule, compute, and take the result that is due."""
        plan = self.scheduler.schedule()
        if plan is None:
            assert self.in_flight or not self.scheduler.has_unfinished, "no progress"
        else:
            assert 0 < plan.num_tokens <= self.scheduler.token_budget
            self.in_flight.append((plan, self.runner.execute(plan)))
        while len(self.in_flight) > (self.lag if plan is not None else 0):
            self.take(self.scheduler.update(*self.in_flight.popleft()))
        self.scheduler.check()
        self.check_published()
        return plan

    def check_published(self) -> None:
        """What a running sequence has in the prefix cache is kept under the key of its own tokens."""
        running, block_size = self.scheduler.running, self.pool.block_size
        for sequence in (*running.prefilling, *running.decoding):
            key = prefix_root(b"", sequence.adapter.digest)
            for i, block in enumerate(running.blocks(sequence.row)[: sequence.num_tokens // block_size]):
                tokens = sequence.tokens_between(i * block_size, (i + 1) * block_size).tobytes()
                key = _key(key, tokens)
                if self.pool._tokens[block] is not None:
                    assert self.pool._tokens[block] == tokens and self.pool._key_of(block) == key

    def take(self, outputs: list[TokenOutput]) -> None:
        self.outputs = outputs
        for output in outputs:
            key = output.request_id, output.index
            assert key not in self.ended, "something comes after the end"
            self.got[key] += output.token_ids
            assert self.got[key] == self.expected[key][: len(self.got[key])]
            if output.prompt_logprobs is not None:
                scored = [next(iter(entry)) for entry in output.prompt_logprobs[1:]]
                assert scored == self.prompts[output.request_id][1:]
            if output.finish_reason is not None:
                self.ended[key] = output

    def drain(self) -> None:
        """Run to the end: nothing is left behind, and whatever ended by itself ended as expected."""
        while self.scheduler.has_unfinished or self.in_flight:
            self.step()
        assert self.pool.num_used == 0
        for key, output in self.ended.items():
            if output.finish_reason is not FinishReason.ERROR:
                assert self.got[key] == self.expected[key]


class FakeDevice(FakeRunner):
    """A FakeRunner with the rest of what an engine wants, and faults on demand."""

    def __init__(self, config: EngineConfig, lag: int = 0) -> None:
        super().__init__(
            num_rows=config.max_num_seqs,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            vocab_size=VOCAB,
        )
        self.lag = lag
        self.faults: list[BaseException] = []  # raised one by one by the next steps
        self.late_faults: list[BaseException] = []  # raised where the result is waited for
        self.most_tokens = 10**9  # that fit into memory
        self.is_dead = False
        self.plan_sizes: list[int] = []

    def launch(self, plan):
        self.plan_sizes.append(plan.num_tokens)
        if self.faults:
            raise self.faults.pop(0)
        if plan.num_tokens > self.most_tokens:
            raise torch.OutOfMemoryError("no memory")
        result = self.execute(plan)

        def wait():
            if self.late_faults:
                raise self.late_faults.pop(0)
            return result

        return wait

    def release_memory(self):
        pass

    def check_device(self):
        if self.is_dead:
            raise RuntimeError("the device is gone")


def config(**changes) -> EngineConfig:
    values = {"max_model_len": 64, "max_num_batched_tokens": 32, "max_num_seqs": 8, "block_size": 4, "num_blocks": 64}
    return EngineConfig(**{**values, **changes})


def make(lag: int = 0, **changes) -> tuple[Engine, FakeDevice]:
    device = FakeDevice(config(**changes), lag)
    return Engine(None, config(**changes), runner=device), device


def add(engine: Engine, *arguments, **rest) -> list[int]:
    """Engine.request and Engine.add in one."""
    return engine.add(engine.request(*arguments, **rest))


def run(engine: Engine) -> dict[tuple[str, int], tuple[list[int], FinishReason]]:
    """Everything to its end -> tokens and reason of each completion that the engine ended itself."""
    tokens, ended = {}, {}
    while engine.has_unfinished:
        for output in engine.step():
            key = output.request_id, output.index
            assert key not in ended
            tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                ended[key] = tokens[key], output.finish_reason
        engine.check()
    assert engine.metrics().num_used_blocks == 0
    return ended


def right(prompt, seed: int, count: int):
    return expected(prompt, seed, count, VOCAB), FinishReason.LENGTH
