"""Offline work: files of requests in OpenAI's batch format, and rows of Ray Data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.batch.generator import Generator as Generator
    from llama.batch.processor import ProcessorConfig as ProcessorConfig
    from llama.batch.processor import build_processor as build_processor

_HOMES = {"Generator": "generator", "ProcessorConfig": "processor", "build_processor": "processor"}

__all__ = ["Generator", "ProcessorConfig", "build_processor"]


def __getattr__(name: str) -> Any:
    """On first use, because torch comes with it: the command line looks at files before it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'llama.batch' has no attribute {name!r}")
    return getattr(import_module(f"llama.batch.{_HOMES[name]}"), name)
