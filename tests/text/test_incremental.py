"""Decoding piece by piece: never half a character, and the pieces are the whole, however they are cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.tokenizer import IncrementalDecoder
from tests.text.helpers import EOT, PYTHON_TAG

TEXT = "naïve 你好, 👩‍👩‍👧 🇫🇷👍🏽 مرحبا\n\n  end"


def pushed_one_by_one(tokenizer, ids, **options):
    decoder = IncrementalDecoder(tokenizer, **options)
    return [*(decoder.push([token_id]) for token_id in ids), decoder.flush()]


@pytest.mark.parametrize("name", ["llama_tokenizer", "sentencepiece_tokenizer", "demo_tokenizer"])
def test_no_piece_holds_half_a_character(request, name):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(TEXT)
    pieces = pushed_one_by_one(tokenizer, ids)
    assert "".join(pieces) == TEXT == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""


@pytest.mark.parametrize("name", ["llama_tokenizer", "sentencepiece_tokenizer"])
def test_pieces_add_up_for_any_ids_and_cuts(request, name):
    tokenizer = request.getfixturevalue(name)

    @given(st.lists(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6), max_size=12), st.booleans())
    @settings(max_examples=80)
    def check(chunks, skip):
        decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
        pieces = [*(decoder.push(chunk) for chunk in chunks), decoder.flush()]
        assert "".join(pieces) == tokenizer.decode([i for chunk in chunks for i in chunk], skip)

    check()


def test_a_character_appears_with_its_last_token(llama_tokenizer):
    ids = llama_tokenizer.encode_plain("😀")
    assert len(ids) > 1
    pieces = pushed_one_by_one(llama_tokenizer, ids)
    assert pieces == [""] * (len(ids) - 1) + ["😀", ""]


def test_an_end_inside_a_character_shows_in_flush(llama_tokenizer):
    ids = llama_tokenizer.encode_plain("a😀")[:-1]
    assert pushed_one_by_one(llama_tokenizer, ids)[-1] == "\ufffd"
    assert llama_tokenizer.decode(ids) == "a\ufffd"


def test_the_prompt_is_continued(llama_tokenizer, sentencepiece_tokenizer):
    ids = llama_tokenizer.encode_plain("😀!")
    decoder = IncrementalDecoder(llama_tokenizer, ids[:2])
    assert decoder.push(ids[2:]) + decoder.flush() == "😀!"
    prompt, answer = sentencepiece_tokenizer.encode("we"), sentencepiece_tokenizer.encode_plain("held")
    assert pushed_one_by_one(sentencepiece_tokenizer, answer, prompt_ids=prompt)[0] == " h"
    assert "".join(pushed_one_by_one(sentencepiece_tokenizer, answer)) == "held"


def test_special_tokens_are_kept_on_request(llama_tokenizer):
    ids = llama_tokenizer.encode(f"{PYTHON_TAG}x{EOT}", add_special_tokens=False)
    keep = {llama_tokenizer.token_to_id(PYTHON_TAG)}
    assert "".join(pushed_one_by_one(llama_tokenizer, ids)) == "x"
    assert "".join(pushed_one_by_one(llama_tokenizer, ids, keep=keep)) == f"{PYTHON_TAG}x"
    assert "".join(pushed_one_by_one(llama_tokenizer, ids, skip_special_tokens=False)) == f"{PYTHON_TAG}x{EOT}"


def test_ids_of_a_padded_model_vocabulary_have_no_text(llama_tokenizer):
    assert "".join(pushed_one_by_one(llama_tokenizer, [10**5, *llama_tokenizer.encode_plain("a"), 10**5])) == "a"
