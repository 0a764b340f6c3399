"""Which launches go straight to what was compiled: those for which Triton would find the same form, and no others."""

import pytest
import torch
from triton.compiler import CompiledKernel

from llama.kernels.gpu import launch as launching
from llama.kernels.gpu.launch import Kinds, Launch, Launcher, cdiv, next_power_of_2
from llama.kernels.types import kind_of


class OnCuda(torch.Tensor):
    """A tensor of the host that says it lies on a device, `offset` bytes behind a multiple of 16."""

    is_cuda = True

    def get_device(self):
        return getattr(self, "device_index", 0)


def on_cuda(dtype=torch.float16, offset=0, device=0):
    tensor = torch.zeros(64, dtype=torch.uint8)
    start = -tensor.data_ptr() % 16 + offset
    made = tensor[start : start + 16].view(dtype).as_subclass(OnCuda)
    made.device_index = device
    return made


class Compiled(CompiledKernel):
    def __init__(self, told):
        self.told = told

    def __getitem__(self, grid):
        return lambda *arguments: self.told.append(("direct", grid, arguments))

    def __del__(self):
        pass


class Kernel:
    """As Triton's, launched by its own means it gives what it was compiled to."""

    arg_names = ("out", "x", "ids", "count", "stride", "BLOCK", "SIZE")
    do_not_specialize = ("count",)
    do_not_specialize_on_alignment = ("ids",)

    def __init__(self):
        self.told = []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.told.append(("by Triton", grid, arguments, constants))
            return Compiled(self.told)

        return launch


BASE = {"count": 5, "stride": 32, "SIZE": 7, "BLOCK": 16, "num_warps": 4}


def launched(launcher, kernel, out, x, ids, **changes):
    numbers = BASE | changes
    constants = {name: numbers[name] for name in ("SIZE", "BLOCK", "num_warps")}
    launcher((3, 2), out, x, ids, numbers["count"], numbers["stride"], **constants)
    return kernel.told[-1]


@pytest.fixture
def known():
    """A launcher that has launched once."""
    kernel = Kernel()
    launcher = Launcher(kernel)
    assert launched(launcher, kernel, on_cuda(), on_cuda(), on_cuda(torch.int32))[0] == "by Triton"
    return launcher, kernel


def test_the_second_launch_of_a_form_is_direct_with_all_arguments_in_the_kernels_order(known):
    out, x, ids = on_cuda(), on_cuda(), on_cuda(torch.int32)
    how, grid, arguments = launched(*known, out, x, ids)
    assert (how, grid) == ("direct", (3, 2, 1, 1))
    assert all(ours is theirs for ours, theirs in zip(arguments, (out, x, ids), strict=False))
    assert arguments[3:] == (5, 32, 16, 7)


@pytest.mark.parametrize("changes", [{"count": 1}, {"count": 16}, {"count": 2**31 - 1}])
def test_what_a_kernel_is_not_specialised_for_makes_no_form(known, changes):
    how, _, arguments = launched(*known, on_cuda(), on_cuda(), on_cuda(torch.int32, offset=4), **changes)
    assert how == "direct" and arguments[3] == changes["count"]


@pytest.mark.parametrize(
    "changes", [{"count": 2**31}, {"stride": 1}, {"stride": 33}, {"SIZE": 8}, {"BLOCK": 32}, {"num_warps": 8}]
)
def test_another_number_is_another_form_once(known, changes):
    tensors = on_cuda(), on_cuda(), on_cuda(torch.int32)
    assert [launched(*known, *tensors, **changes)[0] for _ in range(2)] == ["by Triton", "direct"]
    assert launched(*known, *tensors)[0] == "direct"


def test_another_dtype_or_device_is_another_form(known):
    assert launched(*known, on_cuda(), on_cuda(torch.float32), on_cuda(torch.int32))[0] == "by Triton"
    assert launched(*known, on_cuda(), on_cuda(), on_cuda(torch.int64))[0] == "by Triton"
    assert launched(*known, on_cuda(device=1), on_cuda(device=1), on_cuda(torch.int32, device=1))[0] == "by Triton"


def test_what_is_not_aligned_or_on_no_device_always_goes_through_triton(known):
    for tensors in ((on_cuda(), on_cuda(offset=2), on_cuda(torch.int32)), (torch.zeros(8), on_cuda(), on_cuda())):
        assert [launched(*known, *tensors)[0] for _ in range(2)] == ["by Triton", "by Triton"]


def settled():
    kernel = Kernel()
    return Launch(Launcher(kernel), (3, 2), (5, 32), SIZE=7, BLOCK=16, num_warps=4), kernel


def test_a_settled_launch_is_direct_from_the_second_on():
    launch, kernel = settled()
    launch(on_cuda(), on_cuda(), on_cuda(torch.int32))
    assert kernel.told[0][:2] == ("by Triton", (3, 2)) and kernel.told[0][2][3:] == (5, 32)
    assert kernel.told[0][3] == {"SIZE": 7, "BLOCK": 16, "num_warps": 4}
    for _ in range(2):
        tensors = on_cuda(), on_cuda(), on_cuda(torch.int32, offset=4)
        launch(*tensors)
        how, grid, arguments = kernel.told[-1]
        assert (how, grid) == ("direct", (3, 2, 1, 1)) and arguments[3:] == (5, 32, 16, 7)
        assert all(ours is theirs for ours, theirs in zip(arguments, tensors, strict=False))


def test_a_settled_launch_takes_what_another_one_has_compiled():
    kernel = Kernel()
    launcher = Launcher(kernel)
    tensors = on_cuda(), on_cuda(), on_cuda(torch.int32)
    for grid in ((1,), (2,), (3,)):
        Launch(launcher, grid, (5, 32), SIZE=7, BLOCK=16, num_warps=4)(*tensors)
    assert [(how, grid) for how, grid, *_ in kernel.told] == [
        ("by Triton", (1,)),
        ("direct", (2, 1, 1)),
        ("direct", (3, 1, 1)),
    ]


def test_a_settled_launch_of_what_is_not_aligned_or_on_no_device_goes_through_triton():
    for tensors in ((on_cuda(), on_cuda(offset=2), on_cuda(torch.int32)), (torch.zeros(8), on_cuda(), on_cuda())):
        launch, kernel = settled()
        for _ in range(3):
            launch(*tensors)
        assert [how for how, *_ in kernel.told] == ["by Triton"] * 3


def test_tensors_are_of_one_kind_where_a_launch_of_them_is_the_same():
    x = torch.zeros(4, 8, dtype=torch.float16)
    assert kind_of(x) == kind_of(torch.ones(4, 8, dtype=torch.float16))
    others = x[:2], x.view(8, 4), x.t(), x.float(), x.to("meta"), torch.zeros(33, dtype=x.dtype)[1:].view(4, 8)
    assert all(kind_of(other) != kind_of(x) for other in others)


def test_kinds_are_kept_but_not_without_end(monkeypatch):
    monkeypatch.setattr(launching, "_MOST_KINDS", 3)
    kinds = Kinds()
    assert [kinds.keep(number, -number) for number in range(3)] == [0, -1, -2] and len(kinds) == 3
    assert kinds.keep(3, -3) == -3 and dict(kinds) == {3: -3}


class KernelOfTuples(Kernel):
    arg_names = ("rules", "x", "count", "SIZE")
    do_not_specialize_on_alignment = ()


def test_members_of_a_tuple_count_like_arguments():
    kernel = KernelOfTuples()
    launcher = Launcher(kernel)

    def how(rules, count=3):
        launcher((4,), rules, on_cuda(), count, SIZE=7, num_warps=4)
        return kernel.told[-1]

    rules = (on_cuda(), 32, on_cuda(torch.float32))
    assert how(rules)[0] == "by Triton"
    told = how(rules, count=9)
    assert told[:2] == ("direct", (4, 1, 1)) and told[2][0] is rules and told[2][2:] == (9, 7)
    for other in ((on_cuda(), 1, on_cuda(torch.float32)), (on_cuda(), 32, on_cuda(torch.int32))):
        assert [how(other)[0] for _ in range(2)] == ["by Triton", "direct"]
    for other in ((on_cuda(), 32, on_cuda(torch.float32, offset=4)), (torch.zeros(8), 32, on_cuda(torch.float32))):
        assert [how(other)[0] for _ in range(2)] == ["by Triton", "by Triton"]


def test_sizes():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert [next_power_of_2(n) for n in (1, 2, 3, 4, 5, 1000, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 1024, 2048]
