"""Tokenizers whose patterns hang, panic or multiply a text: refused at load in one line, and a panic ends one call."""

import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers

from llama.api.errors import CheckpointError
from llama.text.tokenizer import Tokenizer
from llama.text.tokenizer.bounds import is_plain, without_vocabulary
from llama.text.tokenizer.trial import try_out
from tests.text.helpers import LLAMA_PATTERN, llama_backend, sentencepiece_backend, write_checkpoint


def split(pattern):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"), byte_level])


def backend_with(**parts):
    backend = llama_backend()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def loaded(folder, backend):
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(folder, backend))
    try_out(folder, tokenizer)
    return tokenizer


@pytest.mark.parametrize("pattern", [r"(x+x+)+y", r"(.*)*$^", r"(a|a)*b"])
def test_patterns_that_end_in_a_panic_are_refused(tmp_path, pattern):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be used.*(Panic|did not finish)") as caught:
        loaded(tmp_path, backend_with(pre_tokenizer=split(pattern)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace("a", "a" * 10_000),
        normalizers.Sequence([normalizers.Replace("a", "b" * 20), normalizers.Replace("b", "c" * 20)]),
        normalizers.Replace(tokenizers.Regex(""), "x" * 500),
        normalizers.Prepend("x" * 500),
    ],
)
def test_normalisers_that_multiply_are_refused(tmp_path, normalizer):
    with pytest.raises(CheckpointError, match=r"make a text .* times as long, more than 128"):
        loaded(tmp_path, backend_with(normalizer=normalizer))


@pytest.mark.parametrize(
    "make",
    [
        llama_backend,
        sentencepiece_backend,
        lambda: backend_with(normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend("x")])),
        lambda: backend_with(pre_tokenizer=split(LLAMA_PATTERN)),
    ],
)
def test_usual_tokenizers_are_taken(tmp_path, make):
    assert loaded(tmp_path, make()).encode("hello")


def test_the_librarys_own_patterns_need_no_trial(tmp_path, demo_tokenizer, monkeypatch):
    monkeypatch.setattr("llama.text.tokenizer.trial.Worker", None)
    try_out(tmp_path, demo_tokenizer)
    with pytest.raises(TypeError):
        loaded(tmp_path, llama_backend())


def test_a_panic_is_an_error_of_that_call_alone(tmp_path):
    """As where no trial has found it: the tokenizer was made by the caller."""
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, backend_with(pre_tokenizer=split(r"(x+x+)+y"))))
    for text in ("x" * 60, "x" * 60 + " " * 5000):
        with pytest.raises(RuntimeError, match="the tokenizer failed"):
            tokenizer.encode(text)
    assert tokenizer.encode("hello")


def test_a_file_that_makes_the_parser_panic_or_fail_is_named(tmp_path):
    for text in ("{}", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not a usable tokenizer"):
            Tokenizer.from_pretrained(tmp_path)


def test_a_trial_reads_no_vocabulary(tmp_path):
    """Reading as many tokens as Llama 3 has would take a second; the whole trial takes 0.1 s."""
    backend = llama_backend()
    vocab = backend.get_vocab(with_added_tokens=False)
    words = [f"word{i}" for i in range(128_000)]
    backend.model = tokenizers.models.BPE(vocab | {word: len(vocab) + i for i, word in enumerate(words)}, [])
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, backend))
    assert not is_plain(tokenizer.backend) and len(without_vocabulary(tokenizer.backend)) < 5000
    (tmp_path / "tokenizer.json").unlink()
    try_out(tmp_path, tokenizer)
