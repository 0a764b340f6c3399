"""The cheap bound on a text's tokens: never above the true number, whatever the tokenizer does to the text."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from llama.text.tokenizer import Tokenizer
from tests.text.helpers import llama_backend, sentencepiece_backend

ALPHABET = set(pre_tokenizers.ByteLevel.alphabet())
PLAIN = "The user asks:  4 spaces\n\n你好 <|eot_id|> <s>"


def llama(**parts):
    backend = llama_backend()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def with_added(backend, content, **flags):
    backend.add_tokens([tokenizers.AddedToken(content, **flags)])
    return backend


def of_words():
    return tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))


def without_some_bytes():
    """What is not in the vocabulary is dropped without a trace."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def without_some_characters():
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(ALPHABET - {*"xyz"}))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def metaspace():
    backend = sentencepiece_backend()
    backend.normalizer, backend.pre_tokenizer = None, pre_tokenizers.Metaspace()
    return backend


BOUNDED = {
    "llama": llama_backend,
    "sentencepiece": sentencepiece_backend,
    "metaspace": metaspace,
    "dropped_characters": without_some_characters,
    "prefix": lambda: llama(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "long": lambda: with_added(llama_backend(), "x" * 200, normalized=False),
    "longer_when_normalised": lambda: with_added(
        llama(normalizer=normalizers.Replace("x", "yy")), "x" * 90, normalized=True
    ),
}
# each with a text of 600 characters and more that takes a handful of tokens
SHRINKING = {
    "accents": (
        lambda: llama(normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "e" + "\u0301" * 600,
    ),
    "strip": (lambda: llama(normalizer=normalizers.Strip()), " " * 600 + "a"),
    "replace": (lambda: llama(normalizer=normalizers.Replace("a" * 50, "a")), "a" * 5000),
    "regex": (lambda: llama(normalizer=normalizers.Replace(tokenizers.Regex("a+"), "a")), "a" * 600),
    "nested": (
        lambda: llama(normalizer=normalizers.Sequence([normalizers.Sequence([normalizers.Strip()])])),
        " " * 600 + "a",
    ),
    "lstrip": (lambda: with_added(llama_backend(), "<mask>", lstrip=True), " " * 600 + "<mask>"),
    "rstrip": (lambda: with_added(llama_backend(), "<mask>", rstrip=True), "<mask>" + " " * 600),
    "removed": (
        lambda: llama(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split(" ", behavior="removed"), pre_tokenizers.ByteLevel(use_regex=False)]
            )
        ),
        " " * 600 + "a",
    ),
    "white_space": (lambda: llama(pre_tokenizer=pre_tokenizers.Whitespace()), " " * 600 + "a"),
    "unknown_word": (of_words, "b" * 600),
    "missing_bytes": (without_some_bytes, "é" * 600 + "a"),
}


def made(make):
    backend = make()
    decoder = tokenizers.decoders.ByteLevel()
    if backend.decoder is None:
        backend.decoder = decoder
    return Tokenizer(backend)


@pytest.mark.parametrize("name", BOUNDED)
def test_the_bound_is_never_above_the_truth(name):
    tokenizer = made(BOUNDED[name])
    assert tokenizer.min_tokens(PLAIN * 100) > 1
    longest = max(tokenizer._parsing.get_vocab(with_added_tokens=True), key=len)
    pieces = [*PLAIN, *tokenizer.added_tokens, " " * 300, longest, longest * 20, "x" * 90, "é", "\u0301", "😀"]

    @settings(max_examples=60)
    @given(st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=20)), max_size=30).map("".join))
    def check(text):
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))

    check()


@pytest.mark.parametrize("name", SHRINKING)
def test_where_text_may_vanish_there_is_no_bound(name):
    make, text = SHRINKING[name]
    tokenizer = made(make)
    count = len(tokenizer.encode(text, add_special_tokens=False))
    assert tokenizer.min_tokens(text) == 0
    assert count < len(text) / max(map(len, tokenizer._parsing.get_vocab(with_added_tokens=True)))


def test_the_demo_models_bound(demo_tokenizer):
    assert demo_tokenizer.min_tokens("a" * 8_100_000) == 100_000
    text = "=" * 64 * 1000
    assert demo_tokenizer.min_tokens(text) <= len(demo_tokenizer.encode(text))
