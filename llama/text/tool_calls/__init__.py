"""Tool calls in what a Llama 3.1 model says, found while it is still saying it."""

from llama.text.tool_calls.forms import ToolCall, ToolCallDelta, merged_deltas
from llama.text.tool_calls.parser import CALL_TOKENS, PYTHON_TAG, ToolCallParser, parse_tool_calls

__all__ = [
    "CALL_TOKENS",
    "PYTHON_TAG",
    "ToolCall",
    "ToolCallDelta",
    "ToolCallParser",
    "merged_deltas",
    "parse_tool_calls",
]
