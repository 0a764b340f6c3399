"""Engine: requests over token ids in, their tokens out, step by step. It knows nothing of text.

One thread at a time may use an engine. `abort` and `finish` are legal in every state of a request, free its blocks at
once and give no output: the caller knows what it ended. Ends that the engine itself finds come with `step`.
"""

import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from llama.api.errors import EngineDeadError, ParameterError, refusal
from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from llama.engine.adapters import Adapter, Adapters
from llama.engine.blocks import BlockPool
from llama.engine.budget import free_cpu_bytes, lora_bytes
from llama.engine.config import EngineConfig
from llama.engine.draft_model import DraftModel
from llama.engine.graph_runner import make_runner
from llama.engine.guidance import check_guided, guided_limit
from llama.engine.memory import fitting_blocks
from llama.engine.metrics import EngineMetrics
from llama.engine.parallel_runner import ParallelRunner, RankLostError
from llama.engine.plan import Plan, StepResult
from llama.engine.request import Request, check_params, check_room, checked_ids, with_logprobs
from llama.engine.runner import Runner
from llama.engine.sampler import Seeds, child_seed
from llama.engine.scheduler import Scheduler
from llama.engine.sequence import Sequence, TokenOutput
from llama.engine.speculation import let_speculate
from llama.model.autocast import own_dtype
from llama.model.kv_cache import KVCache
from llama.model.module import Watch, hooks_of, num_hooks_made
from llama.model.transformer import Transformer

logger = logging.getLogger(__name__)

T = TypeVar("T")

STEP_ATTEMPTS = 3  # of a step that runs out of memory, each with half the tokens of the one before


class StepRunner(Protocol):
    """What the engine needs of a Runner; tests and benchmarks bring others."""

    vocab_size: int
    lag: int  # steps that may be in flight while the next one is scheduled

    def launch(self, plan: Plan) -> Callable[[], StepResult]: ...
    def release_memory(self) -> None: ...
    def check_device(self) -> None: ...


class Engine:
    def __init__(
        self,
        model: Transformer | None,
        config: EngineConfig,
        *,
        eos_token_ids: Iterable[int] = (),
        runner: StepRunner | None = None,
        draft: Transformer | None = None,
    ) -> None:
        """`runner` stands in for the one that computes `model` (tests, benchmarks); then num_blocks must be given.
        `draft` is the model that speculative_config names."""
        if model is not None:
            config = config.resolved(model.config, model.device.type)
        self.config = config
        eos_token_ids = frozenset(eos_token_ids)
        num_blocks = config.num_blocks
        if runner is None:
            if model is None:
                raise ValueError("an engine needs a model, or a runner in its place")
            if config.tensor_parallel_size > 1:
                raise refusal("tensor_parallel_size", "1 for a model in one process", config.tensor_parallel_size)
            num_blocks = num_blocks or fitting_blocks(model, config, draft)
            runner = make_runner(model, config, num_blocks, eos_token_ids)
        elif num_blocks is None:
            raise ValueError("num_blocks must be given with a runner")
        self.runner = runner
        self.pool = BlockPool(num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
        self.scheduler = Scheduler(
            config,
            self.pool,
            eos_token_ids=eos_token_ids,
            vocab_size=runner.vocab_size,
            model=repr(model.config).encode() if model is not None else b"",
            lora_bytes=lora_bytes(config, free_cpu_bytes()),
        )
        self._draft_kv: KVCache | None = None
        if config.speculation is not None and config.speculation.method == "draft_model":
            if draft is None or not isinstance(runner, Runner) or self.scheduler.speculation is None:
                raise ValueError("speculative_config names a draft model, which the engine was not given")
            shape = num_blocks, config.block_size
            self._draft_kv = KVCache(draft.config, *shape, dtype=draft.dtype, device=draft.device)
            parts = draft, self._draft_kv, self.scheduler.running, runner.sampler
            self.scheduler.speculation.draft_model = DraftModel(*parts, config)
        self.model = model
        self._hooks = [] if model is None else hooks_of(model)
        self._watch = None if model is None else Watch(model)
        self._made_for = "" if model is None else f"{model.dtype} on {model.device}"
        self._has_warned = self.is_sleeping = False
        self._let_speculate = let_speculate  # tests bring drafts of their own
        self._seeds = Seeds(config.seed)
        self._in_flight: deque[tuple[Plan, Callable[[], StepResult]]] = deque()
        self._num_requests = self._num_steps = self._num_prompt_tokens = 0
        self._num_attempts = 0  # at the present step, all without memory for it
        self._max_tokens: int | None = None  # that the next attempt may have
        self._death: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.runner.vocab_size

    @property
    def graph_bytes(self) -> int:
        """Memory of the device that recorded steps take."""
        return self.runner.graph_bytes if isinstance(self.runner, Runner | ParallelRunner) else 0

    def warm(self, adapter: Adapter) -> None:
        """Have ready what steps with this adapter need, before it is added. Legal on any thread."""
        if isinstance(self.runner, Runner | ParallelRunner):
            self.runner.warm(adapter.content)

    def add_adapter(self, adapter: Adapter, replace: bool = False) -> None:
        """See Adapters.add. Steps with it are recorded now if no request waits for that, and otherwise as they come."""
        if isinstance(self.runner, Runner) and not (self.has_unfinished or self.is_sleeping):
            self.runner.record(adapter.content)
        self.adapters.add(adapter, replace)

    def request(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        lora: str | None = None,
        clip: bool = True,
        **rest: Any,
    ) -> Request:
        """A request for `add`; `rest` are fields of Request. All that can be refused is checked here, and a
        ParameterError says what is legal. Without `clip`, max_tokens that the context has no room for are a
        ContextLengthError. Legal on any thread."""
        if not isinstance(request_id, str):
            raise ParameterError(f"request_id must be a string, got {request_id!r}", "request_id")
        adapter = self.adapters.get(lora)
        check_room(len(prompt_token_ids), None if clip else params.max_tokens, self.config.context_len)
        prompt = checked_ids(prompt_token_ids, self.vocab_size)
        check_params(params, self.vocab_size, self.config)
        params = with_logprobs(params, self.config.max_logprobs, self.vocab_size)
        limit, capacity = self.limit(len(prompt), params.max_tokens), self._capacity
        if params.is_guided:
            lens = len(prompt), len(rest.get("negative_token_ids", ())) or 1
            check_guided(self.config, self.pool.num_blocks, lens, guided_limit(limit, lens, self.config.context_len))
        if max(limit, len(prompt) + 1) > capacity:
            raise ParameterError(
                f"a prompt of {len(prompt)} tokens and up to {max(1, limit - len(prompt))} new ones can never run: "
                f"the KV cache holds {capacity - 1} tokens ({self.pool.num_blocks} blocks of {self.pool.block_size})"
            )
        return Request(request_id, prompt, params, adapter, **rest)

    @property
    def _capacity(self) -> int:
        """The most tokens that one request may have. The last one is never computed and needs no place."""
        return self.pool.num_blocks * self.pool.block_size + 1

    def limit(self, prompt_len: int, max_tokens: int | None) -> int:
        """The most tokens that this request may have."""
        return min(self.config.context_len, self._capacity if max_tokens is None else prompt_len + max_tokens)

    def add(self, request: Request) -> list[int]:
        """Queue a request of `request` -> the seed of each of its completions."""
        self.check_alive()
        if self.is_sleeping:
            raise ParameterError("the engine sleeps: wake_up() lets it take requests")
        if request.request_id in self.scheduler:
            raise ParameterError(f"request_id {request.request_id!r} is in use", "request_id")
        if not self.has_unfinished:
            self.notice_changes()
        params, prompt = request.params, request.prompt_token_ids
        if request.new_matcher is None:
            for name in ("response_format", "structured_outputs", "allowed_token_ids", "bad_words"):
                if getattr(params, name):
                    raise ParameterError(f"{name} needs a matcher", name)
        limit = self.limit(len(prompt), params.max_tokens)
        negative = np.array(request.negative_token_ids or prompt[-1:], np.int32)
        if params.is_guided:
            limit = guided_limit(limit, (len(prompt), len(negative)), self.config.context_len)
        seed = self._seeds.next() if params.seed is None else params.seed
        sequences = [
            Sequence(
                request.request_id, i, self._num_requests, params, child_seed(seed, i), prompt, limit, request.adapter
            )
            for i in range(params.n)
        ]
        for sequence in sequences:
            sequence.taps = request.taps
        if params.prompt_logprobs is not None:
            sequences[0].prompt_logprobs = [None] * request.score_from
        if params.is_guided:
            sequences[0].guide(negative)
        speculates = params.speculative and not params.is_guided and not params.logits_processors
        if self.config.speculation is not None and speculates:
            self._let_speculate(sequences, self.config.speculation, request.prediction_token_ids)
        if request.new_matcher is not None:
            first = sequences[0].matcher = request.new_matcher()
            for sequence in sequences[1:]:
                sequence.matcher = first.fork()
        self.scheduler.add(sequences)
        self._num_requests += 1
        self._num_prompt_tokens += len(prompt)
        return [sequence.seed for sequence in sequences]

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters that requests can name. Adding and removing is legal while requests run."""
        return self.scheduler.adapters

    def notice_changes(self) -> None:
        """Of weights, since the last request: in place, as by an optimizer's step, or by others in their place. Then
        the keys and values of earlier prompts are those of another network. ParameterError where the model was moved or
        cast."""
        if self.model is not None and (now := f"{self.model.dtype} on {self.model.device}") != self._made_for:
            raise ParameterError(f"the model was {self._made_for} when its engine was made, it is {now}: make another")
        if self._watch is not None and self._watch.has_changed():
            self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        """Forget the K and V of earlier prompts; requests that run keep what they have, and share none of it."""
        if self._watch is not None:
            if self.model is not None and self._watch.has_others():
                self._hooks = hooks_of(self.model)
                if isinstance(self.runner, Runner):
                    self.runner.renew()
            self._watch.renew()
        self.pool.unpublish_all()
        self.scheduler.running.keep_private()

    def abort(self, request_id: str) -> None:
        """End a request. Unknown ids and requests that have ended are ignored."""
        self.scheduler.abort(request_id)

    def finish(self, request_id: str, index: int, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End one completion for a reason that only its text shows (the caller reports it). May come late."""
        self.scheduler.finish(request_id, index)

    def sleep(self) -> None:
        """Give the KV cache's memory back, with all that is in it. No request is taken until `wake_up`."""
        if self.has_unfinished:
            raise ParameterError("sleep needs an idle engine: requests run")
        if not self.is_sleeping and isinstance(self.runner, Runner | ParallelRunner):
            self.reset_prefix_cache()
            self.runner.sleep()
            if self._draft_kv is not None:
                self._draft_kv.release()
            self.is_sleeping = True

    def wake_up(self) -> None:
        """Take the KV cache's memory again. MemoryError where it is gone: the engine sleeps on."""
        if self.is_sleeping and isinstance(self.runner, Runner | ParallelRunner):
            self.runner.wake_up()
            if self._draft_kv is not None:
                self._draft_kv.take_back()
            self.is_sleeping = False

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._in_flight)

    @own_dtype
    def step(self) -> list[TokenOutput]:
        """Compute one step. A failure of the model ends the step's requests with "error" and leaves a usable engine;
        EngineDeadError if it does not."""
        self.check_alive()
        outputs: list[TokenOutput] = []
        is_launched = self._launch(outputs)
        while len(self._in_flight) > (self.runner.lag if is_launched else 0):
            self._collect(outputs)
        return outputs

    def _launch(self, outputs: list[TokenOutput]) -> bool:
        """Schedule a step and set the device to it. Out of memory, it tries again with fewer tokens."""
        while True:
            num_hooks = num_hooks_made()
            self.scheduler.running.close_cache(self._is_hooked())
            plan = self._keep_books(self.scheduler.schedule, self._max_tokens)
            if plan is None:
                return False
            try:
                self._in_flight.append((plan, self.runner.launch(plan)))
                self._num_steps += 1
                if num_hooks_made() != num_hooks:
                    self._keep_books(self.scheduler.distrust)
                return True
            except BaseException as error:
                members = self._keep_books(self.scheduler.revert)
                if not isinstance(error, Exception):
                    raise
                if not self._tries_again(plan, error):
                    self._fail(members, error, outputs)
                    return False

    def _tries_again(self, plan: Plan, error: Exception) -> bool:
        """Whether a step that failed, and has been taken back, is made again with fewer tokens."""
        self._num_attempts += 1
        if not isinstance(error, torch.OutOfMemoryError) or self._num_attempts >= STEP_ATTEMPTS:
            self._num_attempts, self._max_tokens = 0, None
            return False
        self.runner.release_memory()
        self._max_tokens = max(2, plan.num_tokens // 2)  # the two of a guided request go together
        logger.warning("out of memory in a step of %d tokens; trying %d", plan.num_tokens, self._max_tokens)
        return True

    def _is_hooked(self) -> bool:
        is_hooked = any(self._hooks)
        if is_hooked and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "the model of an engine has forward hooks: while they are there its steps run eagerly and without the "
                "prefix cache; capture= and interventions= of generate() read and change activations per request",
                stacklevel=2,
            )
        return is_hooked

    def _collect(self, outputs: list[TokenOutput]) -> None:
        """Wait for the oldest step in flight and take its result."""
        plan, result_of = self._in_flight.popleft()
        try:
            result = result_of()
        except BaseException as error:
            # Later steps build on this one. What was scheduled last is undone first.
            self._in_flight.clear()
            members: list[Sequence] = []
            while self.scheduler.num_in_flight:
                members += self._keep_books(self.scheduler.revert)
            if not isinstance(error, Exception):
                raise
            if not self._tries_again(plan, error):
                self._fail(members, error, outputs)
            return
        self._num_attempts, self._max_tokens = 0, None
        outputs += self._keep_books(self.scheduler.update, plan, result)

    def _fail(self, members: list[Sequence], error: Exception, outputs: list[TokenOutput]) -> None:
        logger.error("a step failed; its requests end with an error", exc_info=error)
        outputs += self._keep_books(self.scheduler.fail, members)
        self.runner.release_memory()
        try:
            self.runner.check_device()
        except Exception as broken:
            is_said = isinstance(broken, RankLostError)
            raise self.die(str(broken) if is_said else "the device computes no more") from broken

    def _keep_books(self, function: Callable[..., T], *arguments: Any) -> T:
        """Bookkeeping that was cut off half-way cannot be trusted any more."""
        try:
            return function(*arguments)
        except BaseException as error:
            death = self.die("its bookkeeping broke off")
            if isinstance(error, Exception):
                raise death from error
            raise

    def die(self, why: str) -> EngineDeadError:
        """From now on every call raises it."""
        self._death = f"the engine is dead: {why}"
        return EngineDeadError(self._death)

    def check_alive(self) -> None:
        """EngineDeadError once it is dead."""
        if self._death is not None:
            raise EngineDeadError(self._death)

    def check(self) -> None:
        """Prove the invariants of the bookkeeping; AssertionError says what is wrong. O(blocks), for tests."""
        self.scheduler.check()

    def metrics(self) -> EngineMetrics:
        scheduler = self.scheduler
        drafts = {} if scheduler.speculation is None else scheduler.speculation.counts()
        return EngineMetrics(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_blocks=self.pool.num_blocks,
            num_used_blocks=self.pool.num_used,
            num_cached_blocks=self.pool.num_cached,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            num_prefix_queries=scheduler.num_queried_tokens,
            num_prefix_hits=scheduler.num_hit_tokens,
            **drafts,
        )
