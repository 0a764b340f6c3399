"""What LoRA adapters add to one module: for all loaded adapters the stacked A and B, which one op applies to a batch.

Adapters are numbered from 1; index 0 means no adapter. Stacks belong to the engine and not to the model, which several
engines may share: they come to each forward with the batch.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, is_grad_enabled, nn

from llama.kernels import differentiable, ops
from llama.kernels.cpu.pieces import Pieces
from llama.kernels.types import TokenAdapters

RANK_STEP = 16  # ranks are rounded up to it: the smallest that tensor cores multiply


class LoraStack:
    """The adapters of one module of ours: y += B (A x) by each token's adapter index. As wide as the largest rank."""

    a: Tensor  # [adapters, slices, rank, in]; of the embedding [adapters, vocab, rank]
    b: Tensor  # [adapters, out, rank]

    def __init__(self, slice_starts: tuple[int, ...], *, is_embedding: bool) -> None:
        self.slice_starts = slice_starts
        self.is_embedding = is_embedding
        self.rank = 0

    def add(self, x: Tensor, y: Tensor, tokens: TokenAdapters) -> Tensor:
        """Adds to y [tokens, out] in place and returns it, or with gradients a tensor of its own; x [tokens, in], or
        token ids [tokens]."""
        if is_grad_enabled() and (y.requires_grad or self.a.requires_grad or self.b.requires_grad):
            return differentiable.lora(x, y, self.a, self.b, adapters=tokens, slice_starts=self.slice_starts)
        shrink = ops.lora_embedding if self.is_embedding else ops.lora_shrink
        ops.lora_expand(shrink(x, self.a, tokens), y, self.b, tokens, self.slice_starts)
        return y

    def reserve(self, num_adapters: int, in_features: int, rank: int, like: Tensor) -> bool:
        """Room for pairs of `rank` in the dtype and on the device of `like` -> whether the tensors are new ones."""
        have = self.rank
        if rank <= have:
            return False
        rank = -(-rank // RANK_STEP) * RANK_STEP
        slices = len(self.slice_starts) - 1
        shape = (num_adapters, in_features, rank) if self.is_embedding else (num_adapters, slices, rank, in_features)
        a, b = like.new_zeros(shape), like.new_zeros(num_adapters, self.slice_starts[-1], rank)
        if have:
            (a[..., :have] if self.is_embedding else a[:, :, :have]).copy_(self.a)
            b[..., :have] = self.b
        self.a, self.b, self.rank = a, b, rank
        return True

    def clear(self, index: int) -> None:
        self.a[index - 1] = 0
        self.b[index - 1] = 0

    def put(self, index: int, slice_index: int, a: Tensor, b: Tensor) -> None:
        """One slice of a cleared adapter: a [rank, in], b [out, rank]."""
        rank = a.shape[0]
        low, high = self.slice_starts[slice_index : slice_index + 2]
        if self.is_embedding:
            self.a[index - 1, :, :rank] = a.t()
        else:
            self.a[index - 1, slice_index, :rank] = a
        self.b[index - 1, low:high, :rank] = b


Stacks = Mapping[nn.Module, LoraStack]


class StepAdapters(NamedTuple):
    """The adapters of the tokens of one step."""

    stacks: Stacks
    tokens: TokenAdapters

    @classmethod
    def of(cls, stacks: Stacks, indices: Tensor, fixed: Pieces | None = None) -> "StepAdapters":
        """indices [tokens] int32: which adapter of `stacks` each token uses, 0 = none; `fixed` is the batch's."""
        return cls(stacks, TokenAdapters(indices, fixed))

    def rows(self, rows: Tensor) -> "StepAdapters":
        """Those of the tokens `rows` alone."""
        return self.of(self.stacks, self.tokens.indices.index_select(0, rows), self.tokens.fixed)

    def concern(self, module: nn.Module) -> bool:
        """Whether any adapter adds to the module's output."""
        return module in self.stacks

    def add(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """y with what the adapters of `module` add to it; see `LoraStack.add`."""
        stack = self.stacks.get(module)
        return y if stack is None else stack.add(x, y, self.tokens)
