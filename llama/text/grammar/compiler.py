"""From a response format or tools to a Grammar.

A grammar is compiled twice: in a worker process with a deadline, for a large `multipleOf` alone can take all the time
and memory there is; and here, if that went well. Compile away from an event loop: for the first grammar llguidance
reads the vocabulary, which takes a second or more.
"""

import json
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llama.api.errors import ParameterError, QueueFullError, blamed_on, is_failure, panics_caught
from llama.text.chat.prepare import prepare_tools, tool_name
from llama.text.grammar.matcher import Automaton, Matcher, told
from llama.text.grammar.schema import (
    MAX_BYTES,
    prepared_schema,
    schema_of_response_format,
    schema_of_tool,
    subschemas,
)
from llama.text.kept import Kept
from llama.text.sandbox import LOW_PRIORITY, Worker, WorkerError
from llama.text.sandbox.grammars import parser_limits
from llama.text.tokenizer import Tokenizer
from llama.text.tokenizer.tokenizer import check_unicode
from llama.text.tool_calls.forms import CALL_KEYS, head_of_call
from llama.text.tool_calls.parser import MARKERS

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

DEADLINE_SECONDS = 5.0
KEPT_BYTES = 2**28
LIVE_BYTES = 2**31  # of those that are kept or that requests hold
# In Lark: comments, strings and regexes; a token by its name, and by numbers.
_LARK_SKIPPED = r"//.*|#.*|\"(?:\\.|[^\"\\])*\"|/(?:\\.|[^/\\\n])+/"
_TOKEN = r"<[^<>\[\]\s][^<>\s]*>"
_TOKEN_IDS = r"<\[[^\]]*\]>"


class Grammar:
    """A compiled grammar. Every sequence gets a matcher of its own; they share the automaton."""

    def __init__(self, prototype: "LLMatcher", vocab_size: int, source_bytes: int = 0) -> None:
        self._prototype = prototype
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self.automaton = Automaton(source_bytes)

    def matcher(self) -> Matcher:
        """At the beginning of the grammar."""
        with self._lock:
            return Matcher(self._prototype.deep_copy(), self._vocab_size, self.automaton)


class GrammarCompiler:
    """Compiles grammars for one tokenizer and a model's vocab_size, from any thread; keeps the last ones, KEPT_BYTES of
    them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, *, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        tokenizer.check_vocab(vocab_size)
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._deadline_seconds = deadline_seconds
        module = "llama.text.sandbox.grammars"
        self._worker = Worker(module, {}, deadline_seconds=deadline_seconds, niceness=LOW_PRIORITY)
        self._lock = threading.Lock()
        self._kept = Kept[Grammar](KEPT_BYTES, lambda source, grammar: grammar.automaton.nbytes)
        self._live: weakref.WeakSet[Automaton] = weakref.WeakSet()

    def compile(self, constraint: Mapping[str, Any] | None, field: str = "response_format") -> Grammar | None:
        """The grammar of `SamplingParams.constraint`, which this field gave; None for none and for {"type": "text"}.

        Raises ParameterError for what is not a constraint, exceeds a limit, does not compile in time or asks for what
        llguidance does not have; ImportError where that is not installed.
        """
        with blamed_on(field):
            if constraint is None:
                return None
            if not isinstance(constraint, Mapping):
                raise ValueError(f"{field} must be an object, got {constraint!r}")
            kind = constraint.get("type")
            if kind == "text":
                return None
            where = f"{field}.{'json' if (field, kind) == ('structured_outputs', 'json_schema') else kind}"
            began = time.monotonic()
            try:
                return self._grammar(self._source(constraint, where), field if kind == "json_object" else where)
            except ValueError:
                if kind == "json_schema":
                    self._name_the_place(schema_of_response_format(constraint), where, began)
                raise

    def _source(self, constraint: Mapping[str, Any], where: str) -> str:
        """What llguidance compiles."""
        kind, matcher = constraint.get("type"), _llguidance().LLMatcher
        if kind in ("json_object", "json_schema"):
            schema = prepared_schema(schema_of_response_format(constraint), where)
            return str(matcher.grammar_from_json_schema(schema))
        if kind == "regex":
            return str(matcher.grammar_from_regex(_checked_text(constraint.get("regex"), where)))
        if kind == "choice":
            choices = _checked_text(_lark_choice(constraint["choice"]), where)
            return str(matcher.grammar_from_lark(f"start: {choices}"))
        if kind == "grammar":
            text = _checked_text(constraint["grammar"], where)
            try:
                source = str(_llguidance().grammar_from("grammar", text))  # Lark, or what it turns into Lark
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {told(str(error))}") from None
            return self._with_ids(source)
        raise ValueError(f"response_format.type must be text, json_object, json_schema or regex, got {kind!r}")

    def _with_ids(self, source: str) -> str:
        """What a caller wrote in Lark, its control tokens named by id: llguidance sees them under other names."""

        def with_id(found: re.Match[str]) -> str:
            is_known = found[0] in self._tokenizer.added_tokens
            return f"<[{self._tokenizer.token_to_id(found[0])}]>" if is_known else found[0]

        return _in_lark(_TOKEN, with_id, source)

    @blamed_on("tools")
    def compile_tool_choice(self, tools: Sequence[Mapping[str, Any]], name: str | None = None) -> Grammar:
        """The grammar of exactly one call, `{"name": N, "parameters": {...}}`, of the named tool or of any.

        Raises what `compile` raises, and ParameterError for a name that is not among the tools.
        """
        prepared = prepare_tools(tools) or []
        chosen = [tool for tool in prepared if name is None or tool_name(tool) == name]
        if not chosen:
            known = [tool_name(tool) for tool in prepared]
            wanted = f"tool_choice asks for a call of {name or 'any tool'!r}"
            raise ParameterError(f"{wanted}, the tools are {known}", "tool_choice")
        return self._calls("call", chosen, [schema_of_tool(tool) for tool in chosen])

    @blamed_on("tools")
    def compile_answer(
        self,
        tools: Sequence[Mapping[str, Any]],
        constraint: Mapping[str, Any] | None = None,
        field: str = "response_format",
    ) -> Grammar:
        """The grammar of calls, as in `compile_tool_choice`, or an answer: as the constraint says, else any text that
        is no call. Without a constraint the arguments of a tool that is not `strict` are any object.

        Raises what `compile` raises.
        """
        prepared = prepare_tools(tools) or []
        held = [constraint is not None or is_strict(tool) for tool in prepared]
        schemas = [
            schema_of_tool(t) if is_held else {"type": "object"} for t, is_held in zip(prepared, held, strict=True)
        ]
        answer = _text_rule(prepared)
        if constraint is not None:
            self.compile(constraint, field)  # what is wrong with it is told as if there were no tools
            answer = _answer_rule(constraint, field)
        return self._calls('call ("; " call)* | answer', prepared, schemas, answer)

    def _calls(
        self, start: str, tools: Sequence[Mapping[str, Any]], schemas: Sequence[Mapping[str, Any]], answer: str = ""
    ) -> Grammar:
        rules = [f"start: {start}", f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}", answer]
        for i, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
            check_unicode(tool_name(tool))
            head = head_of_call(tool_name(tool))
            # Beside JSON the parts must be JSON's own, beside text one: what begins alike must be one token of both.
            parts = head if "%json" in answer else ["".join(head)]
            spelled = " ".join(json.dumps(part, ensure_ascii=False) for part in parts)
            rules.append(f'call_{i}: {spelled} arguments_{i} "}}"')
            rules.append(f"arguments_{i}: %json {prepared_schema(schema, _arguments_of(tool))}")
        began = time.monotonic()
        try:
            return self._grammar(_llguidance().LLMatcher.grammar_from_lark("\n".join(rules)), "tools")
        except ValueError:
            for tool, schema in zip(tools, schemas, strict=True):
                self._name_the_place(schema, _arguments_of(tool), began)
            raise

    def _name_the_place(self, schema: Any, where: str, began: float) -> None:
        """Raises ValueError if the schema does not compile, with the place of the smallest one inside that does not for
        the same reason. Does nothing where that would take too long."""
        latest = began + self._deadline_seconds / 2
        error, place = self._error(schema, where, latest), ""
        if error is None:
            return
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        inside = sorted(subschemas(schema), key=lambda each: not each[0].startswith(("/$defs", "/definitions")))
        while inside:
            step, child = inside.pop(0)
            if self._error({**definitions, **child}, where, latest) == error:
                place, inside = place + step, list(subschemas(child))
        raise ValueError(f"{where}{f' at {place}' if place else ''}: {error}")

    def _error(self, schema: Any, where: str, latest: float) -> str | None:
        """What llguidance has against a schema, as far as there is time to ask."""
        if time.monotonic() > latest:
            return None
        try:
            source = _llguidance().LLMatcher.grammar_from_json_schema(prepared_schema(schema, where))
            error = self._worker.ask({"grammar": source})
        except (ValueError, WorkerError):  # a limit, which is told by itself
            return None
        return told(error) if error else None

    @property
    def num_lost_workers(self) -> int:
        """See Worker.num_lost."""
        return self._worker.num_lost

    @property
    def kept_bytes(self) -> int:
        """See Automaton.nbytes."""
        return self._kept.nbytes

    def close(self) -> None:
        """Ends the worker process; another grammar would start one again."""
        self._worker.close()

    def _grammar(self, source: str, where: str) -> Grammar:
        if (kept := self._kept.get(source)) is not None:
            return kept
        self._check_room()
        try:
            # The worker has a vocabulary of bytes, where one token stands for any.
            error = self._worker.ask({"grammar": _in_lark(_TOKEN_IDS, lambda found: "<[0]>", source)})
        except WorkerError as failure:
            raise ValueError(f"{where}: {failure}") from None
        if error:
            raise ValueError(f"{where}: {told(error)}")
        with self._lock:
            vocabulary = self._vocabulary
        with panics_caught("llguidance"):
            prototype = _llguidance().LLMatcher(vocabulary, source, log_level=0, limits=parser_limits())
            prototype.compute_bitmask()  # what cannot even begin shows here
        if prototype.is_error():
            raise ValueError(f"{where}: {told(prototype.get_error())}")
        grammar = Grammar(prototype, self._vocab_size, len(source.encode()))
        self._kept.put(source, grammar)
        with self._lock:
            self._live.add(grammar.automaton)
        return grammar

    def _check_room(self) -> None:
        with self._lock:
            live = sum(automaton.nbytes for automaton in self._live)
        if live > LIVE_BYTES:
            what = f"the grammars of the requests that run or wait take {live} bytes, more than {LIVE_BYTES}"
            raise QueueFullError(what, retry_after=5)

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        eos = sorted(self._tokenizer.eos_token_ids)
        if not eos:
            raise ValueError("a grammar needs a token that ends the text, and the checkpoint names no EOS token")
        make: type[LLTokenizer] = _llguidance().LLTokenizer
        try:
            return make(self._backend_json(), n_vocab=self._vocab_size, eos_token=eos)
        except BaseException as error:  # llguidance raises whatever its parser of tokenizer.json finds, and panics
            if not is_failure(error):
                raise
            raise ValueError(f"grammars do not work with this tokenizer: {told(str(error))}") from None

    def _backend_json(self) -> str:
        """The tokenizer as llguidance is to see it: without the pad token for which the model may have no row, and with
        names of special tokens that no text holds. It would find their own in a text that a grammar asks for, and then
        take neither."""
        state = json.loads(self._tokenizer.backend_json)
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < self._vocab_size]
        hidden = secrets.token_hex(8)
        names = {token["content"]: f"{hidden}{token['id']}" for token in state["added_tokens"] if token["special"]}
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = state["model"]
        if isinstance(vocabulary := model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): token for piece, token in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return json.dumps(state | {"post_processor": None})


def is_strict(tool: Mapping[str, Any]) -> bool:
    """Whether a prepared tool asks that every call keeps to its schema."""
    return tool["function"].get("strict") is True


def _arguments_of(tool: Mapping[str, Any]) -> str:
    return f"the parameters of tool {tool_name(tool)!r}"


def _answer_rule(constraint: Mapping[str, Any], field: str) -> str:
    kind = constraint["type"]
    if kind == "regex":
        return f"answer: {_lark_regex(constraint['regex'])}"
    if kind == "choice":
        return f"answer: {_lark_choice(constraint['choice'])}"
    if kind == "grammar":
        raise ParameterError(f"{field}.grammar cannot stand beside tools: there would be no room for a call", field)
    return f"answer: %json {prepared_schema(schema_of_response_format(constraint), field)}"


def _lark_choice(choices: Sequence[str]) -> str:
    return " | ".join(json.dumps(text, ensure_ascii=False) for text in choices)


def _text_rule(tools: Sequence[Mapping[str, Any]]) -> str:
    """Text in which ToolCallParser finds no call."""
    names = "|".join(re.escape(tool_name(tool)) for tool in tools)
    begins = rf'\s*((\[\s*)?\{{\s*"({"|".join(sorted(CALL_KEYS))})"|({names})\.call\()(?s:.*)'
    holds = rf"(?s:.*)({'|'.join(map(re.escape, MARKERS))})(?s:.*)"
    return f"answer: TEXT\nTEXT: /(?s:.*)/ & ~{_lark_regex(begins)} & ~{_lark_regex(holds)}"


def _in_lark(pattern: str, change: Callable[[re.Match[str]], str], source: str) -> str:
    """Changed where the pattern stands outside of comments, strings and regexes: in JSON nowhere."""
    skipped_or_found = re.compile(rf"{_LARK_SKIPPED}|(?P<found>{pattern})")
    return skipped_or_found.sub(lambda match: match[0] if match["found"] is None else change(match), source)


def _lark_regex(regex: str) -> str:
    """In Lark's slashes, where neither a slash nor a line break may stand as it is."""
    spelled = {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}
    return "/" + re.sub(r"\\.|[/\n]", lambda found: spelled.get(found[0], found[0]), regex, flags=re.DOTALL) + "/"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError(
            "response_format and tool_choice need llguidance: pip install 'llama-engine[structured]'"
        ) from None
    return llguidance


def _checked_text(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text:
        raise ValueError(f"{where} must be a non-empty string, got {text!r}")
    check_unicode(text)
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"{where} has more than {MAX_BYTES} bytes")
    return text
