"""One completion's way back: token ids -> text decoder -> thought or content -> stop strings -> tool calls -> pieces.

Without a tokenizer everything works but text: pieces and outputs carry token ids and empty strings.
"""

from collections.abc import Iterable
from typing import Any

from llama.api.flat_logprobs import FlatLogprobs
from llama.api.outputs import CompletionOutput, FinishReason, Logprob, Piece
from llama.api.params import SamplingParams
from llama.engine.request import Request
from llama.engine.sequence import TokenOutput
from llama.text.reasoning import THOUGHT_TOKENS, ReasoningParser
from llama.text.tokenizer import IncrementalDecoder, StopMatcher, Tokenizer
from llama.text.tool_calls import CALL_TOKENS, ToolCall, ToolCallDelta, ToolCallParser, merged_deltas


def listed(entries: list[Any], params: SamplingParams, tokenizer: Tokenizer | None) -> Any:
    """The log-probabilities of several positions, as the request wants them, with the text of their tokens."""
    if params.flat_logprobs:
        return FlatLogprobs(entries) if tokenizer is None else FlatLogprobs(entries, tokenizer.token_text)
    return [entry if entry is None else named(entry, tokenizer) for entry in entries]


def named(entries: dict[int, Logprob], tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Log-probabilities with the text of their tokens."""
    if tokenizer is None:
        return entries
    return {token: entry._replace(decoded_token=tokenizer.token_text(token)) for token, entry in entries.items()}


def tokens_of_stops(stop: Iterable[str], tokenizer: Tokenizer) -> dict[Any, str]:
    """The stop strings that are control tokens, whose text no answer holds: their ids end it."""
    known = tokenizer.special_tokens
    return {known[text]: text for text in stop if text in known}


class Completion:
    """One completion on its way: decodes, parts thought from content, watches for stop strings, finds tool calls,
    gathers. Stop strings and calls are looked for in the content alone."""

    def __init__(
        self,
        index: int,
        seed: int | None,
        request: Request,
        prompt_token_ids: list[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        params = self.params = request.params
        self.tokenizer = tokenizer
        self.output = CompletionOutput(index=index, seed=seed)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = listed([], params, tokenizer), 0.0
        self.text_parts: list[str] = []
        self.stop_tokens = {} if tokenizer is None else tokens_of_stops(params.stop, tokenizer)
        self.thought_parts: list[str] = []
        self.num_reasoning_tokens = 0
        self.reasoning: ReasoningParser | None = None
        if tokenizer is not None and request.begins_in_thought is not None:
            self.reasoning = ReasoningParser(request.begins_in_thought)
        self.parser = ToolCallParser(request.tools, request.certain_calls) if request.tools else None
        self.decoder = self._new_decoder(prompt_token_ids)
        self.matcher = self._new_matcher()
        self.held = ""  # text that the matcher keeps back

    def _new_matcher(self) -> StopMatcher | None:
        stop = tuple(self.params.stop)
        return StopMatcher(stop, self.params.include_stop_str_in_output) if stop else None

    def _new_decoder(self, prompt_token_ids: list[int]) -> IncrementalDecoder | None:
        if self.tokenizer is None:
            return None
        special = self.tokenizer.special_tokens
        tags = [*(CALL_TOKENS if self.parser else ()), *(THOUGHT_TOKENS if self.reasoning else ())]
        tags = [special[token] for token in tags if token in special]
        keep, skip = {*self.stop_tokens, *tags}, self.params.skip_special_tokens
        return IncrementalDecoder(self.tokenizer, prompt_token_ids, skip_special_tokens=skip, keep=keep)

    @property
    def ended(self) -> bool:
        return self.output.finish_reason is not None

    def push(self, new: TokenOutput) -> Piece:
        """Take a step's tokens. A stop string drops the tokens behind the one that completed it and wins over the
        engine's own reason to end; the text of a token that ended the completion is hidden, its id is not (both as
        vLLM does)."""
        if self.decoder is None and new.finish_reason is None and new.logprobs is None:  # no text, and nothing ends
            self.output.token_ids += new.token_ids
            return Piece(self.output.index, "", new.token_ids)
        hides_last = new.finish_reason is FinishReason.STOP and not self.params.include_stop_str_in_output
        texts: list[str] = []
        num_thoughts = len(self.thought_parts)
        taken, stopped_by = 0, None
        for taken, token in enumerate(new.token_ids, start=1):
            self.output.token_ids.append(token)
            if not (hides_last and taken == len(new.token_ids)):
                text, stopped_by = self._text(self.decoder.push([token]) if self.decoder else "")
                texts.append(text)
            if stopped_by is not None:
                break
        if stopped_by is not None:
            self._end(FinishReason.STOP, stopped_by)
        elif new.finish_reason is not None:
            text, stopped_by = self._flush()
            texts.append(text)
            self._end(FinishReason.STOP if stopped_by else new.finish_reason, stopped_by or new.stop_reason)
        logprobs = None if new.logprobs is None else listed(new.logprobs[:taken], self.params, self.tokenizer)
        thought = "".join(self.thought_parts[num_thoughts:])
        return self._gather("".join(texts), new.token_ids[:taken], logprobs, thought)

    def abort(self, reason: FinishReason) -> Piece:
        """End from outside. What a stop string held back is given out: it did not match."""
        num_thoughts = len(self.thought_parts)
        text, _ = self._flush()
        self._end(reason, None)
        return self._gather(text, [], None, "".join(self.thought_parts[num_thoughts:]))

    def fail(self) -> Piece:
        """End with "error", without what may be broken."""
        self._end(FinishReason.ERROR, None)
        return Piece(self.output.index, "", [], None, FinishReason.ERROR)

    def _text(self, text: str) -> tuple[str, str | None]:
        """What is new of the content, and the stop string that ends it. Thoughts are put aside."""
        if self.reasoning is not None:
            was_inside = self.reasoning.is_inside
            thought, text = self.reasoning.push(text)
            self.thought_parts += [thought] if thought else []
            if was_inside or self.reasoning.is_inside:
                self.num_reasoning_tokens = len(self.output.token_ids)
        return self._watched(text)

    def _watched(self, text: str) -> tuple[str, str | None]:
        if self.matcher is None or not text:
            return text, None
        shown, stopped_by = self.matcher.push(text)
        if stopped_by is not None and len(self.output.token_ids) <= self.params.min_tokens:
            # Before min_tokens nothing stops: give out all that was held and begin to watch anew.
            shown, stopped_by, self.held = self.held + text, None, ""
            self.matcher = self._new_matcher()
        elif stopped_by is None:
            self.held = (self.held + text)[len(shown) :]
        return shown, stopped_by

    def _flush(self) -> tuple[str, str | None]:
        text, stopped_by = self._text(self.decoder.flush() if self.decoder else "")
        if stopped_by is None and self.reasoning is not None:
            thought, held = self.reasoning.flush()
            self.thought_parts += [thought] if thought else []
            shown, stopped_by = self._watched(held)
            text += shown
        if stopped_by is None and self.matcher is not None:
            text += self.matcher.flush()
        return text, stopped_by

    def _end(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        last = self.output.token_ids[-1:] if reason is FinishReason.STOP and stop_reason is None else [stop_reason]
        self.output.finish_reason = reason
        self.output.stop_reason = self.stop_tokens.get(last[0], stop_reason) if last else stop_reason

    def _gather(
        self, text: str, token_ids: list[int], logprobs: list[dict[int, Logprob]] | None, thought: str
    ) -> Piece:
        output = self.output
        calls: list[ToolCall] = []
        deltas: list[ToolCallDelta] = []
        if self.parser is not None:
            text, calls, deltas = self._find_calls(self.parser, text)
        if text:
            self.text_parts.append(text)
        if logprobs is not None and output.logprobs is not None and output.cumulative_logprob is not None:
            output.logprobs.extend(logprobs)
            if isinstance(logprobs, FlatLogprobs):
                output.cumulative_logprob += logprobs.cumulative_logprob
            else:
                output.cumulative_logprob += sum(e[t].logprob for t, e in zip(token_ids, logprobs, strict=True))
        ended = output.finish_reason, output.stop_reason
        usage = None  # Reply puts it in
        return Piece(output.index, text, token_ids, logprobs, *ended, calls, usage, thought, deltas)

    def _find_calls(self, parser: ToolCallParser, text: str) -> tuple[str, list[ToolCall], list[ToolCallDelta]]:
        """What the text makes certain: text that is no call, calls, and what is new of calls."""
        output = self.output
        events = parser.feed(text)
        if self.ended:
            events += parser.finish()
        calls: list[ToolCall] = []
        deltas: list[ToolCallDelta] = []
        for event in events:
            if isinstance(event, ToolCallDelta):
                deltas.append(event)
            elif isinstance(event, ToolCall):
                if event.written is None:  # else it was told while it came
                    number = len(output.tool_calls) + len(calls)
                    deltas.append(ToolCallDelta(number, event.name, event.arguments_json))
                calls.append(event)
        output.tool_calls.extend(calls)
        if output.tool_calls and output.finish_reason is FinishReason.STOP:
            output.finish_reason = FinishReason.TOOL_CALLS
        return "".join(event for event in events if isinstance(event, str)), calls, merged_deltas(deltas)
