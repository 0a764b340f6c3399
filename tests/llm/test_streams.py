"""LLM: chat, streams, interruption, the progress bar."""

import dataclasses
import gc
import signal
import sys
import threading

import pytest

from llama import LLM, ParameterError, SamplingParams
from llama.api.errors import EngineDeadError
from tests.llm.helpers import GREEDY


def test_chat_takes_one_conversation_or_several(llm):
    talks = [[{"role": "user", "content": text}] for text in ("one", "two <|eot_id|>")]
    outputs = llm.chat(talks, GREEDY, use_tqdm=False)
    singles = [llm.chat(talk, GREEDY, use_tqdm=False)[0] for talk in talks]
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in singles]
    eot = llm.tokenizer.special_tokens["<|eot_id|>"]
    assert [o.prompt_token_ids.count(eot) for o in outputs] == [1, 1]  # the template's own


@pytest.mark.parametrize("n", [1, 3])
def test_the_pieces_of_a_stream_add_up_to_what_generate_says(llm, n):
    params = SamplingParams(n=n, seed=5, max_tokens=30, stop=["zq", "\n"], logprobs=0)
    whole = llm.generate("Hi", params, use_tqdm=False)[0]
    pieces = list(llm.stream("Hi", params))
    for completion in whole.outputs:
        mine = [p for p in pieces if p.index == completion.index]
        assert "".join(p.text for p in mine) == completion.text
        assert [t for p in mine for t in p.token_ids] == completion.token_ids
        assert len([e for p in mine for e in p.logprobs]) == len(completion.token_ids)
        assert mine[-1].finish_reason == completion.finish_reason
    assert [p.usage is not None for p in pieces].index(True) == len(pieces) - 1
    assert pieces[-1].usage.prompt_tokens == 3


def test_a_stream_of_messages_is_a_chat(llm):
    talk = [{"role": "user", "content": "Hello"}]
    text = "".join(piece.text for piece in llm.stream(talk, GREEDY))
    assert text == llm.chat(talk, GREEDY, use_tqdm=False)[0].outputs[0].text


def test_streams_interleave_with_each_other_and_with_generate(llm):
    expected = [o.outputs[0].token_ids for o in llm.generate(["a", "b", "c"], GREEDY, use_tqdm=False)]
    first, second = llm.stream("a", GREEDY), llm.stream("b", GREEDY)
    got = [[], []]
    for turn in range(3):
        got[0] += next(first).token_ids
        got[1] += next(second).token_ids
        if turn == 1:
            assert llm.generate("c", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected[2]
    for tokens, stream in zip(got, (first, second), strict=True):
        for piece in stream:
            tokens += piece.token_ids
    assert got == expected[:2]


def test_closing_a_stream_aborts_its_request_alone(llm):
    kept, dropped, unread = llm.stream("a", GREEDY), llm.stream("b", GREEDY), llm.stream("c", GREEDY)
    next(kept), next(dropped)
    dropped.close()
    unread.close()
    assert len(llm.replies) == 1
    assert len(list(kept)) == 11
    next(llm.stream("a", GREEDY))  # nobody keeps this one


def test_a_stream_is_checked_before_it_is_read(llm):
    for prompt, params, more, words in (
        ("", GREEDY, {}, "prompt is empty"),
        ([1, -1], GREEDY, {}, "got -1"),
        ("x" * 255, GREEDY, {}, "256 tokens and the context is 256"),
        ("x", {"temperature": 0}, {}, "must be a SamplingParams, got dict"),
        ("x", [GREEDY, GREEDY], {}, "must be a SamplingParams, got list"),
        ("x", SamplingParams(stop_token_ids=[10**6]), {}, "stop_token_ids must hold"),
        ("x", GREEDY, {"lora": "style"}, "no adapter named 'style'"),
        ("x", GREEDY, {"tools": [{"name": "f"}]}, "tools and tool_choice need a conversation"),
        ([{"role": "no role", "content": "x"}], GREEDY, {}, "role must be"),
    ):
        with pytest.raises(ValueError, match=words):
            llm.stream(prompt, params, **more)


def test_what_the_engine_refuses_is_refused_by_the_call(folder, monkeypatch):
    llm = LLM(folder, num_blocks=4, max_num_seqs=2)  # 64 tokens for a context of 256
    for prompt in ("x" * 100, [{"role": "user", "content": "x" * 100}]):
        with pytest.raises(ValueError, match=r"can never run: the KV cache holds 64 tokens"):
            llm.stream(prompt, GREEDY)
    assert not llm.engine.has_unfinished and not len(llm.replies)
    monkeypatch.setattr(llm.engine, "_death", "the engine is dead: of this test")
    with pytest.raises(EngineDeadError, match="of this test"):
        llm.stream("x", GREEDY)


def test_a_stream_runs_from_the_call_on(llm):
    expected = llm.generate("a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    stream = llm.stream("a", GREEDY)
    llm.generate("b", GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished
    assert [token for piece in stream for token in piece.token_ids] == expected
    assert next(stream, None) is None
    unread = llm.stream("a", GREEDY)
    assert llm.engine.has_unfinished
    del unread
    assert not llm.engine.has_unfinished


def test_nothing_comes_of_a_closed_stream(llm):
    stream = llm.stream("a", SamplingParams(n=2, max_tokens=4))
    next(stream)  # and the other completion's piece is there already
    stream.close()
    stream.close()
    assert list(stream) == []


def test_a_failure_ends_the_stream_that_met_it(llm, monkeypatch):
    stream = llm.stream("a", GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(llm.replies, "step", lambda **_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
    assert list(stream) == [] and not len(llm.replies)


@pytest.fixture
def interrupted():
    """Ctrl-C raises KeyboardInterrupt also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupted")
def test_an_interrupt_aborts_after_the_step_and_leaves_the_engine_usable(llm, monkeypatch):
    expected = llm.generate("a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    steps = []

    def step(really=llm.engine.step):
        steps.append(len(steps))
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
            steps.append("the step went on")
        return really()

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", step)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert steps == [0, 1, 2, "the step went on"] and signal.getsignal(signal.SIGINT) is before
    assert not llm.engine.has_unfinished
    assert llm.generate("a", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_no_progress_bar_where_stderr_is_no_terminal(llm, capsys, monkeypatch):
    llm.generate(["a", "b"], GREEDY)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    llm.generate(["a", "b"], GREEDY)
    assert "2/2" in capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_stop_string_that_is_a_control_token_stops_at_its_id(llm, ignore_eos):
    special = llm.tokenizer.special_tokens
    for text, ends in (("<|eot_id|>", True), ("<|python_tag|>", True), ("<|eom_id|>", False)):
        token = special[text]
        bias = {token: 100} if ends else {special["<|eot_id|>"]: 100}
        params = SamplingParams(logit_bias=bias, stop=["zq", text], ignore_eos=ignore_eos, max_tokens=6, temperature=0)
        for include in (False, True):
            params = dataclasses.replace(params, include_stop_str_in_output=include, min_tokens=2)
            output = llm.generate("Hi", params, use_tqdm=False)[0].outputs[0]
            pieces = list(llm.stream("Hi", params))
            assert "".join(piece.text for piece in pieces) == output.text
            if ends:
                assert (output.finish_reason, output.stop_reason) == ("stop", text)
                assert output.token_ids.index(token) == len(output.token_ids) - 1 == 2
                assert output.text.endswith(text) is include
            else:
                assert output.stop_reason is None


def test_a_stop_string_with_a_control_token_inside_is_refused(llm):
    with pytest.raises(ParameterError, match=r"'a<.eot_id.>' holds the control token .*give it alone") as caught:
        llm.generate("Hi", SamplingParams(stop=["ok", "a<|eot_id|>"]), use_tqdm=False)
    assert caught.value.param == "stop"


class Cycle:
    """Only the garbage collector finds it."""

    def __init__(self, stream):
        self.itself, self.stream = self, stream


def test_a_stream_that_the_garbage_collector_ends_inside_a_step_touches_no_other(llm, monkeypatch):
    params = SamplingParams(seed=3, max_tokens=12, ignore_eos=True)
    alone = llm.generate("neighbour", params, use_tqdm=False)[0].outputs[0]
    launch, update, dropped = llm.engine.runner.launch, llm.engine.scheduler.update, []
    gc.disable()
    try:

        def collecting(inner):
            def call(*arguments):
                if dropped:
                    dropped.pop()
                    assert gc.collect()
                return inner(*arguments)

            return call

        monkeypatch.setattr(llm.engine.runner, "launch", collecting(launch))
        monkeypatch.setattr(llm.engine.scheduler, "update", collecting(update))
        for at in range(1, 9):
            mine = llm.stream("neighbour", params)
            others = [Cycle(llm.stream(f"other {i}", params)) for i in range(3)]
            for each in others:
                next(each.stream)
            pieces = []
            for i, piece in enumerate(mine):
                pieces.append(piece)
                if i == at:
                    others = dropped.append(None)
            assert [token for piece in pieces for token in piece.token_ids] == alone.token_ids
            assert not llm.engine.has_unfinished and not len(llm.replies)
    finally:
        gc.enable()


def test_a_stream_that_is_dropped_while_another_thread_steps_does_not_wait(llm, monkeypatch):
    """The collector may run in a thread that holds a lock for which that step waits: a log's, say."""
    step, is_in, may_end = llm.engine.step, threading.Event(), threading.Event()

    def slow_step():
        is_in.set()
        assert may_end.wait(60)
        return step()

    left, kept = llm.stream("left", GREEDY), llm.stream("kept", GREEDY)
    monkeypatch.setattr(llm.engine, "step", slow_step)
    reader = threading.Thread(target=lambda: pieces.extend(kept))
    pieces = []
    reader.start()
    assert is_in.wait(60)
    dropper = threading.Thread(target=left.__del__)
    dropper.start()
    dropper.join(5)
    waits = dropper.is_alive()
    may_end.set()
    reader.join(60)
    dropper.join(60)
    assert not waits
    monkeypatch.undo()
    expected = llm.generate("kept", GREEDY, use_tqdm=False)[0].outputs[0]
    assert [token for piece in pieces for token in piece.token_ids] == expected.token_ids
    assert not llm.engine.has_unfinished and not len(llm.replies)
