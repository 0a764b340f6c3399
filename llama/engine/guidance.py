"""Guidance: two contexts of one request, the prompt's and the negative prompt's, that draw one token together.

Both have rows and blocks of their own and come and go together. They never decode: in each step what they lack is
chunks, and the last token of each is computed in one step with the other's: a draw finds the logits of both. The
next token is therefore known to the host before they run on. Runs without torch.
"""

from collections.abc import Callable

from llama.api.errors import ParameterError
from llama.engine.config import EngineConfig
from llama.engine.running import Running
from llama.engine.sequence import Sequence


def check_guided(config: EngineConfig, num_blocks: int, lens: tuple[int, int], limit: int) -> None:
    """ParameterError if prompts of these lengths, the first growing to `limit` tokens, can never run side by side."""
    if min(config.max_num_seqs, config.token_budget) < 2:
        told = "guidance_scale needs max_num_seqs and max_num_batched_tokens of at least 2: it computes two prompts"
        raise ParameterError(told, "guidance_scale")
    size = config.block_size
    computed = limit - 1, limit - 1 + lens[1] - lens[0]  # the last token is drawn and never computed
    if sum(-(-tokens // size) for tokens in computed) > num_blocks:
        raise ParameterError(
            f"a prompt of {lens[0]} tokens, a negative_prompt of {lens[1]} and up to {limit - lens[0]} new ones each "
            f"can never run: the KV cache has {num_blocks} blocks of {size}",
            "guidance_scale",
        )


def guided_limit(limit: int, lens: tuple[int, int], context_len: int) -> int:
    """The most tokens of the prompt's context where neither may exceed `context_len`. ParameterError if none is left
    to be drawn."""
    most = min(limit, lens[0] + context_len - lens[1])
    if most <= lens[0]:
        told = f"negative_prompt has {lens[1]} tokens and the context is {context_len} (max_model_len): no room is left"
        raise ParameterError(told, "negative_prompt")
    return most


def chunk_sizes(
    running: Running, sequence: Sequence, budget: int, preempt: Callable[[Sequence], None]
) -> dict[Sequence, int]:
    """How many known tokens each context of a prefilling sequence computes in this step, where it computes some.
    Blocks for them are reserved, taken from newer sequences where none is left."""
    missing = {one: one.num_tokens - int(running.computed[one.row]) for one in sequence.contexts}
    is_last = len(missing) == 1 or sum(missing.values()) <= budget
    counts = {}
    for one, count in missing.items():
        wanted = min(count if is_last else count - 1, budget)
        counts[one] = running.reserve(one, wanted, preempt) if wanted > 0 else 0
        budget -= counts[one]
    if len(missing) > 1 and is_last and counts != missing:  # there are not blocks enough
        counts = {one: min(count, missing[one] - 1) for one, count in counts.items()}
    return {one: count for one, count in counts.items() if count > 0}
