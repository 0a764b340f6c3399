"""llama-engine: Llama 3.1 inference in PyTorch and Triton.

The public names are imported on first use, so that `import llama` and the command line's help need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.api.errors import AdapterError as AdapterError
    from llama.api.errors import ChatTemplateError as ChatTemplateError
    from llama.api.errors import CheckpointError as CheckpointError
    from llama.api.errors import ConfigError as ConfigError
    from llama.api.errors import ContextLengthError as ContextLengthError
    from llama.api.errors import EngineClosedError as EngineClosedError
    from llama.api.errors import EngineDeadError as EngineDeadError
    from llama.api.errors import ParameterError as ParameterError
    from llama.api.errors import QueueFullError as QueueFullError
    from llama.api.errors import WorkerLostError as WorkerLostError
    from llama.api.flat_logprobs import FlatLogprobs as FlatLogprobs
    from llama.api.outputs import CompletionOutput as CompletionOutput
    from llama.api.outputs import FinishReason as FinishReason
    from llama.api.outputs import Logprob as Logprob
    from llama.api.outputs import Piece as Piece
    from llama.api.outputs import RequestMetrics as RequestMetrics
    from llama.api.outputs import RequestOutput as RequestOutput
    from llama.api.outputs import Usage as Usage
    from llama.api.params import SamplingParams as SamplingParams
    from llama.api.structured import StructuredOutputsParams as StructuredOutputsParams
    from llama.async_llm.async_llm import AsyncLLM as AsyncLLM
    from llama.llm.beam_search import BeamSearchParams as BeamSearchParams
    from llama.llm.llm import LLM as LLM
    from llama.llm.loras import LoRARequest as LoRARequest
    from llama.model.capture import Capture as Capture
    from llama.model.capture import attention_pattern as attention_pattern
    from llama.model.config import ModelConfig as ModelConfig
    from llama.model.interventions import Add as Add
    from llama.model.interventions import Apply as Apply
    from llama.model.interventions import Project as Project
    from llama.model.interventions import Replace as Replace
    from llama.model.interventions import Scale as Scale
    from llama.model.transformer import Transformer as Transformer
    from llama.text.tokenizer import Tokenizer as Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "llama.api.errors",
    "Add": "llama.model.interventions",
    "Apply": "llama.model.interventions",
    "AsyncLLM": "llama.async_llm.async_llm",
    "ChatTemplateError": "llama.api.errors",
    "BeamSearchParams": "llama.llm.beam_search",
    "Capture": "llama.model.capture",
    "CheckpointError": "llama.api.errors",
    "CompletionOutput": "llama.api.outputs",
    "ConfigError": "llama.api.errors",
    "ContextLengthError": "llama.api.errors",
    "EngineClosedError": "llama.api.errors",
    "EngineDeadError": "llama.api.errors",
    "FinishReason": "llama.api.outputs",
    "FlatLogprobs": "llama.api.flat_logprobs",
    "LLM": "llama.llm.llm",
    "LoRARequest": "llama.llm.loras",
    "Logprob": "llama.api.outputs",
    "ModelConfig": "llama.model.config",
    "ParameterError": "llama.api.errors",
    "Piece": "llama.api.outputs",
    "Project": "llama.model.interventions",
    "QueueFullError": "llama.api.errors",
    "Replace": "llama.model.interventions",
    "RequestMetrics": "llama.api.outputs",
    "RequestOutput": "llama.api.outputs",
    "SamplingParams": "llama.api.params",
    "Scale": "llama.model.interventions",
    "StructuredOutputsParams": "llama.api.structured",
    "Tokenizer": "llama.text.tokenizer",
    "Transformer": "llama.model.transformer",
    "attention_pattern": "llama.model.capture",
    "Usage": "llama.api.outputs",
    "WorkerLostError": "llama.api.errors",
}

__all__ = [
    "LLM",
    "AdapterError",
    "Add",
    "Apply",
    "AsyncLLM",
    "BeamSearchParams",
    "Capture",
    "ChatTemplateError",
    "CheckpointError",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthError",
    "EngineClosedError",
    "EngineDeadError",
    "FinishReason",
    "FlatLogprobs",
    "LoRARequest",
    "Logprob",
    "ModelConfig",
    "ParameterError",
    "Piece",
    "Project",
    "QueueFullError",
    "Replace",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Scale",
    "StructuredOutputsParams",
    "Tokenizer",
    "Transformer",
    "Usage",
    "WorkerLostError",
    "__version__",
    "attention_pattern",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
