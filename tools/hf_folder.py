"""A Hugging Face checkpoint folder written piece by piece: config files, and tensors streamed into safetensors shards.

The folder appears under its name only when it is complete. At most one shard's tensors are held in memory.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llama.model.config import ModelConfig, RopeScaling

MAX_SHARD_BYTES = 5_000_000_000

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output` to fill, renamed to it at the end; removed if anything fails."""
    if output.exists():
        raise FileExistsError(f"{output} exists already: remove it or name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".partial", dir=output.parent))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp lets only the owner in
        os.rename(work, output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> None:
    """Write `tensors` in the order given, as model.safetensors or as numbered shards with an index."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        path = folder / f"{len(shards)}.partial"
        save_file(pending, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors lets only the owner in
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + num_bytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor.contiguous()
        pending_bytes += num_bytes
        total_bytes += num_bytes
    flush()
    if len(shards) == 1:
        os.rename(folder / "0.partial", folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        filename = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"{i}.partial", folder / filename)
        weight_map.update(dict.fromkeys(names, filename))
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )


def write_configs(folder: Path, config: ModelConfig, dtype: str, pad_token_id: int | None) -> None:
    """config.json, and the generation_config.json that repeats its token ids."""
    document = config.to_hugging_face(dtype)
    write_json(folder / "config.json", document)
    ids = {key: document[key] for key in ("bos_token_id", "eos_token_id")} | {"pad_token_id": pad_token_id}
    write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})


def llama3_rope_scaling(factor: float) -> RopeScaling:
    """The scaling of Llama 3.1 (factor 8) and 3.2 (factor 32); the other three numbers never varied."""
    return RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def unpermute_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of a q or k projection from the interleaved RoPE layout to the half-split one. weight [heads * D, hidden]

    Meta and GGUF rotate rows (0, 1), (2, 3), ... of a head as pairs; Hugging Face rotates (0, D/2), (1, D/2 + 1), ...
    """
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)
