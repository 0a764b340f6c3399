"""The mode in which a token's activations and logits have the same bits whatever is computed beside it.

It asks of each Linear in which pieces rows are to be multiplied, and of attention how queries are to be cut: see
`llama.kernels.cpu.pieces`; where ops go to Triton, `llama.kernels.exact_pieces` and `llama.kernels.types.Runs`.
"""

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.api.errors import ParameterError
from llama.kernels import ops
from llama.kernels.cpu.fixed_attention import find_pieces
from llama.kernels.cpu.pieces import Pieces, Product, cancelling, find
from llama.kernels.exact_pieces import LEAST, MOST, ExactPieces, find_exact
from llama.kernels.types import KVLayer, Ragged, Runs
from llama.model.autocast import own_dtype
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from llama.model.weights.form import WeightForm
from llama.model.weights.packed import pack
from llama.model.weights.quantised import Dense, Joined, Quantised

logger = logging.getLogger(__name__)

_TRIED_ROWS = 128
_TRIED_BYTES = 1 << 28  # of what more rows at once give


class _Way(NamedTuple):
    """How a kind of Linear multiplies."""

    pieces: Pieces | ExactPieces | None
    multiply: Callable[[Tensor, Tensor], Tensor] = F.linear


@own_dtype
def fix_rows(model: Transformer) -> None:
    """Put a prepared model into the mode, for batches that are as its `fixed` says. What changes its weights' forms
    asks for another call. ParameterError where this machine has no such way to multiply."""
    with ops.on_device(model.device):
        _fix_rows(model)


def _fix_rows(model: Transformer) -> None:
    started, config = time.monotonic(), model.local_config
    on_triton = ops.on_triton(model.embed_tokens.weight)
    shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    fixed: Pieces | Runs | None = _runs(model, *shape) if on_triton else find_pieces(*shape, model.dtype)
    ways: dict[object, _Way] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # int8 is packed with its help
        for module in model.modules():
            if isinstance(module, Linear):
                for part in _parts(module.form):
                    if isinstance(part, Quantised):
                        part.serve_few()
                # Linears of one kind have the same pieces.
                kind = (module.in_features, module.out_features, *_kind(module.form))
                if kind not in ways:
                    ways[kind] = _way_on_triton(module) if on_triton else _Way(_pieces_of(module))
                module.pieces, module.multiply = ways[kind]
    if fixed is None or any(way.pieces is None for way in ways.values()):
        why = f"its products in {str(model.dtype).removeprefix('torch.')} depend on the batch"
        raise ParameterError(f"deterministic must be False on this machine: {why}", "deterministic")
    model.fixed = fixed
    logger.info("pieces of rows with the same bits found (%.2f s)", time.monotonic() - started)


def _pieces_of(linear: Linear) -> Pieces | None:
    x, source = cancelling(linear.in_features, _dtype(linear))
    seconds = [part.few_tokens for part in _parts(linear.form) if isinstance(part, Quantised)]
    most = min((second.most_tokens for second in seconds if second is not None), default=None)
    return find(_taking(linear, source), x, most)


def _way_on_triton(linear: Linear) -> _Way:
    """Products with codes have a kernel of ours, cuBLAS has those with dense weights; ours has these too where a row's
    bits depend on its place in one of cuBLAS's."""
    dtype, rows = _dtype(linear), _TRIED_ROWS
    while rows < MOST and 2 * rows * linear.out_features * dtype.itemsize <= _TRIED_BYTES:
        rows *= 2
    x, source = cancelling(linear.in_features, dtype, rows, linear.device)
    product, kinds = _taking(linear, source), {type(part) for part in _parts(linear.form)}
    if kinds == {Quantised}:
        return _Way(find(product, x[:_TRIED_ROWS], LEAST))
    if Quantised in kinds:  # beside a dense part
        return _Way(find_exact(product, x[:LEAST]))
    exact = find_exact(product, x)
    if exact is not None or linear.form is not None:
        return _Way(exact)
    from llama.kernels.gpu.matmul import dense_matmul

    own = find(partial(dense_matmul, weight=linear.dense_weight()[:, source]), x[:_TRIED_ROWS], LEAST)
    return _Way(own, dense_matmul)


def _taking(linear: Linear, source: Tensor) -> Product:
    """The product with a weight of the same form, with the columns `source`, that make everything cancel."""
    form = linear.form
    if isinstance(form, Joined):
        return Joined([part.taking(source) for part in form.parts])
    if isinstance(form, Quantised):
        return form.taking(source)
    taken = linear.dense_weight()[:, source]
    packed = None if form is None else pack(taken, is_gated=linear.is_gated)
    return packed or partial(F.linear, weight=taken)


def _dtype(linear: Linear) -> torch.dtype:
    return linear.weight.dtype if linear.form is None else linear.form.dtype


def _parts(form: WeightForm | None) -> Sequence[object]:
    return form.parts if isinstance(form, Joined) else [form]


def _kind(form: WeightForm | None) -> list[object]:
    kinds: list[object] = []
    for part in _parts(form):
        kinds.append(type(part))
        if isinstance(part, Quantised):
            weight = part.weight
            kinds += [weight.codes.dtype, weight.shape, weight.group_size, type(part.few_tokens)]
            kinds += [weight.zeros is None, weight.minima is None]
        elif isinstance(part, Dense):
            kinds.append(part.weight.shape)
    return kinds


@torch.inference_mode()
def _runs(model: Transformer, heads: int, kv_heads: int, head_dim: int) -> Runs | None:
    """None if attention's bits depend on how queries are cut: tried with runs that end in two tiles of keys. That it
    does not matter who adds up chunks is a fact of numbers, not of a machine."""
    runs, block_size, device = Runs.of(heads // kv_heads), 16, model.device
    past = 64 - runs.most // 2
    lens = [count for count in (runs.most // 2, runs.most, runs.most // 2) if count]
    total = past + sum(lens)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(model.dtype)

    cache = -(-total // block_size), block_size, kv_heads, head_dim
    q, kv_layer = drawn(sum(lens), heads, head_dim), KVLayer(drawn(*cache), drawn(*cache))

    def attend(lens: list[int]) -> Tensor:
        starts = torch.tensor([0, *lens], device=device).cumsum(0).int()
        ragged = Ragged(
            block_tables=torch.arange(cache[0], dtype=torch.int32, device=device).repeat(len(lens), 1),
            query_starts=starts,
            context_lens=past + starts[1:],
            slots=torch.empty(0, dtype=torch.int64, device=device),
            num_decodes=len(lens) if runs.most == 1 else 0,
            block_size=block_size,
            run_len=runs.most,
        )
        return ops.paged_attention(q, kv_layer, ragged, head_dim**-0.5)

    cut = [count for whole in lens for count in (1, whole - 1) if count]
    return runs if torch.equal(attend(lens), attend(cut)) else None
