"""Which model computed something: a digest over every byte of its weights, the same on any device and whatever the form
that this machine multiplies them in."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from llama.model.config import ModelConfig
from llama.model.linear import Linear
from llama.model.module import Module, version_of
from llama.model.weights.quantised import Joined, Quantised

_BLOCK = 1 << 14  # numbers of 64 bits with one sum: they and what is made of them stay in a core's cache
_BLOCKS_AT_ONCE = 256  # 32 MiB: what a thread takes, or a GPU


class _Known(NamedTuple):
    holder: "ref[Any]"
    version: tuple[int, int] | None
    sums: bytes


class Digests:
    """Digests of one model. The sums of a weight are kept for as long as it is the same tensor in the same version,
    as `version_of` counts it: a change in place through `.data` or another library's view of the memory it does not
    see, and wants `forget`."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}  # by id of the weight, or of the form that it lies in
        self._shared = b""

    def __reduce__(self) -> tuple[type["Digests"], tuple[()]]:
        return Digests, ()  # a copied or pickled model has weights of its own

    def forget(self) -> None:
        self._known = {}

    def add_shared(self, name: str, tensor: Tensor) -> None:
        """Of a model that is one rank's part: a weight was updated in the parts of other ranks too."""
        self._shared = blake2b(self._shared + _Sums().of(name, tensor), digest_size=16).digest()

    def of(self, model: Module, config: ModelConfig) -> str:
        """Of the config and of all bytes of every weight; of a quantised one its codes and scales are hashed."""
        told = blake2b(repr(config).encode() + self._shared, digest_size=16)
        used: dict[int, _Known] = {}
        sums = _Sums()
        for name, holder in _holders(model):
            version = _version(holder)
            known = used.get(id(holder)) or self._known.get(id(holder))
            if known is None or known.holder() is not holder or known.version != version or version is None:
                known = _Known(ref(holder), version, b"".join(sums.of(*each) for each in _tensors(holder)))
            used[id(holder)] = known
            told.update(name.encode() + known.sums)
        self._known = used
        return told.hexdigest()


def _holders(model: Module) -> Iterator[tuple[str, Any]]:
    """Names and what has their weights: a tensor, or the form of a Linear's."""
    for name, module in model.named_modules():
        own: dict[str, Any] = dict(module.named_parameters(recurse=False))
        hidden = module._non_persistent_buffers_set  # which follow from the config
        own |= {key: value for key, value in module.named_buffers(recurse=False) if key not in hidden}
        if isinstance(module, Linear):
            own["weight"] = module.dense_weight() if module.form is None else module.form
        yield from ((f"{name}.{key}", own[key]) for key in sorted(own) if own[key] is not None)


def _tensors(holder: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(holder, Tensor):
        yield "", holder
    elif isinstance(holder, Joined):
        for i, part in enumerate(holder.parts):
            yield from ((f"{i}{key}", tensor) for key, tensor in _tensors(part))
    elif isinstance(holder, Quantised):
        weight = holder.weight
        fields = {"scales": weight.scales, "zeros": weight.zeros, "minima": weight.minima, "order": holder.order}
        yield f"codes/{weight.group_size}/{holder.dtype}", weight.codes
        yield from ((name, tensor) for name, tensor in fields.items() if tensor is not None)
    else:
        yield "", holder.dense()


def _version(holder: Any) -> tuple[int, int] | None:
    """None for what cannot be known again."""
    if not isinstance(holder, Tensor):
        return 0, 0  # a form is made of one weight, and stays as it is
    return None if holder.is_inference() else (version_of(holder), holder.data_ptr())


class _Sums:
    """Checksums of tensors, mod 2^64 and therefore exact on any device.

    Block by block of 128 KiB, sum_i (h_i ^ (h_i >> 32)) with h_i = x_i * m_i: x_i the block's i-th 64 bits, m_i an odd
    number that belongs to the place. Without the shift, changes of highest bits alone (signs of float64) would cancel
    in pairs.
    """

    def __init__(self) -> None:
        self._factors: dict[torch.device, Tensor] = {}

    def of(self, key: str, tensor: Tensor) -> bytes:
        tensor = tensor.detach().contiguous()
        flat = tensor.view(-1).view(torch.uint8)
        factors = self._on(flat.device)
        parts = flat.split(_BLOCK * 8 * _BLOCKS_AT_ONCE) if len(flat) else ()
        if flat.device.type == "cpu" and len(parts) > 1:  # in threads of ours: a block is less than PyTorch shares out
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                sums = list(pool.map(_sums, parts, [factors] * len(parts)))
        else:
            sums = [_sums(part, factors) for part in parts]
        told = f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode()
        return told + (torch.cat(sums).cpu().numpy().tobytes() if sums else b"")

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._factors:
            generator = np.random.PCG64(0)  # its numbers are fixed for good
            self._factors[device] = torch.from_numpy(generator.random_raw(_BLOCK).view(np.int64) | 1).to(device)
        return self._factors[device]


def _sums(data: Tensor, factors: Tensor) -> Tensor:
    """Bytes -> the sums of their blocks; the last one may be short, which is as if zeros filled it up."""
    if data.numel() % 8 or data.storage_offset() % 8:
        data = torch.cat((data, data.new_zeros(-data.numel() % 8)))
    numbers = data.view(torch.int64)
    whole = len(numbers) // _BLOCK * _BLOCK
    blocks = numbers[:whole].view(-1, _BLOCK)
    step = 1 if data.device.type == "cpu" else max(1, len(blocks))
    parts = [part for part in (*blocks.split(step), numbers[whole:].view(1, -1)) if part.numel()]
    mixed, shifted = torch.empty_like(parts[0]), torch.empty_like(parts[0])
    sums = []
    for part in parts:
        rows, columns = part.shape
        product = torch.mul(part, factors[:columns], out=mixed[:rows, :columns])
        product ^= torch.bitwise_right_shift(product, 32, out=shifted[:rows, :columns])
        sums.append(product.sum(1))
    return torch.cat(sums)
