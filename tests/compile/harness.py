"""Compiles what the wrappers of `kernels` launch, for GPUs that need not be there, and reads the machine code.

A case calls a real wrapper with tensors on the meta device. A driver that knows a target and nothing else takes the
place of CUDA's, and every launch stops after compiling, so what is judged is what a GPU would run: the same constants,
the same specialisation on alignment, the same number of warps. Nothing runs, so nothing is said about results.
"""

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tests.settled import forget_settled

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory that one program may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The matrix instructions of a whole warp group, where there are such.
WARP_GROUP = {80: "HMMA", 90: "[HQ]GMMA", 100: "UTC[A-Z0-9]*MMA"}


@dataclass(frozen=True)
class Case:
    """One call of a wrapper; the tuples name kernels that it launches and what their machine code must hold."""

    name: str
    run: Callable[[], object]
    wide_loads: tuple[str, ...] = ()  # 128-bit loads from global memory
    tensor_cores: tuple[str, ...] = ()  # any matrix instruction
    warp_group: tuple[str, ...] = ()  # the matrix instructions of a warp group
    descriptors: tuple[str, ...] = ()  # tiles that the copy engine fetches by a descriptor
    requests: tuple[str, ...] = ()  # weights requested while the kernel in front still runs, from sm_90 on
    waits: tuple[str, ...] = ()  # for the kernel in front, before all else, and then lets the next one begin, likewise
    stack: tuple[str, ...] = ()  # may use local memory, where the cosine of a large angle has digits of 2 / pi
    resident: tuple[tuple[str, int], ...] = ()  # how many programs an sm_90 multiprocessor must hold at once
    # A kernel, how many weights a thread widens in a turn of its main loop, and the instructions that sm_90 may spend
    # on each.
    per_weight: tuple[str, int, float] | None = None
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Row:
    """One compiled kernel."""

    case: str
    kernel: str
    arch: int
    warps: int
    registers: int
    shared: int
    spills: int  # accesses of local memory
    wide_loads: int
    tensor_cores: int
    warp_group: int
    descriptors: int
    requests: int  # lines asked for before the wait for the kernel in front
    waits: bool  # for the kernel in front, and then lets the next one begin
    too_early: int  # loads, stores and exits before that wait
    instructions: int
    loop: int  # instructions of its longest loop

    @property
    def key(self) -> str:
        return f"{self.case} {self.kernel} sm_{self.arch}"

    @property
    def resident(self) -> int:
        """Programs that an sm_90 multiprocessor holds: 65,536 registers, 228 KB of shared memory, 64 warps."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(65536 // registers, 228 * 1024 // (self.shared + 1024), 64 // self.warps, 32)


class _TargetOnly:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _compile_only(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Collects (kernel name, compiled kernel) of every launch in place of launching."""
    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def stop_after_compiling(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = stop_after_compiling
    forget_settled()
    driver.set_active(_TargetOnly(arch))
    try:
        yield compiled
    finally:
        JITFunction.run = run


def _tool(arguments: list[str]) -> str:
    return subprocess.run(arguments, check=True, capture_output=True, text=True).stdout


def _read(case: str, name: str, arch: int, kernel: Any) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool([knobs.nvidia.cuobjdump.path, "-res-usage", file.name])
        code = _tool([knobs.nvidia.cuobjdump.path, "-sass", file.name])
    # "/*0a10*/  @!P0 LDG.E.128 R8, ... ;" -> "LDG.E.128"
    in_order = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([\w.]+)", code, re.MULTILINE)
    opcodes = Counter(in_order)
    before_wait = Counter(in_order[: in_order.index("ACQBULK")] if "ACQBULK" in in_order else ())

    def count(pattern: str, opcodes: Counter[str] = opcodes) -> int:
        return sum(number for opcode, number in opcodes.items() if re.match(pattern, opcode))

    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or not opcodes:
        raise RuntimeError(f"{case} {name} sm_{arch}: cuobjdump's answer is not understood")
    return Row(
        case=case,
        kernel=name,
        arch=arch,
        warps=kernel.metadata.num_warps,
        registers=int(registers[1]),
        shared=kernel.metadata.shared,
        spills=count("STL|LDL"),
        wide_loads=count(r"(LDG|LDGSTS)\..*128"),
        tensor_cores=count(r"HMMA|IMMA|QMMA|[HQ]GMMA|UTC[A-Z0-9]*MMA"),
        warp_group=count(WARP_GROUP[arch]),
        descriptors=count("UTMALDG"),
        requests=count(r"CCTL.*PF2", before_wait),
        waits="ACQBULK" in opcodes and "PREEXIT" in in_order[in_order.index("ACQBULK") :],
        too_early=count("LDG|STG|ATOM(?!S)|RED|EXIT", before_wait),
        instructions=sum(opcodes.values()),
        loop=_longest_loop(code),
    )


def _longest_loop(code: str) -> int:
    """Instructions between a jump back and its target."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    places = [int(place, 16) for place, _ in lines]
    jumps = [
        (place, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for place, (_, text) in zip(places, lines, strict=True)
    ]
    loops = [(int(jump[1], 16), place) for place, jump in jumps if jump is not None and int(jump[1], 16) < place]
    return max((sum(start <= place <= end for place in places) for start, end in loops), default=0)


def compile_case(case: Case, arch: int) -> list[Row]:
    """A row for each distinct kernel that the case launches."""
    with _compile_only(arch) as compiled:
        case.run()
    if not compiled:
        raise RuntimeError(f"{case.name}: launches nothing")
    rows = [_read(case.name, name, arch, kernel) for name, kernel in {id(k): (n, k) for n, k in compiled}.values()]
    names = Counter(row.kernel for row in rows)
    twice = [name for name, number in names.items() if number > 1]
    if twice:
        raise RuntimeError(
            f"{case.name}: launches several variants of {', '.join(twice)}: make them cases of their own"
        )
    return rows


def cases_of(module: str) -> dict[str, Case]:
    """The cases of tests/compile/cases/<module>.py by name."""
    cases = list(importlib.import_module(f"tests.compile.cases.{module}").cases())
    named = {case.name: case for case in cases}
    if len(named) < len(cases):
        raise RuntimeError(f"two cases of {module} have the same name")
    return named


def compile_task(task: tuple[str, str, int]) -> tuple[list[Row], str]:
    """(module, case, architecture) -> rows and no error, or no rows and what went wrong: what a worker process does."""
    module, name, arch = task
    try:
        return compile_case(cases_of(module)[name], arch), ""
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return [], f"{type(error).__name__}: {lines[-1]}"


# What a later version of a kernel may take more of than its expectation before that counts as a regression.
REGISTER_SLACK = 8
INSTRUCTION_SLACK = 1.15


def complaints(row: Row, case: Case, expected: tuple[int, int, int] | None) -> list[str]:
    """What is wrong with a row; `expected` is (registers, shared, instructions), None = nothing to compare with."""
    found = []
    if row.spills and row.kernel not in case.stack:
        found.append(f"{row.spills} accesses of local memory: registers spill")
    if row.shared > SHARED_LIMIT[row.arch]:
        found.append(f"{row.shared} bytes of shared memory, the limit is {SHARED_LIMIT[row.arch]}")
    for wanted in ("wide_loads", "tensor_cores", "warp_group", "descriptors"):
        if row.kernel in getattr(case, wanted) and not getattr(row, wanted):
            found.append(f"no instruction of the kind {wanted}")
    if row.kernel in case.requests and row.arch >= 90 and not row.requests:
        found.append("no weight is requested before the wait for the kernel in front")
    if row.kernel in case.waits and row.arch >= 90 and not row.waits:
        found.append("does not wait for the kernel in front, or does not let the next one begin")
    if row.too_early:
        found.append(f"{row.too_early} loads, stores and exits before the wait for the kernel in front")
    for kernel, programs in case.resident:
        if (kernel, 90) == (row.kernel, row.arch) and row.resident < programs:
            found.append(f"{row.resident} programs fit a multiprocessor at once, not {programs}")
    if case.per_weight is not None and (case.per_weight[0], 90) == (row.kernel, row.arch):
        _, weights, most = case.per_weight
        if not 0 < row.loop <= most * weights:
            found.append(f"{row.loop / weights:.2f} instructions per weight, at most {most}")
    if expected is not None:
        registers, shared, instructions = expected
        if row.registers > registers + REGISTER_SLACK:
            found.append(f"{row.registers} registers, expected {registers}")
        if row.shared > shared:
            found.append(f"{row.shared} bytes of shared memory, expected {shared}")
        if row.instructions > instructions * INSTRUCTION_SLACK:
            found.append(f"{row.instructions} instructions, expected {instructions}")
    return found
