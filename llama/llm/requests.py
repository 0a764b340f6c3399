"""From what a caller types to a Request: forms of prompts, defaults of sampling, checks before anything is enqueued."""

import reprlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from numbers import Integral
from typing import Any, TypeGuard

from llama.api.errors import ParameterError, blamed_on
from llama.api.params import SamplingParams
from llama.engine.engine import Engine
from llama.engine.request import Request, check_room
from llama.llm.replies import tokens_of_stops
from llama.text.chat import ChatTemplate
from llama.text.chat.prepare import prepare_tools, tool_name
from llama.text.grammar import GrammarCompiler, is_strict
from llama.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Mapping[str, Any]
ToolChoice = str | Mapping[str, Any]  # as OpenAI spells it
MAX_REQUEST_ID = 256


def is_token_ids(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Integral)


def is_conversation(value: Any) -> TypeGuard[Sequence[Message]]:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list."""
    if isinstance(prompts, str | Mapping) or is_token_ids(prompts):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        found = type(prompts).__name__
        raise ParameterError(f"prompts must be a string, token ids, a dict or a list of these, got {found}", "prompts")
    return list(prompts)


def as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation or many, as a list."""
    if isinstance(messages, list | tuple) and not is_conversation(messages):
        if all(isinstance(conversation, list | tuple) for conversation in messages):
            return list(messages)
    elif is_conversation(messages):
        return [messages]
    raise ParameterError(
        'messages must be a list of {"role": ..., "content": ...}, or a list of such lists', "messages"
    )


def one_per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """A value given once for all, or a list with one for each prompt."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ParameterError(f"{name} has {len(value)} entries for {count} prompts", name)
    return list(value)


@dataclass(frozen=True, slots=True)
class Tools:
    """`shown` to the model, prepared; None for none. `must_call` one of them, or the one called `name`."""

    shown: list[dict[str, Any]] | None
    must_call: bool = False
    name: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The schema of each tool's arguments by its name; None for none. A grammar needs no second look."""
        return {
            tool_name(tool): None if self.must_call or is_strict(tool) else tool["function"].get("parameters")
            for tool in self.shown or ()
        }


def choose(tools: Sequence[Mapping[str, Any]] | None, choice: ToolChoice) -> Tools:
    """Raises ParameterError for tools that cannot be meant and for a choice that is none of theirs."""
    prepared = prepare_tools(tools or None)
    if choice == "auto":
        return Tools(prepared)
    if choice == "none":
        return Tools(None)
    if prepared is None:
        raise ParameterError("tool_choice needs tools", "tool_choice")
    if choice == "required":
        return Tools(prepared, must_call=True)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or name not in map(tool_name, prepared):
        legal = '"auto", "none", "required" or {"type": "function", "function": {"name": ...}} with the name of a tool'
        raise ParameterError(f"tool_choice must be {legal}", "tool_choice")
    return Tools(prepared, must_call=True, name=name)


class Inputs:
    """What is needed to turn prompts into Requests. Has no mutable state but the grammars that it
    keeps: safe to share between threads."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer | None, template: ChatTemplate | None, defaults: SamplingParams
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults

    def request(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        lora: str | None,
        *,
        request_id: str | None = None,
        clip: bool = True,
    ) -> Request:
        """A prompt in any form, checked. ParameterError names the field and what is legal. Without `clip`, max_tokens
        that the context has no room for are a ContextLengthError."""
        params, request_id = self._checked(params, request_id, lora)
        with blamed_on("prompt"):
            text, token_ids = self._encode(prompt, None if clip else params.max_tokens)
            request = self.engine.request(request_id, token_ids, params, prompt=text, lora=lora, clip=clip)
        return self._constrained(request, Tools(None))

    def chat_request(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None,
        lora: str | None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        request_id: str | None = None,
        clip: bool = True,
    ) -> Request:
        """A conversation, rendered by the checkpoint's template with the assistant's header at its end."""
        if self.template is None:
            raise ParameterError("chat needs a tokenizer: this model takes token ids only", "messages")
        params, request_id = self._checked(params, request_id, lora)
        chosen = choose(tools, tool_choice)
        check = partial(self._check_length, max_tokens=None if clip else params.max_tokens)
        with blamed_on("messages"):
            text, token_ids = self.template.prompt(messages, tools=chosen.shown, check=check)
            request = self.engine.request(request_id, token_ids, params, prompt=text, lora=lora, clip=clip)
        return self._constrained(request, chosen)

    def _encode(self, prompt: Prompt, max_tokens: int | None) -> tuple[str | None, Sequence[int]]:
        """`max_tokens`: what must fit behind it; None: anything."""
        if isinstance(prompt, Mapping):
            return self._encode_mapping(prompt, max_tokens)
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError("text prompts need a tokenizer: this model takes token ids only")
            if not prompt:
                raise ValueError("prompt is empty")
            self._check_length(prompt, max_tokens)
            return prompt, self.tokenizer.encode(prompt)
        if not isinstance(prompt, list | tuple):
            raise ValueError(f"a prompt must be a string, token ids or a dict, got {type(prompt).__name__}")
        return None, prompt

    def _check_length(self, text: str, max_tokens: int | None) -> None:
        """ContextLengthError for a text that is too long however it is encoded: that may take seconds and gigabytes."""
        if self.tokenizer is not None and len(text) + (max_tokens or 1) > (most := self.engine.config.context_len):
            check_room(self.tokenizer.min_tokens(text), max_tokens, most, at_least=True)

    def _encode_mapping(self, prompt: Mapping[str, Any], max_tokens: int | None) -> tuple[str | None, Sequence[int]]:
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not prompt:
            raise ValueError(f"a prompt dict holds prompt_token_ids or prompt, got {sorted(map(str, prompt))}")
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"prompt must be a string, got {type(text).__name__}")
        if token_ids is None:
            return self._encode(text or "", max_tokens)
        if not isinstance(token_ids, list | tuple):
            raise ValueError(f"prompt_token_ids must be a list of token ids, got {type(token_ids).__name__}")
        return text, token_ids

    def _checked(
        self, params: SamplingParams | None, request_id: str | None, lora: str | None
    ) -> tuple[SamplingParams, str]:
        """What costs nothing to check, before there is any work. With the defaults for what is not given."""
        params = self.defaults if params is None else params
        if not isinstance(params, SamplingParams):
            found = type(params).__name__
            raise ParameterError(f"sampling_params must be a SamplingParams, got {found}", "sampling_params")
        if params.stop:
            params = self._with_stop_tokens(params)
        if isinstance(params.prediction, str) and self.tokenizer is None:
            raise ParameterError("prediction as text needs a tokenizer: this model takes token ids only", "prediction")
        if request_id is None:
            request_id = uuid.uuid4().hex  # equals no id that a caller has chosen
        elif not isinstance(request_id, str) or not 0 < len(request_id) <= MAX_REQUEST_ID:
            legal = f"a string of 1 to {MAX_REQUEST_ID} characters"
            raise ParameterError(f"request_id must be {legal}, got {reprlib.repr(request_id)}", "request_id")
        self.engine.adapters.get(lora)
        return params, request_id

    def _with_stop_tokens(self, params: SamplingParams) -> SamplingParams:
        """A stop string that is a control token ends the answer as its id: the text of an answer holds none."""
        if self.tokenizer is None:
            raise ParameterError("stop needs a tokenizer: this model takes token ids only", "stop")
        hidden = self.tokenizer.special_tokens
        for text in params.stop:
            inside = next((token for token in hidden if token in text and token != text), None)
            if inside is not None and text not in hidden:
                why = f"{reprlib.repr(text)} holds the control token {inside}, of which no answer has the text"
                raise ParameterError(f"stop: {why}: give it alone", "stop")
        ids = tokens_of_stops(params.stop, self.tokenizer)
        return replace(params, stop_token_ids=[*params.stop_token_ids, *ids]) if ids else params

    def _constrained(self, request: Request, tools: Tools) -> Request:
        """With the grammar that the answer is held to: a call that must be made goes before any other, and beside any
        other a call may be made."""
        params, grammar = request.params, None
        try:
            if tools.must_call:
                grammar = self._grammars.compile_tool_choice(tools.shown or (), tools.name)
            elif tools.shown and (params.constrained_by or any(map(is_strict, tools.shown))):
                field = params.constrained_by or "response_format"
                grammar = self._grammars.compile_answer(tools.shown, params.constraint, field)
            elif params.constrained_by is not None:
                grammar = self._grammars.compile(params.constraint, params.constrained_by)
        except ImportError as error:
            raise ParameterError(str(error), params.constrained_by or "tool_choice") from None
        return replace(
            request,
            tools=tools.parameters,
            new_matcher=None if grammar is None else grammar.matcher,
            prediction_token_ids=self._prediction(params),
        )

    def _prediction(self, params: SamplingParams) -> Sequence[int]:
        """What the answer may be like, in tokens; none where no drafts are made of it."""
        if params.prediction is None or self.engine.config.speculative_config is None or not params.speculative:
            return ()
        if not isinstance(params.prediction, str):
            return params.prediction
        assert self.tokenizer is not None
        with blamed_on("prediction"):
            return self.tokenizer.encode_plain(params.prediction)

    @property
    def num_lost_workers(self) -> int:
        """Worker processes that were lost while a template was rendered or a grammar compiled."""
        compiler: GrammarCompiler | None = self.__dict__.get("_grammars")  # none until the first grammar
        templates = 0 if self.template is None else self.template.num_lost_workers
        return templates + (0 if compiler is None else compiler.num_lost_workers)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        if self.tokenizer is None:
            what = "response_format needs a tokenizer: this model takes token ids only"
            raise ParameterError(what, "response_format")
        return GrammarCompiler(self.tokenizer, self.engine.vocab_size)
