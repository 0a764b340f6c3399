"""Thoughts in the text: what is thought and what is content, however it is cut, against one regular expression."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.text.reasoning import ReasoningParser, Thoughts, thoughts_after, thoughts_continued
from tests.text.helpers import every_cut

PIECES = ["<think>", "</think>", "<", "</", "think>", "think", "\n", " ", "a", "<b>", "é"]


def parsed(parts, is_inside):
    parser = ReasoningParser(is_inside)
    news = [*map(parser.push, parts), parser.flush()]
    return "".join(thought for thought, _ in news), "".join(content for _, content in news)


def expected(text: str, is_inside: bool) -> tuple[str, str]:
    if not is_inside:
        begun = re.match(r"\s*<think>", text)
        if begun is None:
            return "", text
        text = text[begun.end() :]
    found = re.fullmatch(r"(?s)\n*(.*?)\n*(?:</think>\n*(.*))?", text)
    return found[1], found[2] or ""


@pytest.mark.parametrize(
    ("text", "is_inside", "thought", "content"),
    [
        ("a</think>\n\nb", True, "a", "b"),
        ("a", True, "a", ""),
        ("a</thi", True, "a</thi", ""),
        ("<think>\na\n</think>\n\nb </think> c", False, "a", "b </think> c"),
        ("b <think>a</think>", False, "", "b <think>a</think>"),
        ("</think>b", True, "", "b"),
        (" <thin", False, "", " <thin"),
        ("<think></think>\n", False, "", ""),
        ("x < y\n\n\nz </think>", True, "x < y\n\n\nz ", ""),
    ],
)
def test_by_hand(text, is_inside, thought, content):
    for parts in every_cut(text):
        assert parsed(parts, is_inside) == (thought, content)


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.booleans(), st.data())
def test_any_cut_is_the_whole(text, is_inside, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parsed(parts, is_inside) == expected(text, is_inside)
    assert parsed(list(text), is_inside) == expected(text, is_inside)


def test_what_a_prompt_leaves_to_be_written():
    assert thoughts_after("<|Assistant|><think>\n") is Thoughts.BEGUN
    assert thoughts_after("<|Assistant|><think>\n\n</think>\n\n") is Thoughts.NONE
    assert thoughts_after("what is <think>?<|Assistant|>") is Thoughts.POSSIBLE
    assert thoughts_continued("<think>half") is Thoughts.BEGUN
    assert thoughts_continued("<think>a</think>b") is Thoughts.NONE
    assert thoughts_continued("The answer") is Thoughts.NONE
