"""A PEFT adapter read from its folder: for each adapted module the pair A, B with y += B (A x), the scale inside B.

Nothing of an adapter is left out: each adapted module has its two tensors, and each tensor of the file
belongs to an adapted module, or is an exact copy of one of the base model's, which PEFT stores beside some adapters.
"""

import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.api.errors import AdapterError, CheckpointError
from llama.files import some_of
from llama.kernels.types import wide_dtype
from llama.model.checkpoint.layout import layout
from llama.model.checkpoint.shards import StoredTensor, read_header, read_into
from llama.model.config import ModelConfig
from llama.model.lora.adapter_config import AdaptedModule, read_adapter_config
from llama.model.transformer import Transformer

_PREFIX = "base_model.model."
_FILE = "adapter_model.safetensors"


class Pair(NamedTuple):
    """y += b (a x)."""

    a: Tensor  # [rank, in_features]; of the embedding [rank, vocab]
    b: Tensor  # [out_features, rank], times the scale


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """What an adapter computes. `digest` tells two of them apart by content: configuration and weights."""

    path: str
    pairs: Mapping[str, Pair]  # by the module's Hugging Face name; of a rank's model its parts of them
    rank: int  # the largest of its modules
    targets: tuple[str, ...]  # q_proj, ...
    nbytes: int
    digest: bytes


def read_adapter(
    path: str | Path, model: Transformer, *, max_rank: int, check_size: Callable[[int], None] = lambda nbytes: None
) -> AdapterWeights:
    """Read and check a PEFT folder for `model`; its tensors come on the CPU, in the model's dtype. `check_size` may
    refuse their bytes before they are read.

    Raises AdapterError that names the key, module or tensor which is wrong.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: is no folder; a PEFT adapter is one")
    sizes = module_sizes(model.config)
    modules = read_adapter_config(folder, list(sizes))
    for module in modules:
        if module.rank > max_rank:
            raise AdapterError(f"{folder}: {module.name} has rank {module.rank}, max_lora_rank is {max_rank}")
    try:
        stored = {tensor.name: tensor for tensor in read_header(_weights_file(folder))}
        wanted = _wanted(modules, sizes)
        check_size(sum(rows * columns for rows, columns in wanted.values()) * model.dtype.itemsize)
        _match(folder, wanted, stored, model)
        return _read(folder, modules, wanted, stored, model)
    except CheckpointError as error:
        raise AdapterError(str(error)) from None


def _weights_file(folder: Path) -> Path:
    path = folder / _FILE
    if not path.exists():
        if (folder / "adapter_model.bin").exists():
            raise AdapterError(f"{folder}: adapter_model.bin is a pickle, which can run code; save it as safetensors")
        raise AdapterError(f"{folder}: has no {_FILE}")
    return path


def module_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of every module that an adapter can have, by its Hugging Face name."""
    matrices = [entry for entry in layout(config) if len(entry.shape) == 2]
    sizes = {entry.name.removesuffix(".weight"): (entry.shape[1], entry.shape[0]) for entry in matrices}
    hidden, vocab = config.hidden_size, config.vocab_size
    return sizes | {"model.embed_tokens": (vocab, hidden), "lm_head": (hidden, vocab)}


def _tensor_names(module: str) -> tuple[str, str]:
    if module == "model.embed_tokens":
        return f"{_PREFIX}{module}.lora_embedding_A", f"{_PREFIX}{module}.lora_embedding_B"
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _wanted(modules: list[AdaptedModule], sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Tensor name -> shape."""
    shapes = {}
    for module in modules:
        in_features, out_features = sizes[module.name]
        a, b = _tensor_names(module.name)
        shapes[a], shapes[b] = (module.rank, in_features), (out_features, module.rank)
    return shapes


def _match(
    folder: Path, wanted: Mapping[str, tuple[int, int]], stored: Mapping[str, StoredTensor], model: Transformer
) -> None:
    extra = [name for name in stored if name not in wanted and not _is_base_copy(stored[name], model)]
    if extra:
        candidates = [*wanted, *(_tensor_names(name)[0] for name in module_sizes(model.config))]
        nearest = difflib.get_close_matches(extra[0], candidates, n=1, cutoff=0.0)
        raise AdapterError(
            f"{folder}: {len(extra)} of {len(stored)} tensors belong to no adapted module: {some_of(extra)}; "
            f"the nearest name to the first is {nearest[0]}"
        )
    if missing := [name for name in wanted if name not in stored]:
        raise AdapterError(f"{folder}: {_FILE} lacks {some_of(missing)}, which adapter_config.json calls for")
    for name, shape in wanted.items():
        _ = stored[name].dtype  # refuses integers and the like
        if stored[name].shape != shape:
            raise AdapterError(f"{folder}: {name} should be {list(shape)}, found {list(stored[name].shape)}")


def _is_base_copy(stored: StoredTensor, model: Transformer) -> bool:
    """PEFT stores the embedding's and the head's own weight beside an adapter of theirs; both must be ours."""
    name = stored.name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    if name == "model.embed_tokens.weight":
        base: Tensor = model.embed_tokens.weight.detach()
    elif name == "lm_head.weight":
        base = model.lm_head.dense_weight()
    else:
        return False
    shape = (model.config.vocab_size, model.config.hidden_size)
    if stored.shape != shape:
        raise AdapterError(f"{stored.path}: {stored.name} is {list(stored.shape)}, the model's is {list(shape)}")
    copy = _load(stored, base.dtype)[model.shard.vocabulary]
    if not torch.equal(copy, base[: len(copy)].cpu()):
        raise AdapterError(f"{stored.path}: {stored.name} differs from the base model's: it was trained on another one")
    return True


def _load(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(stored.shape, dtype=dtype, device="cpu")
    read_into(stored, tensor)
    return tensor


def _read(
    folder: Path,
    modules: list[AdaptedModule],
    wanted: Mapping[str, tuple[int, int]],
    stored: Mapping[str, StoredTensor],
    model: Transformer,
) -> AdapterWeights:
    wide = wide_dtype(model.dtype)
    digest = hashlib.blake2b(digest_size=16)
    pairs = {}
    for module in modules:
        names = _tensor_names(module.name)
        a, b = (_load(stored[name], wide) for name in names)
        for name, tensor in zip(names, (a, b), strict=True):
            if not bool(tensor.isfinite().all()):
                raise AdapterError(f"{folder}: {name} holds NaN or infinity")
        digest.update(repr(module).encode())
        digest.update(a.view(torch.uint8).numpy().data)
        digest.update(b.view(torch.uint8).numpy().data)
        # The scale goes in before the rounding to the model's dtype, once.
        pair = pairs[module.name] = Pair(a.to(model.dtype), (b * module.scale).to(model.dtype))
        if not all(bool(tensor.isfinite().all()) for tensor in pair):
            raise AdapterError(f"{folder}: {module.name}, scaled by {module.scale:g}, is too large for {model.dtype}")
    if not any(bool(pair.a.any()) and bool(pair.b.any()) for pair in pairs.values()):
        raise AdapterError(f"{folder}: every lora_A or lora_B is zero: it was never trained and would change nothing")
    own = pairs if model.shard.size == 1 else {name: _cut(name, pair, model) for name, pair in pairs.items()}
    return AdapterWeights(
        path=str(folder),
        pairs=own,
        rank=max(module.rank for module in modules),
        targets=tuple(dict.fromkeys(module.name.rpartition(".")[2] for module in modules)),
        nbytes=sum(tensor.nbytes for pair in own.values() for tensor in pair),
        digest=digest.digest(),
    )


def _cut(name: str, pair: Pair, model: Transformer) -> Pair:
    """A rank's part: B is cut as the rows of its weight, A as the columns. What is added to the embedding is added to
    the sum over the ranks, and whole on each."""
    if name == "model.embed_tokens":
        return pair
    cut = model.shard.cut(name)
    b = pair.b[cut.rows]
    if name == "lm_head":
        b = torch.nn.functional.pad(b, (0, 0, 0, model.local_config.vocab_size - len(b)))
    return Pair(pair.a[:, cut.columns].clone(), b.clone())
