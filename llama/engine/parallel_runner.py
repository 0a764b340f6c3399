"""Runners of a model that ranks share: rank 0's tells the others each step and computes its part; theirs do as told.

Nothing is sent back, but that a rank has no memory for a step, which is then tried again on all. Every rank draws the
same tokens: the logits are the same bits on each, and noise is a function of seed, position and token. With a step
comes a checksum of what rank 0 drew before: ranks that drew anything else end the engine, before a wrong text does.
"""

import contextlib
import logging
import weakref
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from llama.api.errors import AdapterError, EngineDeadError
from llama.engine.adapters import Adapter
from llama.engine.plan import Array, Plan, StepResult
from llama.engine.runner import Runner
from llama.engine.tap_messages import decode_taps, encode_taps
from llama.engine.wire import Message, decode_plan, encode_plan
from llama.model.lora import AdapterWeights
from llama.model.taps import SequenceTaps

logger = logging.getLogger(__name__)


class RankLostError(EngineDeadError):
    """A rank ended, is silent or failed; the others cannot go on without it."""


def launch_alike(
    runner: Runner, plan: Plan, tell: Callable[[torch.OutOfMemoryError], None]
) -> Callable[[], StepResult]:
    """runner.launch(plan). A rank that has no memory for it tells so, and then says nothing but zeros to the end of the
    forward: the others are in it, and can stop no more than a device can. What they draw is not taken."""
    communicator = runner.model.communicator
    if communicator is not None:
        communicator.num_calls = 0
    try:
        return runner.launch(plan)
    except torch.OutOfMemoryError as error:
        calls = runner.calls(plan)
        left = None if calls is None or communicator is None else calls[communicator.num_calls :]
        if not left or communicator is None:  # the others may have drawn their tokens
            raise
        logger.warning("rank %d ran out of memory in a step of %d tokens", communicator.shard.rank, plan.num_tokens)
        tell(error)
        message = str(error)
    runner.release_memory()
    communicator.stand_in(left, runner.model.dtype)

    def starved() -> StepResult:
        raise torch.OutOfMemoryError(message)

    return starved


class Peers(Protocol):
    """The other ranks, as rank 0 sees them."""

    @property
    def lost(self) -> str | None:
        """Why they cannot go on."""

    def send(self, data: bytes) -> None: ...
    def ask(self, message: Message) -> list[dict[str, Any]]: ...
    def starved(self, step: int) -> str | None:
        """Which of them had no memory for this step, which rank 0 has computed."""

    def in_step(self) -> AbstractContextManager[None]: ...
    def failed(self, error: BaseException) -> RankLostError: ...
    def listen(self, listener: Callable[[str], None]) -> None: ...
    def close(self) -> None: ...


def checksum(result: StepResult) -> int:
    return zlib.crc32(result.token_ids.tobytes())


class ParallelRunner:
    """Rank 0's: `runner` computes its own part, `peers` hear of each step. A step that any rank has no memory for is an
    OutOfMemoryError of its result, and none has taken it. No other failure leaves the ranks alike: RankLostError."""

    def __init__(self, runner: Runner, peers: Peers) -> None:
        self.vocab_size = runner.vocab_size
        self.lag = runner.lag
        self.own = runner
        self._peers = peers
        self._drawn: dict[int, int] = {}  # step -> checksum, of which the others have not heard
        self._numbers: weakref.WeakKeyDictionary[Adapter | SequenceTaps, int] = weakref.WeakKeyDictionary()
        self._num_shared = 0
        self._forgotten: list[int] = []
        self._is_short = False

    @property
    def lost(self) -> str | None:
        return self._peers.lost

    @property
    def graph_bytes(self) -> int:
        return self.own.graph_bytes

    def launch(self, plan: Plan) -> Callable[[], StepResult]:
        def run() -> Callable[[], StepResult]:
            drawn, self._drawn = self._drawn, {}
            forgotten = [self._forgotten.pop() for _ in range(len(self._forgotten))]
            taps, arrays = self._tell_taps(plan)
            extra = {"drawn": list(drawn.items()), "forget": forgotten, "release": self._is_short, **taps}
            self._is_short = False
            self._peers.send(encode_plan(plan, self._numbers.__getitem__, extra, arrays))
            return launch_alike(self.own, plan, starving.append)

        starving: list[torch.OutOfMemoryError] = []
        result_of = self._guarded(run)

        def result() -> StepResult:
            if starving:
                raise starving[0]
            found: StepResult = self._guarded(result_of)
            if (who := self._peers.starved(plan.step)) is not None:
                raise torch.OutOfMemoryError(f"{who} ran out of memory")
            self._drawn[plan.step] = checksum(found)
            return found

        return result

    def _tell_taps(self, plan: Plan) -> tuple[dict[str, Any], dict[str, Array]]:
        """By number; those that the others do not know yet in full."""
        new: list[Any] = []
        arrays: dict[str, Array] = {}
        for _, taps in plan.taps:
            if taps not in self._numbers:
                number = self._number(taps)
                told, own = encode_taps(taps)
                named = {f"taps {number} {i}": array for i, array in enumerate(own)}
                arrays |= named
                new.append([number, told, list(named)])
        return {"taps": [[place, self._numbers[taps]] for place, taps in plan.taps], "new_taps": new}, arrays

    def _number(self, shared: Adapter | SequenceTaps) -> int:
        """What the others know it by, until it goes."""
        self._num_shared += 1
        self._numbers[shared] = self._num_shared
        weakref.finalize(shared, self._forgotten.append, self._num_shared)
        return self._num_shared

    def _guarded(self, run: Callable[[], Any]) -> Any:
        self.check_device()
        try:
            with self._peers.in_step():
                return run()
        except BaseException as error:
            lost = self._peers.failed(error)
            if isinstance(error, Exception):
                raise lost from error
            raise

    def warm(self, adapter: AdapterWeights) -> None:
        """See Runner; the others do so when they read it."""
        self.own.warm(adapter)

    def share(self, adapter: Adapter) -> None:
        """Have the others read an adapter that rank 0 has read, from the same files. AdapterError where they cannot."""
        number = self._num_shared + 1
        told = {"number": number, "path": adapter.content.path, "digest": adapter.digest.hex()}
        for rank, answer in enumerate(self._answers({"adapter": told}), start=1):
            if answer.get("refused"):
                self._num_shared = number
                self._forgotten.append(number)
                raise AdapterError(f"rank {rank}: {answer['refused']}")
        self._number(adapter)

    def ask(self, content: Mapping[str, Any]) -> None:
        """Have the others do what is no step. MemoryError where one of them cannot."""
        answers = enumerate(self._answers(content), start=1)
        refused = [f"rank {rank}: {answer['refused']}" for rank, answer in answers if "refused" in answer]
        if refused:
            raise MemoryError(refused[0])

    def _answers(self, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        self.check_device()
        try:
            return self._peers.ask(Message(dict(content), {}))
        except OSError as error:
            raise self._peers.failed(error) from error

    def sleep(self) -> None:
        """See Runner."""
        self.own.sleep()
        self.ask({"sleep": True})

    def wake_up(self) -> None:
        """See Runner: all of them, or none."""
        self.own.wake_up()
        try:
            self.ask({"wake_up": True})
        except MemoryError:
            self.sleep()
            raise

    def close(self) -> None:
        """End the other ranks; the engine is dead then."""
        self._peers.close()

    def listen(self, listener: Callable[[str], None]) -> None:
        """`listener` is called, on another thread, with the reason why ranks are lost, once they are."""
        self._peers.listen(listener)

    def release_memory(self) -> None:
        """The others do so before their next step."""
        self._is_short = True
        self.own.release_memory()

    def check_device(self) -> None:
        if self.lost is not None:
            raise RankLostError(self.lost)


class Follower:
    """Another rank's: does what a message says -> the answer, None where none is awaited."""

    def __init__(
        self,
        runner: Runner,
        read: Callable[[Mapping[str, Any]], Adapter],
        say: Callable[[dict[str, Any]], None],
    ) -> None:
        """`read` reads an adapter's files. AdapterError where they are not what rank 0 has read. `say` tells rank 0."""
        self._runner = runner
        self._read = read
        self._say = say
        self._adapters: dict[int, Adapter] = {}
        self._taps: dict[int, SequenceTaps] = {}
        self._in_flight: list[tuple[int, Callable[[], StepResult]]] = []
        self._drawn: dict[int, int] = {}

    def take(self, message: Message) -> dict[str, Any] | None:
        content = message.content
        if "adapter" in content:
            return self._load(content["adapter"])
        for number in content["forget"]:
            self._adapters.pop(number, None)
            self._taps.pop(number, None)
        # Looked at before the step: it may wait for ranks that are not there any more.
        while len(self._in_flight) > self._runner.lag:
            self._collect()
        for step, drawn in content["drawn"]:
            self._compare(step, drawn)
        if content["release"]:
            self._runner.release_memory()
        for number, told, names in content["new_taps"]:
            self._taps[number] = decode_taps(told, [message.arrays[name] for name in names], self._runner.model)
        plan = decode_plan(message, self._adapters)
        plan = plan._replace(taps=tuple((place, self._taps[number]) for place, number in content["taps"]))
        result_of = launch_alike(self._runner, plan, lambda error: self._say({"starved": plan.step}))
        self._in_flight.append((plan.step, result_of))
        if self._runner.lag == 0:
            self._collect()
        return None

    def _collect(self) -> None:
        step, result_of = self._in_flight.pop(0)
        with contextlib.suppress(torch.OutOfMemoryError):  # nobody takes its tokens
            self._drawn[step] = checksum(result_of())

    def _compare(self, step: int, drawn: int) -> None:
        while step not in self._drawn and self._in_flight:
            self._collect()
        if self._drawn.pop(step, None) != drawn:
            raise RuntimeError(f"in step {step} it drew other tokens than rank 0: their devices compute differently")

    def _load(self, told: Mapping[str, Any]) -> dict[str, Any]:
        try:
            adapter = self._adapters[told["number"]] = self._read(told)
        except ValueError as error:
            return {"refused": str(error)}
        self._runner.warm(adapter.content)
        return {"loaded": told["number"]}
