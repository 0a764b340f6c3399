"""Compile every kernel for every architecture, print a table, fail on spills, lost instructions and regressions.

python -m tests.compile.run [--update] [--processes N] [NAME ...]    NAME: a module in cases/, or part of a case's name

Expectations are kept per version of Triton in expected.json; --update writes this version's anew.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

from tests.compile.harness import ARCHITECTURES, Row, cases_of, compile_task, complaints

HERE = Path(__file__).parent
EXPECTED = HERE / "expected.json"


def _print_table(rows: list[Row]) -> None:
    head = ("kernel", "case", "sm", "warps", "registers", "shared", "spills", "128-bit", "matrix", "instructions")
    lines = [
        (
            r.kernel,
            r.case,
            r.arch,
            r.warps,
            r.registers,
            r.shared,
            r.spills,
            r.wide_loads,
            r.tensor_cores,
            r.instructions,
        )
        for r in rows
    ]
    table = [head, *[tuple(map(str, line)) for line in lines]]
    widths = [max(len(line[column]) for line in table) for column in range(len(head))]
    for line in table:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        print("  ".join(left + right))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compile.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--update", action="store_true", help="write this version's expectations")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--architectures", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: nothing would be compiled")

    started = time.monotonic()
    modules = sorted(path.stem for path in (HERE / "cases").glob("*.py"))
    cases = {(module, case.name): case for module in modules for case in cases_of(module).values()}
    if arguments.names:
        cases = {key: case for key, case in cases.items() if any(n == key[0] or n in key[1] for n in arguments.names)}
    tasks = [
        (*key, arch) for key, case in cases.items() for arch in case.architectures if arch in arguments.architectures
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context) as pool:
        results = list(pool.map(compile_task, tasks))

    everything = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    expected = everything.get(triton.__version__)
    rows, failures, measured = [], [], {}
    for (module, name, arch), (compiled, error) in zip(tasks, results, strict=True):
        if error:
            failures.append(f"{name} sm_{arch}: {error}")
        for row in compiled:
            rows.append(row)
            measured[row.key] = [row.registers, row.shared, row.instructions]
            known = None if expected is None or arguments.update else expected.get(row.key)
            if expected is not None and not arguments.update and known is None:
                failures.append(f"{row.key}: has no expectation yet: run with --update")
            failures += [f"{row.key}: {what}" for what in complaints(row, cases[module, name], known)]
    _print_table(rows)
    if arguments.update:
        kept = (expected or {}) if arguments.names else {}
        everything[triton.__version__] = dict(sorted((kept | measured).items()))
        lines = json.dumps(everything, indent=1)
        EXPECTED.write_text(_one_line_each(lines))
    print(f"\ntriton {triton.__version__}: {len(rows)} kernels, {time.monotonic() - started:.0f} s", end="")
    print(
        "" if expected is not None or arguments.update else "; no expectations for this version, only the hard limits"
    )
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _one_line_each(text: str) -> str:
    """JSON with a row's three numbers on one line."""
    return re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
