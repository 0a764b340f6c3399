"""One request's way back: the pieces of its completions (completion.py), gathered into a RequestOutput.

Shared by LLM and AsyncLLM. `Replies` is an engine together with the requests that it is answering: it routes a step's
outputs and tells the engine about ends that only the text shows. A failure in the text of one request ends that
request alone.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from llama.api.errors import is_failure
from llama.api.outputs import FinishReason, Piece, RequestMetrics, RequestOutput, Usage
from llama.engine.engine import Engine
from llama.engine.request import Request, Taps
from llama.engine.sequence import TokenOutput
from llama.llm.completion import Completion, listed
from llama.llm.interrupts import interrupts_held
from llama.text.tokenizer import Tokenizer
from llama.text.tool_calls import merged_deltas

logger = logging.getLogger(__name__)

T = TypeVar("T")

UNKEPT_CAPTURE = "capture"  # the stop_reason of an error: the capture's save_to failed


class Reply:
    """One request's answer while it grows."""

    def __init__(self, request: Request, seeds: list[int], tokenizer: Tokenizer | None, queued: float) -> None:
        self.request = request
        self.tokenizer = tokenizer = tokenizer if request.params.detokenize else None
        self.streams = False  # set by a stream: then pieces wait in `pending` until they are taken
        self.pending: deque[Piece] = deque()
        prompt_token_ids: list[int] = request.prompt_token_ids.tolist()
        self._completions = [Completion(i, seed, request, prompt_token_ids, tokenizer) for i, seed in enumerate(seeds)]
        self._output = RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[c.output for c in self._completions],
            metrics=RequestMetrics(queued=queued),
        )

    @property
    def finished(self) -> bool:
        return self._output.finished

    @property
    def output(self) -> RequestOutput:
        """All that has come so far; complete once `finished`."""
        for completion in self._completions:
            completion.output.text = "".join(completion.text_parts)
            completion.output.reasoning_content = "".join(completion.thought_parts) or None
        return self._output

    def push(self, new: TokenOutput) -> Piece | None:
        """What a step's output adds; None if its completion had ended already (a lagging step may still report it)."""
        completion = self._completions[new.index]
        if completion.output.finish_reason is not None:
            return None
        output = self._output
        if new.prompt_logprobs is not None:
            output.prompt_logprobs = listed(new.prompt_logprobs, self.request.params, self.tokenizer)
        if new.index == 0:  # the others may find what it computed
            output.num_cached_tokens = new.num_cached_tokens
            output.metrics.scheduled = output.metrics.scheduled or new.scheduled
        if output.metrics.first_token is None and new.token_ids:
            output.metrics.first_token = time.monotonic()
        if new.num_draft_tokens:
            self._count_drafts(new)
        piece = completion.push(new)
        return piece if piece.finish_reason is None else self._closed(piece)

    def _count_drafts(self, new: TokenOutput) -> None:
        metrics, num_accepted = self._output.metrics, max(0, len(new.token_ids) - 1)
        metrics.num_drafts += 1
        metrics.num_draft_tokens += new.num_draft_tokens
        metrics.num_accepted_tokens += num_accepted
        if new.num_prediction_tokens:
            metrics.num_prediction_tokens += new.num_prediction_tokens
            metrics.num_accepted_prediction_tokens += num_accepted

    def abort(self, reason: FinishReason = FinishReason.ABORT) -> list[Piece]:
        """End every completion that still runs."""
        return [self._closed(c.abort(reason)) for c in self._completions if not c.ended]

    def fail(self, index: int | None = None) -> list[Piece]:
        """End every completion that still runs with "error", and completion `index`, whose end nobody has heard of."""
        failed = [c for c in self._completions if not c.ended or c.output.index == index]
        return [self._closed(c.fail()) for c in failed]

    def _closed(self, piece: Piece) -> Piece:
        if not all(c.ended for c in self._completions):
            return piece
        if self.request.taps is not None and not self._keep_captured(self.request.taps):
            reason, why = FinishReason.ERROR, UNKEPT_CAPTURE
            last = self._completions[piece.index].output
            last.finish_reason, last.stop_reason = reason, why
            piece = replace(piece, finish_reason=reason, stop_reason=why)
        self._output.finished = True
        self._output.metrics.finished = time.monotonic()
        return replace(piece, usage=self.usage())

    def _keep_captured(self, taps: Taps) -> bool:
        """False, and a line in the log, where what is to take it fails."""
        broken = (FinishReason.ABORT, FinishReason.ERROR)
        is_whole = all(c.output.finish_reason not in broken for c in self._completions)
        num_tokens = [len(c.output.token_ids) for c in self._completions]
        try:
            self._output.captured, each = taps.finish(self.request.request_id, num_tokens, is_whole)
        except BaseException as error:  # the caller's function, or a folder that cannot be written
            if not is_failure(error):
                raise
            logger.exception("request %s: save_to failed; it ends with an error", self.request.request_id)
            return False
        for completion, values in zip(self._completions, each, strict=True):
            completion.output.captured = values
        return True

    def usage(self) -> Usage:
        completion_tokens = sum(len(c.output.token_ids) for c in self._completions)
        metrics = self._output.metrics
        accepted = metrics.num_accepted_prediction_tokens
        return Usage(
            len(self.request.prompt_token_ids),
            completion_tokens,
            self._output.num_cached_tokens,
            metrics.mean_acceptance_length,
            accepted,
            metrics.num_prediction_tokens - accepted,
            None if self.request.begins_in_thought is None else sum(c.num_reasoning_tokens for c in self._completions),
        )


class Replies:
    """An engine and the requests that it is answering. Threads take turns; a call from inside another one (a signal
    handler's) is a RuntimeError, but for `abort`, which is then carried out at the other's end."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self._live: dict[str, Reply] = {}
        self._lock = threading.RLock()
        self._is_in_use = False
        self._late_aborts: deque[Reply] = deque()

    def __len__(self) -> int:
        return len(self._live)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        with self._lock:
            if self._is_in_use:
                raise RuntimeError("an engine was used from inside one of its own calls")
            self._is_in_use = True
            try:
                yield
                while self._late_aborts:
                    self._abort(self._late_aborts.popleft(), FinishReason.ABORT)
            finally:
                self._is_in_use = False
        self._settle()

    def _settle(self) -> None:
        """Carry out the late aborts, unless a turn is under way: it looks for them when it ends."""
        while self._late_aborts and self._lock.acquire(blocking=False):
            try:
                if self._is_in_use:  # by this very thread
                    return
                with self._turn():
                    pass
            finally:
                self._lock.release()

    def add(self, request: Request, queued: float | None = None) -> Reply:
        """Hand a request to the engine. ValueError where the engine refuses it, and nothing is left behind."""
        queued = time.monotonic() if queued is None else queued
        with self._turn():
            seeds = self.engine.add(request)
            try:
                reply = Reply(request, seeds, self.tokenizer, queued)
            except BaseException:
                self.engine.abort(request.request_id)
                raise
            self._live[request.request_id] = reply
            return reply

    def between_steps(self, function: Callable[[], T]) -> T:
        """Do something to the engine while no step of it runs; signals wait for its end. EngineDeadError where it is
        dead."""
        with interrupts_held(), self._turn():
            self.engine.check_alive()
            return function()

    def step(self, unless: Callable[[], bool] = lambda: False) -> list[tuple[Reply, Piece]]:
        """One engine step; every new piece, with the reply that it belongs to. Nothing where `unless()` is true by the
        time that it is this thread's turn."""
        news: list[tuple[Reply, Piece]] = []
        with self._turn():
            if unless():
                return news
            for new in self.engine.step():
                reply = self._live.get(new.request_id)
                if reply is None:
                    continue
                pieces = self._push(reply, new)
                if reply.finished:
                    del self._live[new.request_id]
                if reply.streams:
                    reply.pending.extend(pieces)
                news += [(reply, piece) for piece in pieces]
        return news

    def _push(self, reply: Reply, new: TokenOutput) -> list[Piece]:
        try:
            piece = reply.push(new)
        except BaseException as error:
            return self._fail(reply, error, new.index)
        if piece is None:
            return []
        if piece.finish_reason is not None and new.finish_reason is None:
            self.engine.finish(new.request_id, new.index, piece.finish_reason, piece.stop_reason)
        return [piece]

    def abort(self, reply: Reply, reason: FinishReason = FinishReason.ABORT) -> list[Piece]:
        """End a request now; the last pieces of what it had. Legal at any time, also when it has ended."""
        with self._lock:
            if self._is_in_use:  # by this very thread: in a signal handler or a destructor
                self._late_aborts.append(reply)
                return []
            with self._turn():
                return self._abort(reply, reason)

    def abandon(self, reply: Reply) -> None:
        """`abort` for a destructor. The garbage collector may run it inside anything, in a thread that holds what the
        present turn needs: so it never waits."""
        if not reply.finished:
            self._late_aborts.append(reply)
            self._settle()

    def _abort(self, reply: Reply, reason: FinishReason) -> list[Piece]:
        request_id = reply.request.request_id
        if self._live.get(request_id) is not reply:  # it has ended, and the id may be another's by now
            return []
        del self._live[request_id]
        self.engine.abort(request_id)
        try:
            return reply.abort(reason)
        except BaseException as error:
            return self._fail(reply, error)

    def _fail(self, reply: Reply, error: BaseException, index: int | None = None) -> list[Piece]:
        """Whatever is wrong with the text of one request, the others go on."""
        if not is_failure(error):
            raise error
        request_id = reply.request.request_id
        logger.error("request %s: its text could not be processed; it ends with an error", request_id, exc_info=error)
        self.engine.abort(request_id)
        return reply.fail(index)


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Consecutive pieces of each completion made one, so that a slow reader costs what is left to read and no more. But
    text behind a thought or a call begins another one, which keeps order and tokens. The piece that carries the usage
    stays last."""
    by_index: dict[int, list[list[Piece]]] = {}
    before_text: set[int] = set()  # completions whose last run has a thought or a call
    for piece in pieces:
        runs = by_index.setdefault(piece.index, [])
        if not runs or (piece.text and piece.index in before_text):
            runs.append([])
            before_text.discard(piece.index)
        runs[-1].append(piece)
        if piece.reasoning_content or piece.tool_call_deltas:
            before_text.add(piece.index)
    joined = [run[0] if len(run) == 1 else _join(run) for runs in by_index.values() for run in runs]
    return sorted(joined, key=lambda piece: piece.usage is not None)


def _join(parts: list[Piece]) -> Piece:
    last = parts[-1]
    logprobs = next((part.logprobs[:0] for part in parts if part.logprobs is not None), None)
    for part in parts:
        if logprobs is not None and part.logprobs:
            logprobs.extend(part.logprobs)
    return Piece(
        last.index,
        "".join(part.text for part in parts),
        [token for part in parts for token in part.token_ids],
        logprobs,
        last.finish_reason,
        last.stop_reason,
        [call for part in parts for call in part.tool_calls],
        last.usage,
        "".join(part.reasoning_content for part in parts),
        merged_deltas(delta for part in parts for delta in part.tool_call_deltas),
    )
