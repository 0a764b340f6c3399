"""Offline work: files of requests in OpenAI's batch format, and rows of Ray Data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.batch.generator import Generator as Generator

__all__ = ["Generator"]


def __getattr__(name: str) -> Any:
    """On first use, because torch comes with it: the command line looks at files before it."""
    if name != "Generator":
        raise AttributeError(f"module 'llama.batch' has no attribute {name!r}")
    from llama.batch.generator import Generator

    return Generator
