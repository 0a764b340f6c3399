"""The mode in which a token's activations and logits have the same bits whatever is computed beside it.

It asks of each Linear, and of attention, in which pieces rows are to be multiplied: see `llama.kernels.cpu.pieces`.
"""

import logging
import time
import warnings
from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F

from llama.api.errors import ParameterError
from llama.kernels.cpu.fixed_attention import find_pieces
from llama.kernels.cpu.pieces import Pieces, Product, cancelling, find
from llama.model.linear import Linear
from llama.model.transformer import Transformer
from llama.model.weights.form import WeightForm
from llama.model.weights.packed import pack
from llama.model.weights.quantised import Dense, Joined, Quantised

logger = logging.getLogger(__name__)


def fix_rows(model: Transformer) -> None:
    """Put a prepared model into the mode, for batches that have its `fixed`. What changes its weights' forms asks for
    another call. ParameterError where this machine has no such way to multiply."""
    started, config = time.monotonic(), model.local_config
    found: dict[object, Pieces | None] = {}
    shape = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    found["attention"] = fixed = find_pieces(*shape, model.dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # int8 is packed with its help
        for module in model.modules():
            if isinstance(module, Linear):
                # Linears of one kind have the same pieces.
                kind = (module.in_features, module.out_features, *_kind(module.form))
                if kind not in found:
                    found[kind] = _pieces_of(module)
                module.pieces = found[kind]
    if None in found.values():
        raise ParameterError("deterministic must be False on this machine: its products depend on the batch")
    model.fixed = fixed
    logger.info("pieces of rows with the same bits found (%.2f s)", time.monotonic() - started)


def _pieces_of(linear: Linear) -> Pieces | None:
    form = linear.form
    x, source = cancelling(linear.in_features, linear.weight.dtype if form is None else form.dtype)
    seconds = [part.few_tokens for part in _parts(form) if isinstance(part, Quantised)]
    most = min((second.most_tokens for second in seconds if second is not None), default=None)
    product: Product
    # A weight of the same form, with the columns that make everything cancel.
    if isinstance(form, Joined):
        product = Joined([part.taking(source) for part in form.parts])
    elif isinstance(form, Quantised):
        product = form.taking(source)
    else:
        taken = linear.dense_weight()[:, source]
        product = partial(F.linear, weight=taken) if form is None else pack(taken) or partial(F.linear, weight=taken)
    return find(product, x, most)


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
