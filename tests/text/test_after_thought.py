"""A grammar behind a thought: walks through its masks, with tokens that cut the tags anywhere."""

import random
import re

import numpy as np
import pytest
import tokenizers

from llama.text.grammar import AfterThought, GrammarCompiler, GrammarError, ThoughtMasks
from llama.text.reasoning import ReasoningParser
from llama.text.tokenizer import Tokenizer
from tests.fakes import EOS_ID, byte_tokenizer

TAGS = ["<think>", "</", "<thi", "think", "think>", "nk>", ">\n\n", ">x", "x</", "x<"]
VOCAB = EOS_ID + 1 + len(TAGS)
FORMATS = {"(yes|no)<br>": "no", "<(b|i)>x+": "<b", "(<think|<)(!)+": "<"}


@pytest.fixture(scope="module")
def tokenizer():
    backend = tokenizers.Tokenizer.from_str(byte_tokenizer().backend_json)
    backend.add_tokens([tokenizers.AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return Tokenizer(backend, eos_token_ids=[EOS_ID])


@pytest.fixture(scope="module")
def grammars(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB)
    yield {regex: compiler.compile({"type": "regex", "regex": regex}) for regex in FORMATS}
    compiler.close()


@pytest.fixture(scope="module")
def masks(tokenizer):
    return ThoughtMasks(tokenizer, VOCAB)


def allowed(matcher):
    row = np.zeros((VOCAB + 31) // 32, np.int32)
    matcher.fill_mask(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(matcher, tags, chance):
    """Random tokens that the masks allow, mostly of `tags`; with steps back, and over a fork."""
    ids = []
    for _ in range(150):
        choices = allowed(matcher)
        likely = [*tags.intersection(choices)]
        token = chance.choice(likely if likely and chance.random() < 0.8 else choices)
        before = matcher.fork()
        matcher.advance(token)
        if chance.random() < 0.3:
            matcher.rollback(1)
            assert allowed(matcher) == choices
            matcher.advance(token)
        assert allowed(before) == choices
        if token == EOS_ID:
            return ids, True
        ids.append(token)
        if chance.random() < 0.1:
            back = chance.randrange(len(ids) + 1)
            rest = ids[len(ids) - back :]
            matcher.rollback(back)
            for token in rest:
                matcher.advance(token)
    return ids, False


@pytest.mark.parametrize("regex", FORMATS)
@pytest.mark.parametrize("is_inside", [True, False])
def test_content_is_as_the_grammar_says_and_the_thought_is_free(grammars, masks, tokenizer, regex, is_inside):
    likely = {*range(EOS_ID, VOCAB), *b"</thin>xy!\n"}
    ended = 0
    for seed in range(40):
        matcher = AfterThought.at_start(masks, grammars[regex], is_inside)
        ids, is_whole = walk(matcher, likely, random.Random(seed))
        text = b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")
        parser = ReasoningParser(is_inside)
        content = parser.push(text)[1]
        assert not content or text.endswith(content)
        if is_whole:
            assert re.fullmatch(regex, content), text
        ended += is_whole
    assert ended


@pytest.mark.parametrize("is_inside", [True, False])
@pytest.mark.parametrize("regex", FORMATS)
def test_by_hand(grammars, masks, tokenizer, regex, is_inside):
    """Character by character: the tag opens a thought though the grammar begins like it, and nothing ends the text in
    a thought."""
    matcher = AfterThought.at_start(masks, grammars[regex], is_inside)
    for token in (("" if is_inside else "<think>") + "</b</thin</think").encode():
        assert token in allowed(matcher)
        matcher.advance(token)
    assert EOS_ID not in allowed(matcher)
    behind = [token for token in allowed(matcher) if tokenizer.token_bytes(token).startswith(b">")]
    assert {tokenizer.token_bytes(token).strip(b"\n") for token in behind} == {b">"}
    matcher.advance(ord(">"))
    for token in FORMATS[regex].encode():
        assert token in allowed(matcher)
        matcher.advance(token)


def test_a_tag_that_the_grammar_does_not_know_is_written_to_its_end(grammars, masks, tokenizer):
    matcher = AfterThought.at_start(masks, grammars["(yes|no)<br>"], False)
    matcher.advance(ord("<"))
    assert all(b"think>".startswith(tokenizer.token_bytes(token)) for token in allowed(matcher))
    with pytest.raises(GrammarError):
        matcher.advance(ord("y"))
