"""The adapters that are loaded on an engine's device, stacked by module.

Stacks are made when the first adapter that needs them is loaded, as wide as its rank, and grow with later ones, so that
an engine without adapters pays nothing.
"""

from collections.abc import Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.api.errors import ParameterError
from llama.kernels.types import TokenAdapters
from llama.model.adapters import LoraStack
from llama.model.checkpoint.layout import layout
from llama.model.lora.adapter import AdapterWeights, Pair
from llama.model.transformer import Transformer

_ALIGNED = 16  # elements

Places = dict[str, tuple[nn.Module, int, tuple[int, ...]]]


class LoadedAdapters:
    """`generation` counts how often a tensor of `stacks` was made anew: what holds addresses must look."""

    def __init__(self, model: Transformer, max_loras: int, least_rank: int = 0) -> None:
        """Stacks are for ranks of at least `least_rank`."""
        self.stacks: dict[nn.Module, LoraStack] = {}
        self.max_loras = max_loras
        self.generation = 0
        self._least_rank = least_rank
        self._model = model
        self._held: dict[int, AdapterWeights] = {}

    @cached_property
    def _places(self) -> Places:
        """Looked for with the first adapter: a caller's own network may lack projections."""
        return module_places(self._model)

    def put(self, index: int, adapter: AdapterWeights) -> None:
        """Make `index` (1 .. max_loras) stand for `adapter` and nothing else. ParameterError for another index."""
        if isinstance(index, bool) or not isinstance(index, int) or not 1 <= index <= self.max_loras:
            raise ParameterError(f"an adapter's index must be 1 to {self.max_loras}, got {index!r}", "index")
        if self._held.get(index) is adapter:
            return
        self._held.pop(index, None)
        for stack in self.stacks.values():
            stack.clear(index)
        self.reserve(adapter)
        for name, pair in _brought(adapter.pairs, self._model.norm.weight).items():
            module, slice_index, _ = self._places[name]
            self.stacks[module].put(index, slice_index, pair.a, pair.b)
        self._held[index] = adapter

    def reserve(self, adapter: AdapterWeights) -> None:
        """Make room for `adapter` in the stacks, so that `put` moves none of them."""
        for name, pair in adapter.pairs.items():
            module, _, starts = self._places[name]
            if module not in self.stacks:
                self.stacks[module] = LoraStack(starts, is_embedding=module is self._model.embed_tokens)
            rank, in_features = pair.a.shape
            room = max(rank, self._least_rank)
            self.generation += self.stacks[module].reserve(self.max_loras, in_features, room, self._model.norm.weight)

    def warm(self, adapter: AdapterWeights) -> None:
        """Launch what steps with `adapter` will launch, over zeros, so that no step waits for a compiler. Nothing that
        steps use is changed."""
        like = self._model.norm.weight
        rooms: dict[nn.Module, tuple[tuple[int, ...], int, int]] = {}
        for name, pair in adapter.pairs.items():
            module, _, starts = self._places[name]
            rank, in_features = pair.a.shape
            held = self.stacks[module].rank if module in self.stacks else self._least_rank
            rooms[module] = starts, in_features, max(rank, rooms[module][2] if module in rooms else held)
        for is_embedding, room in {(module is self._model.embed_tokens, room) for module, room in rooms.items()}:
            starts, in_features, rank = room
            stack = LoraStack(starts, is_embedding=is_embedding)
            stack.reserve(1, in_features, rank, like)
            none = torch.zeros(1, dtype=torch.int32, device=like.device)
            x = none.long() if is_embedding else like.new_zeros(1, in_features)
            stack.add(x, like.new_zeros(1, starts[-1]), TokenAdapters(none))


def _brought(pairs: Mapping[str, Pair], like: Tensor) -> Mapping[str, Pair]:
    """An adapter's tensors on a GPU in one copy that nobody waits for; hundreds would each be waited for."""
    if like.device.type != "cuda":
        return pairs
    return apart(joined(pairs, like.dtype).pin_memory().to(like.device, non_blocking=True), pairs)


def joined(pairs: Mapping[str, Pair], dtype: torch.dtype) -> Tensor:
    """All tensors behind one another, each from a multiple of `_ALIGNED` on."""
    parts = [F.pad(x.flatten().to("cpu", dtype), (0, -x.numel() % _ALIGNED)) for pair in pairs.values() for x in pair]
    return torch.cat(parts)


def apart(flat: Tensor, pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """What `joined` made of `pairs`, as views of it."""
    found, start = {}, 0
    for name, pair in pairs.items():
        views = []
        for x in pair:
            views.append(flat[start : start + x.numel()].view(x.shape))
            start += x.numel() + -x.numel() % _ALIGNED
        found[name] = Pair(*views)
    return found


def module_places(model: Transformer) -> Places:
    """Hugging Face's module name -> our module, which of its fused slices, where each begins and the last ends."""
    fused: dict[str, list[tuple[str, int, int]]] = {}
    for entry in layout(model.local_config):
        if entry.leaf == "bias":
            continue
        name = entry.name.removesuffix(".weight")
        fused.setdefault(entry.module, []).append(
            (name, entry.start, entry.shape[-1 if name.endswith("embed_tokens") else 0])
        )
    fused.setdefault("lm_head", [("lm_head", 0, model.local_config.vocab_size)])
    places = {}
    for path, slices in fused.items():
        starts = (*(start for _, start, _ in slices), slices[-1][1] + slices[-1][2])
        for index, (name, _, _) in enumerate(slices):
            places[name] = (model.get_submodule(path), index, starts)
    return places
