"""What a folder says about its quantisation: the method by its name, and what the tensors alone cannot tell.

Where tensors tell it as well (the width of codes, the size of groups), the folder's word is only held against them.
"""

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama.api.errors import CheckpointError, ParameterError, is_one_of
from llama.files import QUANTISATION_FILES, read_json, read_json_if_there
from llama.model.weights.quantised import SCHEMES
from llama.patterns import matches

# What vLLM calls a method beside its own name.
_WORDS = {"gptq": ("gptq_marlin",), "awq": ("awq_marlin",), "modelopt": ("modelopt_fp8",)}
# Lists of modules that were left dense, as one writer or another calls them.
_LEFT_DENSE = tuple(
    "ignore ignored_layers exclude exclude_modules modules_to_not_convert llm_int8_skip_modules".split()
)
_INSTEAD = "take a folder of the same model in FP8 or W4A16 (compressed-tensors), GPTQ or AWQ instead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """`widths` and `group_sizes` are those that codes may have, None = any; group size -1 is the whole row.

    The last six are for an estimate of what the codes take, where there are no tensors to ask."""

    method: str
    widths: frozenset[int] | None = None
    group_sizes: frozenset[int] | None = None
    block: tuple[int, int] = (128, 128)  # rows, columns of one scale, where scales form a grid
    symmetric: bool = False  # GPTQ: every zero point is the middle of the codes
    zeros_less_one: bool = False  # GPTQ's first format stores zero points less one
    is_by_gptqmodel: bool = False  # others, in that format, lost what lies beside a zero point of 0
    needed: frozenset[str] = frozenset()  # tensors that every module with codes has, beside those of its format
    scheme: str | None = "fp8"  # what linear layers hold in memory: fp8, int8, int4; None = dense weights
    columns: int = -1  # that share a scale, -1 = the whole row
    scale_bytes: int = 4  # with the zero point and the minimum that go with it
    has_coded_head: bool = False  # where it is no embedding
    targets: frozenset[str] = frozenset(("Linear",))  # modules with codes: all linear layers, or as in `left_dense`
    left_dense: frozenset[str] = frozenset()  # modules, parts of their names, `re:` and what follows matches, or `*`

    def coded(self, modules: Collection[str]) -> set[str]:
        """Those of these linear layers that hold codes, by the word of config.json. CheckpointError for a pattern in it
        that is none or does not end."""
        if self.scheme is None:
            return set()
        targets = set(modules) if "Linear" in self.targets else _named(self.targets, modules)
        return targets - _named(self.left_dense, modules)


def _named(words: Iterable[str], modules: Collection[str]) -> set[str]:
    plain = {word for word in words if not word.startswith("re:") and "*" not in word}
    found = {module for module in modules if not plain.isdisjoint(_parts(module))}
    for word in set(words) - plain:
        pattern = word.removeprefix("re:") if word.startswith("re:") else fnmatch.translate(word)
        try:
            found.update(matches(pattern, modules, "match"))
        except ValueError as error:
            raise CheckpointError(f"quantization_config: {error}") from None
    return found


def _parts(module: str) -> Iterator[str]:
    """Of its name, between dots."""
    names = module.split(".")
    return (".".join(names[i:j]) for i in range(len(names)) for j in range(i + 1, len(names) + 1))


def find_quantization(folder: Path) -> Quantization | None:
    """None for a folder of plain weights; its config.json alone will do. Raises CheckpointError, one line, for a method
    that is not read here."""
    path = folder / "config.json" if folder.is_dir() else folder
    config = read_json(path)
    values = config.get("quantization_config")
    if values is None:
        values = config.get("quantization")  # MLX
    if values is None:
        path, values = _told_beside(path)
    if values is None:
        return None
    try:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"quantization_config must be an object, got {values!r}")
        method = values.get("quant_method")
        if method is None and {"bits", "group_size"} <= values.keys() and "quantization" in config:
            method = "mlx"
        if not isinstance(method, str) or method not in _METHODS:
            raise CheckpointError(f"the quantisation method {method!r} is not supported; {_INSTEAD}")
        left_dense = frozenset().union(*(_texts(values.get(key)) for key in _LEFT_DENSE))
        return replace(_METHODS[method](values), left_dense=left_dense)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _told_beside(path: Path) -> tuple[Path, Any]:
    """What the first of QUANTISATION_FILES beside config.json says, and which of them it is."""
    for name in QUANTISATION_FILES:
        values = _of_own_file(read_json_if_there(path.with_name(name)))
        if values is not None:
            return path.with_name(name), values
    return path, None


def _of_own_file(found: Mapping[str, Any]) -> Any:
    """What it says, as config.json would; None where it is no file of a quantiser's."""
    if "quantization" in found:
        told = found["quantization"]
        return {"quant_method": "modelopt", **told} if isinstance(told, Mapping) else told
    # AutoGPTQ and AutoAWQ named no method in theirs at first, and AutoAWQ had keys of its own.
    method = found.get("quant_method") or ("gptq" if "desc_act" in found else "awq" if "zero_point" in found else None)
    renamed = {new: found[old] for old, new in (("w_bit", "bits"), ("q_group_size", "group_size")) if old in found}
    return None if method is None else {**found, **renamed, "quant_method": method}


def scheme_for(word: str | None, found: Quantization | None) -> str | None:
    """By which scheme the linear layers of a folder are to be rounded when a user says `word`: None = as they are.

    A quantised folder takes the words that vLLM has for its own method, and they change nothing.
    """
    if found is not None and not is_one_of(word, (None, found.method, *_WORDS.get(found.method, ()))):
        raise ParameterError(
            f"quantization must be None or {found.method!r} for a folder that is quantised already, got {word!r}",
            "quantization",
        )
    if found is None and not is_one_of(word, (None, *SCHEMES)):
        told = ", ".join(SCHEMES)
        raise ParameterError(f"quantization must be one of {told} for a dense checkpoint, got {word!r}", "quantization")
    return word if found is None else None


def _refuse(what: str) -> CheckpointError:
    return CheckpointError(f"{what} is not supported; {_INSTEAD}")


def _only(method: str, values: Mapping[str, Any], key: str, *accepted: Any) -> None:
    if values.get(key) not in (None, *accepted):
        raise _refuse(f"{method} with {key} {values[key]!r}")


def _integer(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"quantization_config: {key} must be an integer, got {value!r}")
    return value


def _compressed_tensors(values: Mapping[str, Any]) -> Quantization:
    name = "compressed-tensors"
    accepted = ("dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized")
    _only(name, values, "format", *accepted, "mixed-precision")
    sparsity = values.get("sparsity_config") or {}
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        raise _refuse(f"{name} with sparsity ({sparsity!r})")
    if values.get("transform_config"):
        raise _refuse(f"{name} with transforms (transform_config)")
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping):
        raise CheckpointError(f"quantization_config: config_groups must be an object, got {groups!r}")
    widths, sizes, shared, block = set(), set(), set(), (128, 128)
    schemes, targets, has_zeros, needed = set(), set(), False, []
    for group in groups.values():
        _only(name, group if isinstance(group, Mapping) else {"format": group}, "format", *accepted)
        weights = group.get("weights")
        if weights is None:  # attention or the KV cache
            continue
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"quantization_config: weights must be an object, got {weights!r}")
        kind, width = weights.get("type", "int"), weights.get("num_bits", 8)
        if (kind, width) not in (("int", 4), ("int", 8), ("float", 8)):
            raise _refuse(f"{name} with weights of {width!r} bits, type {kind!r},")
        strategy = weights.get("strategy")
        if strategy not in ("tensor", "channel", "group", "block"):
            raise _refuse(f"{name} with the strategy {strategy!r}")
        widths.add(width)
        sizes.add(_integer(weights, "group_size") if strategy == "group" else -1)
        block = _block(weights.get("block_structure")) or block
        shared.add(block[1] if strategy == "block" else weights["group_size"] if strategy == "group" else -1)
        schemes.add("fp8" if kind == "float" else f"int{width}")
        targets |= _texts(group.get("targets", ["Linear"]))
        has_zeros |= weights.get("symmetric") is False
        needed.append(_beside_scales(weights))
    return Quantization(
        method=name,
        widths=frozenset(widths),
        group_sizes=frozenset(sizes),
        block=block,
        scheme=max(schemes - {"int4"}, default="int4" if schemes else None),
        columns=min(shared - {-1}, default=-1),
        scale_bytes=3 if has_zeros else 2,
        targets=frozenset(targets),
        needed=frozenset.intersection(*needed) if needed else frozenset(),
    )


def _beside_scales(weights: Mapping[str, Any]) -> frozenset[str]:
    """Without these its codes are another weight."""
    zeros = ["weight_zero_point"] if weights.get("symmetric") is False else []
    return frozenset([*zeros, "weight_g_idx"] if weights.get("actorder") in ("group", "dynamic") else zeros)


def _texts(value: Any) -> set[str]:
    return {each for each in value if isinstance(each, str)} if isinstance(value, list) else set()


def _block(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [int(part) if part.isdigit() else part for part in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(each) is int and each > 0 for each in value):
        raise CheckpointError(f"quantization_config: a block must be two positive integers, got {value!r}")
    return value[0], value[1]


def _fp8(values: Mapping[str, Any]) -> Quantization:
    _only("fp8", values, "fmt", "e4m3", "float8_e4m3fn")
    _only("fp8", values, "scale_fmt", "float")
    block = _block(values.get("weight_block_size"))
    columns = -1 if block is None else block[1]
    return Quantization(method="fp8", widths=frozenset((8,)), block=block or (128, 128), columns=columns)


def _fbgemm_fp8(values: Mapping[str, Any]) -> Quantization:
    return Quantization(method="fbgemm_fp8", widths=frozenset((8,)))


def _modelopt(values: Mapping[str, Any]) -> Quantization:
    if values.get("quant_algo") != "FP8":
        raise _refuse(f"modelopt with quant_algo {values.get('quant_algo')!r}")
    return Quantization(method="modelopt", widths=frozenset((8,)))


def _quark(values: Mapping[str, Any]) -> Quantization:
    """Its options for all modules, and for those of a name or a type; what it does with activations has no effect."""
    several = [values.get(key) or {} for key in ("layer_quant_config", "layer_type_quant_config")]
    if not all(isinstance(options, Mapping) for options in several):
        raise CheckpointError(f"quantization_config: layer_quant_config must be an object, got {several[0]!r}")
    for options in (values.get("global_quant_config"), *(each for named in several for each in named.values())):
        weight = options.get("weight") if isinstance(options, Mapping) else options
        kind = (weight.get("dtype"), weight.get("qscheme")) if isinstance(weight, Mapping) else weight
        if kind not in (None, ("fp8_e4m3", "per_tensor"), ("fp8_e4m3", "per_channel")):
            raise _refuse(f"quark with weights of {kind!r}")
    return Quantization(method="quark", widths=frozenset((8,)))


def _gptq(values: Mapping[str, Any]) -> Quantization:
    for key in ("checkpoint_format", "format"):
        _only("gptq", values, key, "gptq", "gptq_v2")
    _only("gptq", values, "pack_dtype", "int32")
    if values.get("dynamic"):
        raise _refuse("gptq with options per module (dynamic)")
    bits = _integer(values, "bits")
    if bits not in (4, 8):
        raise _refuse(f"gptq with bits {bits}")
    if not isinstance(values.get("sym"), bool):
        raise CheckpointError(f"quantization_config: sym must be true or false, got {values.get('sym')!r}")
    meta = values.get("meta")
    return Quantization(
        method="gptq",
        widths=frozenset((bits,)),
        group_sizes=frozenset((_integer(values, "group_size"),)),
        symmetric=values["sym"],
        zeros_less_one=values.get("checkpoint_format", values.get("format")) != "gptq_v2",
        is_by_gptqmodel=isinstance(meta, Mapping) and "gptqmodel" in str(meta.get("quantizer")),
        needed=frozenset(("g_idx",) if values.get("desc_act") and values["group_size"] != -1 else ()),
        scheme=f"int{bits}",
        columns=values["group_size"],
        scale_bytes=2 if values["sym"] else 3,
    )


def _awq(values: Mapping[str, Any]) -> Quantization:
    version = values.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _refuse(f"awq with version {version!r}")
    bits = _integer(values, "bits")
    if bits != 4:
        raise _refuse(f"awq with bits {bits}")
    size = _integer(values, "group_size")
    codes: dict[str, Any] = {"scheme": "int4", "columns": size, "scale_bytes": 3}
    return Quantization(method="awq", widths=frozenset((4,)), group_sizes=frozenset((size,)), **codes)


def _bitsandbytes(values: Mapping[str, Any]) -> Quantization:
    has_4_bits = values.get("load_in_4bit") or values.get("_load_in_4bit")
    return Quantization(method="bitsandbytes", scheme=None if has_4_bits else "int8")


def _mlx(values: Mapping[str, Any]) -> Quantization:
    _only("mlx", values, "mode", "affine")
    scheme = "int4" if values.get("bits") == 4 else "int8"
    size = values["group_size"] if isinstance(values.get("group_size"), int) else -1
    return Quantization(method="mlx", scheme=scheme, columns=size, scale_bytes=5, has_coded_head=True)


_METHODS = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm_fp8,
    "modelopt": _modelopt,
    "quark": _quark,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "mlx": _mlx,
}
