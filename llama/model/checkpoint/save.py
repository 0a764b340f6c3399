"""From a module to a Hugging Face folder that transformers loads, all of it or nothing."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama.model.checkpoint.layout import Entry, layout
from llama.model.checkpoint.shards import write
from llama.model.config import ModelConfig

MAX_SHARD_BYTES = 5_000_000_000


def save_pretrained(
    module: nn.Module, config: ModelConfig, path: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json and safetensors (several shards with an index, where one would be too large) to `path`.

    The folder appears complete under its name or not at all. It must not exist yet, or be empty: FileExistsError.
    """
    dtype = stored_rows(module, next(layout(config))).dtype
    with new_folder(path) as folder:
        write_checkpoint(folder, config, dtype, lambda entry: stored_rows(module, entry), max_shard_bytes)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to fill, renamed to it at the end; removed if anything fails."""
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
) -> None:
    """config.json and weights of one dtype; `tensor_of` is asked for one tensor at a time, in the layout's order."""
    shards: list[list[Entry]] = [[]]
    room = max_shard_bytes
    for entry in layout(config):
        size = math.prod(entry.shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        write(folder / name, [(entry.name, entry.shape) for entry in shard], dtype, map(tensor_of, shard))
        weight_map |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        total = sum(math.prod(entry.shape) for shard in shards for entry in shard) * dtype.itemsize
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    write_json(folder / "config.json", config.to_hugging_face(str(dtype).removeprefix("torch.")))


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def stored_rows(module: nn.Module, entry: Entry) -> Tensor:
    """The tensor that a checkpoint keeps under the entry's name: a state dict has it dense, whatever its form."""
    tensor: Tensor = module.get_submodule(entry.module).state_dict()[entry.leaf]
    return tensor.detach().narrow(0, entry.start, entry.shape[0])
