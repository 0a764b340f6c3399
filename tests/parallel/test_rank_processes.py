"""Ranks as processes: they start wherever Python runs, and none outlives what it was started for."""

import asyncio
import contextlib
import gc
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from llama import LLM, AsyncLLM, SamplingParams
from llama.api.errors import EngineDeadError, ParameterError
from llama.llm import torchrun
from tests.model.models import tiny_model
from tests.tiny_checkpoint import make_model

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


OTHER_FILES = """
import gc, os
from llama import LLM
llm = LLM({folder!r}, num_blocks=16, max_model_len=256, tensor_parallel_size=2)
pipes = [os.pipe() for _ in range(64)]  # they get the numbers of descriptors that were closed
del llm
gc.collect()
print("alive")
"""


@pytest.mark.slow
def test_an_engine_that_goes_leaves_the_files_alone_that_came_after_it(folder):
    """Where the ranks met is looked at once more, when their groups go."""
    command = [sys.executable, "-c", OTHER_FILES.format(folder=folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.fixture(scope="module")
def expected(folder):
    options = SMALL | {"tensor_parallel_size": 1}
    return LLM(folder, **options).generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def processes_of(llm) -> list[subprocess.Popen]:
    return [peer.process for peer in llm.engine.runner._peers._state.peers]


def children_of(pid: int, program: bytes = b"rank_process.py") -> list[int]:
    """Processes alive that run this program and whose parent is `pid`: ranks, unless it is another."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:
                continue
            state, parent = status.rpartition(")")[2].split()[:2]
            if int(parent) == pid and program in command and state != "Z":
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


def shared_memory_of(pid: int) -> set[str]:
    """What a process has in /dev/shm, open or mapped. What is there no longer by name is not left behind."""
    found = set()
    with contextlib.suppress(OSError):
        for line in (Path("/proc") / str(pid) / "maps").read_text().splitlines():
            if not line.endswith("(deleted)"):
                found |= {word for word in line.split() if word.startswith("/dev/shm/")}
        for entry in (Path("/proc") / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(entry)
                if target.startswith("/dev/shm/") and not target.endswith("(deleted)"):
                    found.add(target)
    return found


def ports_of(pid: int) -> int:
    """How many TCP ports a process listens on."""
    links = []
    for entry in (Path("/proc") / str(pid) / "fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(f"socket:[{row[9]}]" in links for row in rows if row[3] == "0A")


def environment(**more) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | more


@contextlib.contextmanager
def started(command, **options):
    """A process that a test may leave running where it fails."""
    with subprocess.Popen(command, env=environment(), **options) as process:
        try:
            yield process
        finally:
            process.kill()


def test_two_ranks_answer_as_one_process_and_a_killed_one_ends_the_engine(folder, expected):
    llm = LLM(folder, **SMALL)
    assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
    for call, what in (
        (lambda: llm.save_prefix(PROMPT, "never.safetensors"), "a kept prefix"),
        (lambda: llm.load_prefix("never.safetensors"), "a kept prefix"),
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
    assert process.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "-c", "stdin", "-i"])
def test_ranks_start_from_anything_that_runs_python(folder, expected, tmp_path, how):
    """No guard around the script's main part; and what an outer torchrun or Slurm left behind is no matter."""
    text = SCRIPT.format(folder=folder)
    (tmp_path / "script.py").write_text(text)
    arguments = {"script": [str(tmp_path / "script.py")], "-c": ["-c", text], "stdin": ["-"], "-i": ["-i"]}[how]
    left_over = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
    options = {"capture_output": True, "text": True, "env": environment(**left_over), "cwd": tmp_path, "timeout": 300}
    done = subprocess.run([sys.executable, *arguments], input=text, check=False, **options)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


UNINSTALLED = """
import os, sys
sys.path[:] = ["", *(path for path in sys.path if path and not os.path.isdir(os.path.join(path, "llama")))]
"""


@pytest.mark.slow
def test_ranks_find_what_rank_0_has_from_its_working_directory(folder, expected):
    """As a notebook does in a clone that is not installed."""
    options = {"capture_output": True, "text": True, "env": environment(PYTHONPATH=""), "cwd": REPOSITORY}
    done = subprocess.run([sys.executable, "-c", UNINSTALLED + SCRIPT.format(folder=folder)], check=False, **options)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


@pytest.mark.slow
def test_ranks_meet_where_the_name_of_the_machine_means_nothing(folder, expected):
    """Nor what others use to find a network."""
    renamed = ["unshare", "--map-root-user", "--uts", "sh", "-c", 'hostname no.such.host && exec "$0" "$@"']
    if shutil.which("unshare") is None or subprocess.run([*renamed, "true"], check=False).returncode:
        pytest.skip("needs namespaces of its own for a name of its own")
    command = [*renamed, sys.executable, "-c", SCRIPT.format(folder=folder)]
    options = {"capture_output": True, "text": True, "env": environment(GLOO_SOCKET_IFNAME="none0"), "timeout": 300}
    done = subprocess.run(command, check=False, **options)
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


@pytest.mark.slow
def test_torchrun_starts_the_ranks_and_rank_0_has_the_user(folder, expected, tmp_path):
    """The others serve where they make their LLM, and end with rank 0, be it by an error."""
    (tmp_path / "script.py").write_text(SCRIPT.format(folder=folder) + "import sys; sys.exit(int(sys.argv[1]))\n")
    for code in (0, 3):
        arguments = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "script.py"), str(code)]
        options = {"capture_output": True, "text": True, "env": environment(), "cwd": tmp_path, "timeout": 300}
        done = subprocess.run([sys.executable, *arguments], check=False, **options)
        assert done.stdout == f"{expected}\n", done.stderr
        assert (done.returncode == 0) == (code == 0)


def test_what_an_outer_job_left_behind_is_no_torchrun(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert torchrun.rank_of_this(2) is None
    monkeypatch.setattr(torchrun, "_is_started_by_torchrun", lambda: True)
    assert torchrun.rank_of_this(2) == 1
    assert torchrun.rank_of_this(4) is None
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ParameterError, match="ranks are processes of one machine, got RANK=1 with LOCAL_RANK=0"):
        torchrun.rank_of_this(2)
    monkeypatch.delenv("RANK")
    assert torchrun.rank_of_this(2) is None


# A shell's background jobs, and all that they start, ignore Ctrl-C.
WAITING = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
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
@pytest.mark.parametrize("state", ["loading", "idle", "busy"])
def test_no_rank_outlives_rank_0(folder, state, sent):
    text = WAITING.format(folder=folder, busy=state == "busy")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "process_group": 0}
    with started([sys.executable, "-c", text], **options) as process:
        if state == "loading":
            wait_until(lambda: len(children_of(process.pid)) == 3, 300)
            time.sleep(random.uniform(0, 3))
        else:
            assert process.stdout.readline() == "ready\n"
        pids = children_of(process.pid)
        assert len(pids) == 3
        assert not any(map(shared_memory_of, [process.pid, *pids]))
        # Ctrl-C goes to the whole group, as a terminal sends it.
        os.killpg(process.pid, sent) if sent == signal.SIGINT else process.kill()
        _, err = process.communicate(timeout=60)
        wait_until(lambda: all(map(is_gone, pids)), 10)
        assert process.returncode != 0
        assert err.count("KeyboardInterrupt") == (sent == signal.SIGINT), err
        assert "rank" not in err.replace("rank_process", "").partition("Traceback")[0], err


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_whose_rank_is_killed_ends_with_an_error_for_all(victim, tmp_path):
    """20 requests stream; within 10 seconds all have ended, the exit code is not 0, and no process is left."""
    options = ("--port", "0", "--num-blocks", "400", "-tp", "2", "--no-access-log")
    code = "import sys; from llama.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", make_model(tmp_path), *options]
    with started(command, stderr=subprocess.PIPE, text=True) as process:
        lines = iter(process.stderr.readline, "")
        url = next(line for line in lines if "serving" in line).split()[-1]
        [rank] = children_of(process.pid)
        body = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
        ended, all_stream = [], threading.Barrier(21)

        def ask():
            said = ""
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("POST", f"{url}/v1/completions", json=body) as answer,
            ):
                for line in answer.iter_lines():
                    if not said:
                        all_stream.wait(300)
                    said += line
            ended.append("[DONE]" not in said or "error" in said)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(20)]
        for thread in threads:
            thread.start()
        all_stream.wait(300)
        os.kill(process.pid if victim == 0 else rank, signal.SIGKILL)
        killed = time.monotonic()
        for thread in threads:
            thread.join(max(0.0, killed + 10 - time.monotonic()))
        assert ended == [True] * 20
        assert process.wait(30) == (-signal.SIGKILL if victim == 0 else os.EX_SOFTWARE)
        wait_until(lambda: is_gone(rank), 5)


@pytest.mark.slow
def test_engines_that_start_at_once_do_not_meet_one_another(folder, expected, monkeypatch):
    for name, value in {"MASTER_ADDR": "nowhere", "MASTER_PORT": "1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = []

    def start():
        with contextlib.closing(LLM(folder, **SMALL)) as llm:
            found.append(llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert found == [expected] * 8


@pytest.mark.slow
def test_ranks_live_on_when_the_thread_that_made_them_ends(folder, expected):
    made = []
    thread = threading.Thread(target=lambda: made.append(LLM(folder, **SMALL)))
    thread.start()
    thread.join()
    time.sleep(2)
    assert made[0].generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


@pytest.mark.slow
def test_starts_and_stops_leave_nothing(folder, expected, caplog):
    """No process, no shared memory, no port, no descriptor."""
    caplog.set_level(logging.CRITICAL, "llama")  # pytest keeps logged errors, their frames hold the engines
    me = os.getpid()
    before, descriptors = set(children_of(me)), 0
    for i in range(50):
        llm = LLM(folder, **SMALL)
        assert llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
        # What a process does not make it cannot leave behind; what others have in /dev/shm comes and goes.
        assert not any(map(shared_memory_of, children_of(me)))
        if i % 2:
            llm.close()
            with pytest.raises(EngineDeadError, match="closed"):
                llm.generate(PROMPT, GREEDY, use_tqdm=False)
        del llm
        gc.collect()
        assert set(children_of(me)) <= before
        if i == 1:
            descriptors, ports = len(os.listdir("/proc/self/fd")), ports_of(me)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert ports_of(me) <= ports
