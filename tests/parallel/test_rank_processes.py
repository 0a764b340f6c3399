"""Ranks as processes: they start wherever Python runs, and none outlives what it was started for."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llama import LLM, AsyncLLM, SamplingParams
from llama.api.errors import EngineDeadError
from llama.engine.parallel_runner import RankLostError
from llama.llm import ranks as ranks_module
from tests.model.models import tiny_model

REPOSITORY = Path(__file__).parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(max_tokens=200, ignore_eos=True)
SMALL = {"num_blocks": 400, "max_num_seqs": 32, "max_model_len": 256, "tensor_parallel_size": 2}
PROMPT = {"prompt_token_ids": [1, 2, 3]}
SCRIPT = """
from llama import LLM, SamplingParams
llm = LLM({folder!r}, num_blocks=64, max_model_len=256, tensor_parallel_size=2)
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
print(llm.generate({{"prompt_token_ids": [1, 2, 3]}}, params, use_tqdm=False)[0].outputs[0].token_ids)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def expected(folder):
    options = SMALL | {"tensor_parallel_size": 1}
    return LLM(folder, **options).generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def processes_of(llm) -> list[subprocess.Popen]:
    return [peer.process for peer in llm.engine.runner._peers._state.peers]


def children_of(pid: int) -> list[int]:
    """Rank processes alive whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            state, parent = status.rpartition(")")[2].split()[:2]
            if int(parent) == pid and b"rank_process.py" in command and state != "Z":
                found.append(int(entry.name))
    return found


def wait_until(is_so, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def environment(**more) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | more


def test_two_ranks_answer_as_one_process_and_a_killed_one_ends_the_engine(folder, expected):
    llm = LLM(folder, **SMALL)
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
    for call, what in (
        (lambda: llm.update_weights([]), "update_weights"),
        (lambda: llm.save_prefix(PROMPT, "never.safetensors"), "a kept prefix"),
        (lambda: llm.model.session(8), "session"),
    ):
        with pytest.raises(ValueError, match=f"{what} needs the whole model in one process"):
            call()
    [process] = processes_of(llm)
    stream = llm.stream(PROMPT, LONG)
    next(stream)
    process.kill()
    started = time.monotonic()
    with pytest.raises(EngineDeadError, match=rf"rank 1 \(process {process.pid}\) was ended by SIGKILL"):
        for _ in stream:
            pass
    assert time.monotonic() - started < 10
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        llm.generate(PROMPT, GREEDY, use_tqdm=False)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_stream_ends_with_an_error_when_any_rank_is_killed(folder, size):
    async def crowd(victim):
        async with AsyncLLM(folder, **SMALL | {"tensor_parallel_size": size}) as llm:
            streams = [await llm.submit(PROMPT, LONG) for _ in range(20)]
            pids = [process.pid for process in processes_of(llm.llm)]
            async for _ in streams[0]:
                break
            os.kill(pids[victim], signal.SIGKILL)
            found = await asyncio.wait_for(asyncio.gather(*(s.result() for s in streams), return_exceptions=True), 10)
            assert all(isinstance(error, EngineDeadError) and "was ended by SIGKILL" in str(error) for error in found)
            wait_until(lambda: all(map(is_gone, pids)), 5)

    for victim in range(size - 1):
        asyncio.run(crowd(victim))


@pytest.mark.slow
def test_an_idle_engine_hears_of_a_killed_rank(folder):
    async def idle():
        async with AsyncLLM(folder, **SMALL) as llm:
            processes_of(llm.llm)[0].kill()
            wait_until(lambda: llm.is_dead, 10)
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await llm.submit(PROMPT, GREEDY)

    asyncio.run(idle())


@pytest.mark.slow
def test_a_stopped_rank_is_given_up_after_its_silence(folder):
    llm = LLM(folder, **SMALL)
    [process] = processes_of(llm)
    process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(EngineDeadError, match="rank 1 has given no sign of life for 15 seconds"):
        llm.generate(PROMPT, LONG, use_tqdm=False)
    assert 10 < time.monotonic() - started < 25
    assert process.poll() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "-c", "stdin"])
def test_ranks_start_from_anything_that_runs_python(folder, expected, tmp_path, how):
    """No guard around the script's main part; and what an outer torchrun or Slurm left behind is no matter."""
    text = SCRIPT.format(folder=folder)
    (tmp_path / "script.py").write_text(text)
    arguments = {"script": [str(tmp_path / "script.py")], "-c": ["-c", text], "stdin": ["-"]}[how]
    left_over = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    options = {"capture_output": True, "text": True, "env": environment(**left_over), "cwd": tmp_path, "timeout": 300}
    done = subprocess.run([sys.executable, *arguments], input=text, check=False, **options)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


WAITING = """
import sys, time
from llama import LLM, SamplingParams
llm = LLM({folder!r}, num_blocks=400, max_num_seqs=32, max_model_len=256, tensor_parallel_size=4)
stream = llm.stream({{"prompt_token_ids": [1, 2, 3]}}, SamplingParams(max_tokens=200, ignore_eos=True))
next(stream)
print("ready", flush=True)
while {busy}:
    for _ in llm.stream({{"prompt_token_ids": [1, 2, 3]}}, SamplingParams(max_tokens=200, ignore_eos=True)): pass
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True])
def test_no_rank_outlives_rank_0(folder, busy, sent):
    text = WAITING.format(folder=folder, busy=busy)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "process_group": 0}
    with subprocess.Popen([sys.executable, "-c", text], env=environment(), **options) as process:
        assert process.stdout.readline() == "ready\n"
        pids = children_of(process.pid)
        assert len(pids) == 3
        # Ctrl-C goes to the whole group, as a terminal sends it.
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.kill()
        _, err = process.communicate(timeout=60)
        wait_until(lambda: all(map(is_gone, pids)), 10)
        assert process.returncode != 0
        assert err.count("KeyboardInterrupt") == (sent == signal.SIGINT), err


@pytest.mark.slow
def test_a_rank_that_cannot_load_is_named(folder, monkeypatch, tmp_path):
    program = tmp_path / "rank_process.py"
    text = Path(ranks_module._PROGRAM).read_text()
    broken = "from llama.model import checkpoint; checkpoint.Checkpoint.load = lambda *_, **__: 1 / 0\n        serve("
    program.write_text(text.replace("serve(", broken, 1).replace("import serve  #", "import serve as serve  #"))
    monkeypatch.setattr(ranks_module, "_PROGRAM", program)
    before = children_of(os.getpid())
    with pytest.raises(RankLostError, match="rank 1: ZeroDivisionError: division by zero"):
        LLM(folder, **SMALL)
    wait_until(lambda: children_of(os.getpid()) == before, 10)


@pytest.mark.slow
def test_ranks_live_on_when_the_thread_that_made_them_ends(folder, expected):
    made = []
    thread = threading.Thread(target=lambda: made.append(LLM(folder, **SMALL)))
    thread.start()
    thread.join()
    time.sleep(2)
    assert made[0].generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


@pytest.mark.slow
def test_starts_and_stops_leave_nothing(folder, expected):
    shared, before = set(os.listdir("/dev/shm")), children_of(os.getpid())
    descriptors = len(os.listdir("/proc/self/fd"))
    for i in range(12):
        llm = LLM(folder, **SMALL)
        assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
        if i % 2:
            llm.close()
            with pytest.raises(EngineDeadError, match="closed"):
                llm.generate(PROMPT, GREEDY, use_tqdm=False)
        del llm
        gc.collect()
        assert children_of(os.getpid()) == before
    # Other programs of the machine come and go: theirs are semaphores of multiprocessing, which ranks do not use.
    assert {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")} <= shared
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 12
