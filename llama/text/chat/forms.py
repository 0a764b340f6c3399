"""Which form of messages a template reads, found by rendering small conversations with it.

Templates agree on the roles system, user and assistant and on little else. Some read content as text, some as a list of
parts; some want a call's arguments as an object, some as JSON text; some take one call in a turn, some know a call by
its content being null, some know neither calls nor the role `tool`. A form fits if all that was said shows in what is
rendered. Where several do, it is the one nearest to what transformers would be given.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from llama.text.chat.calls import CallForm, Message, with_calls
from llama.text.chat.prepare import TOOL_ROLES
from llama.text.chat.source import TemplateSource

# messages and tools -> what the template makes of them; None where it refuses them
Render = Callable[[Sequence[Message], Sequence[Any] | None], str | None]

# What no template writes or tests for.
_NAMES = ("qzjwf", "qzjwg")
_ARGUMENTS = ("qzjwa", "qzjwb")
_RESULTS = ("qzjwr", "qzjws")
_KEY = "qzjwk"
_TEXTS = ("qzjwt", "qzjwu", "qzjwv")
_TOOL = {
    "type": "function",
    "function": {"name": "qzjwh", "description": "", "parameters": {"type": "object", "properties": {}}},
}


class TemplateForms:
    """The forms of one template, each found when a conversation first needs it. Safe to use from several threads."""

    def __init__(self, source: TemplateSource, render: Render) -> None:
        self._source = source
        self._render = render
        self._wants_parts: dict[str, bool] = {}  # by role
        self._call_form: CallForm | None = None

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """Prepared messages as the template reads them."""
        listed = [message | {"role": self._role(message["role"])} for message in messages]
        if any("tool_calls" in message or message["role"] in TOOL_ROLES for message in listed):
            if self._call_form is None:
                self._call_form = self._find_call_form()
            listed = with_calls(listed, self._call_form)
        return [self._with_parts(message) for message in listed]

    def _role(self, role: str) -> str:
        if role == "developer" and role not in self._source.strings:
            return "system"
        return "tool" if role == "ipython" and role not in self._source.strings else role

    # Text or parts

    def _with_parts(self, message: Message) -> Message:
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            return message
        if role not in self._wants_parts:
            self._wants_parts[role] = self._find_parts(role)
        return message | {"content": _parts(content)} if self._wants_parts[role] else message

    def _find_parts(self, role: str) -> bool:
        """Whether text of this role shows as a list of parts alone."""
        before = () if role in ("system", "user") else ("user", "assistant") if role in TOOL_ROLES else ("user",)
        roles = (*before, role, *(("user",) if role == "system" else ()))

        def shows(*with_parts: str) -> bool:
            said = zip(roles, _TEXTS, strict=False)
            messages = [{"role": r, "content": _parts(text) if r in with_parts else text} for r, text in said]
            return _TEXTS[len(before)] in (self._render(messages, None) or "")

        return not shows() and (shows(role) or shows(*roles))

    # Calls and results

    def _find_call_form(self) -> CallForm:
        form = next((form for form in self._call_forms() if self._shows_calls(form)), None)
        if form is None:
            return CallForm() if self._source.reads_calls else CallForm("in_text")
        return replace(
            form,
            takes_null=self._shows_calls(replace(form, takes_null=True)),
            takes_empty=self._shows_calls(replace(form, takes_empty=True), content=""),
            takes_text=self._shows_calls(replace(form, takes_text=True), content=_TEXTS[0]),
            takes_objects=self._shows_calls(form, object_results=True),
        )

    def _call_forms(self) -> Iterator[CallForm]:
        roles = ("tool", *(("ipython",) if "ipython" in self._source.strings else ()), "user")
        if self._source.reads_calls:
            either, spellings = (False, True), ("object", "text")
            for choice in itertools.product(spellings, roles, either, either, (True, False)):
                yield CallForm(*choice)  # in the order of its fields
        yield from (CallForm("in_text", role) for role in roles)

    def _shows_calls(self, form: CallForm, content: str | None = None, object_results: bool = False) -> bool:
        """Whether two calls of one turn and their results are rendered whole."""
        calls = [
            {"id": f"call-{name}", "type": "function", "function": {"name": name, "arguments": {_KEY: value}}}
            for name, value in zip(_NAMES, _ARGUMENTS, strict=True)
        ]
        results = [
            {"role": "tool", "tool_call_id": f"call-{name}", "content": {_KEY: text} if object_results else text}
            for name, text in zip(_NAMES, _RESULTS, strict=True)
        ]
        turn = {"role": "assistant", "content": content, "tool_calls": calls}
        messages = [self._with_parts(m) for m in with_calls([{"role": "user", "content": "?"}, turn, *results], form)]
        needed = [*_NAMES, *_ARGUMENTS, *_RESULTS]
        # An object as Python writes it, JSON text that was quoted again, a null that was printed.
        mangled = [f"'{_KEY}': ", rf"\"{_KEY}", *(["None"] if content is None and form.takes_null else [])]
        for tools in (None, [_TOOL]) if self._source.reads_tools else (None,):
            rendered = self._render(messages, tools) or ""
            if all(map(rendered.__contains__, needed)) and not any(map(rendered.__contains__, mangled)):
                return True
        return False


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]
