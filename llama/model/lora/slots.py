"""Adapters on the device: for each adapted module the stacked A and B of all slots, which one op applies to a batch.

Slots are numbered from 1; 0 means no adapter. Stacks are made when the first adapter that needs them is put into a
slot, as wide as its rank, and grow with later ones, so that an engine without adapters pays nothing.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import kernels
from kernels import LoraPlan
from llama.model.checkpoint.layout import layout
from llama.model.lora.adapter import Adapter, Pair

if TYPE_CHECKING:
    from llama.model.transformer import Transformer

RANK_STEP = 16  # ranks are rounded up to it: the smallest that tensor cores multiply


class LoraStack(nn.Module):
    """The adapters of one module of ours: y += B (A x) by each token's slot."""

    def __init__(self, slice_starts: tuple[int, ...], *, is_embedding: bool = False) -> None:
        super().__init__()
        self.slice_starts = slice_starts
        self.is_embedding = is_embedding
        self.register_buffer("a", None, persistent=False)  # [slots, slices, rank, in]; embedding: [slots, vocab, rank]
        self.register_buffer("b", None, persistent=False)  # [slots, out, rank]

    def forward(self, x: Tensor, y: Tensor, plan: LoraPlan) -> Tensor:
        """Adds to y [tokens, out] in place and returns it; x [tokens, in], or token ids [tokens]."""
        shrink = kernels.lora_embedding if self.is_embedding else kernels.lora_shrink
        kernels.lora_expand(shrink(x, self.a, plan), y, self.b, plan, self.slice_starts)
        return y

    def reserve(self, num_slots: int, in_features: int, rank: int, like: Tensor) -> None:
        """Room for pairs of `rank` in the dtype and on the device of `like`."""
        have = 0 if self.b is None else self.b.shape[2]
        if rank <= have:
            return
        rank = -(-rank // RANK_STEP) * RANK_STEP
        slices = len(self.slice_starts) - 1
        shape = (num_slots, in_features, rank) if self.is_embedding else (num_slots, slices, rank, in_features)
        a, b = like.new_zeros(shape), like.new_zeros(num_slots, self.slice_starts[-1], rank)
        if have:
            (a[..., :have] if self.is_embedding else a[:, :, :have]).copy_(self.a)
            b[..., :have] = self.b
        self.a, self.b = a, b

    def clear(self, slot: int) -> None:
        if self.b is not None:
            self.a[slot - 1] = 0
            self.b[slot - 1] = 0

    def put(self, slot: int, index: int, pair: Pair) -> None:
        """The pair of slice `index` into a cleared slot."""
        rank = pair.a.shape[0]
        low, high = self.slice_starts[index : index + 2]
        if self.is_embedding:
            self.a[slot - 1, :, :rank] = pair.a.t()
        else:
            self.a[slot - 1, index, :rank] = pair.a
        self.b[slot - 1, low:high, :rank] = pair.b


class LoraSlots:
    """The slots of a model. `generation` counts how often a stack was made anew: what holds addresses must look."""

    def __init__(self, model: "Transformer", num_slots: int) -> None:
        self.model = model
        self.num_slots = num_slots
        self.generation = 0
        self._place = module_places(model)
        self._used: dict[int, set[str]] = {}

    def put(self, slot: int, adapter: Adapter) -> None:
        """Make `slot` (1 .. num_slots) hold `adapter` and nothing else."""
        for path in self._used.pop(slot, ()):
            self.model.get_submodule(path).lora.clear(slot)
        self._used[slot] = set()
        for name, pair in adapter.pairs.items():
            path, index = self._place[name]
            stack = self._stack(path)
            old = stack.b
            in_features = pair.a.shape[1]
            stack.reserve(self.num_slots, in_features, pair.a.shape[0], self.model.norm.weight)
            self.generation += stack.b is not old
            if path not in self._used[slot]:
                stack.clear(slot)
                self._used[slot].add(path)
            stack.put(slot, index, pair)

    def _stack(self, path: str) -> LoraStack:
        module = self.model.get_submodule(path)
        if module.lora is None:
            starts = sorted(start for where, start in self._starts() if where == path)
            out_features = self.model.config.hidden_size if path == "embed_tokens" else module.out_features
            module.lora = LoraStack((*starts, out_features), is_embedding=path == "embed_tokens")
        return module.lora

    def _starts(self) -> list[tuple[str, int]]:
        entries = [(entry.module, entry.start) for entry in layout(self.model.config)]
        return [*entries, ("lm_head", 0)] if self.model.config.tie_word_embeddings else entries


def module_places(model: "Transformer") -> dict[str, tuple[str, int]]:
    """Hugging Face's module name -> (our module's path, which of its fused slices)."""
    places: dict[str, tuple[str, int]] = {"lm_head": ("lm_head", 0)}
    count: dict[str, int] = {}
    for entry in layout(model.config):
        index = count.get(entry.module, 0)
        count[entry.module] = index + 1
        places[entry.name.removesuffix(".weight")] = (entry.module, index)
    return places
