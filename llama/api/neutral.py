"""Fields of vLLM's and OpenAI's that are not here, with the values that change nothing: clients write defaults out.

At such a value a field is taken everywhere, at any other it is refused by name. Runs without torch.
"""

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]  # name -> the values

# Of vLLM's SamplingParams.
SAMPLING: Neutral = {
    "best_of": (None, 1),
    "early_stopping": (False,),
    "extra_args": (None, {}),
    "guided_decoding": (None,),
    "length_penalty": (1.0,),
    "output_kind": (0,),
    "repetition_detection": (None,),
    "skip_clone": (False,),
    "skip_reading_prefix_cache": (None, False),
    "spaces_between_special_tokens": (True, False),  # of tokenizers in Python, which are not read
    "thinking_token_budget": (None,),
    "use_beam_search": (False,),
}
# Of the bodies of OpenAI's routes, as OpenAI and vLLM have them. Null is absent.
_BODY: Neutral = {
    **SAMPLING,
    "detokenize": (True,),
    "flat_logprobs": (False,),
    "logits_processors": (None, []),
    "chat_template": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": ({},),
    "logprobs_mode": ("raw_logprobs",),
    "request_id": (),
    "vllm_xargs": ({},),
}
CHAT: Neutral = {
    **_BODY,
    "add_special_tokens": (False,),
    "audio": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "include_reasoning": (True,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "moderation": (),
    "prompt_cache_options": ({},),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}
COMPLETION: Neutral = {**_BODY, "add_special_tokens": (True,), "prompt_embeds": ()}
TOKENIZE: Neutral = {"chat_template": (), "media_io_kwargs": ({},), "mm_processor_kwargs": ({},)}
RESPONSES: Neutral = {"max_tool_calls": (), "moderation": (), "stop": ([],), "verbosity": ("medium",)}


def is_neutral(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether `value` is one of `values`; True is no 1."""
    return any(isinstance(value, bool) is isinstance(other, bool) and value == other for other in values)
