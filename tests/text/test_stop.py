"""Stop strings: the text before the one that is complete first, for every way of cutting the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.tokenizer import StopMatcher
from tests.text.helpers import every_cut


def run(stop, pieces, include=False):
    matcher = StopMatcher(tuple(stop), include)
    text, matched = "", None
    for piece in pieces:
        emitted, matched = matcher.push(piece)
        text += emitted
    return text + matcher.flush(), matched


def expected(stop, text, include=False):
    """The plain definition: at the first end where any stop string is complete, the longest such."""
    for end in range(1, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    st.text("abc", max_size=24),
    st.booleans(),
)
@settings(max_examples=150)
def test_every_cut_gives_what_the_definition_says(stop, text, include):
    want = expected(stop, text, include)
    for pieces in every_cut(text):
        assert run(stop, pieces, include) == want


@given(st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3), st.text("abc", max_size=24))
@settings(max_examples=150)
def test_no_more_is_held_back_than_may_still_match(stop, text):
    matcher = StopMatcher(tuple(stop))
    passed = 0
    for end, character in enumerate(text, 1):
        emitted, matched = matcher.push(character)
        if matched:
            return
        passed += len(emitted)
        held = text[passed:end]
        longest = max((k for s in stop for k in range(len(s)) if text[:end].endswith(s[:k])), default=0)
        assert len(held) == longest


def test_text_after_the_match_is_dropped():
    matcher = StopMatcher(("END",))
    assert matcher.push("answer EN") == ("answer ", None)
    assert matcher.push("D and more") == ("", "END")
    assert matcher.push("more") == ("", "END")
    assert matcher.flush() == ""


def test_held_text_comes_out_when_it_does_not_match():
    matcher = StopMatcher(("<stop>",))
    assert matcher.push("a<st") == ("a", None)
    assert matcher.push("ar>") == ("<star>", None)
    assert matcher.push("<sto") == ("", None)
    assert matcher.flush() == "<sto"


def test_without_stop_strings_everything_passes():
    assert StopMatcher(()).push("abc") == ("abc", None)


@pytest.mark.parametrize("bad", [("",), "stop", (1,)])
def test_bad_stop_strings_are_refused(bad):
    with pytest.raises(ValueError, match="non-empty strings"):
        StopMatcher(bad)
