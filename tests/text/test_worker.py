"""Whose fault it is that a worker process ended: only what the request itself did twice is the request's."""

import logging
import os
import signal
import threading
import time

import pytest

from llama.api.errors import WorkerLostError
from llama.text.sandbox import Worker, WorkerError, WorkerLimitError

PATIENCE = 60


def start(setup):
    """The other side: does what a request tells it to."""

    def handle(request):
        if request["do"] == "signal":
            os.kill(os.getpid(), request["signal"])
        if request["do"] == "exit":
            os._exit(3)
        if request["do"] == "spin":
            while True:
                pass
        if request["do"] == "dawdle":  # hardly any processor time, as on a machine that is busy with something else
            until = time.monotonic() + request["seconds"]
            while time.monotonic() < until:
                time.sleep(0.01)
        return os.getpid()

    return handle


@pytest.fixture
def worker():
    made = Worker(__name__, {}, deadline_seconds=0.5)
    yield made
    made.close()


def process_of(worker):
    return worker._process.pid


class Visitor:
    """Does something to each of the next `count` processes, once they have a request."""

    def __init__(self, worker, count, action):
        self.worker, self.count, self.action = worker, count, action
        self.seen = []
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self):
        latest = time.monotonic() + PATIENCE
        while len(self.seen) < self.count and time.monotonic() < latest:
            process = self.worker._process
            if self.worker._lock.locked() and process is not None and process.pid not in self.seen:
                self.seen.append(process.pid)
                time.sleep(0.05)  # it looks first whether its process has ended
                self.action(process.pid)
            time.sleep(0.005)


def killed(pid):
    os.kill(pid, signal.SIGKILL)


def stopped(pid):
    os.kill(pid, signal.SIGSTOP)


@pytest.mark.parametrize("action", [killed, stopped])
def test_a_request_whose_process_is_ended_is_tried_again(worker, caplog, action):
    first = worker.ask({"do": "nothing"})
    visitor = Visitor(worker, 1, action)
    with caplog.at_level(logging.WARNING):
        pid = worker.ask({"do": "dawdle", "seconds": 0.4})
    visitor.thread.join()
    assert visitor.seen == [first] != [pid] and worker.num_lost == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize("action", [killed, stopped])
def test_twice_the_systems_doing_is_not_the_requests_fault(worker, caplog, monkeypatch, action):
    monkeypatch.setattr("llama.text.sandbox.worker._START_SECONDS", 3.0)
    worker.ask({"do": "nothing"})
    visitor = Visitor(worker, 2, action)
    with caplog.at_level(logging.ERROR), pytest.raises(WorkerLostError, match="ask again") as raised:
        worker.ask({"do": "dawdle", "seconds": 1.5})
    visitor.thread.join()
    assert raised.value.retry_after > 0 and worker.num_lost == 2 and len(caplog.records) == 1
    assert worker.ask({"do": "nothing"}) == process_of(worker)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
def test_a_request_that_crashes_two_processes_is_at_fault(worker, number):
    with pytest.raises(WorkerLimitError, match="ended the process"):
        worker.ask({"do": "signal", "signal": number})
    assert worker.num_lost == 2
    with pytest.raises(WorkerError, match="ended the process"):
        worker.ask({"do": "exit"})


def test_only_the_processs_own_time_counts(worker):
    assert worker.ask({"do": "dawdle", "seconds": 1.2})
    with pytest.raises(WorkerLimitError, match=r"did not finish within 0\.5 s"):
        worker.ask({"do": "spin"})
    assert worker.num_lost == 0


def test_a_request_that_never_gets_its_time_does_not_wait_for_ever(worker, monkeypatch, caplog):
    monkeypatch.setattr("llama.text.sandbox.worker._PATIENCE", 4)
    with caplog.at_level(logging.ERROR), pytest.raises(WorkerLostError):
        worker.ask({"do": "dawdle", "seconds": 1000})
    assert worker.num_lost == 1 and "too busy" in caplog.text


def test_a_stopped_process_that_does_not_read_holds_nobody(worker):
    """The request is larger than a pipe, so that writing it would wait for ever."""
    text = "x" * 100_000
    pid = worker.ask({"do": "nothing"})
    stopped(pid)
    assert worker.ask({"do": "nothing", "text": text}) != pid


def test_a_process_that_died_between_two_requests_is_replaced(worker):
    pid = worker.ask({"do": "nothing"})
    killed(pid)
    worker._process.wait()
    assert worker.ask({"do": "nothing"}) != pid
    assert worker.num_lost == 1


def test_no_room_for_a_process(worker, monkeypatch):
    import subprocess

    def refuse(*arguments, **options):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patched, pytest.raises(WorkerLostError):
        patched.setattr(subprocess, "Popen", refuse)
        worker.ask({"do": "nothing"})
    assert worker.ask({"do": "nothing"})
