"""Signals that raise take effect between steps and leave engine and handlers as they were."""

import signal
import threading

import pytest

from llama import LLM, SamplingParams
from llama.llm.interrupts import SIGNALS, interrupts_held
from tests.model.models import hugging_face_weights, tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = list(range(33))


class LateError(Exception):
    pass


def late(number, frame):
    raise LateError(number)


@pytest.fixture(autouse=True)
def handlers():
    """Ctrl-C raises KeyboardInterrupt also where the tests run in the background, which ignores it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = dict.fromkeys(SIGNALS, late) | {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in mine.items():
        signal.signal(number, handler)
    yield
    after = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == mine


@pytest.fixture(scope="module")
def runs():
    return LLM(tiny_model(), block_size=4, num_blocks=60)


def raising(monkeypatch, target, name, number):
    """Have `number` come while target.name works -> what happened there."""
    happened, really = [], getattr(target, name)

    def work(*args, **kwargs):
        if not happened:
            happened.append("began")
            signal.raise_signal(number)
            happened.append("went on")
        return really(*args, **kwargs)

    monkeypatch.setattr(target, name, work)
    return happened


def is_as_before(runs):
    runs.engine.check()
    assert not runs.engine.has_unfinished and not len(runs.replies)
    assert runs.engine.pool.num_used == 0
    assert len(runs.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6


NUMBERS = [number for number in SIGNALS if number != signal.SIGHUP]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_in_a_step_takes_effect_behind_it(runs, monkeypatch, number):
    with monkeypatch.context() as patch:
        happened = raising(patch, runs.engine, "step", number)
        with pytest.raises((LateError, KeyboardInterrupt)):
            runs.generate([PROMPT, PROMPT[:9]], GREEDY, use_tqdm=False)
    assert happened == ["began", "went on"]
    is_as_before(runs)


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGINT])
def test_a_time_limit_in_the_model_is_no_failure_of_the_model(runs, monkeypatch, number):
    with monkeypatch.context() as patch:
        happened = raising(patch, runs.model, "hidden", number)
        stream = runs.stream(PROMPT, GREEDY)
        with pytest.raises((LateError, KeyboardInterrupt)):
            next(stream)
    assert happened == ["began", "went on"] and list(stream) == []
    is_as_before(runs)


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGINT])
def test_blocks_of_a_prefix_that_is_loaded_meanwhile_are_not_lost(runs, monkeypatch, tmp_path, number):
    runs.save_prefix(PROMPT, tmp_path / "prefix")
    runs.reset_prefix_cache()
    for name in ("allocate", "publish", "free"):
        with monkeypatch.context() as patch:
            happened = raising(patch, runs.engine.pool, name, number)
            with pytest.raises((LateError, KeyboardInterrupt)):
                runs.load_prefix(tmp_path / "prefix")
        assert happened == ["began", "went on"]
        assert runs.engine.pool.num_used == 0 and runs.engine.pool.num_cached == 8
        assert runs.reset_prefix_cache()
    is_as_before(runs)


def test_what_comes_while_a_request_is_aborted_waits(runs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs.engine, "step", lambda: late(0, None))
        happened = raising(patch, runs.engine, "abort", signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            runs.generate([PROMPT, PROMPT[:9]], GREEDY, use_tqdm=False)
        assert happened == ["began", "went on"]
    is_as_before(runs)
    stream = runs.stream(PROMPT, GREEDY)
    next(stream)
    with monkeypatch.context() as patch:
        happened = raising(patch, runs.engine, "abort", signal.SIGALRM)
        with pytest.raises(LateError):
            stream.close()
    assert happened == ["began", "went on"]
    is_as_before(runs)


def test_while_a_caller_makes_new_weights_signals_take_effect_at_once():
    runs, happened = LLM(tiny_model(), block_size=4, num_blocks=60), []

    def made():
        yield from hugging_face_weights(tiny_model()).items()
        signal.raise_signal(signal.SIGINT)
        happened.append("went on")

    with pytest.raises(KeyboardInterrupt):
        runs.update_weights(made())
    assert not happened
    is_as_before(runs)


def test_all_that_have_come_take_effect_and_a_ctrl_c_is_not_hidden():
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    with pytest.raises(KeyboardInterrupt) as caught, interrupts_held():
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGALRM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert not seen
    assert isinstance(caught.value.__context__, LateError) and seen == [signal.SIGUSR1]
    signal.signal(signal.SIGUSR1, late)


def test_blocks_in_one_another_end_with_the_outermost():
    happened = []
    with pytest.raises(LateError), interrupts_held() as held:
        with interrupts_held():
            signal.raise_signal(signal.SIGALRM)
            happened.append("inside")
        happened.append("outside")
        held.deliver()
        happened.append("never")
    assert happened == ["inside", "outside"]


def test_handlers_come_back_though_one_raises_meanwhile(monkeypatch):
    def put_back(number, handler, really=signal.signal):
        before = really(number, handler)
        if handler is late and number == signal.SIGALRM:
            signal.raise_signal(signal.SIGALRM)
        return before

    monkeypatch.setattr(signal, "signal", put_back)
    with pytest.raises(LateError), interrupts_held():
        pass


def test_another_thread_holds_nothing():
    found = []

    def work():
        with interrupts_held() as held:
            held.deliver()
            found.append(signal.getsignal(signal.SIGALRM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [late]
