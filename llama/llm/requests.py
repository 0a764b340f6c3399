"""From what a caller types to a Request: forms of prompts, defaults of sampling, checks before anything is enqueued."""

import reprlib
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from numbers import Integral
from typing import Any, TypedDict, TypeGuard, Unpack

from llama.api.errors import ParameterError, blamed_on, is_one_of, refusal
from llama.api.params import SamplingParams
from llama.engine.engine import Engine
from llama.engine.request import Request, TokenMatcher, check_room
from llama.engine.token_rules import TokenRules
from llama.llm.completion import tokens_of_stops
from llama.llm.tool_choice import ToolChoice, Tools, choose
from llama.text.chat import ChatTemplate
from llama.text.chat.prepare import tool_name
from llama.text.grammar import AfterThought, GrammarCompiler, ThoughtMasks, is_strict
from llama.text.reasoning import Thoughts, thoughts_after, thoughts_continued
from llama.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Mapping[str, Any]
MAX_REQUEST_ID = 256
REASONING_PARSERS = (None, "", "deepseek_r1", "none")
_KEPT_TEMPLATES = 4


class Rendering(TypedDict, total=False):
    """How a conversation becomes a prompt. `continue_final_message` goes on with the last message instead of answering
    it; `add_generation_prompt` (by default the opposite) ends the prompt with the assistant's header. `chat_template`
    is the text of another template, `chat_template_kwargs` are variables of it."""

    add_generation_prompt: bool | None
    continue_final_message: bool
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None


def as_lists(value: Any) -> Any:
    """NumPy arrays and tensors of token ids as lists, be they the value or what it lists."""
    if getattr(value, "ndim", 0) in (1, 2) and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple) and value and hasattr(value[0], "tolist"):
        return [each.tolist() if hasattr(each, "tolist") else each for each in value]
    return value


def is_token_ids(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Integral)


def is_conversation(value: Any) -> TypeGuard[Sequence[Message]]:
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def as_prompts(prompts: Prompt | Sequence[Prompt], name: str = "prompts") -> list[Prompt]:
    """One prompt or many, as a list."""
    prompts = as_lists(prompts)
    if isinstance(prompts, str | Mapping) or is_token_ids(prompts):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        found = type(prompts).__name__
        raise ParameterError(f"{name} must be a string, token ids, a dict or a list of these, got {found}", name)
    return list(prompts)


def unwrapped(prompt: Prompt) -> tuple[str | None, Sequence[int] | None]:
    """The text and the token ids that a prompt in any form has; where it has ids, they count."""
    text: Any = None
    token_ids: Any = prompt
    if isinstance(prompt, Mapping):
        if set(prompt) - {"prompt", "prompt_token_ids"} or not prompt:
            raise ValueError(f"a prompt dict holds prompt_token_ids or prompt, got {sorted(map(str, prompt))}")
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"prompt must be a string, got {type(text).__name__}")
        if token_ids is None:
            return text or "", None
    elif isinstance(prompt, str):
        return prompt, None
    token_ids = as_lists(token_ids)
    if not isinstance(token_ids, list | tuple):
        found = type(token_ids).__name__
        if isinstance(prompt, Mapping):
            raise ValueError(f"prompt_token_ids must be a list of token ids, got {found}")
        raise ValueError(f"a prompt must be a string, token ids or a dict, got {found}")
    return text, token_ids


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


class Inputs:
    """What is needed to turn prompts into Requests. Has no mutable state but the grammars and templates that it keeps:
    safe to share between threads."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        defaults: SamplingParams,
        reasoning_parser: str | None = None,
    ) -> None:
        """`reasoning_parser`: see LLM."""
        if not is_one_of(reasoning_parser, REASONING_PARSERS):
            legal = '"deepseek_r1", "none" or None'
            raise ParameterError(f"reasoning_parser must be {legal}, got {reasoning_parser!r}", "reasoning_parser")
        self.engine = engine
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self._reasoning_parser = reasoning_parser or None
        self._templates: dict[str, ChatTemplate] = {}  # that requests brought
        self._lock = threading.Lock()

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
            text, token_ids = self._encode(prompt, self._length_check(params, clip))
            request = self._of_ids(request_id, token_ids, params, prompt=text, lora=lora, clip=clip)
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
        **rendering: Unpack[Rendering],
    ) -> Request:
        """A conversation, rendered by the checkpoint's template with the assistant's header at its end."""
        params, request_id = self._checked(params, request_id, lora)
        chosen = choose(tools, tool_choice)
        check = self._length_check(params, clip)
        with blamed_on("messages"):
            text, token_ids = self.render(messages, chosen.shown, check, **rendering)
            request = self._of_ids(request_id, token_ids, params, prompt=text, lora=lora, clip=clip)
        request = replace(request, begins_in_thought=self._begins_in_thought(text, messages, rendering))
        return self._constrained(request, chosen)

    def _of_ids(self, request_id: str, token_ids: Sequence[int], params: SamplingParams, **rest: Any) -> Request:
        asked, negative = params.truncate_prompt_tokens, params.negative_prompt
        if asked == -1:
            asked = max(1, self.engine.config.context_len - (params.max_tokens or 1))
        token_ids = token_ids if asked is None else token_ids[-asked:]
        if isinstance(negative, str):
            if self.tokenizer is None:
                what = "negative_prompt as text needs a tokenizer: this model takes token ids only"
                raise ParameterError(what, "negative_prompt")
            negative = self._negative(self.tokenizer, negative) if params.is_guided else ()
        if params.is_guided and negative:
            rest["negative_token_ids"] = negative
        return self.engine.request(request_id, token_ids, params, **rest)

    def _negative(self, tokenizer: Tokenizer, text: str) -> Sequence[int]:
        most = self.engine.config.context_len
        with blamed_on("negative_prompt"):
            if len(text) >= most and (count := tokenizer.min_tokens(text)) >= most:  # to encode it may take seconds
                told = f"has at least {count} tokens and the context is {most} (max_model_len): no room is left"
                raise ValueError(f"negative_prompt {told}")
            return tokenizer.encode(text)

    def render(
        self,
        messages: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        check: Callable[[str], None] = lambda text: None,
        **rendering: Unpack[Rendering],
    ) -> tuple[str, Sequence[int]]:
        """The prompt that a conversation becomes: as text, which `check` may refuse, and as token ids."""
        if unknown := sorted(rendering.keys() - Rendering.__annotations__.keys()):
            raise TypeError(f"a chat has no argument {unknown[0]!r}")
        template = self._template(rendering)
        continues = rendering.get("continue_final_message", False)
        ends_with_header = rendering.get("add_generation_prompt")
        kwargs = {} if (given := rendering.get("chat_template_kwargs")) is None else given
        for name, value in (("continue_final_message", continues), ("add_generation_prompt", ends_with_header)):
            if not isinstance(value, bool | None):
                raise refusal(name, "True or False", value)
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise refusal("chat_template_kwargs", "a dict", kwargs)
        if ends_with_header is None:
            ends_with_header = not continues
        own = {"messages", "tools", "add_generation_prompt", "continue_final_message", "check", "self"}
        if taken := sorted(kwargs.keys() & own):
            raise ParameterError(f"chat_template_kwargs must not hold {taken[0]!r}", "chat_template_kwargs")
        return template.prompt(messages, tools, ends_with_header, bool(continues), check=check, **kwargs)

    def _begins_in_thought(self, prompt: str, messages: Sequence[Message], rendering: Rendering) -> bool | None:
        """See Request."""
        knows_thoughts = self._reasoning_parser == "deepseek_r1" or self._template(rendering).knows_thoughts
        if self._reasoning_parser == "none" or not knows_thoughts:
            return None
        thoughts = thoughts_after(prompt)
        if rendering.get("continue_final_message"):
            thoughts = thoughts_continued(str(messages[-1].get("content") or ""))
        return None if thoughts is Thoughts.NONE else thoughts is Thoughts.BEGUN

    def _template(self, rendering: Rendering) -> ChatTemplate:
        if self.template is None or self.tokenizer is None:
            raise ParameterError("chat needs a tokenizer: this model takes token ids only", "messages")
        if (text := rendering.get("chat_template")) is None:
            return self.template
        with blamed_on("chat_template"):
            return self._other_template(text)

    def _other_template(self, text: str) -> ChatTemplate:
        if not isinstance(text, str):
            raise ValueError(f"chat_template must be a template's text, got {text!r}")
        assert self.tokenizer is not None
        with self._lock:
            if text not in self._templates:
                if len(self._templates) == _KEPT_TEMPLATES:
                    self._templates.pop(next(iter(self._templates))).close()
                self._templates[text] = ChatTemplate(self.tokenizer, {"default": text})
            return self._templates[text]

    def _encode(self, prompt: Prompt, check: Callable[[str], None]) -> tuple[str | None, Sequence[int]]:
        text, token_ids = unwrapped(prompt)
        if token_ids is None:
            if self.tokenizer is None:
                raise ValueError("text prompts need a tokenizer: this model takes token ids only")
            if not text:
                raise ValueError("prompt is empty")
            check(text)
            token_ids = self.tokenizer.encode(text)
        return text, token_ids

    def _length_check(self, params: SamplingParams, clip: bool) -> Callable[[str], None]:
        """ContextLengthError for a text that is too long however it is encoded: that may take seconds and gigabytes."""
        if not isinstance(clip, bool):
            raise refusal("clip", "True or False", clip)
        most, max_tokens = self.engine.config.context_len, None if clip else params.max_tokens

        def check(text: str) -> None:
            if self.tokenizer is not None and len(text) + (max_tokens or 1) > most:
                check_room(self.tokenizer.min_tokens(text), max_tokens, most, at_least=True)

        return check if params.truncate_prompt_tokens is None else lambda text: None

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
        if tools.shown and not params.detokenize:
            raise ParameterError("tools need detokenize=True: calls are looked for in the text", "tools")
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
        new_matcher: Callable[[], TokenMatcher] | None = None if grammar is None else grammar.matcher
        if grammar is not None and request.begins_in_thought is not None:
            new_matcher = partial(AfterThought.at_start, self._thought_masks, grammar, request.begins_in_thought)
        if params.allowed_token_ids or params.bad_words:
            rules = TokenRules(self.engine.vocab_size, params.allowed_token_ids, self._bad_sequences(params))
            new_matcher = partial(rules.matcher, new_matcher)
        return replace(
            request,
            tools=tools.parameters,
            certain_calls=() if grammar is None else _certain_calls(tools, params),
            new_matcher=new_matcher,
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

    def _bad_sequences(self, params: SamplingParams) -> list[list[int]]:
        """Each of bad_words, without leading blanks unless it is all blank, as tokens at the beginning of a text, and
        behind a space where those differ: as vLLM does it, only if both have the same length."""
        if params.bad_words and self.tokenizer is None:
            raise ParameterError("bad_words need a tokenizer: this model takes token ids only", "bad_words")
        sequences: list[list[int]] = []
        for word in params.bad_words:
            assert self.tokenizer is not None
            text = word.lstrip() or word
            bare, spaced = (self.tokenizer.encode(p + text, add_special_tokens=False) for p in ("", " "))
            sequences += [bare] if bare else []
            if spaced and len(spaced) == len(bare) and spaced[0] != bare[0]:
                sequences.append(spaced)
        return sequences

    @cached_property
    def _thought_masks(self) -> ThoughtMasks:
        assert self.tokenizer is not None
        return ThoughtMasks(self.tokenizer, self.engine.vocab_size)

    @property
    def num_lost_workers(self) -> int:
        """Worker processes that were lost while a template was rendered or a grammar compiled."""
        compiler: GrammarCompiler | None = self.__dict__.get("_grammars")  # none until the first grammar
        templates = 0 if self.template is None else self.template.num_lost_workers
        return templates + (0 if compiler is None else compiler.num_lost_workers)

    @property
    def grammar_bytes(self) -> int:
        """Of the compiled grammars that are kept."""
        compiler: GrammarCompiler | None = self.__dict__.get("_grammars")
        return 0 if compiler is None else compiler.kept_bytes

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        if self.tokenizer is None:
            what = "response_format needs a tokenizer: this model takes token ids only"
            raise ParameterError(what, "response_format")
        return GrammarCompiler(self.tokenizer, self.engine.vocab_size)


def _certain_calls(tools: Tools, params: SamplingParams) -> list[str]:
    """Whose calls the grammar holds from their first characters on, if nothing may end the text inside of one: beside a
    response_format an answer may begin like a call."""
    if params.stop or params.stop_token_ids or (params.constrained_by is not None and not tools.must_call):
        return []
    shown = tools.shown or []
    if tools.must_call:
        return [tool_name(tool) for tool in shown if tools.name in (None, tool_name(tool))]
    return [tool_name(tool) for tool in shown if is_strict(tool)]
