"""Session: one sequence and its keys and values, to be computed, taken back, forked and kept by hand.

For a caller's own speculation, guidance or search; nothing here schedules or samples. ActivationCache is what
`Transformer.run_with_cache` reads of a forward.
"""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llama.api.errors import ParameterError, checked_integer
from llama.kernels import ops
from llama.kernels.types import wide_dtype
from llama.model.autocast import own_dtype
from llama.model.batch import Batch, rectangle
from llama.model.config import ModelConfig
from llama.model.kept import opened, write
from llama.model.kv_cache import KVCache
from llama.model.taps import resolve_points

BLOCK_SIZE = 16


class Network(Protocol):
    """What a session needs of a Transformer."""

    config: ModelConfig

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def digest(self) -> str: ...
    def forward(self, batch: Batch, kv: KVCache) -> Tensor: ...


class Session:
    """`session(token_ids)` computes more tokens of one sequence -> their logits [tokens, vocab], float32 (float64 for a
    float64 model). It holds at most `max_tokens`."""

    def __init__(self, model: Network, max_tokens: int) -> None:
        longest = model.config.longest_context
        self.max_tokens = checked_integer("max_tokens", max_tokens, 1, longest, why=", the model's context")
        self.model = model
        self.token_ids: list[int] = []
        num_blocks = -(-self.max_tokens // BLOCK_SIZE)
        self._kv = KVCache(model.config, num_blocks, BLOCK_SIZE, dtype=model.dtype, device=model.device)

    def __len__(self) -> int:
        return len(self.token_ids)

    @torch.no_grad()
    @own_dtype
    def __call__(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """`token_ids` are a list or an int64 tensor [tokens], of one at least."""
        told = "token_ids must be a list or an int64 tensor of token ids [tokens], of one at least"
        try:
            ids = torch.as_tensor(token_ids, device=self.model.device)
        except (TypeError, ValueError, RuntimeError):
            raise ParameterError(f"{told}, got {reprlib.repr(token_ids)}", "token_ids") from None
        ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
        if not ids.numel() or ids.dim() != 2 or len(ids) != 1 or ids.dtype != torch.int64:
            raise ParameterError(f"{told}, got {reprlib.repr(token_ids)}", "token_ids")
        checked_ids(ids, self.model.config.vocab_size)
        start, stop = len(self), len(self) + ids.shape[1]
        if stop > self.max_tokens:
            raise ParameterError(f"{stop} tokens are more than the session's max_tokens={self.max_tokens}", "token_ids")
        batch = rectangle(ids, start, self._kv.num_blocks, BLOCK_SIZE)
        with ops.on_device(self.model.device):
            logits = self.model.forward(batch, self._kv)
        self.token_ids += ids[0].tolist()
        return logits.to(wide_dtype(logits.dtype))

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        num_tokens = checked_integer("num_tokens", num_tokens, 0, len(self))
        del self.token_ids[len(self) - num_tokens :]

    def fork(self) -> "Session":
        """A session of its own with the same tokens."""
        copy = Session(self.model, self.max_tokens)
        copy.token_ids = list(self.token_ids)
        copy._kv.data.copy_(self._kv.data)
        return copy

    def save(self, path: str | Path) -> None:
        """Write tokens, keys and values to one safetensors file. ParameterError where no file can be at that path;
        OSError where it cannot be written all the same."""
        token_ids = torch.tensor(self.token_ids, dtype=torch.int64, device="cpu")
        content = {"token_ids": token_ids, "kv": self._used(len(self)).cpu()}
        write(path, content, self._signature())

    def load(self, path: str | Path) -> None:
        """Take what `save` wrote in place of what is here. ParameterError where it is another model's, or too long, or
        no such file."""
        with opened(path) as file:
            if file.metadata() != self._signature():
                raise ParameterError(f"{path} was computed by another model, or holds no session", "path")
            token_ids = file.get_tensor("token_ids").tolist()
            if len(token_ids) > self.max_tokens:
                what = f"{path} holds {len(token_ids)} tokens, more than max_tokens={self.max_tokens}"
                raise ParameterError(what, "path")
            self._used(len(token_ids)).copy_(file.get_tensor("kv"))
        self.token_ids = token_ids

    def _signature(self) -> dict[str, str]:
        return {"model": self.model.digest(), "config": json.dumps(repr(self.model.config))}

    def _used(self, num_tokens: int) -> Tensor:
        """[layers, 2, tokens, kv_heads, head_dim], a view."""
        return self._kv.data.flatten(2, 3)[:, :, :num_tokens]


class ActivationCache(Mapping[str, Tensor]):
    """What a forward left at points of the network: [batch, seq, ...] each. TransformerLens' names find them too."""

    def __init__(self, values: dict[str, Tensor], num_layers: int) -> None:
        self._values = values
        self._num_layers = num_layers

    def __getitem__(self, point: str) -> Tensor:
        if not isinstance(point, str) or point not in self._values:
            found = resolve_points(point, self._num_layers)
            if len(found) > 1:
                raise ParameterError(f"{point!r} names {len(found)} points, [] gives the value of one", "points")
            [point] = found
        return self._values[point]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        size = sum(value.nbytes for value in self._values.values())
        lines = [f"  {name}: {list(v.shape)} {str(v.dtype)[6:]}, {v.nbytes:,} bytes" for name, v in self.items()]
        return "\n".join([f"ActivationCache of {len(self)} points, {size:,} bytes", *lines])


def checked_ids(token_ids: Tensor, vocab_size: int) -> Tensor:
    """[batch, seq] int64 on their device. ParameterError for what is no token id."""
    if token_ids.dim() != 2 or token_ids.dtype != torch.int64:
        raise ParameterError(f"token_ids must be an int64 tensor [batch, seq], got {token_ids!r}", "token_ids")
    for extreme in (int(token_ids.min()), int(token_ids.max())) if token_ids.numel() else ():
        if not 0 <= extreme < vocab_size:
            raise ParameterError(f"token_ids must be in [0, {vocab_size}), got {extreme}", "token_ids")
    return token_ids
