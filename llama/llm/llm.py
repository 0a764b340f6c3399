"""LLM: the library's face. Text in, text out; prompts of any form, in batches or streamed.

Threads that use one LLM take turns, step by step (AsyncLLM serves many requests better). All requests of one LLM share
its engine: a stream that is read while another is open, or a generate() in between, advances both.
"""

import inspect
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack, cast

import torch

from llama.api.errors import ParameterError, is_one_of, of_each
from llama.api.outputs import Piece, RequestOutput
from llama.api.params import SamplingParams
from llama.engine.config import EngineConfig
from llama.engine.request import Request
from llama.hub import model_folder
from llama.llm.engines import load_engine, ranks_of
from llama.llm.interrupts import Held, interrupts_held
from llama.llm.loading import check_draft, check_model, load_defaults, load_text, tell_useless_ends
from llama.llm.loras import LoraInfo, LoRARequest, RequestedLoras, describe, read_lora
from llama.llm.replies import Replies, Reply
from llama.llm.requests import (
    Inputs,
    Message,
    Prompt,
    Rendering,
    as_conversations,
    as_prompts,
    is_conversation,
    one_per_prompt,
)
from llama.llm.scoring import Scoring
from llama.llm.taps import kept_output, tapped
from llama.llm.tool_choice import ToolChoice
from llama.llm.upkeep import Upkeep
from llama.llm.vllm_names import METHOD_ARGUMENTS, refuse_foreign, without_foreign
from llama.model.capture import Capture
from llama.model.taps import Interventions
from llama.model.transformer import Transformer
from llama.text.chat.prepare import prepare_tools
from llama.text.tokenizer import Tokenizer

__all__ = ["LLM"]

T = TypeVar("T")
ProgressBar = bool | Callable[..., Any]  # whether, or what makes one


def _bar(use_tqdm: ProgressBar, total: int) -> AbstractContextManager[Any]:
    """A progress bar, or None in its place."""
    if not use_tqdm:
        return nullcontext()
    from tqdm.auto import tqdm  # not above: it starts a thread with its first bar

    bar_of: Callable[..., Any] = use_tqdm if callable(use_tqdm) else tqdm
    # disable=None lets tqdm itself be silent where stderr is no terminal
    bar: AbstractContextManager[Any] = bar_of(total=total, desc="Prompts", unit="prompt", disable=None)
    return bar


def _names_options(cls: type[T]) -> type[T]:
    """Class decorator: help() and notebooks show each field of EngineConfig beside **options."""
    *own, rest = inspect.signature(cls).parameters.values()
    options = [
        inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=option.type)
        for option in fields(EngineConfig)
    ]
    cls.__signature__ = inspect.Signature([*own, *options, rest])  # type: ignore[attr-defined]
    return cls


class Pieces(Iterator[Piece]):
    """What LLM.stream gives. The engine has the request already; `step` advances all that it has. Closing this aborts
    the request, and so does dropping it."""

    def __init__(self, replies: Replies, reply: Reply, step: Callable[[Reply], object]) -> None:
        reply.streams = True
        self._replies = replies
        self._reply = reply
        self._step = step

    def __next__(self) -> Piece:
        reply = self._reply
        try:
            if not (reply.pending or reply.finished):
                with interrupts_held() as held:
                    while not (reply.pending or reply.finished):
                        held.deliver()
                        self._step(reply)
        except BaseException:
            self.close()
            raise
        if not reply.pending:
            raise StopIteration
        return reply.pending.popleft()

    def close(self) -> None:
        """Legal at any time and any number of times; nothing comes afterwards."""
        with interrupts_held():
            self._replies.abort(self._reply)
        self._reply.pending.clear()

    def __del__(self) -> None:
        self._replies.abandon(self._reply)


@_names_options
class LLM(Scoring, Upkeep):
    """A model with its engine. `model` is a Hugging Face folder, an id of the hub ("org/name", at `revision`: a branch,
    tag or commit) or a Transformer; without a tokenizer (a Transformer alone, or a folder that has none) prompts and
    answers are token ids only.

    device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:0". dtype: "auto" (the checkpoint's), "float64" (on
    the CPU), "float32", "float16", "bfloat16". load_format: "auto", or "dummy" for random weights from config.json
    alone. quantization: "int8", "int4" or "fp8" rounds the linear layers of a dense model as it is loaded (head,
    embedding and norms stay); a quantised folder is taken as it is, and vLLM's word for its method is accepted.
    quantization_layout, on a CPU: "compact" keeps the codes alone, "balanced" also what makes few tokens fast, "fast"
    what makes many fast too. check_weights: refuse NaN and infinities. reasoning_parser: "deepseek_r1" looks for
    `<think>...</think>` at the beginning of a chat's answer and gives it as `reasoning_content`; None does so where the
    chat template knows of `</think>`, "none" never does. Stop strings, grammars and tool calls begin behind the
    thought. `options` are the fields of `llama.engine.config.EngineConfig`, as the signature lists them. Arguments of
    vLLM's that are not here are refused by name unless they hold vLLM's default.
    """

    def __init__(
        self,
        model: str | Path | Transformer,
        tokenizer: str | Path | Tokenizer | None = None,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        load_format: str = "auto",
        quantization: str | None = None,
        quantization_layout: str = "balanced",
        check_weights: bool = False,
        revision: str | None = None,
        reasoning_parser: str | None = None,
        **options: Any,
    ) -> None:
        ours = {field.name for field in fields(EngineConfig)}
        refuse_foreign({name: value for name, value in options.items() if name not in ours})
        config = EngineConfig(**{name: value for name, value in options.items() if name in ours})
        if isinstance(model, str):
            model = model_folder(model, revision)
        elif revision is not None:
            raise ParameterError("revision is for an id of the hub as model", "revision")
        self.tokenizer, template = load_text(model, tokenizer)
        defaults, eos_token_ids = load_defaults(model)
        model_config, where = check_model(model, device=device, dtype=dtype, load_format=load_format)
        tell_useless_ends(model, eos_token_ids, model_config.vocab_size)
        config = config.resolved(model_config, where.type)
        eos_token_ids |= frozenset(model_config.eos_token_ids)
        if self.tokenizer is not None:
            self.tokenizer.check_vocab(model_config.vocab_size)
            eos_token_ids |= self.tokenizer.eos_token_ids
        speculation = config.speculation
        if speculation is not None and speculation.model is not None:
            check_draft(speculation.model, model_config.vocab_size, self.tokenizer)
        self.engine = load_engine(
            model,
            where,
            config,
            eos_token_ids=eos_token_ids,
            dtype=dtype,
            load_format=load_format,
            quantization=quantization,
            quantization_layout=quantization_layout,
            check_weights=check_weights,
        )
        assert self.engine.model is not None
        self.model = self.engine.model
        self.inputs = Inputs(self.engine, self.tokenizer, template, defaults, reasoning_parser)
        self.replies = Replies(self.engine, self.tokenizer)
        self._requested = RequestedLoras(self.load_lora)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora: str | Sequence[str | None] | None = None,
        use_tqdm: ProgressBar = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        *,
        request_ids: Sequence[str] | None = None,
        capture: Capture | Sequence[Capture | None] | None = None,
        interventions: Interventions = None,
        **foreign: Any,
    ) -> list[RequestOutput]:
        """Write on from each prompt; the outputs come in the order asked. Prompts are a string (encoded as the
        checkpoint's tokenizer does it, special-token text parsed), token ids, {"prompt_token_ids": [...]}, or a list of
        these. One mistake in any of them is a ValueError before anything runs.

        capture and interventions (see `llama.model.capture`, `llama.model.interventions`) are one for all prompts or a
        list with one (or None) for each; what is captured comes as `captured` of the outputs and their completions.
        `foreign`: vLLM's other arguments, at the values that change nothing."""
        refuse_foreign(foreign, METHOD_ARGUMENTS, "LLM.generate")
        listed = as_prompts(prompts)
        each_params = one_per_prompt("sampling_params", sampling_params, len(listed))
        each_lora = self._loras(lora, lora_request, len(listed))
        ids = [None] * len(listed) if request_ids is None else one_per_prompt("request_ids", request_ids, len(listed))
        asked = list(zip(listed, each_params, each_lora, ids, strict=True))
        requests = of_each("prompts", asked, lambda one: self.inputs.request(one[0], one[1], one[2], request_id=one[3]))
        return self._run(tapped(self.engine, requests, capture, interventions), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora: str | Sequence[str | None] | None = None,
        use_tqdm: ProgressBar = True,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        *,
        tool_choice: ToolChoice = "auto",
        request_ids: Sequence[str] | None = None,
        capture: Capture | Sequence[Capture | None] | None = None,
        interventions: Interventions = None,
        **rendering: Unpack[Rendering],
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several. What a message holds is text, never a control token.

        tool_choice, as OpenAI spells it: "auto" lets the model decide, "none" hides the tools from it, "required" holds
        the answer to a call of one of them, {"type": "function", "function": {"name": NAME}} to a call of that one.

        rendering: continue_final_message=True goes on with the last message; add_generation_prompt=False leaves out the
        assistant's header; chat_template is the text of another template, chat_template_kwargs are variables of it.
        """
        listed = as_conversations(messages)
        each_params = one_per_prompt("sampling_params", sampling_params, len(listed))
        each_lora = self._loras(lora, lora_request, len(listed))
        own = without_foreign(rendering, "LLM.chat")
        ask = partial(self.inputs.chat_request, tools=tools, tool_choice=tool_choice, **own)
        ids = [None] * len(listed) if request_ids is None else one_per_prompt("request_ids", request_ids, len(listed))

        def request_of(asked: Sequence[Any]) -> Request:
            *rest, request_id = asked
            return ask(*rest, request_id=request_id)

        asked = list(zip(listed, each_params, each_lora, ids, strict=True))
        requests = of_each("conversations", asked, request_of)
        return self._run(tapped(self.engine, requests, capture, interventions), use_tqdm)

    def stream(
        self,
        prompt_or_messages: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora: str | None = None,
        lora_request: LoRARequest | None = None,
        *,
        tool_choice: ToolChoice = "auto",
        capture: Capture | None = None,
        interventions: Interventions = None,
        **rendering: Unpack[Rendering],
    ) -> Pieces:
        """The answer to one prompt or conversation as it is written, for a loop to read. The engine takes the request
        here, so every refusal comes from this call. Closing or dropping what it returns aborts the request; the pieces
        of each completion add up to what generate() or chat() would have given. `tools`, `tool_choice` and
        `rendering`, as in chat(), need a conversation."""
        [lora] = self._loras(lora, lora_request, 1)
        if is_conversation(prompt_or_messages):
            ask = partial(self.inputs.chat_request, tools=tools, tool_choice=tool_choice, **rendering)
            request = ask(prompt_or_messages, sampling_params, lora)
        elif prepare_tools(tools) or not is_one_of(tool_choice, ("auto",)):
            raise ParameterError("tools and tool_choice need a conversation: give a list of messages", "tools")
        elif rendering:
            name = next(iter(rendering))
            raise ParameterError(f"{name} needs a conversation: give a list of messages", name)
        else:
            request = self.inputs.request(cast(Prompt, prompt_or_messages), sampling_params, lora)
        [request] = tapped(self.engine, [request], capture, interventions)
        with interrupts_held():
            return Pieces(self.replies, self.replies.add(request), self._step)

    def get_tokenizer(self) -> Tokenizer:
        """ParameterError where there is none."""
        if self.tokenizer is None:
            raise ParameterError("this model takes token ids only: it has no tokenizer", "tokenizer")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without a SamplingParams gets: the checkpoint's generation_config.json over neutral values."""
        return self.inputs.defaults

    def load_lora(self, name: str, path: str | Path, replace: bool = False) -> LoraInfo:
        """Load a PEFT adapter's folder; requests ask for it with lora=name. AdapterError (a ValueError) says what is
        wrong with it. With `replace` one of that name makes way; requests that run with it keep it to their end. Legal
        while requests run."""
        adapter = read_lora(self.engine, self.model, name, path, replace)
        self.replies.between_steps(lambda: self.engine.add_adapter(adapter, replace))
        return describe(adapter)

    def unload_lora(self, name: str) -> None:
        """From now on no request can ask for it; those that run with it keep it to their end."""
        self.replies.between_steps(lambda: self.engine.adapters.remove(name))

    def list_loras(self) -> list[LoraInfo]:
        return [describe(adapter) for adapter in list(self.engine.adapters.by_name.values())]

    def close(self) -> None:
        """End the other ranks where there are some (tensor_parallel_size), after which this LLM is of no use. The
        garbage collector and the end of Python do it too."""
        if (ranks := ranks_of(self.engine)) is not None:
            ranks.close()
            self.engine.die("it was closed")

    def _loras(
        self,
        lora: str | Sequence[str | None] | None,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None,
        count: int,
    ) -> list[str | None]:
        """The adapter's name for each prompt; what a LoRARequest asks for is loaded where it is not yet."""
        if lora_request is None:
            return one_per_prompt("lora", lora, count)
        if lora is not None:
            raise ParameterError("lora and lora_request name the same thing: give one of them", "lora")
        names: list[str | None] = []
        for request in one_per_prompt("lora_request", lora_request, count):
            if not isinstance(request, LoRARequest | None):
                found = type(request).__name__
                raise ParameterError(f"lora_request must be a LoRARequest, got {found}", "lora_request")
            known = None if request is None else self.engine.adapters.by_name.get(request.lora_name)
            path = None if known is None else known.content.path
            names.append(None if request is None else self._requested.name(request, path))
        return names

    def _run(self, requests: Sequence[Request], use_tqdm: ProgressBar) -> list[RequestOutput]:
        times = Counter(request.request_id for request in requests)
        if twice := [name for name, count in times.items() if count > 1]:
            raise ParameterError(f"request_ids must differ, {twice[0]!r} is there twice", "request_ids")
        replies: list[Reply] = []
        kept = {one.request_id: kept_output(one) for one in requests if one.taps is not None and one.taps.is_kept}
        with interrupts_held() as held:
            try:
                for request in requests:
                    if request.request_id not in kept:
                        replies.append(self.replies.add(request))
                self._finish(replies, use_tqdm, held)
            finally:
                for reply in replies:
                    self.replies.abort(reply)
        outputs = kept | {reply.request.request_id: reply.output for reply in replies}
        return [outputs[request.request_id] for request in requests]

    def _finish(self, replies: Sequence[Reply], use_tqdm: ProgressBar, held: Held) -> None:
        awaited = {reply.request.request_id for reply in replies}
        in_order = deque(replies)
        prompt_tokens = output_tokens = 0
        started = time.monotonic()
        with _bar(use_tqdm, len(replies)) as bar:
            while in_order:
                held.deliver()
                if in_order[0].finished:  # perhaps in a step of another thread
                    ended = [in_order.popleft()]
                else:
                    ended = [reply for reply, piece in self._step(in_order[0]) if piece.usage is not None]
                for reply in ended:
                    if reply.request.request_id not in awaited:
                        continue
                    awaited.remove(reply.request.request_id)
                    if bar is None:
                        continue
                    usage = reply.usage()
                    prompt_tokens += usage.prompt_tokens
                    output_tokens += usage.completion_tokens
                    seconds = max(time.monotonic() - started, 1e-9)
                    bar.set_postfix_str(
                        f"in {prompt_tokens / seconds:.1f} tok/s, out {output_tokens / seconds:.1f} tok/s",
                        refresh=False,
                    )
                    bar.update()

    def _step(self, awaited: Reply) -> list[tuple[Reply, Piece]]:
        """A step of the engine, while signals are held, or nothing if a step of another thread has ended the request
        that is awaited."""

        def has_ended() -> bool:
            assert awaited.finished or self.engine.has_unfinished, "a request waits, which the engine does not know"
            return awaited.finished

        return self.replies.step(unless=has_ended)
