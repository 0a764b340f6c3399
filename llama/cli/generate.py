"""`llama generate`: one prompt, streamed to stdout or as one JSON object."""

import json
import sys
from argparse import Namespace
from typing import Any

from llama.api.outputs import CompletionOutput, FinishReason, RequestOutput
from llama.cli.common import FAILED, Timed, add_single_request_flags, load, params_for, sampling_values, show, typed
from llama.cli.flags import Parser, UsageError, flag

DESCRIPTION = "Continue a prompt, or answer it with --chat. Streams to stdout; the rates go to stderr."


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s MODEL PROMPT [options]"
    parser.add_argument("model", metavar="MODEL", help="folder of the checkpoint, or an id of the hub")
    text = "the text, or - to read it from stdin (its last line break is dropped)"
    parser.add_argument("prompt", metavar="PROMPT", help=text)
    parser.add_argument("--chat", action="store_true", help="take the prompt as a user's message")
    parser.add_argument("--system", metavar="TEXT", help="the system message, with --chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object when all is done")
    add_single_request_flags(parser)


def run(options: Namespace) -> int:
    values = sampling_values(options)
    if options.system is not None and not options.chat:
        raise UsageError("--system needs --chat: a raw prompt has no roles")
    for name in ("logprobs", "prompt_logprobs"):
        if name in values and not options.json:
            raise UsageError(f"{flag(name)} needs --json")
    if not values.get("detokenize", True) and not options.json:
        raise UsageError("--no-detokenize needs --json: there is no text to print")
    from_stdin = options.prompt == "-"
    text = sys.stdin.read().removesuffix("\n") if from_stdin else options.prompt
    text = typed(text, "stdin" if from_stdin else "PROMPT")
    llm = load(options, values)
    params, lora = params_for(llm, values), options.lora and options.lora[0]
    prompt: Any = _messages(options.system, text) if options.chat else text
    if options.json or params.n > 1:
        answer = llm.chat if options.chat else llm.generate
        outputs = answer(prompt, params, lora=lora, use_tqdm=False)
        print(json.dumps(_as_json(outputs[0]), ensure_ascii=False) if options.json else _listed(outputs[0]))
        return _code([completion.finish_reason for completion in outputs[0].outputs])
    pieces, last = Timed(llm.stream(prompt, params, lora=lora)), None
    for last in pieces:
        show(last)
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
    answer: dict[str, Any] = {
        "prompt": output.prompt,
        "prompt_tokens": len(output.prompt_token_ids),
        "outputs": [_completion(completion) for completion in output.outputs],
        "time_to_first_token": metrics.time_to_first_token,
        "seconds": None if metrics.finished is None else metrics.finished - metrics.queued,
    }
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [None if each is None else _entries(each) for each in output.prompt_logprobs]
    return answer


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        **({} if completion.reasoning_content is None else {"reasoning_content": completion.reasoning_content}),
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
