"""Which tools a model is shown, and which of them it must call."""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama.api.errors import ParameterError, is_one_of
from llama.files import some_of
from llama.text.chat.prepare import prepare_tools, tool_name

ToolChoice = str | Mapping[str, Any]  # as OpenAI spells it
_shown = reprlib.Repr()  # of what a client has sent
_shown.maxstring = 100


@dataclass(frozen=True, slots=True)
class Tools:
    """`shown` to the model, prepared; None for none. `must_call` one of them, or the one called `name`."""

    shown: list[dict[str, Any]] | None
    must_call: bool = False
    name: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The schema of each tool's arguments by its name; None for none."""
        return {tool_name(tool): tool["function"].get("parameters") for tool in self.shown or ()}


def choose(tools: Sequence[Mapping[str, Any]] | None, choice: ToolChoice) -> Tools:
    """Raises ParameterError for tools that cannot be meant and for a choice that is none of theirs."""
    prepared = prepare_tools(tools)
    if is_one_of(choice, ("auto",)):
        return Tools(prepared)
    if is_one_of(choice, ("none",)):
        return Tools(None)
    if prepared is None:
        raise ParameterError("tool_choice needs tools", "tool_choice")
    if is_one_of(choice, ("required",)):
        return Tools(prepared, must_call=True)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in map(tool_name, prepared):
        legal = '"auto", "none", "required" or {"type": "function", "function": {"name": ...}} with the name of a tool'
        named, told = some_of(map(tool_name, prepared)), _shown.repr(name if isinstance(name, str) else choice)
        raise ParameterError(f"tool_choice must be {legal} ({named}), got {told}", "tool_choice")
    return Tools(prepared, must_call=True, name=name)
