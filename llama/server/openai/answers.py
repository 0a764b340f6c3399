"""Parts that the answers of chat and completions share: their frame, chunks, usage, values of log-probabilities."""

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import llama
from llama.api.outputs import Logprob, Piece, RequestOutput, Usage
from llama.server.openai.schema import StreamOptions
from llama.server.streaming import DONE

_FINGERPRINT = f"llama-engine-{llama.__version__}"
_LEAST = -9999.0  # JSON has no infinity


def new_id(prefix: str) -> str:
    return f"{prefix}-{secrets.token_hex(12)}"


def frame(answer_id: str, kind: str, model: str, created: int) -> dict[str, Any]:
    return {"id": answer_id, "object": kind, "created": created, "model": model, "system_fingerprint": _FINGERPRINT}


def now() -> int:
    return int(time.time())


def usage_of(usages: list[Usage], *, has_prediction: bool = False) -> dict[str, Any]:
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    told = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }
    names = ["accepted_prediction_tokens", "rejected_prediction_tokens"] if has_prediction else []
    if any(usage.reasoning_tokens is not None for usage in usages):
        names.append("reasoning_tokens")
    if names:
        told["completion_tokens_details"] = {name: sum(getattr(usage, name) for usage in usages) for name in names}
    return told


async def chunks(
    choices: AsyncGenerator[dict[str, Any]],
    head: dict[str, Any],
    options: StreamOptions | None,
    usage: Callable[[], dict[str, Any]],
    first: dict[str, Any] | None = None,
) -> AsyncGenerator[Any]:
    """The events of a stream: a chunk for each choice, the usage where it is asked for, DONE. `first`: what the first
    chunk has besides."""
    wanted = options is not None and options.include_usage
    always = wanted and options is not None and options.continuous_usage_stats
    async with aclosing(choices):
        async for choice in choices:
            told = {"usage": usage() if always else None} if wanted else {}
            yield {**head, **told, **(first or {}), "choices": [choice]}
            first = None
    if wanted:
        yield {**head, "choices": [], "usage": usage()}
    yield DONE


class ToldCalls:
    """What a stream has told of one completion's calls."""

    def __init__(self) -> None:
        self._num_begun = self.num_whole = 0

    def text_of(self, piece: Piece) -> str:
        """The piece's text; but that of a call that was cut has been told as the call's beginning. Each piece once."""
        self._num_begun += sum(delta.name is not None for delta in piece.tool_call_deltas)
        self.num_whole += len(piece.tool_calls)
        return "" if piece.finish_reason is not None and self._num_begun > self.num_whole else piece.text


def scores_of(output: RequestOutput, asked: int) -> list[dict[str, Any] | None]:
    """vLLM's form of a prompt's log-probabilities: each position's own token and the `asked` best ones, -1 for all."""
    told: list[dict[str, Any] | None] = []
    for token, entries in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True):
        if entries is None:
            told.append(None)
            continue
        shown = {token: entries[token]} | dict(top_of(entries, len(entries) if asked == -1 else asked))
        told.append({f"{each}": entry._asdict() | {"logprob": value_of(entry)} for each, entry in shown.items()})
    return told


def value_of(logprob: Logprob) -> float:
    return max(logprob.logprob, _LEAST)


def top_of(entries: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` most probable entries of a position; the entries hold the actual token too."""
    return sorted(entries.items(), key=lambda entry: (entry[1].rank, entry[0]))[:count]
