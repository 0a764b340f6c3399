"""Which tensors of a folder make one quantised weight together, found before any of them is read."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from llama.api.errors import CheckpointError
from llama.model.checkpoint.layout import Entry
from llama.model.checkpoint.quantised.config import Quantization
from llama.model.checkpoint.quantised.formats import OF_ACTIVATIONS, OF_ATTENTION, Format, find_format, unpack
from llama.model.checkpoint.shards import DTYPES, StoredTensor, read_codes
from llama.model.weights.coded import CodedWeight


class CodedSource(NamedTuple):
    """The tensors of one module, by what follows its name."""

    module: str
    shape: tuple[int, int]
    format: Format
    quantization: Quantization
    stored: dict[str, StoredTensor]

    @property
    def place(self) -> tuple[Path, int]:
        return min(tensor.place for tensor in self.stored.values())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def may_lack_zeros(self) -> bool:
        """Whether it has zero points of 0, less one, of a writer that may have put such a one over its neighbours."""
        told = self.quantization
        if told.method != "gptq" or told.symmetric or not told.zeros_less_one or told.is_by_gptqmodel:
            return False
        (width,) = told.widths or (4,)
        return bool((unpack(read_codes(self.stored["qzeros"]), width) == (1 << width) - 1).any())

    def read(self) -> CodedWeight:
        """Raises CheckpointError."""
        try:
            tensors = {name: read_codes(tensor) for name, tensor in self.stored.items()}
            return self.format.read(tensors, self.shape, self.quantization)
        except CheckpointError as error:
            raise CheckpointError(f"{self.place[0]}: {self.module}: {error}") from None


def find_coded(
    entries: Iterable[Entry], stored: Mapping[str, StoredTensor], quantization: Quantization | None
) -> tuple[dict[str, CodedSource], dict[str, StoredTensor]]:
    """-> (the quantised weights by their entry's name, what is left of `stored`: plain and unknown tensors).

    Scales of activations and of the KV cache are left out of both.
    """
    entries = list(entries)
    modules = {entry.name.removesuffix(".weight"): entry for entry in entries if len(entry.shape) == 2}
    never_coded = {entry.name for entry in entries if len(entry.shape) == 1}
    parts: dict[str, dict[str, StoredTensor]] = {}
    rest = dict(stored)
    for name, tensor in stored.items():
        module = None if name in never_coded else _module_of(name, modules)
        if module is not None:
            parts.setdefault(module, {})[name[len(module) + 1 :]] = tensor
        elif quantization is not None and _scales_attention(name):
            del rest[name]
    sources = {}
    for module, tensors in parts.items():
        weights = tensors.keys() - OF_ACTIVATIONS
        plain = weights == {"weight"} and tensors["weight"].code in DTYPES
        if quantization is None and (plain or not find_format(tensors)):
            continue
        if not plain:
            entry = modules[module]
            rows, columns = entry.shape
            form = _checked_format(tensors, quantization, module)
            assert quantization is not None  # else it was refused
            sources[entry.name] = CodedSource(module, (rows, columns), form, quantization, tensors)
        for name in tensors:
            if not (plain and name == "weight"):
                del rest[f"{module}.{name}"]
    return sources, rest


def _module_of(name: str, modules: Mapping[str, Entry]) -> str | None:
    """The module that the tensor belongs to: names of bitsandbytes have dots after it (q_proj.weight.absmax)."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return name
    return None


def _scales_attention(name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf in OF_ATTENTION and module.endswith(".self_attn")


def _checked_format(tensors: dict[str, StoredTensor], quantization: Quantization | None, module: str) -> Format:
    found = find_format(tensors)
    told = ", ".join(f"{name} {tensor.code} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))
    if found is None:
        raise CheckpointError(f"{module}: its tensors are in no format that is known: {told}")
    if quantization is None or quantization.method not in found.methods:
        said = "names no quantisation" if quantization is None else f"says {quantization.method!r}"
        raise CheckpointError(f"{module}: its tensors are those of {' or '.join(found.methods)}, config.json {said}")
    if lacking := quantization.needed - tensors.keys():
        raise CheckpointError(f"{module}: config.json says that it has {' and '.join(sorted(lacking))}, found {told}")
    return found
