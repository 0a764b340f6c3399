"""`llama generate`: one prompt, streamed to stdout or as one JSON object."""

import json
import sys
from typing import Any

from llama.api.outputs import CompletionOutput, FinishReason, RequestOutput
from llama.cli.common import FAILED, Timed, load, named_adapter, params_for, sampling_values
from llama.cli.flags import Generate
from llama.cli.usage import UsageError


def run_generate(command: Generate) -> int:
    values = sampling_values(command.sampling)
    if command.system is not None and not command.chat:
        raise UsageError("--system needs --chat: a raw prompt has no roles")
    for name in ("logprobs", "prompt_logprobs"):
        if name in values and not command.json:
            raise UsageError(f"--{name.replace('_', '-')} needs --json")
    text = sys.stdin.read().removesuffix("\n") if command.prompt == "-" else command.prompt
    adapter = named_adapter(command.lora)
    llm = load(command.model, command.engine, max_num_seqs=max(1, values.get("n", 1)), adapter=adapter)
    params, lora = params_for(llm, values), adapter and adapter[0]
    prompt: Any = _messages(command.system, text) if command.chat else text
    if command.json or params.n > 1:
        answer = llm.chat if command.chat else llm.generate
        outputs = answer(prompt, params, lora=lora, use_tqdm=False)
        print(json.dumps(_as_json(outputs[0]), ensure_ascii=False) if command.json else _listed(outputs[0]))
        return _code([completion.finish_reason for completion in outputs[0].outputs])
    pieces, last = Timed(llm.stream(prompt, params, lora=lora)), None
    for last in pieces:
        print(last.text, end="", flush=True)
    print(flush=True)
    print(pieces.summary(), file=sys.stderr)
    return _code([last.finish_reason if last else None])


def _code(reasons: list[FinishReason | None]) -> int:
    if FinishReason.ERROR not in reasons:
        return 0
    print(f"llama: {FAILED}", file=sys.stderr)
    return 1


def _messages(system: str | None, text: str) -> list[dict[str, str]]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": text}]


def _listed(output: RequestOutput) -> str:
    return "\n".join(f"[{completion.index}] {completion.text}" for completion in output.outputs)


def _as_json(output: RequestOutput) -> dict[str, Any]:
    metrics = output.metrics
    answer = {
        "prompt": output.prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "outputs": [_completion(completion) for completion in output.outputs],
        "time_to_first_token": metrics.time_to_first_token,
        "seconds": None if metrics.finished is None else metrics.finished - metrics.queued,
    }
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [p and _entries(p) for p in output.prompt_logprobs]
    return answer


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
    }
    if completion.logprobs is not None:
        answer["cumulative_logprob"] = completion.cumulative_logprob
        answer["logprobs"] = [_entries(entries) for entries in completion.logprobs]
    return answer


def _entries(entries: dict[int, Any]) -> list[dict[str, Any]]:
    return [{"token_id": token, **entry._asdict()} for token, entry in entries.items()]
