"""The engine of offline work."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.async_llm.async_llm import AsyncLLM


def open_llm(model: str | Path, loras: Mapping[str, str | Path], **llm_arguments: Any) -> AsyncLLM:
    """An AsyncLLM with these adapters loaded, name -> folder, that refuses no request because others wait: its caller
    bounds what waits."""
    limits = {"max_waiting_requests": 1 << 40, "max_waiting_tokens": 1 << 60, "slow_reader_timeout": 1e9}
    llm = AsyncLLM(model, **{"max_loras": len(loras), **limits, **llm_arguments})
    for name, path in loras.items():
        llm.llm.load_lora(name, path)
    return llm
