"""From a module to a Hugging Face folder that transformers loads, all of it or nothing."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama.api.errors import ParameterError
from llama.files import check_path
from llama.model.checkpoint.layout import Entry, entries_of, layout
from llama.model.checkpoint.quantised.write import (
    Coded,
    Scheme,
    coded_tensors,
    kv_scale_tensors,
    quantization_config,
)
from llama.model.checkpoint.shards import Stored, write
from llama.model.config import ModelConfig
from llama.model.linear import Linear
from llama.model.weights.quantised import Dense, Quantised

MAX_SHARD_BYTES = 5_000_000_000


def save_pretrained(
    module: nn.Module,
    config: ModelConfig,
    path: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    kv_scales: Tensor | None = None,
) -> None:
    """Write config.json and safetensors (several shards with an index, where one would be too large) to `path`.

    The folder appears complete under its name or not at all. It must not exist yet, or be empty: FileExistsError.
    Quantised weights stay so: in compressed-tensors, or MLX's format where it alone can tell them. `kv_scales` are
    a `Checkpoint`'s.
    """
    entries = entries_of(module, config)
    dtype = stored_rows(module, entries[0]).dtype

    def coded_of(entry: Entry) -> Coded | None:
        form = _coded_rows(module, entry)
        return coded_tensors(form) if isinstance(form, Quantised) else None

    with new_folder(path) as folder:
        write_checkpoint(
            folder,
            config,
            dtype,
            lambda entry: stored_rows(module, entry),
            max_shard_bytes,
            coded_of=coded_of,
            entries=entries,
            kv_scales=kv_scales,
        )


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to fill, renamed to it at the end; removed if anything fails."""
    check_path(path, ParameterError)
    folder = Path(path).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists already; save to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        building.chmod(0o755)
        yield building
        os.rename(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def write_checkpoint(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    tensor_of: Callable[[Entry], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    coded_of: Callable[[Entry], Coded | None] = lambda entry: None,
    kv_scales: Tensor | None = None,
    entries: Sequence[Entry] | None = None,
) -> None:
    """config.json and weights of one dtype, but for those that `coded_of` says are quantised; `tensor_of` is asked for
    one tensor at a time, in the layout's order."""
    shards: list[dict[str, Stored]] = [{}]
    schemes: dict[str, Scheme | None] = {}
    room = max_shard_bytes
    for entry in layout(config) if entries is None else entries:
        module, coded = entry.name.removesuffix(".weight"), coded_of(entry)
        tensors = {entry.name: Stored.of(dtype, entry.shape, partial(tensor_of, entry))}
        if coded is not None:
            tensors = {f"{module}.{name}": tensor for name, tensor in coded.tensors.items()}
        if len(entry.shape) == 2 and entry.module != "embed_tokens":
            schemes[module] = None if coded is None else coded.scheme
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1] |= tensors
        room -= size
    shards[-1] |= kv_scale_tensors(kv_scales)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        write(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    document = config.to_hugging_face(str(dtype).removeprefix("torch."))
    if kv_scales is not None or any(scheme is not None for scheme in schemes.values()):
        document |= quantization_config(schemes, kv_scales)
    write_json(folder / "config.json", document)


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stored_rows(module: nn.Module, entry: Entry) -> Tensor:
    """The dense tensor that a checkpoint keeps under the entry's name, whatever the form of the weight."""
    coded = _coded_rows(module, entry)
    if coded is not None:
        return coded.dense()
    tensor: Tensor = module.get_submodule(entry.module).state_dict()[entry.leaf]
    return tensor.detach().narrow(0, entry.start, entry.shape[0])


def _coded_rows(module: nn.Module, entry: Entry) -> Quantised | Dense | None:
    owner = module.get_submodule(entry.module)
    coded = owner.coded if isinstance(owner, Linear) and entry.leaf == "weight" else None
    return None if coded is None else coded.rows(entry.start, entry.shape[0])
