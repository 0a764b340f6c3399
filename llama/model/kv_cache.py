"""The paged K/V tensors of all layers, and how many bytes a block costs. Which block is whose, BlockPool decides."""

from collections.abc import Sequence

import torch

from llama.kernels.types import KVLayer
from llama.model.config import ModelConfig


class KVCache:
    """`layers` hold [num_blocks, block_size, kv_heads, head_dim] each for K and V, views of one allocation.

    In uint8 it is float8 e4m3's bytes; `scales` [layers, 2, kv_heads] are then those of K and of V (None = 1).
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        scales: torch.Tensor | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        # Not cleared: that would touch gigabytes before the first answer, and what was never stored is never read.
        try:
            self.data = torch.empty(config.num_hidden_layers, 2, *shape, dtype=dtype, device=device)
        except RuntimeError:  # torch.OutOfMemoryError is one too
            size = num_blocks * self.bytes_per_block(config, block_size, dtype)
            raise MemoryError(
                f"num_blocks={num_blocks} blocks of {block_size} tokens take {size} bytes, more than {device} has"
            ) from None
        if dtype != torch.uint8:
            self.layers = [KVLayer(k, v) for k, v in self.data]
            return
        if scales is None:
            scales = torch.ones(config.num_hidden_layers, 2, config.num_key_value_heads, device="cpu")
        scales = scales.to(device, torch.float32)
        self.layers = [KVLayer(k, v, scale) for (k, v), scale in zip(self.data, scales, strict=True)]

    def release(self) -> None:
        """Give the memory back; the views of `layers` stay, and mean nothing until `take_back`."""
        self.data.untyped_storage().resize_(0)

    def take_back(self) -> None:
        """As much memory as before, with nothing in it. MemoryError where it is not there."""
        size = self.data.numel() * self.data.itemsize
        try:
            self.data.untyped_storage().resize_(size)
        except RuntimeError:
            raise MemoryError(f"the KV cache takes {size} bytes, more than {self.data.device} has now") from None

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        return config.kv_values_per_token * block_size * dtype.itemsize

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks (source, target) in every layer; sources are read before any target is written."""
        if not pairs:
            return
        sources, targets = torch.tensor(pairs, device="cpu").to(self.data.device, non_blocking=True).unbind(1)
        self.data.index_copy_(2, targets, self.data.index_select(2, sources))
