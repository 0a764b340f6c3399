"""Stand-ins for the parts under a face: a tokenizer of single bytes and an engine that says what it is told to.

ScriptedEngine has the methods of Engine that the faces use and none of its machinery: no model, no cache, no scheduler.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from llama.api.errors import ParameterError
from llama.api.outputs import FinishReason, Logprob
from llama.engine.adapters import Adapters
from llama.engine.request import Request
from llama.engine.sequence import TokenOutput
from llama.text.tokenizer import Tokenizer

EOS_ID = 256


def byte_tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes, 256 is the end of text: any text can be scripted as its UTF-8."""
    # GPT-2's table: printable bytes stand for themselves, the others are shifted past 255.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(256, 512))
    vocab = {chr(byte if byte in printable else next(shifted)): byte for byte in range(256)}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return Tokenizer(backend, eos_token_ids=[EOS_ID])


def script_of(text: str) -> list[int]:
    return [*text.encode(), EOS_ID]


class ScriptedEngine:
    """One token of each running completion per step. `script(prompt ids, index)` is all that a completion would say;
    the limit is max_tokens. `lag` = steps that a text-level end takes to be noticed."""

    def __init__(self, script: Callable[[Sequence[int], int], Sequence[int]], *, lag: int = 0) -> None:
        self.script = script
        self.lag = lag
        self.longest_prompt = 1000
        self.adapters = Adapters(0)
        self.config = SimpleNamespace(
            max_num_seqs=4, max_model_len=4096, context_len=4096, speculative_config=None, max_logprobs=20
        )
        self.running: dict[tuple[str, int], SimpleNamespace] = {}
        self.finished: list[tuple[str, int, FinishReason, int | str | None]] = []
        self.aborted: list[str] = []
        self.before_step: Callable[[], None] = lambda: None
        self.num_steps = self.graph_bytes = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running)

    def check_alive(self) -> None:
        """It never dies between steps."""

    def add(self, request: Request) -> list[int]:
        prompt, params = request.prompt_token_ids.tolist(), request.params
        if any(request_id == request.request_id for request_id, _ in self.running):
            raise ParameterError(f"request_id {request.request_id!r} is in use", "request_id")
        if len(prompt) > self.longest_prompt:
            raise ValueError(f"{self.longest_prompt} tokens can never fit")
        for index in range(params.n):
            said = list(self.script(prompt, index))
            self.running[request.request_id, index] = SimpleNamespace(said=said, at=0, params=params, ends_in=None)
        return [7 + index for index in range(params.n)]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.running = {key: state for key, state in self.running.items() if key[0] != request_id}

    def finish(self, request_id: str, index: int, reason: FinishReason, stop_reason: int | str | None) -> None:
        self.finished.append((request_id, index, reason, stop_reason))
        state = self.running.get((request_id, index))
        if state is not None and self.lag:
            state.ends_in = self.lag
        else:
            self.running.pop((request_id, index), None)

    def step(self) -> list[TokenOutput]:
        self.before_step()
        self.num_steps += 1
        return [self._next(key, state) for key, state in list(self.running.items())]

    def _next(self, key: tuple[str, int], state: SimpleNamespace) -> TokenOutput:
        token = state.said[state.at]
        state.at += 1
        reason, stop_reason = None, None
        if token == EOS_ID and not state.params.ignore_eos:
            reason = FinishReason.STOP
        elif token in state.params.stop_token_ids:
            reason, stop_reason = FinishReason.STOP, token
        elif state.at in (len(state.said), state.params.max_tokens):
            reason = FinishReason.LENGTH
        if state.ends_in is not None:
            state.ends_in -= 1
        if reason is not None or state.ends_in == 0:
            del self.running[key]
        logprobs = None if state.params.logprobs is None else [{token: Logprob(-0.5, 1), 65: Logprob(-2.0, 2)}]
        prompt_logprobs = [None, {66: Logprob(-1.0, 3)}] if state.params.prompt_logprobs is not None else None
        return TokenOutput(
            *key, [token], logprobs, reason, stop_reason, prompt_logprobs if state.at == 1 and key[1] == 0 else None, 3
        )
