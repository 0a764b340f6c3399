"""What ranks say to one another inside a forward: sums of partial outputs, and the parts of the logits.

The process group is the library's own, beside any that the caller has made: no environment variable is read, and
several engines may live in one process. Gloo on the CPU, on the loopback device; NCCL on CUDA.
"""

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llama.kernels.types import wide_dtype
from llama.model.parallel import Shard

MAY_HELP = "between GPUs the environment variable NCCL_P2P_DISABLE=1 may help"

# PyTorch notes every call in a map of the whole process, which some versions (2.11) do not lock: groups of two threads
# that call at once are a crash.
_calling = threading.Lock()


def _done(call: Callable[..., Any], *arguments: Any) -> None:
    """The call of a process group, and what it does."""
    with _calling:
        work = call(*arguments)
    work.wait()


class Call(NamedTuple):
    """What ranks say to one another once: a sum of hidden states, a gathering of logits, or logits of rank 0's."""

    rows: int
    kind: Literal["sum", "gather", "spread"]


class Communicator:
    """One rank's end. Every rank must make the same calls in the same order."""

    def __init__(self, shard: Shard, store: Any, device: torch.device, *, seconds: float) -> None:
        """Meets the others by `store`, one of torch.distributed's. A collective that takes longer than `seconds` is an
        error, and the end."""
        self.shard = shard
        self.num_calls = 0  # of `sum`, `gather` and `spread`, in a step
        self._device = device
        wait = timedelta(seconds=seconds)
        self._group: Any  # what a process group of either kind does has no common type
        if device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = wait
            self._group = dist.ProcessGroupNCCL(store, shard.rank, shard.size, nccl)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = wait
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            self._group = gloo(store, shard.rank, shard.size, options)
        self._check(device)

    def sum(self, x: Tensor) -> Tensor:
        """x, in place, summed over the ranks: the same bits on each."""
        self.num_calls += 1
        _done(self._group.allreduce, [x])
        return x

    def gather(self, x: Tensor) -> Tensor:
        """x [rows, columns] -> [rows, vocab_size]: the columns of all ranks in order, without the padding."""
        parts = x.new_empty(self.shard.size, *x.shape)
        self.num_calls += 1
        _done(self._group.allgather, [list(parts.unbind(0))], [x.contiguous()])
        return parts.transpose(0, 1).flatten(1)[:, : self.shard.config.vocab_size].contiguous()

    def whole(self, name: str, x: Tensor) -> Tensor:
        """x [tokens, heads or columns, ...], this rank's part of the point `name` -> all of it."""
        parts = x.new_empty(self.shard.size, *x.shape)
        _done(self._group.allgather, [list(parts.unbind(0))], [x.contiguous()])
        return parts[:: self.shard.num_copies(name)].transpose(0, 1).flatten(1, 2).contiguous()

    def spread(self, x: Tensor) -> Tensor:
        """x, in place, as rank 0 has it."""
        self.num_calls += 1
        _done(self._group.broadcast, x, 0)
        return x

    def lookup(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Rows of a table by token id, where each rank has the rows of its part of the vocabulary."""
        start = self.shard.vocabulary.start
        places = token_ids - start
        is_here = (places >= 0) & (places < weight.shape[0])
        rows = torch.nn.functional.embedding(places.where(is_here, 0), weight)
        return self.sum(rows.masked_fill_(~is_here.unsqueeze(1), 0))

    def stand_in(self, calls: Sequence[Call], dtype: torch.dtype) -> None:
        """Make the calls that the others make in a model of this dtype, with zeros: this rank has no memory for what
        should be in them."""
        local, vocab = self.shard.local, self.shard.config.vocab_size
        does = {
            "sum": (self.sum, local.hidden_size, dtype),
            "gather": (self.gather, local.vocab_size, dtype),
            "spread": (self.spread, vocab, wide_dtype(dtype)),
        }
        for rows, kind in calls:
            call, columns, of = does[kind]
            call(torch.zeros(rows, columns, dtype=of, device=self._device))

    def _check(self, device: torch.device) -> None:
        """On some machines the first collective never returns, on others it returns nonsense."""
        size = self.shard.size
        found = self.sum(torch.arange(4, dtype=torch.float32, device=device) + self.shard.rank).tolist()
        wanted = [float(i * size + size * (size - 1) // 2) for i in range(4)]
        if found != wanted:
            raise RuntimeError(f"the ranks' first sum is {found} where it should be {wanted}; {MAY_HELP}")
