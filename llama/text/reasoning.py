"""A thought at the beginning of an answer, `<think>...</think>`, as DeepSeek-R1's distilled models write it.

The tags are looked for in the text, be they tokens of their own or not. Line breaks around them belong to nobody.
Decisions depend on the characters alone, so the parts are the same however the text was cut.
"""

from enum import Enum, auto

OPEN, CLOSE = "<think>", "</think>"
# They may be special tokens; a text that leaves those out must keep them.
THOUGHT_TOKENS = (OPEN, CLOSE)


class Thoughts(Enum):
    """What a prompt leaves to be written."""

    BEGUN = auto()  # it ends inside a thought
    POSSIBLE = auto()  # the answer may begin with one
    NONE = auto()  # it ends behind one, as where thinking is turned off


def thoughts_after(prompt: str) -> Thoughts:
    """`prompt` as the template rendered it."""
    last = prompt.rstrip()
    if last.endswith(OPEN):
        return Thoughts.BEGUN
    return Thoughts.NONE if last.endswith(CLOSE) else Thoughts.POSSIBLE


def thoughts_continued(written: str) -> Thoughts:
    """Of an answer that has begun with `written`."""
    if not written.lstrip().startswith(OPEN):
        return Thoughts.NONE
    return Thoughts.NONE if CLOSE in written else Thoughts.BEGUN


class _State(Enum):
    BEGINNING = auto()  # nothing but white space, or a part of the tag
    THOUGHT = auto()
    AFTER = auto()  # nothing but line breaks since the thought
    CONTENT = auto()


class ReasoningParser:
    """`push` text as it comes, then `flush`; both return (what is thought, what is content)."""

    def __init__(self, is_inside: bool) -> None:
        """`is_inside`: the prompt has opened the thought."""
        self._state = _State.THOUGHT if is_inside else _State.BEGINNING
        self._is_empty = True  # the thought, so far
        self._held = ""

    @property
    def is_inside(self) -> bool:
        """The text so far ends in a thought."""
        return self._state is _State.THOUGHT

    def push(self, text: str) -> tuple[str, str]:
        if self._state is _State.CONTENT:
            return "", text
        self._held += text
        if self._state is _State.BEGINNING:
            self._begin()
        thought = self._think() if self._state is _State.THOUGHT else ""
        return thought, self._rest()

    def flush(self) -> tuple[str, str]:
        held, self._held = self._held, ""
        return (held.rstrip("\n"), "") if self.is_inside else ("", held)

    def _begin(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._state, self._held = _State.THOUGHT, begun[len(OPEN) :]
        elif not OPEN.startswith(begun):
            self._state = _State.CONTENT

    def _think(self) -> str:
        if self._is_empty:
            self._held = self._held.lstrip("\n")
        thought, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._state, self._held = _State.AFTER, rest
            return thought.rstrip("\n")
        sizes = range(min(len(CLOSE) - 1, len(self._held)), 0, -1)
        partial = next((size for size in sizes if self._held.endswith(CLOSE[:size])), 0)
        end = len(self._held[: len(self._held) - partial].rstrip("\n"))
        thought, self._held = self._held[:end], self._held[end:]
        self._is_empty = self._is_empty and not thought
        return thought

    def _rest(self) -> str:
        if self._state is _State.AFTER:
            self._held = self._held.lstrip("\n")
            if self._held:
                self._state = _State.CONTENT
        if self._state is not _State.CONTENT:
            return ""
        content, self._held = self._held, ""
        return content
