"""Adapters on the device: for each adapted module the stacked A and B of all slots, which one op applies to a batch.

Slots are numbered from 1; 0 means no adapter. Stacks are made when the first adapter that needs them is put into a
slot, as wide as its rank, and grow with later ones, so that an engine without adapters pays nothing. They belong to
the engine and not to the model, which several engines may share; a step hands them down as `AdapterUse`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from llama.kernels import ops
from llama.model.checkpoint.layout import layout
from llama.model.lora.adapter import Adapter, Pair

if TYPE_CHECKING:
    from llama.model.transformer import Transformer

RANK_STEP = 16  # ranks are rounded up to it: the smallest that tensor cores multiply


class LoraStack:
    """The adapters of one module of ours: y += B (A x) by each token's slot."""

    a: Tensor  # [slots, slices, rank, in]; of the embedding [slots, vocab, rank]
    b: Tensor  # [slots, out, rank]

    def __init__(self, slice_starts: tuple[int, ...], *, is_embedding: bool) -> None:
        self.slice_starts = slice_starts
        self.is_embedding = is_embedding
        self.rank = 0

    def apply(self, x: Tensor, y: Tensor, plan: ops.LoraPlan) -> Tensor:
        """Adds to y [tokens, out] in place and returns it; x [tokens, in], or token ids [tokens]."""
        shrink = ops.lora_embedding if self.is_embedding else ops.lora_shrink
        ops.lora_expand(shrink(x, self.a, plan), y, self.b, plan, self.slice_starts)
        return y

    def reserve(self, num_slots: int, in_features: int, rank: int, like: Tensor) -> bool:
        """Room for pairs of `rank` in the dtype and on the device of `like` -> whether the tensors are new ones."""
        have = self.rank
        if rank <= have:
            return False
        rank = -(-rank // RANK_STEP) * RANK_STEP
        slices = len(self.slice_starts) - 1
        shape = (num_slots, in_features, rank) if self.is_embedding else (num_slots, slices, rank, in_features)
        a, b = like.new_zeros(shape), like.new_zeros(num_slots, self.slice_starts[-1], rank)
        if have:
            (a[..., :have] if self.is_embedding else a[:, :, :have]).copy_(self.a)
            b[..., :have] = self.b
        self.a, self.b, self.rank = a, b, rank
        return True

    def clear(self, slot: int) -> None:
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


class AdapterUse(NamedTuple):
    """The adapters of one step."""

    stacks: Mapping[nn.Module, LoraStack]
    plan: ops.LoraPlan

    def add(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """y with what the adapters of `module` add to it, in place."""
        stack = self.stacks.get(module)
        return y if stack is None else stack.apply(x, y, self.plan)


class LoraSlots:
    """The slots of an engine. `generation` counts how often a tensor was made anew: what holds addresses must look."""

    def __init__(self, model: "Transformer", num_slots: int) -> None:
        self.stacks: dict[nn.Module, LoraStack] = {}
        self.num_slots = num_slots
        self.generation = 0
        self._model = model
        self._places = module_places(model)
        self._held: dict[int, Adapter] = {}

    def put(self, slot: int, adapter: Adapter) -> None:
        """Make `slot` (1 .. num_slots) hold `adapter` and nothing else."""
        if self._held.get(slot) is adapter:
            return
        self._held.pop(slot, None)
        for stack in self.stacks.values():
            stack.clear(slot)
        for name, pair in adapter.pairs.items():
            module, index, starts = self._places[name]
            stack = self.stacks.get(module)
            if stack is None:
                stack = LoraStack(starts, is_embedding=module is self._model.embed_tokens)
            rank, in_features = pair.a.shape
            self.generation += stack.reserve(self.num_slots, in_features, rank, self._model.norm.weight)
            self.stacks[module] = stack
            stack.put(slot, index, pair)
        self._held[slot] = adapter

    def use(self, adapter_slots: Tensor) -> AdapterUse:
        """For tokens whose slots are adapter_slots int32 [tokens]."""
        return AdapterUse(self.stacks, ops.plan_lora(adapter_slots))


def module_places(model: "Transformer") -> dict[str, tuple[nn.Module, int, tuple[int, ...]]]:
    """Hugging Face's module name -> our module, which of its fused slices, where each begins and the last ends."""
    fused: dict[str, list[tuple[str, int, int]]] = {}
    for entry in layout(model.config):
        name = entry.name.removesuffix(".weight")
        fused.setdefault(entry.module, []).append(
            (name, entry.start, entry.shape[-1 if name.endswith("embed_tokens") else 0])
        )
    fused.setdefault("lm_head", [("lm_head", 0, model.config.vocab_size)])
    places = {}
    for path, slices in fused.items():
        starts = (*(start for _, start, _ in slices), slices[-1][1] + slices[-1][2])
        for index, (name, _, _) in enumerate(slices):
            places[name] = (model.get_submodule(path), index, starts)
    return places
