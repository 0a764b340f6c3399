"""scheduling_policy="priority": who runs first, who goes back to wait, and that no token changes."""

import pytest

from llama import LLM, SamplingParams
from llama.api.errors import ParameterError
from tests.engine.fakes import Driver
from tests.model.models import tiny_model


def test_a_lower_priority_runs_first_and_leaves_last():
    driver = Driver(num_blocks=8, max_num_seqs=2)
    late, usual, urgent = (driver.add([p + 5] * 12, SamplingParams(max_tokens=9, priority=p)) for p in (1, 0, -1))
    assert driver.step().rows.tolist() == [0, 1]
    scheduler = driver.scheduler
    assert [sequence.request_id for sequence in scheduler.running.decoding] == [urgent, usual]
    assert [sequence.request_id for sequence in scheduler.waiting] == [late]
    another = driver.add([7] * 12, SamplingParams(max_tokens=9, priority=-1))
    while scheduler.num_preemptions == 0:
        driver.step()
    assert [sequence.request_id for sequence in scheduler.running.decoding] == [urgent, another]
    assert [sequence.request_id for sequence in scheduler.waiting] == [usual, late]
    driver.drain()
    assert [name for name, _ in driver.ended] == [urgent, another, usual, late]


def test_priorities_change_the_order_and_no_token():
    model, tokens = tiny_model(), {}
    for policy in ("fcfs", "priority"):
        llm = LLM(model, num_blocks=64, max_num_seqs=1, seed=0, scheduling_policy=policy)
        params = [
            SamplingParams(seed=i, max_tokens=4, ignore_eos=True, priority=i * (policy != "fcfs") % 2) for i in range(4)
        ]
        outputs = llm.generate([[5 + i] * 9 for i in range(4)], params, use_tqdm=False)
        first = sorted(range(4), key=lambda i: outputs[i].metrics.first_token)
        assert first == ([0, 1, 2, 3] if policy == "fcfs" else [0, 2, 1, 3])
        tokens[policy] = [output.outputs[0].token_ids for output in outputs]
    assert tokens["fcfs"] == tokens["priority"]


def test_a_priority_is_refused_where_all_are_served_as_they_come():
    llm = LLM(tiny_model(), num_blocks=16)
    with pytest.raises(ParameterError, match="priority must be 0 where scheduling_policy is fcfs, got -1") as caught:
        llm.generate([5], SamplingParams(priority=-1), use_tqdm=False)
    assert caught.value.param == "priority"
