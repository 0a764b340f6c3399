"""`llama chat`: a conversation in the terminal."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from llama.api.errors import ContextLengthError
from llama.api.outputs import FinishReason
from llama.cli.common import FAILED, Timed, add_single_request_flags, load, params_for, sampling_values, show, typed
from llama.cli.flags import Parser, UsageError, flag

DESCRIPTION = """Talk with a model. /reset forgets the conversation, /save FILE keeps it, /quit leaves; Ctrl-C stops an
answer."""
DEMO_MODEL = "checkpoints/smollm2-135m-instruct"
_HELP = "/reset forgets the conversation, /save FILE keeps it, /quit leaves"


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s [MODEL] [options]"
    text = "folder of the checkpoint (%(default)s)"
    parser.add_argument("model", nargs="?", default=DEMO_MODEL, metavar="MODEL", help=text)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_single_request_flags(parser)


def run(options: Namespace) -> int:
    values = sampling_values(options)
    if values.get("n", 1) > 1:
        raise UsageError("--n is for llama generate: a conversation has one answer")
    for name in ("logprobs", "prompt_logprobs"):
        if name in values:
            raise UsageError(f"{flag(name)} is for llama generate --json: a chat shows texts")
    if not values.get("detokenize", True):
        raise UsageError("--no-detokenize is for llama generate --json: a chat shows texts")
    if options.model == DEMO_MODEL and not Path(DEMO_MODEL).exists():
        raise ValueError(f"{DEMO_MODEL}: there is no such folder; name another model, or run make demo-model")
    llm = load(options, values)
    params = params_for(llm, values)
    conversation = Conversation(llm, params, options.system, options.lora and options.lora[0])
    if sys.stdin.isatty():
        import readline  # noqa: F401  its import gives input() a line editor

        print(f"{_HELP}; temperature {params.temperature}, top_p {params.top_p}", file=sys.stderr)
    while (line := _read()) is not None:
        if line.startswith("/"):
            if not conversation.obey(line):
                return 0
        elif line:
            conversation.ask(line)
    return 0


def _read() -> str | None:
    """The next line without its blanks, None at the end. Ctrl-C drops what has been typed."""
    try:
        return (input("> ") if sys.stdin.isatty() else input()).strip()
    except EOFError:
        if sys.stdin.isatty():
            print()  # the shell's prompt begins a line
        return None
    except KeyboardInterrupt:
        print(f"\n{_HELP}", file=sys.stderr)
        return ""


class Conversation:
    """The messages so far and what the next answer is made with."""

    def __init__(self, llm: Any, params: Any, system: str | None, lora: str | None) -> None:
        self._llm = llm
        self._params = params
        self._lora = lora
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._start)

    def obey(self, line: str) -> bool:
        """Do what a line that begins with / says; False to leave."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return False
        if word == "/reset":
            self.messages = list(self._start)
        elif word == "/save" and rest.strip():
            self._save(Path(rest.strip()))
        else:
            print(_HELP, file=sys.stderr)
        return True

    def ask(self, text: str) -> None:
        """Stream the answer. Ctrl-C stops it and keeps what came; a refusal and a failure leave the conversation as it
        was."""
        messages = [*self.messages, {"role": "user", "content": text}]
        answer: list[str] = []
        thought: list[str] = []
        last = None
        try:
            typed(text, "the message")
            pieces = Timed(self._llm.stream(messages, self._params, lora=self._lora))
        except ValueError as error:
            hint = "; /reset begins anew" if isinstance(error, ContextLengthError) and self.messages else ""
            print(f"{error}{hint}", file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("[stopped]", file=sys.stderr)
            return
        try:
            for last in pieces:
                answer.append(last.text)
                thought.append(last.reasoning_content)
                show(last)
        except KeyboardInterrupt:
            if last is None:  # there is nothing to keep
                print("[stopped]", file=sys.stderr)
                return
            print(" [stopped]", end="", file=sys.stderr)
        print(flush=True)
        if last is not None and last.finish_reason is FinishReason.ERROR:
            print(FAILED, file=sys.stderr)
            return
        print(f"[{pieces.summary()}]", file=sys.stderr)
        said = {"role": "assistant", "content": "".join(answer)}
        self.messages = [*messages, said | ({"reasoning_content": "".join(thought)} if any(thought) else {})]

    def _save(self, path: Path) -> None:
        try:
            path.write_text(json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"cannot save: {error}", file=sys.stderr)
