"""Steps of few tokens with what is around a matrix product in its kernel: a Block in four products, not nine kernels.

The residual stream is whole between the kernels, [tokens, hidden] in the model's dtype, and rounded where it is rounded
without this. From sm_90 on each kernel is launched before the one in front has ended (`llama.kernels.gpu.chain`), but
for prefills and the norms of codes. Off unless an engine asks for it (`fused_decode`): no GPU has shown yet what it
gains.
"""

import torch
from torch import Tensor

from llama.api.errors import ParameterError
from llama.kernels import ops
from llama.kernels.types import CosSin, KVLayer
from llama.model.batch import Batch
from llama.model.linear import Linear
from llama.model.module import hooks_of
from llama.model.transformer import MLP, Attention, Block, RMSNorm, Transformer


def fuse(model: Transformer) -> None:
    """Have all layers of Llama's own kind compute their small steps so. ParameterError where Triton does not run.

    The model itself is changed: of several engines over one model the last that was made decides.
    """
    if not ops.on_triton(model.embed_tokens.weight):
        raise ParameterError(f"fused_decode must be False on {model.device.type}, got True", "fused_decode")
    from llama.kernels.gpu.fused import FEW

    shape = FEW * model.local_config.num_key_value_heads, 3
    counters = torch.zeros(shape, dtype=torch.int32, device=model.device)
    for layer in model.layers:
        assert isinstance(layer, Block)
        if isinstance(layer.fused, FusedBlock) and layer.fused.counters.device == model.device:
            continue  # graphs of another engine may know its counters
        if type(layer.self_attn) is Attention and type(layer.mlp) is MLP:
            layer.fused = FusedBlock(layer, counters)


def unfuse(model: Transformer) -> None:
    """Undo `fuse`."""
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.fused = None


class FusedBlock:
    """A Block's forward, where a step has few tokens, no adapters, no taps and no hooks, and the layer's four linear
    layers are weights and nothing else."""

    def __init__(self, block: Block, counters: Tensor) -> None:
        """`counters`: see `attend`; all layers may have the same ones."""
        from llama.kernels.gpu.attention import rotate_and_attend
        from llama.kernels.gpu.fused import FEW, Fused
        from llama.kernels.gpu.matmul import fused_matmul

        self._most, self._fused, self._multiply = FEW, Fused, fused_matmul
        self._attend = rotate_and_attend
        self._norms = block.input_layernorm, block.post_attention_layernorm
        self._attention, self._mlp = block.self_attn, block.mlp
        self.counters = counters
        self._hooks = hooks_of(block)

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: Batch, cos_sin: CosSin, kv_layer: KVLayer
    ) -> Tensor | None:
        """-> the layer's hidden state [tokens, hidden]; None for a step of another kind."""
        attention, mlp, (before_attention, before_mlp) = self._attention, self._mlp, self._norms
        linears = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
        is_few = x.shape[0] <= self._most and not batch.is_plain
        if not is_few or batch.adapters is not None or batch.taps is not None or x.requires_grad:
            return None
        if any(self._hooks) or any(linear.bare is None for linear in linears):
            return None
        if residual is not None:
            x = x + residual
        qkv = self._product(attention.qkv_proj, x, before_attention)
        qkv = qkv.view(qkv.shape[0], -1, attention.head_dim)
        mixed = self._attend(qkv, cos_sin, kv_layer, batch, attention.scale, self.counters)
        x = self._product(attention.o_proj, mixed.flatten(1), residual=x)
        act = self._product(mlp.gate_up_proj, x, before_mlp, swiglu=True)
        return self._product(mlp.down_proj, act, residual=x)

    def _product(
        self,
        linear: Linear,
        x: Tensor,
        norm: RMSNorm | None = None,
        *,
        residual: Tensor | None = None,
        swiglu: bool = False,
    ) -> Tensor:
        """A norm is fused with dense weights alone: to widen codes takes the instructions that these have to spare."""
        weight = linear.bare
        assert weight is not None
        fused = self._fused(residual=residual, swiglu=swiglu)
        if norm is not None and isinstance(weight, Tensor):
            fused = fused._replace(norm=norm.weight, eps=norm.eps)
        elif norm is not None:
            x, _ = norm(x)
        return self._multiply(x, weight, fused)
