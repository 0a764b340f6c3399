"""The gated activation of the MLP: silu(gate) * up = gate / (1 + exp(-gate)) * up, on one fused gate_up row.

Float32 arithmetic; silu(gate) is rounded to the model's dtype before `up` multiplies it, as in
Hugging Face's Llama. Per token of width I it reads 2 I elements and writes I.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.checks import check_silu_mul, check_tensors
from llama.kernels.gpu.launch import Kinds, Launch, Launcher, cdiv, next_power_of_2
from llama.kernels.types import kind_of


@triton.jit
def _silu_mul_kernel(out, gate_up, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate_up += row * stride
    gate = tl.load(gate_up + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    activated = (gate / (1 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * SIZE + columns, (activated * up).to(dtype), mask=mask)


_launch_silu_mul = Launcher(_silu_mul_kernel)
_KINDS: Kinds[Launch] = Kinds()


def _settle(gate_up: Tensor) -> Launch:
    check_silu_mul(gate_up)
    check_tensors("silu_mul", gate_up=gate_up)
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    block = min(next_power_of_2(size), 2048)
    return Launch(
        _launch_silu_mul,
        (tokens, cdiv(size, block)),
        (gate_up.stride(0),),
        SIZE=size,
        BLOCK=block,
        # Two loads of 16 bytes per thread from each half in 16-bit dtypes.
        num_warps=max(block // 512, 1),
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `ops.silu_mul`."""
    kind = kind_of(gate_up)
    launch = _KINDS.get(kind) or _KINDS.keep(kind, _settle(gate_up))
    out = torch.empty((gate_up.shape[0], gate_up.shape[1] // 2), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        launch(out, gate_up)
    return out
