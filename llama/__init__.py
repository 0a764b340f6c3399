"""llama-engine: Llama 3.1 inference in PyTorch and Triton.

The public names are imported on first use, so that `import llama` and the command line's help need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.async_llm import AsyncLLM as AsyncLLM
    from llama.engine.request import CompletionOutput as CompletionOutput
    from llama.engine.request import FinishReason as FinishReason
    from llama.engine.request import RequestOutput as RequestOutput
    from llama.engine.request import SamplingParams as SamplingParams
    from llama.llm import LLM as LLM
    from llama.llm.loras import LoRARequest as LoRARequest
    from llama.model.config import ModelConfig as ModelConfig
    from llama.model.transformer import Transformer as Transformer

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": "llama.async_llm",
    "CompletionOutput": "llama.engine.request",
    "FinishReason": "llama.engine.request",
    "LLM": "llama.llm",
    "LoRARequest": "llama.llm.loras",
    "ModelConfig": "llama.model.config",
    "RequestOutput": "llama.engine.request",
    "SamplingParams": "llama.engine.request",
    "Transformer": "llama.model.transformer",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "FinishReason",
    "LoRARequest",
    "ModelConfig",
    "RequestOutput",
    "SamplingParams",
    "Transformer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
