"""What a sequence reads and changes inside the network, as rank 0 tells it to the other ranks: once, with the first
step that needs it. Vectors are arrays of the message; functions stay with rank 0."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama.engine.plan import Array
from llama.model.interventions import Add, Apply, Project, Replace, Scale
from llama.model.taps import SequenceTaps, bind
from llama.model.transformer import Transformer

_KINDS = {kind.__name__: kind for kind in (Add, Replace, Scale, Project, Apply)}
_ITEM = 4  # bytes of what arrays of a message hold


def encode_taps(taps: SequenceTaps) -> tuple[dict[str, Any], list[Array]]:
    """-> JSON and arrays."""
    arrays: list[Array] = []
    changes = [
        [given.name, {field.name: _told(getattr(given, field.name), arrays) for field in fields(given)}]
        for given in taps.interventions
    ]
    return {"changes": changes, "points": list(taps.captures), "prompt_len": taps.prompt_len}, arrays


def decode_taps(told: Mapping[str, Any], arrays: Sequence[Array], model: Transformer) -> SequenceTaps:
    """As far as another rank takes part in it: what is read is rank 0's to keep."""
    changes = []
    for name, given in told["changes"]:
        values = {key: _value(value, arrays) for key, value in given.items()}
        changes.append(_KINDS[name](**values))
    nothing = dict.fromkeys(told["points"], range(0))
    return bind(changes, nothing, model.config, told["prompt_len"], like=model.norm.weight)


def _told(value: Any, arrays: list[Array]) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        arrays.append(np.pad(data, (0, -len(data) % _ITEM)).view(np.int32))
        return {"array": len(arrays) - 1, "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if callable(value):
        return {"function": True}
    if isinstance(value, str) or not isinstance(value, Sequence):
        return value.item() if hasattr(value, "item") else value
    return [int(item) for item in value]


def _absent(x: Tensor) -> Tensor:
    raise AssertionError("functions run on rank 0")


def _value(told: Any, arrays: Sequence[Array]) -> Any:
    if not isinstance(told, Mapping):
        return told
    if "function" in told:
        return _absent
    dtype, shape = getattr(torch, told["dtype"]), told["shape"]
    data = torch.from_numpy(arrays[told["array"]].copy()).view(torch.uint8)
    count = int(np.prod(shape)) * dtype.itemsize
    return data[:count].view(dtype).view(shape)
