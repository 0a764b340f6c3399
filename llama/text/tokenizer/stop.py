"""Stop strings in a stream of text.

One Aho-Corasick automaton over all stop strings: a character costs one step, and its state says how much of the text's
end may still become a stop string, which is all that is held back. A stop string matches when its last character
arrives, so the one that is complete first wins; of several complete at once, the longest.
"""

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True)
class _Node:
    depth: int
    next: dict[str, "_Node"] = field(default_factory=dict)
    fallback: "_Node | None" = None  # the longest proper suffix of this node's text that starts some stop string
    match: str | None = None  # the longest stop string that ends here


class StopMatcher:
    """Passes text on until a stop string appears. `include` keeps the stop string in the text."""

    def __init__(self, stop: tuple[str, ...], include: bool = False) -> None:
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop must be a tuple of non-empty strings, got {stop!r}")
        self._include = include
        self._root = self._node = _automaton(stop)
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be passed on, the stop string that ended it or None). After a match all text is dropped."""
        if self._matched is not None:
            return "", self._matched
        if not self._root.next:
            return text, None
        for position, character in enumerate(text):
            self._node = self._step(self._node, character)
            if self._node.match is not None:
                self._matched = self._node.match
                seen = self._held + text[: position + 1]
                self._held = ""
                return (seen if self._include else seen[: -len(self._matched)]), self._matched
        seen = self._held + text
        cut = len(seen) - self._node.depth
        self._held = seen[cut:]
        return seen[:cut], None

    def flush(self) -> str:
        """The text held back: nothing can complete it any more."""
        held, self._held, self._node = self._held, "", self._root
        return held

    def _step(self, node: _Node, character: str) -> _Node:
        while character not in node.next:
            if node.fallback is None:
                return node
            node = node.fallback
        return node.next[character]


def _automaton(stop: tuple[str, ...]) -> _Node:
    root = _Node(0)
    for text in stop:
        node = root
        for character in text:
            node = node.next.setdefault(character, _Node(node.depth + 1))
        node.match = text
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for character, child in node.next.items():
            fallback = node.fallback
            while fallback is not None and character not in fallback.next:
                fallback = fallback.fallback
            child.fallback = root if fallback is None else fallback.next[character]
            child.match = child.match or child.fallback.match
            queue.append(child)
    return root
