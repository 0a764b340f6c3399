"""Benchmarks of the host's time run, and count what a step launches; a device's time begins behind the host's."""

import json
from types import SimpleNamespace

import torch

from benchmarks import host
from benchmarks.decode_gpu import DeviceClock


def test_it_counts_the_launches_of_a_step(capsys):
    host.main(["--layers", "2", "--batches", "1", "3", "--steps", "2"])
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)["results"]
    assert len(lines) == len(results) == 4
    # Two norms, rope, attention, its merge and the activation in each layer, one norm behind them, and the sampler.
    assert {results[f"greedy {batch}"]["launches"] for batch in (1, 3)} == {2 * 6 + 1 + 2}
    assert {results[f"filtered {batch}"]["launches"] for batch in (1, 3)} == {2 * 6 + 1 + 5}
    assert all(found["median"] > 0 and found["n"] == 2 for found in results.values())


def test_the_clock_of_a_recorded_step_starts_with_its_copy(monkeypatch):
    told = []

    class Event:
        def __init__(self, enable_timing):
            self.recorded = None

        def record(self):
            self.recorded = len(told)

    class Inputs:
        def send(self):
            told.append("send")

    def launch(plan):
        told.append("host")
        runner._inputs.send()
        told.append("replay")
        return plan

    monkeypatch.setattr(torch.cuda, "Event", Event)
    model = SimpleNamespace(device=torch.device("cuda"))
    runner = SimpleNamespace(model=model, launch=launch, _inputs=Inputs())
    with DeviceClock(SimpleNamespace(runner=runner)) as clock:
        assert runner.launch("plan") == "plan"
    assert told == ["host", "send", "replay"]
    assert [(start.recorded, end.recorded) for start, end in clock.marks] == [(1, 3)]
    assert runner.launch is launch and "send" not in vars(runner._inputs)
