"""The judge of compiled kernels: each rule can fail, and machine code is read as it is."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from tests.compile.harness import Case, Row, _longest_loop, compile_case, complaints

GOOD = Row(
    case="case",
    kernel="kernel",
    arch=90,
    warps=4,
    registers=128,
    shared=40_000,
    spills=0,
    wide_loads=4,
    tensor_cores=8,
    warp_group=8,
    descriptors=2,
    requests=4,
    waits=True,
    too_early=0,
    instructions=1000,
    loop=500,
)
CASE = Case(
    "case",
    lambda: None,
    wide_loads=("kernel",),
    tensor_cores=("kernel",),
    warp_group=("kernel",),
    descriptors=("kernel",),
    requests=("kernel",),
    waits=("kernel",),
    resident=(("kernel", 4),),
    per_weight=("kernel", 128, 4.0),
)


def test_nothing_to_complain_of():
    assert GOOD.resident == 4
    assert complaints(GOOD, CASE, None) == complaints(GOOD, CASE, (128, 40_000, 1000)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spills": 2}, "2 accesses of local memory"),
        ({"arch": 80, "shared": 170_000}, "the limit is 166912"),
        ({"wide_loads": 0}, "wide_loads"),
        ({"tensor_cores": 0}, "tensor_cores"),
        ({"warp_group": 0}, "warp_group"),
        ({"descriptors": 0}, "descriptors"),
        ({"requests": 0}, "no weight is requested before the wait"),
        ({"too_early": 2}, "2 loads, stores and exits before the wait"),
        ({"waits": False}, "does not wait for the kernel in front"),
        ({"registers": 136}, "3 programs fit"),
        ({"shared": 60_000}, "3 programs fit"),
        ({"loop": 513}, "4.01 instructions per weight, at most 4.0"),
        ({"loop": 0}, "0.00 instructions per weight"),
    ],
)
def test_hard_limits(change, message):
    (found,) = complaints(replace(GOOD, **change), CASE, None)
    assert message in found


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ((119, 40_000, 1000), "128 registers, expected 119"),
        ((128, 39_999, 1000), "40000 bytes of shared memory, expected 39999"),
        ((128, 40_000, 860), "1000 instructions, expected 860"),
    ],
)
def test_regressions(expected, message):
    assert complaints(GOOD, CASE, expected) == [message]


def test_kernels_that_are_not_named_may_lack_instructions():
    lacks = dict.fromkeys(("wide_loads", "tensor_cores", "warp_group", "descriptors", "requests"), 0)
    assert complaints(replace(GOOD, kernel="other", **lacks, waits=False), CASE, None) == []


def test_local_memory_is_no_spill_where_a_cosine_has_a_stack():
    assert complaints(replace(GOOD, spills=2), replace(CASE, stack=("kernel",)), None) == []


def test_the_longest_loop():
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   FFMA R3, R3, R4, R5 ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/              @!P1 BRA `(.L_x_1) ;
        /*0050*/               @P2 BRA 0x10 ;
        /*0060*/                   BRA 0x60;
    """
    assert _longest_loop(code) == 5


@triton.jit
def _dot_kernel(out, a, b, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tile = rows * SIZE + columns
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


@pytest.mark.compile
def test_reads_what_was_compiled():
    def run(**options):
        a, b = (torch.empty(64, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
        _dot_kernel[(1,)](torch.empty(64, 64, device="meta"), a, b, SIZE=64, **options)

    (row,) = compile_case(Case("dot", run), 90)
    assert (row.kernel, row.arch, row.warps) == ("_dot_kernel", 90, 4)
    assert row.warp_group and row.wide_loads and row.shared and not row.spills
    (squeezed,) = compile_case(Case("dot", lambda: run(maxnreg=32)), 80)
    assert squeezed.registers <= 32 and squeezed.spills
