"""Adapters by name at the library's face: loading, listing, and vLLM's way of asking for one."""

from dataclasses import dataclass
from pathlib import Path

from llama.engine.adapters import Adapter
from llama.engine.engine import Engine
from llama.model.lora import read_adapter
from llama.model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class LoraInfo:
    """A loaded adapter: its largest rank, the modules it adapts, its bytes and a digest of its content."""

    name: str
    rank: int
    targets: tuple[str, ...]
    nbytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """vLLM's way to name an adapter: it is loaded from `lora_path` when it is first asked for. The id has no meaning
    here; the name alone tells adapters apart."""

    lora_name: str
    lora_int_id: int
    lora_path: str


def read_lora(engine: Engine, model: Transformer, name: str, path: str | Path) -> Adapter:
    """Read and check what is to be loaded; nothing of the engine is changed."""
    engine.adapters.check_new(name)
    if not isinstance(path, str | Path):
        raise ValueError(f"path must be an adapter's folder, got {type(path).__name__}")
    content = read_adapter(path, model, max_rank=engine.config.max_lora_rank)
    return Adapter(name, content.digest, content)


def describe(adapter: Adapter) -> LoraInfo:
    content = adapter.content
    return LoraInfo(adapter.name, content.rank, content.targets, content.nbytes, adapter.digest.hex())
