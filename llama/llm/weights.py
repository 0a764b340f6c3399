"""New values for the weights of a model that an engine runs: for training loops that generate between their steps."""

import os
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llama.api.errors import ParameterError
from llama.model.checkpoint.layout import Entry, entries_of
from llama.model.fixed_rows import fix_rows
from llama.model.linear import Linear
from llama.model.parallel import Cut
from llama.model.transformer import Transformer

PAIRS = "pairs of a name and a tensor, such as the items() of a dict"
Ask = Callable[[dict[str, Any]], object]


class Update:
    """Puts new values into a model, or into one rank's part of it. `finish` is called once, whatever happened."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._entries = {entry.name: entry for entry in entries_of(model, model.config)}
        self._own = {entry.name: entry for entry in entries_of(model, model.local_config)}
        self._touched: dict[nn.Module, bool] = {}  # module -> whether it was packed

    def check(self, name: str, tensor: Tensor) -> None:
        """ParameterError where a tensor is not the model's or does not fit."""
        entry = self._entries.get(name) if isinstance(name, str) else None
        if entry is None:
            known = next(iter(self._entries))
            raise ParameterError(f"the model has no tensor {name!r}; {known!r} is one", "named_tensors")
        _check(entry, tensor)
        owner = self._model.get_submodule(entry.module)
        if isinstance(owner, Linear) and owner.coded is not None:
            raise ParameterError(f"{name} is quantised: load the model dense to update it", "named_tensors")

    def cut(self, name: str) -> Cut:
        return self._model.shard.cut(name)

    def put(self, name: str, part: Tensor) -> None:
        """`part`: what `cut` says of the checkpoint's tensor."""
        model, entry = self._model, self._own[name]
        owner = model.get_submodule(entry.module)
        if isinstance(owner, Linear) and owner not in self._touched:
            self._touched[owner] = owner.is_prepared
            owner.widen()
        owner.get_parameter(entry.leaf).detach().narrow(0, entry.start, len(part)).copy_(part)
        if owner is model.embed_tokens and model.config.tie_word_embeddings and model.lm_head.form is not None:
            self._touched[model.lm_head] = True
            model.lm_head.form, model.lm_head.weight = None, model.embed_tokens.weight

    def read(self, name: str, path: str) -> None:
        """`put` the rank's part of what rank 0 has written."""
        from safetensors import safe_open  # here and below: most processes change no weights

        rows, columns = self.cut(name)
        with safe_open(path, "pt") as file:
            whole = file.get_slice(name)
            shape = whole.get_shape()
            if len(range(shape[0])[rows]):
                self.put(name, whole[rows] if len(shape) == 1 else whole[rows, columns])

    def finish(self) -> None:
        for owner, was_packed in self._touched.items():
            if was_packed and isinstance(owner, Linear):
                owner.prepare()
        if self._model.fixed is not None:
            fix_rows(self._model)


def update_weights(model: Transformer, named_tensors: Iterable[tuple[str, Tensor]], ask: Ask | None = None) -> int:
    """Copy tensors under their names in a Hugging Face checkpoint into the model, any subset, on any device and in any
    float dtype -> how many. ParameterError names a tensor that is not the model's or does not fit; those before it
    are in place by then. `ask` has the other ranks do their part of a model that is shared."""
    update, count = Update(model), 0
    try:
        for pair in named_tensors:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                told = f"named_tensors must be {PAIRS}, got {reprlib.repr(pair)} for one"
                raise ParameterError(told, "named_tensors")
            name, tensor = pair
            update.check(name, tensor)
            tensor = tensor.detach()
            if ask is not None:
                shown = tensor.to("cpu", model.dtype).contiguous()
                model.digests.add_shared(name, shown)
                _show(ask, name, shown)
            cut = update.cut(name)
            update.put(name, tensor[cut.rows] if tensor.dim() == 1 else tensor[cut])
            count += 1
    finally:
        update.finish()
        if ask is not None:
            ask({"weights": None})
    return count


def _show(ask: Ask, name: str, tensor: Tensor) -> None:
    """In a file of this process's memory, for as long as the others read it."""
    from safetensors.torch import save

    descriptor = os.memfd_create("llama-weights")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(save({name: tensor}))
        ask({"weights": name, "path": f"/proc/{os.getpid()}/fd/{descriptor}"})
    finally:
        os.close(descriptor)


def _check(entry: Entry, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != entry.shape or not tensor.is_floating_point():
        found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ParameterError(f"{entry.name} must be floats {list(entry.shape)}, got {found}", "named_tensors")
    if tensor.layout is not torch.strided or tensor.is_meta:
        raise ParameterError(f"{entry.name} must hold its numbers, got one that is sparse or on meta", "named_tensors")
    if not bool(torch.isfinite(tensor).all()):
        raise ParameterError(f"{entry.name} holds NaN or infinities", "named_tensors")
