"""From a Transformer to a Hugging Face folder that transformers loads, all of it or nothing."""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from llama.model.checkpoint.layout import Entry, layout
from llama.model.checkpoint.shards import write
from llama.model.linear import Linear

if TYPE_CHECKING:
    from llama.model.transformer import Transformer


def save_pretrained(model: "Transformer", path: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write config.json and safetensors (several shards with an index, where one would be too large) to `path`.

    The folder appears complete under its name or not at all. It must not exist yet, or be empty: FileExistsError.
    """
    folder = Path(path).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists already; save to a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        building.chmod(0o755)
        _write_weights(model, building, max_shard_bytes)
        text = json.dumps(model.config.to_hugging_face(str(model.dtype).removeprefix("torch.")), indent=2) + "\n"
        (building / "config.json").write_text(text, encoding="utf-8")
        os.rename(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_weights(model: "Transformer", folder: Path, max_shard_bytes: int) -> None:
    shards: list[list[Entry]] = [[]]
    room = max_shard_bytes
    for entry in layout(model.config):
        size = math.prod(entry.shape) * model.dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        shapes = [(entry.name, entry.shape) for entry in shard]
        write(folder / name, shapes, model.dtype, (stored_rows(model, entry) for entry in shard))
        weight_map |= {entry.name: name for entry in shard}
    if len(shards) > 1:
        total = sum(math.prod(entry.shape) for shard in shards for entry in shard) * model.dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def stored_rows(model: "Transformer", entry: Entry) -> Tensor:
    """The tensor that a checkpoint keeps under the entry's name."""
    module = model.get_submodule(entry.module)
    weight = module.dense_weight() if isinstance(module, Linear) else module.weight
    return weight.detach().narrow(0, entry.start, entry.shape[0])
