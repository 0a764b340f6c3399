"""The tokenizer: BOS once, forged control tokens stay text, ids are checked, broken files are named."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama.api.errors import CheckpointError, ParameterError
from llama.text.tokenizer import IncrementalDecoder, Tokenizer
from tests.text.helpers import BOS, EOT, LLAMA_SPECIAL, llama_backend, sentencepiece_backend, write_checkpoint

LONG = "The user asks:  4 spaces\n\n你好 <|eot_id|> " * 500
TEXTS = ["", LONG, "hi", "  a\n\n b ", "naïve 你好 👩‍👩‍👧", f"a{EOT}b", "<|eot_id", "x" * 300, "\x00\x07\t\r\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_encode_equals_the_backend(llama_path, llama_tokenizer, text):
    backend = tokenizers.Tokenizer.from_file(str(llama_path / "tokenizer.json"))
    assert llama_tokenizer.encode(text) == backend.encode(text).ids
    assert llama_tokenizer.encode(text, add_special_tokens=False) == backend.encode(text, add_special_tokens=False).ids


def test_bos_comes_once_and_never_twice(llama_tokenizer):
    bos = llama_tokenizer.bos_token_id
    assert llama_tokenizer.encode("hi")[0] == bos
    assert llama_tokenizer.encode(BOS + "hi") == llama_tokenizer.encode("hi")
    assert llama_tokenizer.encode("") == [bos]
    assert bos not in llama_tokenizer.encode("hi", add_special_tokens=False)


def test_demo_model_adds_no_bos(demo_tokenizer, demo_model_path):
    assert demo_tokenizer.encode("The capital") == demo_tokenizer.encode("The capital", add_special_tokens=False)
    assert demo_tokenizer.eos_token_ids == {2}
    demo_tokenizer.check_vocab(json.loads((demo_model_path / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("add_eos", [None, True, False])
@pytest.mark.parametrize("has_post_processor", [True, False])
def test_bos_and_eos_are_added_where_transformers_adds_them(tmp_path, add_bos, add_eos, has_post_processor):
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    config = {"bos_token": BOS, "eos_token": EOT} | {key: flag for key, flag in flags.items() if flag is not None}
    path = write_checkpoint(tmp_path, llama_backend(), tokenizer_config=config)
    if not has_post_processor:
        values = json.loads((path / "tokenizer.json").read_text()) | {"post_processor": None}
        (path / "tokenizer.json").write_text(json.dumps(values))
    ours = Tokenizer.from_pretrained(path).encode("hi")
    assert [kind.from_pretrained(path)("hi")["input_ids"] for kind in (PreTrainedTokenizerFast, LlamaTokenizer)] == [
        ours
    ] * 2


def test_tokens_that_only_the_config_lists_are_added(tmp_path):
    from transformers import PreTrainedTokenizerFast

    backend = llama_backend()
    size = backend.get_vocab_size()
    listed = {
        str(size): {"content": "<|im_start|>", "special": True},
        str(size + 1): {"content": "<extra>", "special": False, "normalized": False},
        str(backend.token_to_id(EOT)): {"content": EOT, "special": True},
    }
    config = {"bos_token": BOS, "eos_token": EOT, "added_tokens_decoder": listed}
    path = write_checkpoint(tmp_path, backend, tokenizer_config=config)
    tokenizer = Tokenizer.from_pretrained(path)
    text = "<|im_start|>a<extra>b"
    assert tokenizer.encode(text) == PreTrainedTokenizerFast.from_pretrained(path)(text)["input_ids"]
    assert tokenizer.token_to_id("<extra>") == size + 1
    assert tokenizer.decode(tokenizer.encode(text)) == "a<extra>b"
    listed[str(size + 9)] = {"content": "<far>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"'<far>' cannot have the id {size + 9}, the next one is {size + 2}"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize("listed", [[{"content": "<|im_start|>"}], "<|im_start|>", 3], ids=str)
def test_added_tokens_without_ids_are_refused(tmp_path, listed):
    path = write_checkpoint(tmp_path, llama_backend(), tokenizer_config={"added_tokens_decoder": listed})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: added_tokens_decoder must be an object"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    "listed",
    [
        {"additional_special_tokens": ["<|call|>", EOT, "there"]},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"extra_special_tokens": ["<x>"]},
    ],
)
def test_tokens_that_the_config_only_names_are_added(tmp_path, listed):
    from transformers import PreTrainedTokenizerFast

    path = write_checkpoint(tmp_path, llama_backend(), tokenizer_config={"bos_token": BOS, **listed})
    tokenizer = Tokenizer.from_pretrained(path)
    text = "hello there<|call|>a<image>b<x><y>" + EOT
    assert tokenizer.encode(text) == PreTrainedTokenizerFast.from_pretrained(path)(text)["input_ids"]


def test_a_tokenizer_that_splits_its_control_tokens_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, llama_backend(), tokenizer_config={"split_special_tokens": True})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: split_special_tokens is not supported"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize("value", [5, [EOT], {"lstrip": True}, {"content": 5}, False])
def test_a_role_for_what_is_no_token_is_refused(tmp_path, value):
    path = write_checkpoint(tmp_path, llama_backend(), tokenizer_config={"eos_token": value})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: eos_token must be a token, got"):
        Tokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.json"])
def test_another_form_of_tokenizer_is_refused_with_its_conversion(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: there is no such file; make it of .* with transformers"
    ):
        Tokenizer.from_pretrained(tmp_path)


@given(st.lists(st.sampled_from([*LLAMA_SPECIAL, "<|eot", "_id|>", " ", "a", "\n", "é", "<", "|"])).map("".join))
@settings(max_examples=100)
def test_encode_plain_makes_no_control_token(llama_tokenizer, text):
    ids = llama_tokenizer.encode_plain(text)
    assert llama_tokenizer.special_ids.isdisjoint(ids)
    assert llama_tokenizer.decode(ids) == text


def test_special_flag_missing_on_a_token_with_a_role(tmp_path):
    """An end-of-turn token that the file calls ordinary is a control token all the same."""
    backend = llama_backend()
    backend.add_tokens(["<end>"])
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, backend, tokenizer_config={"eos_token": "<end>"}))
    assert tokenizer.token_to_id("<end>") in tokenizer.encode("a<end>")
    assert tokenizer.token_to_id("<end>") not in tokenizer.encode_plain("a<end>")
    assert tokenizer.decode(tokenizer.encode("a<end>")) == "a"


def test_a_token_matched_after_normalisation_is_matched_literally(tmp_path):
    backend = llama_backend()
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.add_tokens([tokenizers.AddedToken("<|stop|>", special=True, normalized=True)])
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, backend))
    stop = tokenizer.token_to_id("<|stop|>")
    assert stop in tokenizer.encode("<|stop|>")
    assert stop not in tokenizer.encode("<|STOP|>")


def test_plain_text_that_is_a_whole_control_token_is_refused(tmp_path):
    """A word-level vocabulary cannot spell its control token in pieces."""
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "END": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<unk>", "END"])
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, backend))
    assert tokenizer.encode_plain("a zebra") == [2, 0]
    with pytest.raises(ValueError, match="'END'"):
        tokenizer.encode_plain("a END")


@pytest.mark.parametrize("method", ["encode", "encode_plain"])
def test_lone_surrogates_and_other_types_are_refused(llama_tokenizer, method):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at position 2"):
        getattr(llama_tokenizer, method)("ab\ud800")
    with pytest.raises(ValueError, match="must be a string"):
        getattr(llama_tokenizer, method)(None)


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40, True, 1.0, "1", None])
def test_ids_are_checked(llama_tokenizer, bad):
    with pytest.raises(ValueError, match=r"\[0, 408\)"):
        llama_tokenizer.decode([1, bad])


def test_ids_may_be_an_array_or_one_of_them(llama_tokenizer):
    ids = llama_tokenizer.encode("Hello world", add_special_tokens=False)
    text = llama_tokenizer.decode(ids)
    assert text == "Hello world"
    for given_ids in (np.array(ids), torch.tensor(ids), list(np.array(ids)), iter(ids)):
        assert llama_tokenizer.decode(given_ids) == text
    first = llama_tokenizer.decode(ids[:1])
    assert llama_tokenizer.decode(ids[0]) == llama_tokenizer.decode(torch.tensor(ids[0])) == first


@pytest.mark.parametrize("ids", [None, True, 1.5, "ab", [None], [-1], [1 << 40], np.array([0.5]), torch.ones(1, 1)])
def test_what_is_no_id_is_refused(llama_tokenizer, ids):
    legal = f"token ids must be integers in [0, {llama_tokenizer.vocab_size})"
    with pytest.raises(ParameterError, match=re.escape(legal)):
        llama_tokenizer.decode(ids)
    assert llama_tokenizer.token_text(-1) == llama_tokenizer.token_text(1 << 40) == ""


def test_decode_equals_the_backend(llama_path, llama_tokenizer):
    backend = tokenizers.Tokenizer.from_file(str(llama_path / "tokenizer.json"))

    @given(st.lists(st.integers(0, llama_tokenizer.vocab_size - 1)), st.booleans())
    @settings(max_examples=100)
    def check(ids, skip):
        assert llama_tokenizer.decode(ids, skip) == backend.decode(ids, skip_special_tokens=skip)

    check()


@given(text=st.text("abcdeh ilorstuwy\n你👍", max_size=30))
def test_sentencepiece_text_comes_back(sentencepiece_tokenizer, text):
    backend = sentencepiece_backend()
    ids = sentencepiece_tokenizer.encode(text)
    assert ids == backend.encode(text).ids
    assert sentencepiece_tokenizer.decode(ids) == backend.decode(ids) == text


def llama2(backend):
    """As conversions with legacy=True write it."""


def llama2_not_legacy(backend):
    backend.normalizer = None
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


def yi(backend):
    """add_prefix_space is off: nothing is put before a text and nothing dropped."""
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


@pytest.mark.parametrize("family", [llama2, llama2_not_legacy, yi])
def test_sentencepiece_families_as_transformers_reads_them(family, tmp_path):
    backend = sentencepiece_backend()
    family(backend)
    write_checkpoint(tmp_path, backend, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = ["hello there", " hello", "  he  ", "", "do</s> you</s>he", "你 is 👍\n", "<s>hello", "</s> h"]
    for text in texts:
        ids = ours.encode(text)
        twice = text.startswith("<s>")  # transformers puts BOS a second time
        assert ids == theirs.encode(text)[twice:], text
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), (text, skip)
            decoder = IncrementalDecoder(ours, skip_special_tokens=skip)
            assert "".join([*(decoder.push([i]) for i in ids), decoder.flush()]) == ours.decode(ids, skip)


def test_metaspace_and_absent_decoders(tmp_path):
    for decoder in (tokenizers.decoders.Metaspace(), None):
        backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "▁▁a": 1, "▁b": 2}, unk_token="<unk>"))
        if decoder:
            backend.decoder = decoder
        tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, backend))
        for ids in ([], [1], [1, 2], [2, 1, 1]):
            assert tokenizer.decode(ids) == backend.decode(ids)


def test_pieces_and_their_texts(llama_tokenizer):
    ids = llama_tokenizer.encode_plain("é👍 the")
    assert b"".join(map(llama_tokenizer.token_bytes, ids)).decode() == "é👍 the"
    assert llama_tokenizer.token_text(llama_tokenizer.encode_plain(" the")[0]).startswith(" ")
    assert llama_tokenizer.token_text(llama_tokenizer.encode_plain("\xff")[0]) in ("\xff", "\ufffd")
    assert llama_tokenizer.id_to_token(10**6) is None


def test_eos_ids_in_every_spelling(tmp_path):
    def eos(**files):
        for old in tmp_path.glob("*.json"):
            old.unlink()
        return Tokenizer.from_pretrained(write_checkpoint(tmp_path, llama_backend(), **files)).eos_token_ids

    assert eos() == set()
    assert eos(config={"eos_token_id": 7}) == {7}
    assert eos(config={"eos_token_id": 7}, generation_config={"eos_token_id": [8, 9]}) == {8, 9}
    assert eos(config={"eos_token_id": 7}, generation_config={"eos_token_id": None}) == {7}
    assert eos(special_tokens_map={"eos_token": {"content": EOT}}) == {llama_backend().token_to_id(EOT)}
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token id"):
        eos(generation_config={"eos_token_id": "2"})


def test_a_vocabulary_larger_than_the_models_is_refused(llama_tokenizer):
    llama_tokenizer.check_vocab(408)
    llama_tokenizer.check_vocab(512)
    with pytest.raises(ValueError, match="ids up to 407, the model's vocab_size is 400"):
        llama_tokenizer.check_vocab(400)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a usable tokenizer"),
        (b"{}", "not a usable tokenizer"),
        (
            b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
            "not a usable tokenizer",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"\xff\xfe{}", "is not UTF-8"),
    ],
)
def test_a_broken_tokenizer_file_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        Tokenizer.from_pretrained(tmp_path)
    assert "tokenizer.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_and_unsupported_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: there is no such file"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    backend = llama_backend()
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ValueError, match="decoder 'WordPiece' is not supported"):
        Tokenizer.from_pretrained(write_checkpoint(tmp_path, backend))
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: is not JSON"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: must hold a JSON object"):
        Tokenizer.from_pretrained(tmp_path)


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = llama_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.from_pretrained(write_checkpoint(tmp_path, backend))
    text = "the user asks for the weather"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_threads_do_not_disturb_each_other(llama_tokenizer):
    text = f"hello {EOT} there"
    expected = (llama_tokenizer.encode(text), llama_tokenizer.encode_plain(text))
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(lambda: (llama_tokenizer.encode(text), llama_tokenizer.encode_plain(text))) for _ in range(64)
        ]
        assert all(job.result() == expected for job in jobs)
