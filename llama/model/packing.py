"""Which dense weights are packed on a CPU: a table, so that two processes on one kind of processor have the same bits.

A call of a library that multiplies packed weights costs more than a small product itself. `python -m benchmarks.forms`
measures what the table rests on, and says where the machine that it runs on differs.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor, nn

from llama.api.errors import ParameterError, is_one_of
from llama.model.config import ModelConfig
from llama.model.linear import Linear
from llama.model.module import version_of
from llama.model.weights.huge_pages import give_back, move_to_huge_pages
from llama.model.weights.packed import Library, library_of
from llama.model.weights.quantised import LAYOUTS, Quantised, quantise

logger = logging.getLogger(__name__)

Packing = Literal["auto", "always", "never"]
PACKINGS: tuple[Packing, ...] = ("auto", "always", "never")

# Numbers in a weight from which it is worth packing. oneDNN's float32 and FBGEMM's are measured on AVX2, where 16-bit
# numbers without FBGEMM are slower at any size from 8 tokens on; oneDNN's 16-bit ones on a processor with AMX, which
# multiplies bfloat16 in tiles and float16 as float32.
FEWEST_NUMBERS: dict[tuple[Library, torch.dtype], int] = {
    ("onednn", torch.float32): 1 << 18,
    ("onednn", torch.bfloat16): 1 << 14,
    ("onednn", torch.float16): 1 << 17,
    ("fbgemm", torch.bfloat16): 0,
    ("fbgemm", torch.float16): 0,
}
WORTH_MOVING = 1 << 26  # bytes of packed weights


def library_for(shape: tuple[int, int], dtype: torch.dtype, packing: Packing = "auto") -> Library | None:
    """The library that a weight of this shape is packed for on this machine's CPU; None = it stays plain."""
    library = None if packing == "never" else library_of(dtype)
    if library is None or packing == "always":
        return library
    return library if shape[0] * shape[1] >= FEWEST_NUMBERS[library, dtype] else None


def prepare(linears: Sequence[Linear], layout: str, packing: Packing) -> None:
    """See `Transformer.prepare`."""
    if not is_one_of(layout, tuple(LAYOUTS)):
        told = f"must be one of {', '.join(LAYOUTS)}, got {layout!r}"
        raise ParameterError(f"quantization_layout {told}", "quantization_layout")
    if not is_one_of(packing, PACKINGS):
        raise ParameterError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}", "packing")
    chosen = [linear for linear in linears if not linear.is_prepared and _is_packed(linear, packing)]

    def prepare_one(linear: Linear) -> None:
        linear.prepare(layout)
        if linear.coded is not None:
            give_back()

    if chosen:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)  # int8 is packed with its help
            # Packing runs on one core per weight.
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(prepare_one, chosen))
    forms = Counter("plain" if linear.form is None else type(linear.form).__name__ for linear in linears)
    logger.debug("linear layers by form (packing %s): %s", packing, dict(forms))
    if sum(linear.form.nbytes for linear in chosen if linear.form is not None) >= WORTH_MOVING:
        move_to_huge_pages(seconds=2.5)


def unpack(model: nn.Module) -> bool:
    """Make packed weights parameters again, for gradients -> whether there were any. ParameterError for quantised
    ones."""
    packed = [module for module in model.modules() if isinstance(module, Linear) and module.form is not None]
    if any(linear.coded is not None for linear in packed):
        what = (
            "quantised weights have no gradients: dequantise() the model, or call requires_grad_ of single parameters"
        )
        raise ParameterError(what, "requires_grad")
    for linear in packed:
        linear.widen()
    return bool(packed)


class TiedHead:
    """Packs a head that is tied to the embedding anew where that has changed in place since."""

    def __init__(self) -> None:
        self._state = -1, -1

    def settle(self, embedding: nn.Parameter) -> None:
        """What is packed now is of this embedding, as it is."""
        self._state = version_of(embedding), embedding.data_ptr()

    def renew(self, head: Linear, embedding: nn.Parameter) -> None:
        known = self._state
        self.settle(embedding)
        if self._state != known and head.coded is None:
            with torch.inference_mode(False):
                head.form, head.weight = None, embedding
                head.prepare()


def untied(state_dict: Mapping[str, Tensor], prefix: str) -> str:
    """What is wrong with a state dict for a model whose head is its embedding; "" if nothing is."""
    embedding, head = (state_dict.get(f"{prefix}{name}.weight") for name in ("embed_tokens", "lm_head"))
    if embedding is None or head is None or embedding.data_ptr() == head.data_ptr() or torch.equal(embedding, head):
        return ""
    return f"{prefix}lm_head.weight differs from {prefix}embed_tokens.weight, to which the config ties it"


def sample_of(shape: tuple[int, int], dtype: torch.dtype, scheme: str) -> Quantised:
    """As many rows of a weight that is rounded by `scheme` as stand for all of them."""
    return quantise(torch.zeros(shape[0] % 16 or 16, shape[1], dtype=dtype, device="cpu"), scheme)


def quantised_forms(sample: Quantised, rows: int) -> tuple[str, dict[str, int]]:
    """In which forms a weight of so many rows like the sample's lies on this machine's CPU in the default layout, and
    its bytes in each."""
    told, sizes = "", dict.fromkeys(LAYOUTS, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        for layout in LAYOUTS:
            form = Quantised(sample.weight, sample.dtype)
            form.prepare(layout, rows)
            sizes[layout] = form.nbytes * rows // sample.weight.shape[0]
            told = form.told if layout == "balanced" else told
    return told, sizes


def _is_packed(linear: Linear, packing: Packing) -> bool:
    if linear.coded is not None:
        return True
    if linear.weight.requires_grad:  # an optimizer has it
        return False
    return library_for((linear.out_features, linear.in_features), linear.weight.dtype, packing) is not None


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linear layers by name."""
    hidden, size = config.hidden_size, config.intermediate_size
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return {
        "qkv_proj": ((heads + 2 * kv_heads) * dim, hidden),
        "o_proj": (hidden, heads * dim),
        "gate_up_proj": (2 * size, hidden),
        "down_proj": (hidden, size),
        "lm_head": (config.vocab_size, hidden),
    }
