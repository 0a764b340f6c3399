"""Every op in plain PyTorch, under the names and signatures of `kernels`: the CPU path and the oracle."""

from kernels.reference.attention import paged_attention as paged_attention
from kernels.reference.layers import (
    add_rms_norm as add_rms_norm,
)
from kernels.reference.layers import (
    rms_norm as rms_norm,
)
from kernels.reference.layers import (
    rope_and_store as rope_and_store,
)
from kernels.reference.layers import (
    silu_mul as silu_mul,
)
