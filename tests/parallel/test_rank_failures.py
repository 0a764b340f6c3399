"""A rank that dies or raises, at any point of its life, is named at once; and what each takes of the memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llama import LLM
from llama.api.errors import EngineDeadError
from llama.engine.parallel_runner import RankLostError
from llama.llm import ranks as ranks_module
from tests.model.models import tiny_model
from tests.parallel.test_rank_processes import (
    GREEDY,
    PROMPT,
    SMALL,
    children_of,
    environment,
    is_gone,
    processes_of,
    started,
    wait_until,
)
from tests.parallel.test_rank_processes import folder as folder

BROKEN = """
    import llama.llm.rank as broken
    broken.{name} = lambda *_, **__: {action}
    try:
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Shard", "Communicator", "load_model", "fitting_blocks", "make_runner"])
def test_a_rank_that_dies_before_the_first_step_is_named_at_once(folder, monkeypatch, tmp_path, name):
    """Also one that the others wait for where they meet."""
    program = tmp_path / "rank_process.py"
    text = Path(ranks_module._PROGRAM).read_text()
    at, action = "    try:\n        from llama.llm.rank import serve", "os._exit(7)"
    assert at in text
    program.write_text(text.replace(at, BROKEN.format(name=name, action=action).strip("\n") + at[8:]))
    monkeypatch.setattr(ranks_module, "_PROGRAM", program)
    before = children_of(os.getpid())
    began = time.monotonic()
    with pytest.raises(RankLostError, match=r"rank 1 \(process [0-9]+\) ended with exit code 7"):
        LLM(folder, **{name: value for name, value in SMALL.items() if name != "num_blocks"})
    assert time.monotonic() - began < 60
    wait_until(lambda: children_of(os.getpid()) == before, 10)


FAILING = """
    import itertools
    import llama.llm.rank as failing
    plain = failing.make_runner
    def make(*arguments):
        runner, calls = plain(*arguments), itertools.count()
        module = runner.model.get_submodule({module!r})
        forward = module.forward
        module.forward = lambda *rest: 1 / 0 if next(calls) else forward(*rest)
        return runner
    failing.make_runner = make
    try:
"""


@pytest.mark.slow
@pytest.mark.parametrize("module", ["embed_tokens", "layers.1.mlp", "lm_head"])
def test_an_exception_in_a_step_ends_the_engine_and_is_named(folder, monkeypatch, tmp_path, module):
    """Before, between and after the sums that the other rank waits in; on rank 1, then on rank 0."""
    program = tmp_path / "rank_process.py"
    text = Path(ranks_module._PROGRAM).read_text()
    at = "    try:\n        from llama.llm.rank import serve"
    program.write_text(text.replace(at, FAILING.format(module=module).strip("\n") + at[8:]))
    for whose in (1, 0):
        with monkeypatch.context() as patch:
            if whose == 1:
                patch.setattr(ranks_module, "_PROGRAM", program)
            llm = LLM(folder, **SMALL)
        pids = [process.pid for process in processes_of(llm)]
        if whose == 0:
            llm.model.get_submodule(module).forward = lambda *rest: 1 / 0
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match=f"rank {whose}: ZeroDivisionError"):
            llm.generate(PROMPT, GREEDY, use_tqdm=False)
        assert time.monotonic() - began < 15
        wait_until(lambda pids=pids: all(map(is_gone, pids)), 10)


HOLDING = """
from pathlib import Path
from llama import LLM, SamplingParams
from llama.llm import ranks
ranks._PROGRAM = Path({program!r})
llm = LLM({folder!r}, num_blocks=16, max_model_len=256, tensor_parallel_size=2)
print("ready", flush=True)
llm.generate({{"prompt_token_ids": [1, 2, 3]}}, SamplingParams(max_tokens=8), use_tqdm=False)
"""


@pytest.mark.slow
def test_a_rank_whose_threads_cannot_run_ends_with_rank_0_too(folder, tmp_path):
    """In a call that holds the interpreter's lock."""
    program = tmp_path / "rank_process.py"
    text = Path(ranks_module._PROGRAM).read_text()
    at = "    try:\n        from llama.llm.rank import serve"
    held = FAILING.format(module="lm_head").replace("1 / 0", "__import__('ctypes').PyDLL(None).sleep(60)")
    held = held.replace(" if next(calls) else forward(*rest)", "")
    program.write_text(text.replace(at, held.strip("\n") + at[8:]))
    command = [sys.executable, "-c", HOLDING.format(program=str(program), folder=folder)]
    with started(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        [rank] = children_of(process.pid)
        time.sleep(2)  # by then the rank is in that call
        process.kill()
        try:
            wait_until(lambda: is_gone(rank), 5)
        finally:
            if not is_gone(rank):
                os.kill(rank, signal.SIGKILL)


LOAD = """
import sys
from llama import LLM
size = int(sys.argv[2])
llm = LLM(sys.argv[1], num_blocks=16, max_model_len=256, tensor_parallel_size=size)
pid = "self" if size == 1 else llm.engine.runner._peers._state.peers[0].process.pid
status = open(f"/proc/{pid}/status").read()
print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_a_rank_takes_its_share_of_the_memory(folder, tmp_path):
    """The most that its process ever had, over what it has with a model of no size: half of it, and a little."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "head_dim": 256}
    tiny_model(dtype=torch.float32, **sizes).save_pretrained(tmp_path / "large")

    def peak(model, size):
        command = [sys.executable, "-c", LOAD, str(model), str(size)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=300)
        return int(done.stdout)

    whole = peak(tmp_path / "large", 1) - peak(folder, 1)
    part = peak(tmp_path / "large", 2) - peak(folder, 2)
    assert 0.3 * whole < part < 0.75 * whole
