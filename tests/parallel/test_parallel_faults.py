"""Ranks that have less room, that hear slowly; and that all of them draw the same for a long time."""

import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from llama.api.params import SamplingParams
from llama.engine.wire import Message, receive
from llama.llm import rank
from tests.parallel.ranks import engine_on_ranks
from tests.parallel.test_parallel_engine import CONFIG, EOS, Every


def test_the_rank_with_the_least_room_decides(folder, monkeypatch, caplog):
    """And is named, if the others have much more."""
    plain = rank.fitting_blocks

    def half(*arguments):
        blocks = plain(*arguments)
        return blocks // 2 if threading.current_thread().name == "rank 1" else blocks

    monkeypatch.setattr(rank, "fitting_blocks", half)
    with engine_on_ranks(folder, replace(CONFIG, num_blocks=None, max_num_seqs=4)) as engine:
        assert engine.pool.num_blocks == 4 * 256 // 4 // 2
        assert engine.pool.num_blocks in engine.runner.own.kv.data.shape
    assert "rank 1 has room for 128 KV blocks, others for up to 256: the least decides" in caplog.text
    monkeypatch.setattr(rank, "fitting_blocks", lambda *arguments: plain(*arguments) - 1)
    caplog.clear()
    with engine_on_ranks(folder, replace(CONFIG, num_blocks=None, max_num_seqs=4)) as engine:
        assert engine.pool.num_blocks == 255 and not caplog.text


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_slow_reader_gets_every_message_in_order_and_whole(count):
    """Messages larger than the connection's buffers among thousands of small ones."""
    ours, theirs = socket.socketpair()
    sizes = [(i * 7919) % 300 if i % 500 else 1_000_000 for i in range(count)]
    found = []

    def read():
        while (message := receive(theirs)) is not None:
            array = message.arrays["numbers"]
            found.append((message.content["i"], len(array), int(array.sum())))
            if len(found) % 300 == 0:
                time.sleep(0.01)

    reader = threading.Thread(target=read)
    reader.start()
    for i, size in enumerate(sizes):
        ours.sendall(Message({"i": i}, {"numbers": np.full(size, 2, np.int32)}).encoded())
    ours.close()
    reader.join(300)
    assert found == [(i, size, 2 * size) for i, size in enumerate(sizes)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_draw_the_same_for_a_thousand_steps(folder, runners, size):
    """Seeds, penalties and a grammar; each step is compared by its checksum, and the last tokens are here."""
    config = replace(CONFIG, tensor_parallel_size=size, max_num_seqs=6)
    with engine_on_ranks(folder, config, frozenset({EOS})) as engine:
        steps = number = 0
        while steps < 1000:
            while len(engine.scheduler.running) + len(engine.scheduler.waiting) < 6:
                penalty = {"repetition_penalty": 1.3, "frequency_penalty": 0.4} if number % 3 == 0 else {}
                params = SamplingParams(temperature=1.0, seed=number, max_tokens=40 + number % 90, **penalty)
                matcher = {"new_matcher": Every} if number % 4 == 1 else {}
                engine.add(engine.request(str(number), [number % 97, 5, 7], params, **matcher))
                number += 1
            engine.step()
            steps += 1
        kept = engine.runner.own.last_tokens[:6]
        deadline = time.monotonic() + 10
        for runner in runners:
            while not kept.equal(runner.last_tokens[:6]):
                assert time.monotonic() < deadline
                time.sleep(0.01)
