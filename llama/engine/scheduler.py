"""Scheduler: who runs in the next step, and what becomes of what came out. Bookkeeping over token ids and block ids.

There is no prefill phase and no decode phase: a sequence has known tokens, and a step hands out tokens, up to a budget,
until all of them are computed; then each step adds one. Decodes go first, then prompts in chunks, in the order of
priority and arrival. When blocks run out the last sequence in this order goes back to wait, keeps its tokens and is
computed again; the first can always go on, so that every scheduled step makes progress.

`update` may lag one step behind `schedule`. A sequence that turns out to have ended then costs a row of the step in
between; its token is dropped, and the block that it wrote to was never published.
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llama.api.outputs import FinishReason
from llama.engine.adapters import Adapters
from llama.engine.blocks import BlockPool, prefix_root
from llama.engine.config import EngineConfig
from llama.engine.guidance import chunk_sizes
from llama.engine.plan import Ints, Plan, StepResult, entry_of
from llama.engine.running import Running, by_order
from llama.engine.sequence import BROKEN_GRAMMAR, BROKEN_PROCESSOR, Sequence, TokenOutput
from llama.engine.speculation import Speculation
from llama.engine.step import Chunk, Run, StepRecord, decode_constants


class Scheduler:
    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        model: bytes = b"",
        lora_bytes: int | None = None,
    ) -> None:
        self.pool = pool
        self.token_budget = config.token_budget
        # With more sequences than budget some of them would hold blocks and stand still.
        self.max_running = min(config.max_num_seqs, self.token_budget)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.running = Running(config, pool)
        self.adapters = Adapters(config.max_loras, lora_bytes)
        self.waiting: list[Sequence] = []  # by order
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # that the prefix cache was asked for
        self.num_hit_tokens = 0
        self.num_generated_tokens = 0
        self._is_eos = np.zeros(vocab_size, np.bool_)
        self._is_eos[[token for token in self.eos_token_ids if token < vocab_size]] = True
        self._mask_words = -(-vocab_size // 32)
        self.speculation: Speculation | None = None
        if config.speculation is not None:
            self.speculation = Speculation(config.speculation, self.running, self.eos_token_ids, self._mask_words)
        self.model = model
        self._requests: dict[str, list[Sequence]] = {}
        self._in_flight: deque[StepRecord] = deque()
        self._num_steps = 0
        self._constants = decode_constants(0)
        self._refused: tuple[Sequence, int] | None = None  # head of the queue that did not fit, and what was available

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_in_flight(self) -> int:
        """Steps whose result is not known yet."""
        return len(self._in_flight)

    # Requests come and go.

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, sequences: list[Sequence]) -> None:
        """Queue one request: its completions, in the order of their index. The others follow the first one."""
        first, *rest = sequences
        assert first.request_id not in self._requests
        self._requests[first.request_id] = list(sequences)
        first.followers = rest
        insort(self.waiting, first, key=by_order)

    def abort(self, request_id: str) -> None:
        """End a request in whatever state it is; its blocks are free at once. Unknown ids are ignored."""
        for sequence in self._requests.get(request_id, [])[::-1]:
            self._end(sequence)

    def finish(self, request_id: str, index: int) -> None:
        """End one completion."""
        for sequence in self._requests.get(request_id, [])[:]:
            if sequence.index == index:
                self._end(sequence)

    def _end(self, sequence: Sequence) -> None:
        siblings = self._requests[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request_id]
        sequence.finished = True
        if sequence.row >= 0:
            self.running.leave(sequence)
        else:
            places = [self.waiting, *(sibling.followers for sibling in siblings)]
            next(place for place in places if sequence in place).remove(sequence)
        self._queue_followers(sequence)

    def _queue_followers(self, sequence: Sequence) -> None:
        """Those that can fork no more compute the prompt themselves, or find it in the cache."""
        for follower in sequence.followers:
            insort(self.waiting, follower, key=by_order)
        sequence.followers = []

    def _requeue(self, sequence: Sequence) -> None:
        """Back to the queue with all that is known of it; what is in flight must be known before it runs again."""
        sequence = sequence.leader or sequence
        self.running.leave(sequence)
        sequence.ready_after = self._in_flight[-1].number if self._in_flight else -1
        insort(self.waiting, sequence, key=by_order)

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; it keeps its tokens and is computed again."""
        self.num_preemptions += 1
        self._requeue(sequence)

    # A step is made.

    def schedule(self, max_tokens: int | None = None) -> Plan | None:
        """Hand out at most `max_tokens` tokens (None = the whole budget); None if no sequence can use one now."""
        budget = self.token_budget if max_tokens is None else min(max_tokens, self.token_budget)
        step = StepRecord(self._num_steps)
        rows, step.decodes = self._ready(budget)
        if not self.running.reserve_decodes(rows, step.decodes, self.preempt):
            rows, step.decodes = self._ready(budget)
        if self.waiting or self.running.prefilling:
            self._add_chunks(step, budget - len(step.decodes))
            rows, step.decodes = self._ready(budget)  # chunks may have taken blocks from some
        if not step.decodes and not step.chunks:
            return None
        if self.speculation is not None and self.running.num_speculating:
            rows = self.speculation.add_runs(step, rows, budget - step.num_tokens)
        if len(self._constants["query_lens"]) != len(rows):
            self._constants = decode_constants(len(rows))
        adapters = self.adapters.running() if self.running.num_adapters else ()
        plan = step.plan(self.running, adapters, rows, self._constants, self._mask_words)
        self._commit(step, plan)
        return plan

    def _ready(self, budget: int) -> tuple[Ints, list[Sequence]]:
        """Rows and sequences that decode in this step."""
        if self._in_flight:
            rows, sequences = self.running.decodes_beside(self._in_flight[0].number)
        else:
            rows, sequences = self.running.decodes()
        return (rows, sequences) if len(sequences) <= budget else (rows[:budget], sequences[:budget])

    def _add_chunks(self, step: StepRecord, budget: int) -> None:
        """Spend what the decodes left."""
        for sequence in sorted(self.running.prefilling, key=by_order):
            if budget > 0 and sequence.row >= 0 and sequence.leader is None:
                budget -= self._add_chunk(step, sequence, budget)
        promised = self.running.num_promised_blocks(self.running.prefilling) if self.waiting else 0
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            contexts = sequence.contexts
            if len(self.running) + len(contexts) > self.max_running or not self._admit(step, sequence, promised):
                return
            budget -= self._add_chunk(step, sequence, budget)
            promised += self.running.num_promised_blocks(contexts)

    def _admit(self, step: StepRecord, sequence: Sequence, promised: int) -> bool:
        """Let the head of the queue run if there is room for all of its known tokens, `promised` blocks aside."""
        available, block_size = self.pool.num_available, self.pool.block_size
        if self._in_flight and sequence.ready_after >= self._in_flight[0].number:
            return False
        if self._refused is not None and self._refused[0] is sequence and available <= self._refused[1]:
            return False
        root = prefix_root(self.model, sequence.adapter.digest, sequence.params.cache_salt)
        salt = sequence.salt(block_size)
        found = {one: self.running.match(one, root, salt) for one in sequence.contexts}
        needed = sum(-(-o.num_tokens // block_size) - len(h) + self.pool.count_idle(h) for o, h in found.items())
        if needed + promised > available:
            self._refused = sequence, available
            return False
        if not self.adapters.acquire(sequence.adapter):
            return False
        self._refused = None
        del self.waiting[0]
        for one, hits in found.items():
            self.pool.share(hits)
            self.running.enter(one, hits, len(hits) * block_size, self.pool.path(root, hits, salt))
        step.join(sequence)
        if sequence.num_cached_tokens < 0:
            sequence.num_cached_tokens, sequence.scheduled = len(found[sequence]) * block_size, time.monotonic()
            self.num_queried_tokens += sequence.num_tokens
            self.num_hit_tokens += sequence.num_cached_tokens
        return True

    def _add_chunk(self, step: StepRecord, sequence: Sequence, budget: int) -> int:
        """Compute as many known tokens of a prefilling sequence as budget and blocks allow -> how many."""
        counts = chunk_sizes(self.running, sequence, budget, self.preempt)
        for one, count in counts.items():
            self._compute(step, one, count)
        return sum(counts.values())

    def _compute(self, step: StepRecord, sequence: Sequence, count: int) -> None:
        """Put the next known tokens of a prefilling sequence into the step."""
        running, row = self.running, sequence.row
        start = int(running.computed[row])
        stop = start + count
        running.computed[row] = stop
        # Published before they are computed, so that requests of one step can share; taken back if the step fails.
        step.published += running.publish(sequence, stop)
        samples = [sequence, *self._fork(step, sequence)] if stop == sequence.num_tokens and not sequence.leader else []
        score_from = score_to = 0
        if sequence.prompt_logprobs is not None:
            score_from = max(start + 1, len(sequence.prompt_logprobs))
            score_to = max(score_from, min(stop + 1, len(sequence.prompt)))
        tokens = sequence.tokens_between(start, stop)
        step.chunks.append(Chunk(sequence, row, start, tokens, samples, score_from, score_to))

    def _fork(self, step: StepRecord, leader: Sequence) -> list[Sequence]:
        """The other completions of a prompt that is computed now draw from the same logits, as far as there is room."""
        forked = []
        for follower in leader.followers:
            has_blocks = self.pool.num_available > 0 or len(leader.prompt) % self.pool.block_size == 0
            if len(self.running) >= self.max_running or not has_blocks:
                break
            copy = self.running.fork(leader, follower)
            if copy is not None:
                step.copies.append(copy)
            step.join(follower)
            follower.num_cached_tokens = leader.num_cached_tokens
            forked.append(follower)
        leader.followers = leader.followers[len(forked) :]
        self._queue_followers(leader)
        return forked

    def _commit(self, step: StepRecord, plan: Plan) -> None:
        running = self.running
        decodes = slice(plan.num_decodes)
        running.computed[plan.rows[decodes]] = plan.context_lens[decodes]
        for run in step.runs:
            running.computed[run.row] = run.start + len(run.token_ids)
        if plan.masks is not None or plan.processed:
            running.awaited_step[[s.row for s in step.samples if s.needs_last_token]] = step.number
        for chunk in step.chunks:
            for sequence in chunk.samples:
                if sequence.negative is None:
                    running.start_decoding(sequence)
        step.num_departures = running.num_departures
        self._in_flight.append(step)
        self._num_steps += 1

    # A step's result comes.

    def update(self, plan: Plan, result: StepResult) -> list[TokenOutput]:
        """Take the result of the oldest step in flight: append, publish, end, free."""
        step = self._in_flight.popleft()
        assert step.number == plan.step
        if result.prompt_logprobs is not None:
            step.take_scores(result.prompt_logprobs)
        self._publish_decoded(step, plan)
        step.hand_out(plan, result.captured)
        outputs = []
        num_failed = 0
        num_plain = step.num_samples_before_runs
        needs_care = self._needs_care(step, plan, result).tolist()
        token_ids = result.token_ids.tolist()
        for i, (sequence, token) in enumerate(zip(step.samples[:num_plain], token_ids[:num_plain], strict=True)):
            if not needs_care[i]:
                sequence.output_token_ids.append(token)
                name, cached = sequence.request_id, sequence.num_cached_tokens
                outputs.append(TokenOutput(name, sequence.index, [token], None, None, None, None, cached))
            elif not sequence.finished:
                output = self._take(step, result, i, token)
                num_failed += not output.token_ids
                outputs.append(output)
        self.num_generated_tokens += len(outputs) - num_failed
        for run in step.runs:
            if not run.sequence.finished:
                outputs.append(self._take_run(step, result, run, num_plain))
                self.num_generated_tokens += len(outputs[-1].token_ids)
                step.hand_out_run(run, len(outputs[-1].token_ids))
            num_plain += len(run.token_ids)
        return outputs

    def _take_run(self, step: StepRecord, result: StepResult, run: Run, first: int) -> TokenOutput:
        """The tokens drawn behind a run's tokens, from sample `first` on, as far as the drafts are right. What each of
        them does to the sequence is what it would have done in a step of its own."""
        sequence, running = run.sequence, self.running
        taken: TokenOutput | None = None
        for place in range(len(run.token_ids)):
            if sequence.row >= 0:
                context = running.computed[run.row] = run.start + place + 1
                if context % self.pool.block_size == 0:
                    running.publish(sequence, context)
            token = int(result.token_ids[first + place])
            output = self._take(step, result, first + place, token)
            taken = output if taken is None else taken.followed_by(output)
            if sequence.finished or place + 1 == len(run.token_ids) or token != run.token_ids[place + 1]:
                break
        assert taken is not None and self.speculation is not None
        self.speculation.learn(run, len(taken.token_ids))
        taken.num_draft_tokens = len(run.token_ids) - 1
        if run.match is not None and run.match.text is not None:
            taken.num_prediction_tokens = taken.num_draft_tokens
        if sequence.row >= 0:
            running.shrink(sequence, int(running.computed[run.row]))
        return taken

    def _needs_care(self, step: StepRecord, plan: Plan, result: StepResult) -> NDArray[np.bool_]:
        """Which samples may do more than add a token to a sequence that goes on."""
        running, rows = self.running, plan.sample_rows
        care: NDArray[np.bool_] = plan.sample_positions >= running.last[rows]
        care |= result.is_bad
        care |= self._is_eos[result.token_ids]
        if running.num_watched:
            care |= running.watched[rows]
        if step.chunks:
            care[plan.num_decodes :] = True
        if result.logprobs is not None or running.num_departures != step.num_departures:
            care[:] = True
        return care

    def _publish_decoded(self, step: StepRecord, plan: Plan) -> None:
        """Blocks that decoding rows have filled; with a lag, their tokens were not known when they were scheduled."""
        contexts = plan.context_lens[: plan.num_decodes]
        for i in (contexts % self.pool.block_size == 0).nonzero()[0].tolist():
            sequence = step.decodes[i]
            if sequence.row >= 0:
                self.running.publish(sequence, int(contexts[i]))

    def _take(self, step: StepRecord, result: StepResult, i: int, token: int) -> TokenOutput:
        """Sample i, looked at closely."""
        sequence = step.samples[i]
        output = TokenOutput(sequence.request_id, sequence.index, [token], num_cached_tokens=sequence.num_cached_tokens)
        output.scheduled = sequence.scheduled
        if result.is_bad[i]:
            return self._fail(sequence, BROKEN_PROCESSOR if i in result.broken else None)
        if i in step.without_mask or not sequence.advance(token):
            return self._fail(sequence, BROKEN_GRAMMAR)
        sequence.output_token_ids.append(token)
        num_top = sequence.params.logprobs
        if num_top is not None and result.logprobs is not None:
            output.logprobs = [entry_of(sequence.params)(result.logprobs, i, token, num_top)]
        if sequence.prompt_logprobs is not None:
            output.prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        output.finish_reason, output.stop_reason = sequence.ending(self.eos_token_ids)
        if output.finish_reason is not None:
            self._end(sequence)
        return output

    def _fail(self, sequence: Sequence, reason: str | None = None) -> TokenOutput:
        """End a sequence whose numbers cannot be trusted; the prefix cache forgets what it computed."""
        if sequence.row >= 0:
            self.pool.unpublish([block for one in sequence.contexts for block in self.running.blocks(one.row)])
        self._end(sequence)
        cached = max(0, sequence.num_cached_tokens)
        output = TokenOutput(sequence.request_id, sequence.index, [], num_cached_tokens=cached)
        output.finish_reason, output.stop_reason = FinishReason.ERROR, reason
        return output

    def revert(self) -> list[Sequence]:
        """Undo the newest step, which has not been computed: its sequences go back to wait -> these sequences."""
        step = self._in_flight.pop()
        self.pool.unpublish(step.published)
        members = [sequence for sequence in step.members if not sequence.finished]
        for sequence in members:
            if sequence.row >= 0:
                self._requeue(sequence)
        return members

    def distrust(self) -> None:
        """Hooks have come while the newest step was computed: the prefix cache forgets it."""
        self.pool.unpublish(self._in_flight[-1].published)
        self.running.close_cache(True)

    def fail(self, sequences: Iterable[Sequence]) -> list[TokenOutput]:
        """End sequences with an error."""
        return [self._fail(sequence) for sequence in sequences if not sequence.finished]

    def check(self) -> None:
        """Prove the invariants of queue, rows and blocks. AssertionError says what is wrong."""
        self.running.check()
        self.adapters.check()
        running = [*self.running.prefilling, *self.running.decoding]
        following = [follower for sequence in (*self.waiting, *running) for follower in sequence.followers]
        places = [*self.waiting, *(one for one in running if one.leader is None), *following]
        assert len(set(places)) == len(places), "a sequence is in two places"
        assert set(places) == {s for siblings in self._requests.values() for s in siblings}, "a sequence is lost"
        assert self.waiting == sorted(self.waiting, key=by_order), "the queue is out of order"
        assert all(sequence.row < 0 and not sequence.finished for sequence in (*self.waiting, *following))
        assert len(running) <= self.max_running
