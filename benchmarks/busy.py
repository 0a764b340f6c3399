"""Decodes on a CPU, alone and beside another program that computes: ours, ours where OpenMP's threads sleep soon, ours
with one thread, and transformers.

GNU's OpenMP, which torch's wheels bring, lets threads that wait for their next share of the work look for it for
milliseconds: on the core that a thread which has a share may need. Each way has a process of its own, since OpenMP
reads GOMP_SPINCOUNT once; they decode in turn. The other program has a session of its own, as what another terminal or
a service runs.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from benchmarks.common import REPOSITORY, close

# What the environment says in front of each.
WAYS: dict[str, dict[str, str]] = {
    "ours": {},
    "ours, GOMP_SPINCOUNT=100": {"GOMP_SPINCOUNT": "100"},
    "ours, OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
    "transformers": {},
}


def ours(path: str, dtype: str, batch: int) -> Callable[[int], object]:
    from llama import LLM, SamplingParams

    llm = LLM(path, dtype=dtype, device="cpu", num_blocks=200, enable_prefix_caching=False)

    def decode(count: int) -> object:
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        return llm.generate([[1, 2, 3]] * batch, params, use_tqdm=False)

    return decode


def transformers(path: str, dtype: str, batch: int) -> Callable[[int], object]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    ids = torch.tensor([[1, 2, 3]] * batch)
    mask = torch.ones_like(ids)

    def decode(count: int) -> object:
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )

    return decode


def work(decode: Callable[[int], object]) -> None:
    """Answers a number of tokens with the seconds that they took."""
    decode(2)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        decode(int(line))
        print(time.perf_counter() - start, flush=True)


@contextlib.contextmanager
def another_program(is_there: bool) -> Iterator[None]:
    command = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(command, start_new_session=True) if is_there else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=12, help="in a row")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--spins", type=int, nargs="*", default=[], help="other numbers for GOMP_SPINCOUNT, to compare")
    parser.add_argument("--worker", choices=["ours", "transformers"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work({"ours": ours, "transformers": transformers}[given.worker](given.model, given.dtype, given.batch))
        return

    ways = WAYS | {f"ours, {spins} spins": {"GOMP_SPINCOUNT": str(spins)} for spins in given.spins}
    unset = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    arguments = ["--model", given.model, "--dtype", given.dtype, "--batch", str(given.batch)]
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.busy", "--worker", name.split(",")[0], *arguments],
            cwd=REPOSITORY,
            env=unset | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, more in ways.items()
    }

    def ask(name: str, request: str) -> str:
        process = workers[name]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(request)
        process.stdin.flush()
        if not (answer := process.stdout.readline()):
            raise RuntimeError(f"{name} has ended")
        return answer

    try:
        for name in workers:
            ask(name, "")
        results: dict[str, dict[str, float]] = {name: {} for name in workers}
        for place in ("alone", "beside another program"):
            seconds: dict[str, list[float]] = {name: [] for name in workers}
            with another_program(place != "alone"):
                for _ in range(given.rounds):
                    for name in workers:
                        seconds[name].append(float(ask(name, f"{given.tokens}\n")) / given.tokens)
            for name, taken in seconds.items():
                results[name][place] = given.batch / statistics.median(taken)
                print(f"{place:24} {name:26} {results[name][place]:7.1f} tokens/s", flush=True)
    finally:
        for process in workers.values():
            process.kill()
            process.wait()
    close("busy", dtype=given.dtype, batch=given.batch, tokens_per_second=results)


if __name__ == "__main__":
    main()
