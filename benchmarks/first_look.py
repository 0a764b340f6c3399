"""The first minutes on a GPU: does everything launch, is it right, and where does the time go?

python -m benchmarks.first_look 1 --out DIR            correctness, a decode step node by node, the device's own limits
python -m benchmarks.first_look 2 --out DIR            quantised and deterministic; what to tune; then the benchmarks
python -m benchmarks.first_look 3 --out DIR            large tests; quantised: products, 8B and 70B with an fp8 cache
python -m benchmarks.first_look nodes matmul --out DIR single sections, in this process
python -m benchmarks.first_look 1 2 3 --out DIR --tiny anywhere, as a dry run: small shapes, Triton's interpreter

A part takes at most five minutes: each step is a process of its own with a time limit, and may fail alone. What they
print and find is in one archive a part, DIR/part-N.tar.gz, complete after each step; sections alone leave a JSON file
each. Needs torch, Triton and pytest, and runs from the repository's root. The last line is one JSON document.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import REPOSITORY, close

PART_SECONDS = 300.0
LEAST_SECONDS = 5.0  # no step is begun with less
TAIL = 40  # lines of a step's output that are printed


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    sections: tuple[str, ...] = ()  # of this program
    tests: str = ""  # which of the GPU's: "not alone", or those that are "alone"
    module: tuple[str, ...] = ()  # a benchmark with its arguments
    tiny: tuple[str, ...] = ()  # what replaces the arguments in a dry run

    def command(self, out: Path, is_tiny: bool) -> list[str]:
        python = [sys.executable, "-u", "-m"]
        if self.sections:
            return [*python, "benchmarks.first_look", *self.sections, "--out", str(out), *["--tiny"] * is_tiny]
        if self.module:
            return [*python, *(self.module[:1] + self.tiny if is_tiny else self.module)]
        together = ["-n", "12", "--dist", "worksteal"] if self.tests == "not alone" and _has("xdist") else []
        how = ["--collect-only"] if is_tiny else together
        how.append("--continue-on-collection-errors")
        return [*python, "pytest", "-m", f"gpu and {self.tests}", "-q", "-p", "no:cacheprovider", *how]


def _in_codes(preset: str, scheme: str, longest: int, seconds: float, *flags: str) -> Step:
    """Decode steps over a short and a long context; most of the time goes into computing that."""
    codes = ("--quantization", scheme, "--kv-cache-dtype", "fp8")
    full = ("--preset", preset, *codes, *f"--contexts 1024 {longest} --prefill --rounds 30".split(), *flags)
    tiny = ("--preset", "tiny", *codes, *"--contexts 16 40 --prefill --rounds 3".split())
    return Step(f"{preset} {scheme}", seconds, module=("benchmarks.decode_gpu", *full), tiny=tiny)


PARTS = {
    "1": (
        Step("ops", 50, ("machine", "ops")),
        Step("step", 60, ("step",)),
        Step("device", 60, ("nodes", "invariance", "matmul", "cublas")),
        Step("tests", 240, tests="not alone"),  # as long as the part has time
    ),
    "2": (
        Step("forms", 55, ("forms", "deterministic")),
        Step("fused", 35, ("fused",)),
        Step("choices", 60, ("decode_layout", "prefill_tiles", "eager")),
        Step(
            "decode",
            45,
            module=tuple(
                "benchmarks.decode_gpu --no-peer --contexts 128 1024 8192 --prefill 2048 8192 --rounds 40".split()
            ),
            tiny=tuple("--preset tiny --no-peer --contexts 16 --prefill 32 --rounds 3".split()),
        ),
        # Beside the weights, one engine for both batches and 8,192 tokens would want more than the device has.
        Step(
            "decode of 64",
            30,
            module=tuple("benchmarks.decode_gpu --no-peer --contexts 1024 --prefill --batch 64".split()),
            tiny=tuple("--preset tiny --no-peer --contexts 16 --prefill --batch 2 --rounds 3".split()),
        ),
        # On the host alone; its launches stop short of the driver.
        Step(
            "host",
            15,
            module=tuple("benchmarks.host --steps 30".split()),
            tiny=tuple("--layers 1 --batches 1 --steps 2".split()),
        ),
        Step(
            "sampler and prefill",
            60,
            module=tuple("benchmarks.ops --op sample prefill_attention --rounds 20 --no-peers".split()),
            tiny=tuple("--op sample --rounds 1 --no-peers --tiny".split()),
        ),
    ),
    "3": (
        Step("large tests", 40, tests="alone"),
        Step(
            "products with codes",
            40,
            module=tuple("benchmarks.ops --op quantized_matmul --rounds 5".split()),
            tiny=tuple("--op quantized_matmul --rounds 1 --tiny".split()),
        ),
        # 131,072 tokens of an 8B are 6.6e15 operations, 16,384 of a 70B 2.6e15.
        _in_codes("llama-3.1-8b", "int4", 131_072, 45),
        *(_in_codes("llama-3.1-8b", scheme, 32_768, 25) for scheme in ("int8", "fp8")),
        *(_in_codes("llama-3.1-70b", scheme, 16_384, 55) for scheme in ("fp8", "int4")),
        Step("prompts", 15, ("prompts",)),
    ),
}


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def run_step(step: Step, out: Path, is_tiny: bool, seconds: float) -> dict:
    """-> its exit status ("timeout" where it took longer than `seconds`) and how long it took."""
    log = out / f"{step.name.replace(' ', '-')}.txt"
    started = time.monotonic()
    with log.open("w") as file:
        child = subprocess.Popen(
            step.command(out, is_tiny), cwd=REPOSITORY, stdout=file, stderr=file, start_new_session=True
        )
        try:
            status: int | str = child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # workers of its own too
            child.wait()
            status = "timeout"
    print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)
    return {"status": status, "seconds": round(time.monotonic() - started, 1)}


def run_part(name: str, out: Path, archive: Path, is_tiny: bool) -> dict[str, dict]:
    """Each step writes to `out`; the archive has all of it after each."""
    ends = time.monotonic() + PART_SECONDS
    steps = {}
    for step in PARTS[name]:
        left = ends - time.monotonic()
        if left < LEAST_SECONDS and not is_tiny:
            steps[step.name] = {"status": "no time left"}
            continue
        print(f"== part {name}: {step.name} ({PART_SECONDS - left:.0f} s)", flush=True)
        steps[step.name] = run_step(step, out, is_tiny, PART_SECONDS if is_tiny else min(step.seconds, left))
        unfinished = archive.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w:gz") as file:
            file.add(out, "")
        unfinished.replace(archive)
        if step.tests and steps[step.name]["status"] == 1:
            print("After an illegal access all later failures mean nothing: rerun the first failed test alone, with "
                  "CUDA_LAUNCH_BLOCKING=1.")  # fmt: skip
    return steps


def run_sections(names: list[str], out: Path, is_tiny: bool) -> bool:
    """Run each of these sections; its result goes to a file at once. -> whether all of them succeeded."""
    if is_tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and our ops are imported, below
    from benchmarks import first_look_device, first_look_engine, first_look_forms

    look = first_look_device.Look(is_tiny=is_tiny)
    known = first_look_device.SECTIONS | first_look_engine.SECTIONS | first_look_forms.SECTIONS
    succeeded = True
    for i, name in enumerate(names):
        started = time.monotonic()
        try:
            told = json.dumps(known[name](look))
        except Exception as error:
            traceback.print_exc()
            told, succeeded = json.dumps(f"FAILED {type(error).__name__}: {error}"), False
        print(f"== {name}: {time.monotonic() - started:.1f} s\n{told[:4000]}", flush=True)
        (out / f"{name}.json").write_text(told)
        if look.has_lost_device():
            if others := names[i + 1 :]:
                print(f"== {name} lost the device: {', '.join(others)} in a process of their own", flush=True)
                subprocess.run(Step("", 0, tuple(others)).command(out.resolve(), is_tiny), cwd=REPOSITORY, check=False)
            return False
    return succeeded


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_look",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="+", metavar="PART|SECTION", help="1, 2, 3, or names of sections")
    parser.add_argument("--out", type=Path, required=True, help="a folder for all results")
    parser.add_argument("--tiny", action="store_true", help="a dry run without a GPU")
    options = parser.parse_args(given)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in options.what if name not in PARTS]
    succeeded = run_sections(names, out, options.tiny) if names else True
    steps = {}
    for part in options.what:
        if part in PARTS:
            with tempfile.TemporaryDirectory(prefix=f"first-look-{part}-") as folder:
                steps |= run_part(part, Path(folder), out / f"part-{part}.tar.gz", options.tiny)
    if not steps:
        return 0 if succeeded else 1
    close("first_look", steps=steps)
    return 0 if succeeded and all(step["status"] == 0 for step in steps.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
