"""One request's way back: decoding, stop strings, tool calls, log-probabilities, and what the engine is told."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from llama.api.outputs import FinishReason, Logprob, Piece, Usage
from llama.api.params import SamplingParams
from llama.engine.request import Request
from llama.engine.sequence import TokenOutput
from llama.llm.replies import Replies, Reply, merged
from llama.text.tokenizer import Tokenizer
from llama.text.tool_calls import ToolCall, parse_tool_calls
from tests.fakes import EOS_ID, ScriptedEngine, byte_tokenizer, script_of

TOKENIZER = byte_tokenizer()


def request(prompt_token_ids, params, **rest):
    return Request("r", np.array(prompt_token_ids, np.int32), params, **rest)


def answer(text, *, lag=0, tokenizer=TOKENIZER, prompt=(72, 105), **params):
    """(the reply, its pieces, the engine) of a request whose completions all say `text`."""
    engine = ScriptedEngine(lambda prompt, index: script_of(text), lag=lag)
    replies = Replies(engine, tokenizer)
    reply = replies.add(request(list(prompt), SamplingParams(**params)))
    pieces = []
    while engine.has_unfinished:
        pieces += [piece for _, piece in replies.step()]
    assert not len(replies)
    return reply, pieces, engine


def test_a_text_comes_whole_and_in_pieces():
    reply, pieces, engine = answer("Käse 🙂!")
    output = reply.output.outputs[0]
    assert output.text == "Käse 🙂!" == "".join(p.text for p in pieces)
    assert output.token_ids == script_of("Käse 🙂!") == [t for p in pieces for t in p.token_ids]
    assert (output.finish_reason, output.stop_reason, output.seed) == ("stop", None, 7)
    assert [p.text for p in pieces[:4]] == ["K", "", "ä", "s"]
    assert engine.finished == []


def test_the_last_piece_alone_carries_usage():
    reply, pieces, _ = answer("abc", n=2)
    assert [p.usage for p in pieces[:-1]] == [None] * 7
    assert pieces[-1].usage == Usage(prompt_tokens=2, completion_tokens=8, cached_tokens=3)
    assert pieces[-1].usage.total_tokens == 10
    assert reply.output.finished and reply.output.num_cached_tokens == 3


def test_max_tokens_inside_a_character_gives_the_replacement_character():
    reply, _, _ = answer("ä", max_tokens=1)
    assert reply.output.outputs[0].text == "\ufffd"
    assert reply.output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("lag", [0, 1])
def test_a_stop_string_is_cut_and_the_engine_is_told(lag):
    reply, pieces, engine = answer("one. STOP two", stop=["STOP", "x"], lag=lag)
    output = reply.output.outputs[0]
    assert output.text == "one. " == "".join(p.text for p in pieces)
    assert output.token_ids == list(b"one. STOP")
    assert (output.finish_reason, output.stop_reason) == ("stop", "STOP")
    assert engine.finished == [("r", 0, FinishReason.STOP, "STOP")]
    assert pieces[-1].finish_reason == "stop" and pieces[-1].usage.completion_tokens == 9


@given(
    text=st.text("abS 🙂", max_size=12),
    stop=st.lists(st.text("abS 🙂", min_size=1, max_size=3), min_size=1, max_size=3),
    include=st.booleans(),
    max_tokens=st.integers(1, 20),
)
def test_any_text_is_cut_at_the_stop_string_that_is_complete_first(text, stop, include, max_tokens):
    said = [*text.encode(), EOS_ID][:max_tokens]
    whole = bytes(t for t in said if t != EOS_ID).decode(errors="replace")
    ends = [(end, s) for end in range(1, len(whole) + 1) for s in stop if whole[:end].endswith(s)]
    expected = whole
    if ends:
        end = ends[0][0]
        found = max((s for e, s in ends if e == end), key=len)
        expected = whole[: end if include else end - len(found)]
    reply, pieces, _ = answer(text, stop=stop, include_stop_str_in_output=include, max_tokens=max_tokens)
    output = reply.output.outputs[0]
    assert output.text == expected == "".join(p.text for p in pieces)
    assert output.stop_reason == (found if ends else None)
    assert output.token_ids == [t for p in pieces for t in p.token_ids] == said[: len(output.token_ids)]


def test_a_stop_string_can_be_kept():
    reply, pieces, _ = answer("one. STOP two", stop="STOP", include_stop_str_in_output=True)
    assert reply.output.outputs[0].text == "one. STOP" == "".join(p.text for p in pieces)


def test_text_that_only_began_like_a_stop_string_is_given_out_at_the_end():
    reply, pieces, engine = answer("end ST", stop="STOP")
    assert reply.output.outputs[0].text == "end ST" == "".join(p.text for p in pieces)
    assert reply.output.outputs[0].finish_reason == "stop" and engine.finished == []


def test_a_stop_string_wins_over_the_length_limit_that_falls_on_the_same_token():
    reply, _, engine = answer("abcdef", stop="c", max_tokens=3)
    output = reply.output.outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", "c")
    assert engine.finished == []  # the engine ended it by itself


def test_a_stop_string_may_be_completed_by_the_flush_of_the_decoder():
    reply, _, _ = answer("ab\u00e4", stop="b\ufffd", max_tokens=3)
    assert (reply.output.outputs[0].text, reply.output.outputs[0].stop_reason) == ("a", "b\ufffd")


def test_stop_strings_do_not_count_before_min_tokens():
    reply, pieces, _ = answer("a.b.c.d", stop=".", min_tokens=3)
    assert reply.output.outputs[0].text == "a.b" == "".join(p.text for p in pieces)
    reply, pieces, _ = answer("xSTOPySTOPz", stop="STOP", min_tokens=5)
    assert reply.output.outputs[0].text == "xSTOPy" == "".join(p.text for p in pieces)
    reply, _, _ = answer("xSTOPySTOPz", stop="STOP", min_tokens=4)
    assert reply.output.outputs[0].text == "x"


def test_several_tokens_in_one_step_are_cut_at_the_one_that_completed_the_stop_string():
    asked = request([1], SamplingParams(stop="lo", logprobs=0))
    reply = Reply(asked, [0], TOKENIZER, 0.0)
    entries = [{t: Logprob(-1.0, 1)} for t in b"hello w"]
    piece = reply.push(TokenOutput("r", 0, list(b"hello w"), entries))
    assert (piece.text, bytes(piece.token_ids), len(piece.logprobs)) == ("hel", b"hello", 5)
    assert reply.output.outputs[0].cumulative_logprob == -5.0
    assert reply.push(TokenOutput("r", 0, list(b"orld"))) is None


def test_the_text_of_a_stop_token_is_hidden_and_its_id_is_not():
    reply, _, _ = answer("abc", stop_token_ids=[ord("b")])
    output = reply.output.outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("a", [97, 98], 98)
    reply, _, _ = answer("abc", stop_token_ids=[ord("b")], include_stop_str_in_output=True)
    assert reply.output.outputs[0].text == "ab"


def test_logprobs_carry_their_text():
    reply, pieces, _ = answer("xy", logprobs=1, prompt_logprobs=0)
    output = reply.output.outputs[0]
    assert output.logprobs[0] == {120: Logprob(-0.5, 1, "x"), 65: Logprob(-2.0, 2, "A")}
    assert output.logprobs[-1][EOS_ID].decoded_token == "<|end|>"
    assert output.cumulative_logprob == -1.5
    assert [entry for p in pieces for entry in p.logprobs] == output.logprobs
    assert reply.output.prompt_logprobs == [None, {66: Logprob(-1.0, 3, "B")}]


def test_no_logprobs_unless_asked():
    output = answer("xy")[0].output
    assert (output.prompt_logprobs, output.outputs[0].logprobs, output.outputs[0].cumulative_logprob) == (None,) * 3


def test_without_a_tokenizer_there_are_ids_and_no_text():
    reply, pieces, _ = answer("xy", tokenizer=None, logprobs=1)
    output = reply.output.outputs[0]
    assert (output.text, output.token_ids) == ("", script_of("xy"))
    assert output.logprobs[0][120].decoded_token is None
    assert [p.text for p in pieces] == [""] * 3


def test_the_text_continues_the_prompt_inside_a_character():
    reply, _, _ = answer("", prompt="ä".encode()[:1])
    engine = ScriptedEngine(lambda prompt, index: ["ä".encode()[1], EOS_ID])
    replies = Replies(engine, TOKENIZER)
    reply = replies.add(request(["ä".encode()[0]], SamplingParams()))
    while engine.has_unfinished:
        replies.step()
    assert reply.output.outputs[0].text == "ä"


def test_abort_gives_out_what_was_held_and_ends_every_completion():
    engine = ScriptedEngine(lambda prompt, index: script_of("ab" if index else "xSTOxxx"))
    replies = Replies(engine, TOKENIZER)
    reply = replies.add(request([1], SamplingParams(n=2, stop="STOP")))
    for _ in range(4):
        replies.step()
    pieces = replies.abort(reply)
    assert [(p.index, p.text, p.finish_reason) for p in pieces] == [(0, "STO", "abort")]
    assert pieces[-1].usage.completion_tokens == 7
    assert [o.finish_reason for o in reply.output.outputs] == ["abort", "stop"]
    assert reply.output.outputs[0].text == "xSTO" and reply.output.finished
    assert replies.abort(reply) == [] and engine.aborted == ["r"] and not engine.has_unfinished


def test_one_id_serves_one_request_at_a_time():
    replies = Replies(ScriptedEngine(lambda prompt, index: script_of("a")), TOKENIZER)
    reply = replies.add(request([1], SamplingParams()))
    with pytest.raises(ValueError, match="'r' is in use"):
        replies.add(request([1], SamplingParams()))
    while len(replies):
        replies.step()
    assert reply.output.outputs[0].text == "a"


def test_metrics_are_in_order():
    metrics = answer("abc")[0].output.metrics
    assert metrics.queued <= metrics.first_token <= metrics.finished
    assert metrics.time_to_first_token == metrics.first_token - metrics.queued


def test_merged_pieces_are_what_their_parts_were():
    _, pieces, _ = answer("hello", n=2, logprobs=0)
    for cut in range(len(pieces) + 1):
        joined = merged(pieces[:cut]) + merged(pieces[cut:])
        for index in range(2):
            mine, parts = [p for p in joined if p.index == index], [p for p in pieces if p.index == index]
            assert "".join(p.text for p in mine) == "hello"
            assert [t for p in mine for t in p.token_ids] == [t for p in parts for t in p.token_ids]
            assert [e for p in mine for e in p.logprobs] == [e for p in parts for e in p.logprobs]
            assert mine[-1].finish_reason == "stop"
        assert [p.usage is not None for p in joined].index(True) == len(joined) - 1
        assert len(joined) <= 4


def test_merged_keeps_a_single_piece_as_it_is():
    piece = Piece(0, "a", [1])
    assert merged([piece]) == [piece] and merged([]) == []


# ---- tool calls

CALL = '{"name": "f", "parameters": {"a": "é"}}'
OTHER = '{"name": "g", "parameters": {}}'
NAMES = ("f", "g", "code_interpreter")
TAG = "<|python_tag|>"
SAID = [
    CALL,
    f"{CALL}; {OTHER}",
    f"[{CALL}, {OTHER}]\nThat is all.",
    f"{TAG}{CALL}",
    f"{TAG}import os\nprint(1)",
    'Wait. <function=f>{"a": {"b": "}"}}</function> Done 🙂',
    f"f.call(a=1) {CALL} and then {OTHER}",
    '{"name": "unknown", "parameters": {}}',
    '{"name": "f", "parameters": {"a": ',
    "<function=f>no</function>",
    "No call at all: {",
    "",
]


def tagged_tokenizer():
    """Bytes, the end, and the control token that announces a call, which decoding leaves out elsewhere."""
    backend = Backend.from_str(byte_tokenizer().backend_json)
    backend.add_tokens([AddedToken(TAG, special=True, normalized=False)])
    return Tokenizer(backend, eos_token_ids=[EOS_ID])


TAGGED = tagged_tokenizer()


def told(token_ids, cuts, *, reason=FinishReason.STOP, **params):
    """(the completion, its pieces) of an answer that comes in as many steps as the cuts make of it."""
    asked = request([72], SamplingParams(max_tokens=None, **params), tools=dict.fromkeys(NAMES))
    reply = Reply(asked, [7], TAGGED, 0.0)
    ends = [*sorted(set(cuts)), len(token_ids)]
    parts = [token_ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    news = [reply.push(TokenOutput("r", 0, part)) for part in parts[:-1]]
    news.append(reply.push(TokenOutput("r", 0, parts[-1], finish_reason=reason)))
    return reply.output.outputs[0], [piece for piece in news if piece is not None]


def check_told(text, cuts, **params):
    token_ids = [*TAGGED.encode(text), EOS_ID]
    output, pieces = told(token_ids, cuts, **params)
    content, calls = parse_tool_calls(text, NAMES)
    assert (output.text, output.tool_calls) == (content, calls)
    assert output.finish_reason == ("tool_calls" if calls else "stop") == pieces[-1].finish_reason
    for some in (pieces, merged(pieces), merged(pieces[:2]) + merged(pieces[2:])):
        assert "".join(piece.text for piece in some) == content
        assert [call for piece in some for call in piece.tool_calls] == calls
        assert [token for piece in some for token in piece.token_ids] == token_ids
        assert [piece.usage is not None for piece in some] == [False] * (len(some) - 1) + [True]


@pytest.mark.parametrize("text", SAID)
def test_calls_and_text_of_an_answer_cut_anywhere_are_those_of_the_whole(text):
    length = len(TAGGED.encode(text))
    for cuts in [(), range(1, length + 1), *((at,) for at in range(1, length + 1))]:
        check_told(text, cuts)


@pytest.mark.parametrize("text", SAID)
def test_text_behind_a_call_stays_behind_it_when_pieces_are_merged(text):
    def order(pieces):
        parts = [part for piece in pieces for part in (piece.text, *piece.tool_calls) if part != ""]
        groups = itertools.groupby(parts, key=lambda part: isinstance(part, str))
        return [part for is_text, group in groups for part in (["".join(group)] if is_text else group)]

    _, pieces = told([*TAGGED.encode(text), EOS_ID], range(1, len(TAGGED.encode(text)) + 1))
    for cut in range(0, len(pieces), 7):
        assert order(merged(pieces[:cut]) + merged(pieces[cut:])) == order(pieces)
    assert len(merged(pieces)) <= 1 + len(order(pieces))


def test_text_behind_a_thought_begins_another_piece_when_pieces_are_merged():
    thought = [Piece(0, "", [1], reasoning_content="a"), Piece(0, "", [2], reasoning_content="b"), Piece(0, "", [3])]
    text = [Piece(0, "c", [4]), Piece(0, "", [5]), Piece(0, "d", [6], finish_reason=FinishReason.STOP)]
    told = [(piece.reasoning_content, piece.text, piece.token_ids) for piece in merged(thought + text)]
    assert told == [("ab", "", [1, 2, 3]), ("", "cd", [4, 5, 6])]


@given(st.lists(st.sampled_from([*SAID, " ", "; ", "é", "<function=", TAG]), max_size=4).map("".join), st.data())
def test_calls_and_text_of_any_answer_cut_in_any_way_are_those_of_the_whole(text, data):
    length = len(TAGGED.encode(text))
    check_told(text, data.draw(st.sets(st.integers(1, length), max_size=12) if length else st.just(())))


def test_an_answer_with_a_call_comes_token_by_token_through_the_engine():
    engine = ScriptedEngine(lambda prompt, index: script_of("" if index else f"{CALL} so"))
    replies = Replies(engine, TOKENIZER)
    reply = replies.add(request([1], SamplingParams(n=2), tools=dict.fromkeys(NAMES)))
    pieces = []
    while engine.has_unfinished:
        pieces += [piece for _, piece in replies.step()]
    first, second = reply.output.outputs
    assert (first.text, first.tool_calls, first.finish_reason) == (" so", [ToolCall("f", {"a": "é"})], "tool_calls")
    assert (second.text, second.tool_calls, second.finish_reason) == ("", [], "stop")
    at = next(i for i, piece in enumerate(pieces) if piece.tool_calls)
    assert sum(len(piece.token_ids) for piece in pieces[: at + 1] if piece.index == 0) == len(CALL.encode())


def test_a_call_that_is_cut_off_is_text_and_one_before_it_stays_a_call():
    token_ids = TOKENIZER.encode(f"{CALL}; {OTHER}")[:-3]
    for cuts in ((), range(1, len(token_ids))):
        output, pieces = told(token_ids, cuts, reason=FinishReason.LENGTH)
        assert output.tool_calls == [ToolCall("f", {"a": "é"})]
        assert output.text == f"; {OTHER[:-3]}" == "".join(piece.text for piece in pieces)
        assert output.finish_reason == "length"  # not all that it would have called is there


def test_a_stop_string_cuts_before_calls_are_looked_for():
    output, _ = told([*TOKENIZER.encode(f"{CALL}STOP{OTHER}"), EOS_ID], range(1, 60), stop="STOP")
    assert (output.tool_calls, output.text) == ([ToolCall("f", {"a": "é"})], "")
    assert (output.finish_reason, output.stop_reason) == ("tool_calls", "STOP")
    output, _ = told([*TOKENIZER.encode(CALL), EOS_ID], (), stop='"parameters"')
    assert (output.tool_calls, output.text, output.finish_reason) == ([], '{"name": "f", ', "stop")


def test_abort_gives_out_the_beginning_of_a_call():
    asked = request([72], SamplingParams(), tools=dict.fromkeys(NAMES))
    reply = Reply(asked, [7], TOKENIZER, 0.0)
    assert reply.push(TokenOutput("r", 0, TOKENIZER.encode(CALL[:-1]))).text == ""
    [last] = reply.abort()
    assert (last.text, last.tool_calls, last.finish_reason) == (CALL[:-1], [], "abort")
    assert reply.output.outputs[0].text == CALL[:-1]
