"""User text never becomes a control token.

Wherever a string that a user gave spells a control token, a sentinel takes the token's place before rendering:
decimal digits that cannot be guessed, which trimming, JSON quoting and changes of case leave alone. After rendering,
the control tokens that still stand in the text are the template's own. The text between two of them is encoded as plain
text if it holds a sentinel; everything else is encoded as if nothing had happened.
"""

import re
import secrets
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from llama.api.errors import ParameterError
from llama.text.tokenizer import Tokenizer
from llama.text.tokenizer.tokenizer import check_unicode

_NONCE_DIGITS = 20  # fresh for every rendering, so nothing can be learnt from an earlier one
_INDEX_DIGITS = 6


class SafeText:
    """One rendering's sentinels."""

    def __init__(self, tokenizer: Tokenizer, removed: Collection[str] = ()) -> None:
        """`removed`: what the template may take out of a text, so that what stood around it comes together."""
        self._tokenizer = tokenizer
        self._removed = [text for text in removed if text]
        self._nonce = str(secrets.randbelow(9 * 10 ** (_NONCE_DIGITS - 1)) + 10 ** (_NONCE_DIGITS - 1))
        self._sentinel = re.compile(self._nonce + rf"([0-9]{{{_INDEX_DIGITS}}})")
        self._mark, self._marked = self._nonce[::-1], ""
        self._indices: dict[str, str] = {}  # hidden text -> index
        self._hidden: dict[str, str] = {}  # index -> hidden text

    def hide(self, value: Any, field: str, shown: Collection[str] = ()) -> Any:
        """A copy of a JSON value in which no string, keys included, spells a control token or begins or ends one.

        Tokens in `shown` stay. Raises ParameterError, about this field of the request, for text that is not Unicode.
        """
        if isinstance(value, str):
            check_unicode(value, field)
            return self._hide_text(value, shown)
        if isinstance(value, Mapping):
            return {self.hide(k, field): self.hide(v, field, shown) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(v, field, shown) for v in value]
        if not isinstance(value, int | float | None):
            raise ParameterError(f"{field} must be JSON values, got {type(value).__name__}", field)
        return value

    def mark_end(self, message: dict[str, Any]) -> None:
        """Put a mark behind the text of a message that is not hidden yet. Raises ParameterError where it has none."""
        content = message.get("content")
        if not isinstance(content, str) or not content or message.get("tool_calls"):
            what = "continue_final_message needs a last message with text and without tool calls"
            raise ParameterError(what, "continue_final_message")
        self._marked = content.strip()
        message["content"] = content + self._mark + " "

    def up_to_mark(self, rendered: str) -> str:
        """What stands before the mark. A template that trims the text, and so the space behind the mark, would have
        trimmed the message as well (transformers' rule). ParameterError where the text does not show whole."""
        before, mark, behind = rendered.rpartition(self._mark)
        if not mark or self._marked not in self.show(before):
            what = "continue_final_message: the chat template does not show all of the last message"
            raise ParameterError(what, "continue_final_message")
        return before if behind.startswith(" ") else before.rstrip()

    def controls_in(self, strings: Iterable[str]) -> frozenset[str]:
        """The control tokens that these strings hold."""
        return frozenset(token for text in strings for token in self._tokenizer.control_pattern.findall(text))

    def show(self, rendered: str) -> str:
        """The rendered text with the hidden text back in its place."""
        return self._sentinel.sub(lambda m: self._hidden.get(m[1], m[0]), rendered) if self._hidden else rendered

    def encode(self, rendered: str) -> list[int]:
        """Token ids of the rendered text in which hidden text is plain text."""
        if not self._hidden:
            return self._tokenizer.encode(rendered, add_special_tokens=False)
        ids: list[int] = []
        start = copied = 0
        for control in [*self._tokenizer.control_pattern.finditer(rendered), None]:
            end = len(rendered) if control is None else control.start()
            if self._sentinel.search(rendered, start, end):
                ids += self._tokenizer.encode(rendered[copied:start], add_special_tokens=False)
                ids += self._tokenizer.encode_plain(self.show(rendered[start:end]), is_beginning=start == 0)
                copied = end
            start = end if control is None else control.end()
        return ids + self._tokenizer.encode(rendered[copied:], add_special_tokens=False)

    def _hide_text(self, text: str, shown: Collection[str]) -> str:
        pattern = self._tokenizer.control_pattern
        hidden = pattern.sub(lambda m: m[0] if m[0] in shown else self._sentinel_for(m[0]), text)
        rest = pattern.sub("", hidden)
        if self._tokenizer.normalizes_to_control(rest) or (self._removed and pattern.search(self._without(rest))):
            return self._sentinel_for(text)
        return self._hide_ends(hidden)

    def _without(self, text: str) -> str:
        """The text without all that the template may remove, of which one may bring another together."""
        for _ in self._removed:
            before = text
            for removed in self._removed:
                text = text.replace(removed, "")
            if text == before:
                break
        return text

    def _hide_ends(self, text: str) -> str:
        """Text that ends as a control token begins, or the reverse, could be completed by what the template adds."""
        beginnings, endings, longest = self._tokenizer.control_affixes
        bare = text.rstrip()
        for size in range(min(longest, len(bare)), 0, -1):
            if bare[-size:] in beginnings:
                text = bare[:-size] + self._sentinel_for(bare[-size:]) + text[len(bare) :]
                break
        bare = text.lstrip()
        for size in range(min(longest, len(bare)), 0, -1):
            if bare[:size] in endings:
                return text[: len(text) - len(bare)] + self._sentinel_for(bare[:size]) + bare[size:]
        return text

    def _sentinel_for(self, hidden: str) -> str:
        index = self._indices.setdefault(hidden, f"{len(self._indices):0{_INDEX_DIGITS}d}")
        self._hidden[index] = hidden
        return self._nonce + index
