"""Scoring: what LLM offers beside writing: log-likelihoods, perplexity, embeddings. All of it is ordinary requests."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llama.api.errors import ParameterError, blamed_on, checked_integer, is_one_of, of_each, refusal
from llama.api.outputs import FinishReason, RequestOutput
from llama.api.params import SamplingParams
from llama.engine.request import Request
from llama.kernels.types import wide_dtype
from llama.llm.beam_search import BeamSearchOutput, BeamSearchParams, search
from llama.llm.requests import Inputs, Prompt, as_prompts, one_per_prompt, unwrapped
from llama.llm.taps import tapped
from llama.model.capture import Capture
from llama.model.transformer import Transformer

Text = Prompt  # a text, its token ids, or a dict of either


class Score(NamedTuple):
    """Of one continuation: natural log-probabilities under the model, as it is without any sampling rule."""

    logprob: float  # the sum
    is_greedy: bool  # each token is the most probable one
    token_ids: list[int]
    token_logprobs: list[float]


class Scoring:
    """A base of LLM."""

    inputs: Inputs
    model: Transformer

    def _run(self, requests: Sequence[Request], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        raise NotImplementedError

    def _computed(self, requests: Sequence[Request], use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        """Of requests all of whose numbers are wanted. RuntimeError where there are none."""
        outputs = self._run(requests, use_tqdm)
        for i, output in enumerate(outputs):
            if any(completion.finish_reason is FinishReason.ERROR for completion in output.outputs):
                told = "its logits are NaN or infinite, or the log says what failed"
                raise RuntimeError(f"the model failed on sequence {i + 1} of {len(outputs)}: {told}")
        return outputs

    def score(
        self,
        prompts: Text | Sequence[Text],
        continuations: Text | Sequence[Text],
        lora: str | Sequence[str | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[Score]:
        """How probable each continuation is behind its prompt; one prompt may stand for all. Where several have the
        same prompt it is computed once, as far as it fills blocks of the prefix cache.

        Texts are encoded together and split where the prompt alone ends, spaces at its end being the continuation's, as
        lm-evaluation-harness does it. All tokens of both fill the context at most.
        """
        listed = _texts("continuations", continuations)
        firsts = _texts("prompts", prompts)
        firsts = firsts * len(listed) if len(firsts) == 1 else firsts
        if len(firsts) != len(listed):
            raise ParameterError(f"{len(firsts)} prompts for {len(listed)} continuations", "continuations")
        pairs = of_each("continuations", list(zip(firsts, listed, strict=True)), lambda pair: self._split(*pair))
        return self._scores(pairs, one_per_prompt("lora", lora, len(pairs)), use_tqdm)

    def perplexity(
        self, text: Text, window: int | None = None, stride: int | None = None, use_tqdm: bool = False
    ) -> float:
        """exp of the mean negative log-probability of all tokens but the first, each seen behind those before it in a
        window of `window` tokens (None = the context) that moves on by `stride` (None = the window): the sliding window
        of transformers' documentation."""
        [only] = _texts("text", [text])
        token_ids = self._ids(only)
        last = self.inputs.engine.vocab_size - 1
        for each in token_ids:
            if not _is_within(each, 0, last):
                raise refusal("text", f"one text, or token ids in [0, {last}]", each)
        most = self.inputs.engine.config.context_len
        window = most if window is None else window
        stride = window if stride is None else stride
        if not (_is_within(window, 2, most) and _is_within(stride, 1, window)):
            legal = f"integers window in [2, {most}] and stride in [1, window]"
            raise ParameterError(f"perplexity needs {legal}, got {window!r} and {stride!r}", "window")
        if len(token_ids) < 2:
            raise ParameterError("perplexity needs at least two tokens", "text")
        pairs, end = [], 1
        for start in range(0, len(token_ids), stride):
            stop = min(start + window, len(token_ids))
            first = max(end, start + 1)  # a window's first token has nothing before it
            if stop > first:
                pairs.append((token_ids[start:first], token_ids[first:stop]))
            end = stop
            if stop == len(token_ids):
                break
        scores = self._scores(pairs, [None] * len(pairs), use_tqdm)
        total = math.fsum(logprob for score in scores for logprob in score.token_logprobs)
        return math.exp(-total / sum(len(score.token_logprobs) for score in scores))

    def embed(
        self,
        texts: Text | Sequence[Text],
        pooling: Literal["mean", "last"] = "mean",
        layer: int | None = None,
        use_tqdm: bool = True,
    ) -> Tensor:
        """-> [texts, hidden] float32: the mean over a text's tokens, or the last one, of the states after the final
        norm, or of what layer `layer` leaves in the residual stream (-1 = the last layer)."""
        if not is_one_of(pooling, ("mean", "last")):
            raise refusal("pooling", '"mean" or "last"', pooling)
        if layer is not None:
            num_layers = self.model.config.num_hidden_layers
            layer = checked_integer("layer", layer, -num_layers, num_layers - 1)
        point = "norm" if layer is None else f"layers.{layer}.resid_post"
        mean = pooling == "mean"
        capture = Capture(point, positions="prompt" if mean else "last", reduce="mean" if mean else None)
        requests = of_each("texts", _texts("texts", texts), lambda text: self._request(self._ids(text)))
        outputs = self._computed(tapped(self.inputs.engine, requests, capture, None), use_tqdm)
        rows = [value.reshape(-1) for output in outputs for value in output.captured.values()]
        hidden = self.model.config.hidden_size
        return torch.stack(rows).float() if rows else torch.empty(0, hidden, dtype=torch.float32, device="cpu")

    def beam_search(
        self,
        prompts: Text | Sequence[Text],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[BeamSearchOutput]:
        """The best sequences behind each prompt, with its adapter; see BeamSearchParams."""
        engine = self.inputs.engine
        if not isinstance(params, BeamSearchParams):
            found = type(params).__name__
            raise ParameterError(f"params must be a BeamSearchParams, got {found}", "params")
        longest = SamplingParams(max_tokens=params.max_tokens)

        def checked(asked: tuple[str | Sequence[int], str | None]) -> list[int]:
            token_ids = self._ids(asked[0])
            self.inputs.request(token_ids, longest, asked[1])  # refused before any beam is computed
            return token_ids

        texts = _texts("prompts", prompts)
        loras = one_per_prompt("lora", lora, len(texts))
        listed = of_each("prompts", list(zip(texts, loras, strict=True)), checked)
        outputs = search(
            listed,
            params,
            eos_token_ids=engine.scheduler.eos_token_ids,
            context_len=engine.config.context_len,
            logits_of=partial(self._logits, loras=loras, use_tqdm=use_tqdm),
        )
        if self.inputs.tokenizer is not None:
            for output, prompt in zip(outputs, listed, strict=True):
                for sequence in output.sequences:
                    new = sequence.tokens[len(prompt) :]
                    sequence.text = self.inputs.tokenizer.decode(new[:-1] if sequence.finish_reason == "stop" else new)
        return outputs

    def _logits(self, asked: list[tuple[int, list[int]]], loras: Sequence[str | None], use_tqdm: bool) -> list[Tensor]:
        """Those behind each list of tokens, with the adapter of the prompt whose number stands beside it, in at least
        float32."""
        found: dict[str, Tensor] = {}
        requests = [self._request(ids, loras[number]) for number, ids in asked]
        capture = Capture(
            "logits", save_to=lambda request_id, values: found.__setitem__(request_id, values["logits"][0])
        )
        self._computed(tapped(self.inputs.engine, requests, capture, None), use_tqdm)
        rows = [found[request.request_id] for request in requests]
        return [row if row.dtype == torch.float64 else row.float() for row in rows]

    def _scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], loras: Sequence[str | None], use_tqdm: bool
    ) -> list[Score]:
        """The last token is not computed: its log-probability comes from the logits before it, so that a pair may fill
        the context."""
        last: dict[str, tuple[float, bool]] = {}

        def take(token_id: int, request_id: str, values: dict[str, Tensor]) -> None:
            [logits] = values["logits"]
            wide = logits.to(wide_dtype(logits.dtype))
            last[request_id] = float(wide.log_softmax(-1)[token_id]), bool(wide.max() == wide[token_id])

        def request_of(asked: tuple[tuple[list[int], list[int]], str | None]) -> Request:
            (prompt, continuation), lora = asked
            if not prompt or not continuation:
                raise ParameterError("a prompt and a continuation need at least one token each", "continuations")
            most = self.inputs.engine.vocab_size - 1
            if not _is_within(continuation[-1], 0, most):  # no request has it, which would be refused
                told = f"continuations must hold token ids in [0, {most}], got {continuation[-1]!r}"
                raise ParameterError(told, "continuations")
            request = self._request([*prompt, *continuation[:-1]], lora, prompt_logprobs=0)
            capture = Capture("logits", save_to=partial(take, continuation[-1]))
            return tapped(self.inputs.engine, [replace(request, score_from=len(prompt))], capture, None)[0]

        requests = of_each("continuations", list(zip(pairs, loras, strict=True)), request_of)
        scores = []
        for output, (prompt, continuation) in zip(self._computed(requests, use_tqdm), pairs, strict=True):
            scored = zip(continuation[:-1], (output.prompt_logprobs or [])[len(prompt) :], strict=True)
            entries = [entry[token] for token, entry in scored if entry is not None]
            last_logprob, last_is_greedy = last[output.request_id]
            each = [*(entry.logprob for entry in entries), last_logprob]
            is_greedy = all(entry.rank == 1 for entry in entries) and last_is_greedy
            scores.append(Score(math.fsum(each), is_greedy, list(continuation), each))
        return scores

    def _request(self, token_ids: list[int], lora: str | None = None, prompt_logprobs: int | None = None) -> Request:
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=prompt_logprobs)
        return self.inputs.request(token_ids, params, lora)

    def _split(self, prompt: str | Sequence[int], continuation: str | Sequence[int]) -> tuple[list[int], list[int]]:
        if not isinstance(prompt, str) or not isinstance(continuation, str):
            return self._ids(prompt), self._ids(continuation, is_continuation=True)
        bare = prompt.rstrip()
        whole = self._ids(bare + prompt[len(bare) :] + continuation)
        count = len(self._ids(bare))
        return whole[:count], whole[count:]

    def _ids(self, text: str | Sequence[int], is_continuation: bool = False) -> list[int]:
        if not isinstance(text, str):
            return list(text)
        if self.inputs.tokenizer is None:
            raise ParameterError("texts need a tokenizer: this model takes token ids only", "prompt")
        return self.inputs.tokenizer.encode(text, add_special_tokens=not is_continuation)


def _is_within(value: Any, low: int, high: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def _texts(name: str, given: Text | Sequence[Text]) -> list[str | Sequence[int]]:
    """One text (or its token ids) or several, in any form that `generate` takes, as a list of texts and ids."""

    def plain(text: Text) -> str | Sequence[int]:
        with blamed_on(name):
            own, token_ids = unwrapped(text)
        return token_ids if token_ids is not None else own or ""

    return of_each(name, as_prompts(given, name), plain)
