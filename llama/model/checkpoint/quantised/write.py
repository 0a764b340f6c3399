"""Quantised weights on their way to disk: compressed-tensors, or MLX's affine form where groups have a float minimum.

Codes, scales and zero points are written as they are, so that what is loaded again is the same weight, whichever format
it was published in.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.model.checkpoint.shards import Stored
from llama.model.weights.quantised import Quantised

_KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False}

Scheme = dict[str, Any]  # a group of compressed-tensors' config_groups, or MLX's object


class Coded(NamedTuple):
    """One quantised weight: what config.json says of it, and its tensors by what follows the module's name."""

    scheme: Scheme
    tensors: dict[str, Stored]


def coded_tensors(form: Quantised) -> Coded:
    if form.weight.minima is not None:
        return _mlx(form)
    if form.weight.codes.dtype == torch.float8_e4m3fn:
        return _float8(form)
    is_plain = form.order is None and form.weight.zeros is None and len(form.weight.scales) == 1
    return _int8(form) if is_plain and form.weight.codes.dtype == torch.int8 else _packed(form)


def kv_scale_tensors(kv_scales: Tensor | None) -> dict[str, Stored]:
    """compressed-tensors' scales of heads, of an fp8 KV cache."""
    tensors = {}
    for layer, of_layer in enumerate(() if kv_scales is None else kv_scales):
        for name, values in zip(("k_scale", "v_scale"), of_layer, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = _stored(values.view(-1, 1, 1))
    return tensors


def quantization_config(schemes: Mapping[str, Scheme | None], kv_scales: Tensor | None = None) -> dict[str, Any]:
    """What config.json says of the modules: `schemes` by name, None = dense. All may be, beside `kv_scales`."""
    coded = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    if coded and all("mode" in scheme for scheme in coded.values()):
        common = next(iter(coded.values()))
        values = common | {name: scheme for name, scheme in coded.items() if scheme != common}
        return {"quantization": values, "quantization_config": values}
    if any("mode" in scheme for scheme in coded.values()):
        raise ValueError("a float minimum per group and other quantised weights have no format in common")
    kinds: dict[str, list[str]] = {}
    for name, scheme in coded.items():
        kinds.setdefault(json.dumps(scheme), []).append(name)
    groups = {
        f"group_{number}": json.loads(kind) | {"targets": ["Linear"] if len(kinds) == 1 else names}
        for number, (kind, names) in enumerate(kinds.items())
    }
    formats = {group["format"] for group in groups.values()} or {"dense"}
    values = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, scheme in schemes.items() if scheme is None],
        "kv_cache_scheme": None if kv_scales is None else _KV_CACHE,
    }
    return {"quantization_config": values}


def _scheme(kind: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> Scheme:
    common = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "group_size": None}
    if activations is not None:
        activations = {"num_bits": 8, "symmetric": True, "dynamic": True, "group_size": None} | activations
    return {
        "format": kind,
        "weights": common | weights,
        "input_activations": activations,
        "output_activations": None,
    }


def _stored(tensor: Tensor) -> Stored:
    return Stored.of(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _int8(form: Quantised) -> Coded:
    weights = {"strategy": "channel"}
    scheme = _scheme("int-quantized", weights, {"type": "int", "strategy": "token"})
    scales = form.weight.scales.t()
    return Coded(
        scheme, {"weight": Stored.of(torch.int8, form.weight.shape, form.codes), "weight_scale": _stored(scales)}
    )


def _float8(form: Quantised) -> Coded:
    weight, scales = form.weight, form.weight.scales.t()  # [N, G]
    size, rows = weight.group_size, weight.shape[0]
    if len(weight.scales) == 1:
        weights: dict[str, Any] = {"type": "float", "strategy": "channel"}
        activations: dict[str, Any] = {"type": "float", "strategy": "token"}
    else:
        corners = scales[::size]
        if not torch.equal(corners.repeat_interleave(size, dim=0)[:rows], scales):
            raise ValueError("float8 with scales of groups that are no blocks has no published format")
        weights = {"type": "float", "strategy": "block", "block_structure": [size, size]}
        activations = {"type": "float", "strategy": "group", "group_size": size}
        scales = corners
    tensors = {"weight": Stored.of(torch.float8_e4m3fn, weight.shape, form.codes), "weight_scale": _stored(scales)}
    return Coded(_scheme("float-quantized", weights, activations), tensors)


def _packed(form: Quantised) -> Coded:
    weight = form.weight
    rows, columns = weight.shape
    bits = 4 if weight.codes.dtype == torch.int16 else 8
    in_groups = len(weight.scales) > 1
    weights = {
        "num_bits": bits,
        "symmetric": weight.zeros is None,
        "strategy": "group" if in_groups else "channel",
        "group_size": weight.group_size if in_groups else None,
    }
    if form.order is not None:
        weights["actorder"] = "group"
    tensors = {
        "weight_packed": Stored.of(
            torch.int32, (rows, math.ceil(columns * bits / 32)), lambda: pack_words(form.codes(), bits)
        ),
        "weight_scale": _stored(weight.scales.t()),
        "weight_shape": _stored(torch.tensor([rows, columns], device="cpu")),
    }
    if weight.zeros is not None:  # packed along N
        tensors["weight_zero_point"] = _stored(pack_words(weight.zeros, bits).t())
    if form.order is not None:
        groups = torch.empty(columns, dtype=torch.int32, device="cpu")
        groups[form.order.cpu()] = (torch.arange(columns, device="cpu") // weight.group_size).int()
        tensors["weight_g_idx"] = _stored(groups)
    return Coded(_scheme("pack-quantized", weights, None), tensors)


def _mlx(form: Quantised) -> Coded:
    weight = form.weight
    rows, columns = weight.shape
    bits = 4 if weight.codes.dtype == torch.int16 else 8
    assert weight.minima is not None and weight.zeros is not None and form.order is None, "MLX has no other layout"
    tensors = {
        "weight": Stored("U32", (rows, columns * bits // 32), lambda: pack_words(form.codes(), bits)),
        "scales": _stored(weight.scales.t()),
        "biases": _stored(weight.minima.t()),
    }
    return Coded({"group_size": weight.group_size, "bits": bits, "mode": "affine"}, tensors)


def pack_words(q: Tensor, bits: int) -> Tensor:
    """Signed values [R, C] -> int32 [R, ceil(C bits / 32)], unsigned, the first in the lowest bits."""
    size = 32 // bits
    unsigned = q.to(torch.int16) + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -unsigned.shape[1] % size)).to(torch.uint8)
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return unsigned.flatten().view(torch.int32).view(len(q), -1)  # the stride of a single row may be anything
