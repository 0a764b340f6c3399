"""Control tokens and grammars: their text is text, and they themselves come where a grammar in Lark names them."""

import json
import re

import pytest

from llama.api.errors import ParameterError
from llama.text.grammar import GrammarCompiler
from llama.text.tokenizer import Tokenizer
from tests.text.helpers import metaspace_backend, write_checkpoint
from tests.text.walks import allowed, new_row

SPELLED = {"demo_tokenizer": "<|im_start|>", "llama_tokenizer": "<|eot_id|>", "sentencepiece_tokenizer": "</s>"}
SPELLED["metaspace_tokenizer"] = "</s>"


@pytest.fixture(scope="module")
def metaspace_tokenizer(tmp_path_factory):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    folder = tmp_path_factory.mktemp("metaspace")
    return Tokenizer.from_pretrained(write_checkpoint(folder, metaspace_backend("first"), tokenizer_config=config))


@pytest.fixture(scope="module", params=SPELLED)
def case(request):
    """(tokenizer, compiler, the text of a control token)"""
    tokenizer = request.getfixturevalue(request.param)
    compiler = GrammarCompiler(tokenizer, len(new_row()) * 32)
    yield tokenizer, compiler, SPELLED[request.param]
    compiler.close()


def written(compiler, tokenizer, kind, wanted):
    """The ids of a text that the masks let through, up to the end of the text."""
    matcher, ids = compiler.compile({"type": kind, kind: wanted}, "structured_outputs").matcher(), []
    while not matcher.is_accepting:
        ids.append(allowed(matcher)[0])
        matcher.advance(ids[-1])
        assert len(ids) < 100
    return ids


@pytest.mark.parametrize(
    "asked",
    [
        lambda token: ("choice", [token], token),
        lambda token: ("choice", [f"{token}a", f"{token}b"], None),
        lambda token: ("regex", f"he{re.escape(token)}", f"he{token}"),
        lambda token: ("json_schema", {"const": token}, json.dumps(token)),
        lambda token: ("json_schema", {"enum": [[token, token]]}, json.dumps([token, token])),
        lambda token: (
            "json_schema",
            {"type": "object", "properties": {token: {"enum": [token]}}, "required": [token]},
            json.dumps({token: token}),
        ),
        lambda token: ("grammar", f'start: "{token}" // {token}', token),
        lambda token: ("grammar", f'root ::= "{token}"', token),
    ],
)
def test_the_text_of_a_control_token_is_text(case, asked):
    tokenizer, compiler, token = case
    kind, wanted, text = asked(token)
    ids = written(compiler, tokenizer, kind, wanted)
    assert tokenizer.special_ids.isdisjoint(ids)
    told = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert told == text if text else told in wanted


def test_a_call_of_a_tool_that_is_called_like_a_control_token(case):
    tokenizer, compiler, token = case
    matcher, ids = compiler.compile_tool_choice([{"name": token, "parameters": None}]).matcher(), []
    while not matcher.is_accepting:
        ids.append(allowed(matcher)[0])
        matcher.advance(ids[-1])
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == json.dumps({"name": token, "parameters": {}})


def test_a_control_token_that_is_named_comes_as_itself(case):
    tokenizer, compiler, token = case
    number = tokenizer.token_to_id(token)
    for named in (token, f"<[{number}]>", f"<[{number}-{number}]>"):
        source = f'start: "he" {named} "{token}" x\nx: /[a"b]/ // {named} as well'
        ids = written(compiler, tokenizer, "grammar", source)
        assert [i for i in ids if i in tokenizer.special_ids] == [number]
        before, behind = (b"".join(map(tokenizer.token_bytes, part)).decode() for part in _split(ids, number))
        assert before == "he" and re.fullmatch(re.escape(token) + '[a"b]', behind)


def _split(ids, at):
    place = ids.index(at)
    return ids[:place], ids[place + 1 :]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ('start: "a" <|nobody|>', 'unknown special token: "<|nobody|>"'),
        ("start: <|system|>", 'unknown special token: "<|system|>"'),  # which the worker process has
        ("start: <[999999]>", "Token range end too large: 999999"),
        ("start: x\nx[suffix=<[1]>]: /a+/", "cannot be used in terminals"),
    ],
)
def test_tokens_that_are_not_there_are_refused(case, source, told):
    _, compiler, _ = case
    with pytest.raises(ParameterError, match=r"structured_outputs\.grammar: ") as caught:
        compiler.compile({"type": "grammar", "grammar": source}, "structured_outputs")
    assert told in str(caught.value) and "available" not in str(caught.value)
