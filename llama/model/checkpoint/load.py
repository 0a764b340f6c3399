"""From a Hugging Face folder to a module: every file and name checked first, then one pass over the data."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llama.api.errors import CheckpointError, ParameterError, is_one_of, refusal
from llama.files import check_path, read_json, some_of
from llama.model.checkpoint.layout import Entry, layout
from llama.model.checkpoint.quantised import CodedSource, find_coded, find_quantization, scheme_for
from llama.model.checkpoint.quantised.kv_scales import read_kv_scales
from llama.model.checkpoint.save import stored_rows
from llama.model.checkpoint.shards import StoredTensor, read_header, read_part
from llama.model.config import DTYPES, ModelConfig
from llama.model.linear import Linear
from llama.model.parallel import WHOLE, Cut, Shard, sizes
from llama.model.weights.coded import CodedWeight
from llama.model.weights.huge_pages import give_back
from llama.model.weights.quantised import Dense, Quantised, join, of_coded, quantise

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_INDEX_BYTES = 2**26
_THREADS = 4

Source = StoredTensor | CodedSource


class Checkpoint:
    """A Hugging Face folder: config.json is read, and every tensor found and checked, before any weight is read.

    Strict: nothing missing, nothing left over, shapes as configured. Raises ConfigError or CheckpointError, one line
    each. Weights that are quantised in one of the published formats stay so in a `Linear`, but for those whose codes
    stand for a table of values, and those of the embedding: they become dense ones in the module's dtype. `kv_scales`
    [layers, 2, kv_heads] are those of a KV cache in fp8, None where the folder has none.
    """

    def __init__(
        self,
        path: str | Path,
        config: ModelConfig | None = None,
        entries: Callable[[ModelConfig], list[Entry]] | None = None,
    ) -> None:
        """`config` in place of the folder's. `entries`: of a network with parts of its own; those of them that the
        folder lacks are told by `absent`."""
        check_path(path)
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder")
        self._folder = folder
        self.config = ModelConfig.from_pretrained(folder) if config is None else config
        self._entries = list(layout(self.config)) if entries is None else entries(self.config)
        self.absent: list[Entry] = []
        found = find_tensors(folder)
        if self.config.tie_word_embeddings and _EMBEDDING not in found and _HEAD in found:
            found[_EMBEDDING] = found.pop(_HEAD)  # one tensor, stored under its other name
        if entries is not None:
            usual = set(layout(self.config))
            self.absent = [entry for entry in self._entries if entry not in usual and entry.name not in found]
            self._entries = [entry for entry in self._entries if entry not in self.absent]
        self._quantization = find_quantization(folder)
        self._coded, self._stored = find_coded(self._entries, found, self._quantization)
        scales = (None, []) if self._quantization is None else read_kv_scales(found, self.config)
        self.kv_scales, self._layers_without_scales = scales
        plain = [entry for entry in self._entries if entry.name not in self._coded]
        _check(folder, self.config, plain, self._stored)

    def resolve(self, dtype: torch.dtype | str) -> torch.dtype:
        """`dtype` itself; for "auto" what config.json says, else what the last norm is stored in: a plain checkpoint
        has one dtype, and norms are never quantised."""
        if isinstance(dtype, torch.dtype):
            dtype = str(dtype).removeprefix("torch.")
        if is_one_of(dtype, ("auto",)):
            stored = self._stored["model.norm.weight"].dtype
            return getattr(torch, self.config.dtype) if self.config.dtype else stored
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise refusal("dtype", f"one of auto, {', '.join(DTYPES)}", dtype)
        return getattr(torch, dtype)

    def check_ranks(self, size: int, quantization: str | None = None) -> None:
        """ParameterError, with the legal values, where `size` ranks would cut columns that share a scale or that lie in
        an order of their own. One weight is read of those that are stored alike."""
        scheme = scheme_for(quantization, self._quantization)
        legal, problem, seen = sizes(self.config), "", set()
        for entry in self._entries:
            coded = self._coded.get(entry.name)
            kind = entry.shape, coded and frozenset((name, each.shape) for name, each in coded.stored.items())
            if kind in seen or Shard(self.config, 0, size).cut(entry.name).columns == slice(None):
                continue
            seen.add(kind)
            if (row := _first_rows(entry, coded, scheme)) is None:
                continue
            for n in legal[1:]:
                try:
                    for rank in range(n):
                        row.columns(Shard(self.config, rank, n).cut(entry.name).columns)
                except ValueError as error:
                    legal.remove(n)
                    problem = f"{entry.name}: {error}" if n == size else problem
        if problem:
            told = f"must be one of {', '.join(map(str, legal))}" if len(legal) > 1 else "must be 1"
            raise ParameterError(f"tensor_parallel_size {told}, got {size}: {problem}", "tensor_parallel_size")

    def samples(self, dtype: torch.dtype) -> Iterator[tuple[Entry, Quantised | None]]:
        """The linear weights of the first layer, in a model of this dtype: as many of their rows as stand for all of
        them, None where they are dense or become so. Each is read whole."""
        for entry in self._entries:
            if entry.name.startswith("model.layers.0.") and len(entry.shape) == 2:
                count = entry.shape[0] % 16 or 16  # what matters of their number
                form = _first_rows(entry, self._coded.get(entry.name), None, count)
                yield entry, None if form is None else form.to(form.device, dtype)

    def load(
        self,
        module: nn.Module,
        *,
        device: torch.device | str | None = None,
        quantization: str | None = None,
        check_weights: bool = False,
        shard: Shard | None = None,
    ) -> None:
        """Read the weights into `module`, whose parameters lie as `layout` says; those on the meta device are made on
        `device`, in their dtype. Of a `shard` the module has one part of each weight, and that alone is read.

        `quantization` rounds the linear layers of a dense checkpoint to "int8", "int4" or "fp8", each as soon as it is
        read. `check_weights` refuses NaN and infinities.
        """
        target = Target(module, device, scheme_for(quantization, self._quantization), shard)
        sources: dict[str, Source] = {**self._stored, **self._coded}
        entries = self._entries if shard is None else list(layout(shard.local))
        _stream(target, entries, sources)
        self._tell_widened(module, entries)
        if shard is None or shard.rank == 0:
            self._tell_lost_zeros()
            self._tell_lost_scales()
        if self.config.tie_word_embeddings and _HEAD in self._stored:
            embedding = module.get_parameter(f"{self._entries[0].module}.weight").detach()
            _compare_tied_head(embedding, self._stored[_HEAD], target.cut(self._entries[0]))
        for entry in entries if check_weights else ():
            if not bool(stored_rows(module, entry).isfinite().all()):
                raise CheckpointError(f"{entry.name} holds NaN or infinite weights")

    def _tell_widened(self, module: nn.Module, entries: Sequence[Entry]) -> None:
        """Of linear layers: who loads 4 bits and gets 16 should hear of it."""
        size = 0
        for entry in entries:
            owner = module.get_submodule(entry.module)
            if entry.name in self._coded and isinstance(owner, Linear) and owner.form is None:
                size += entry.shape[0] * entry.shape[1] * owner.weight.itemsize
        if size:
            told = "%s: weights in nf4 or fp4 have no form of their own here; dense they take %s bytes"
            logger.warning(told, self._folder, f"{size:,}")

    def _tell_lost_zeros(self) -> None:
        module = next((each.module for each in self._coded.values() if each.may_lack_zeros), None)
        if module is not None:
            told = "%s: zero points of 0 in %s: AutoGPTQ wrote such over other zero points; gptqmodel does not"
            logger.warning(told, self._folder, module)

    def _tell_lost_scales(self) -> None:
        if self._layers_without_scales:
            told = "%s: only some layers have scales for an fp8 KV cache; those without take 1: layers %s"
            logger.warning(told, self._folder, ", ".join(map(str, self._layers_without_scales)))


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name -> place, over all shards of a folder."""
    if (folder / _SINGLE).exists():
        return {tensor.name: tensor for tensor in read_header(folder / _SINGLE)}
    if (folder / _INDEX).exists():
        return _from_index(folder / _INDEX)
    convert = "convert it with `llama convert`"
    for pattern, how in (("*.pth", convert), ("*.bin", "save it again as safetensors"), ("*.gguf", convert)):
        if found := sorted(folder.glob(pattern)):
            raise CheckpointError(f"{found[0]}: only safetensors are loaded; {how}")
    raise CheckpointError(f"{folder}: has neither {_SINGLE} nor {_INDEX}")


def _from_index(path: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(path, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f'{path}: has no object "weight_map"')
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name} is said to lie in {shard!r}, which is no safetensors file's name")
        shards.setdefault(shard, set()).add(name)
    absent = [shard for shard in sorted(shards) if not (path.parent / shard).exists()]
    if absent:
        raise CheckpointError(f"{path.parent}: {_INDEX} names shards that are missing: {some_of(absent)}")
    found: dict[str, StoredTensor] = {}
    for shard in sorted(shards):
        tensors = read_header(path.parent / shard)
        for tensor in tensors:
            if tensor.name in found:
                raise CheckpointError(f"{tensor.path}: {tensor.name} lies in {found[tensor.name].path.name} as well")
            found[tensor.name] = tensor
        if lacking := shards[shard].difference(tensor.name for tensor in tensors):
            raise CheckpointError(f"{path.parent / shard}: lacks {some_of(lacking)}, which {_INDEX} says it holds")
    return found


def _check(folder: Path, config: ModelConfig, entries: list[Entry], stored: dict[str, StoredTensor]) -> None:
    names = {entry.name for entry in entries}
    if missing := [entry.name for entry in entries if entry.name not in stored]:
        raise CheckpointError(f"{folder}: missing tensors: {some_of(missing)}")
    # Old checkpoints carry the rotary frequencies, which follow from config.json; a tied head may be stored as a copy.
    extra = [name for name in stored if name not in names and not name.endswith(".rotary_emb.inv_freq")]
    if config.tie_word_embeddings and _HEAD in extra:
        extra.remove(_HEAD)
    if extra:
        raise CheckpointError(f"{folder}: tensors that no part of the model takes: {some_of(extra)}")
    for entry in entries:
        tensor = stored[entry.name]
        _ = tensor.dtype  # refuses integers and the like
        if tensor.shape != entry.shape:
            raise CheckpointError(
                f"{tensor.path}: {entry.name} should be {list(entry.shape)} by config.json ({entry.keys}), "
                f"found {list(tensor.shape)}"
            )


def _first_rows(entry: Entry, coded: CodedSource | None, scheme: str | None, count: int = 1) -> Quantised | None:
    """Of a weight that is quantised, or will be by `scheme`; None of one that is dense, or becomes so."""
    if coded is None:
        return None if scheme is None else quantise(torch.zeros(count, entry.shape[1], device="cpu"), scheme)
    found = coded.read()
    names = ("codes", "scales", "zeros", "minima")
    first = {name: getattr(found, name)[:count] for name in names if getattr(found, name) is not None}
    return of_coded(found._replace(**first), torch.float32)


class Target(NamedTuple):
    """The module that is filled, and how."""

    module: nn.Module
    device: torch.device | str | None
    quantization: str | None
    shard: Shard | None = None

    def cut(self, entry: Entry) -> Cut:
        return WHOLE if self.shard is None else self.shard.cut(entry.name)

    def fill(self, entries: Sequence[Entry], sources: Mapping[str, Source]) -> int:
        """Read all parts of one of its modules -> their bytes."""
        owner = self.module.get_submodule(entries[0].module)
        weights = [entry for entry in entries if entry.leaf == "weight"]
        if isinstance(owner, Linear) and any(isinstance(sources[entry.name], CodedSource) for entry in weights):
            dtype = owner.weight.dtype
            parts = [part for entry in weights for part in self._parts(sources[entry.name], entry, dtype)]
            dense = [part.weight for part in parts if isinstance(part, Dense)]
            if len(dense) < len(parts):
                owner.take(join(parts))
            else:
                owner.weight = nn.Parameter(dense[0] if len(dense) == 1 else torch.cat(dense), requires_grad=False)
            weights = []
        is_rounded = self.quantization is not None and entries[0].module != "lm_head"
        if isinstance(owner, Linear) and is_rounded and weights and self.cut(weights[0]).columns != slice(None):
            self._take_rounded(owner, sources[weights[0].name], self.cut(weights[0]))
            weights = []
        for entry in (*weights, *(entry for entry in entries if entry.leaf != "weight")):
            parameter = owner.get_parameter(entry.leaf)
            if parameter.is_meta:
                # Not empty_like: of a meta tensor it imports all of torch's compiler, which takes seconds.
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
                parameter = nn.Parameter(empty, requires_grad=False)
                setattr(owner, entry.leaf, parameter)
            source, cut = sources[entry.name], self.cut(entry)
            count = cut.shape(source.shape)[0]
            _read(source, cut, parameter.detach().narrow(0, entry.start, count))
            parameter.detach().narrow(0, entry.start + count, entry.shape[0] - count).zero_()  # padding
        if weights and isinstance(owner, Linear) and is_rounded:
            owner.quantise(str(self.quantization))
        return sum(sources[entry.name].nbytes for entry in entries)

    def _parts(self, source: Source, entry: Entry, dtype: torch.dtype) -> list[Quantised | Dense]:
        """The rank's part of a weight, and what pads it."""
        device, cut = torch.device(self.device or "cpu"), self.cut(entry)
        count = cut.shape(source.shape)[0]
        padding = [Dense(torch.zeros(entry.shape[0] - count, entry.shape[1], dtype=dtype, device=device))]
        padding = padding if count < entry.shape[0] else []
        coded = source.read() if isinstance(source, CodedSource) else None
        if coded is not None and (form := of_coded(coded, dtype)) is not None:
            try:
                return [form.cut(cut).to(device, dtype), *padding]
            except ValueError as error:
                raise CheckpointError(f"{source.place[0]}: {entry.name}: {error}") from None
        weight = torch.empty(count, entry.shape[1], dtype=dtype, device=device)
        if coded is not None:
            _widen(coded, source.shape, cut, weight)
        else:
            _read(source, cut, weight)
        return [Dense(weight), *padding]

    def _take_rounded(self, owner: Linear, source: Source, cut: Cut) -> None:
        """Columns of a weight that is rounded as a whole: a scale holds for a whole row, or for a group of columns."""
        assert self.quantization is not None
        whole = torch.empty(source.shape, dtype=owner.weight.dtype, device=self.device)
        _read(source, WHOLE, whole)
        owner.take(quantise(whole, self.quantization).cut(cut))


def _read(source: Source, cut: Cut, target: Tensor) -> None:
    if isinstance(source, CodedSource):
        _widen(source.read(), source.shape, cut, target)
    else:
        read_part(source, cut, target)


def _widen(coded: CodedWeight, shape: tuple[int, ...], cut: Cut, target: Tensor) -> None:
    if cut.is_whole(shape):
        coded.dense_into(target)
        return
    whole = torch.empty(shape, dtype=target.dtype, device="cpu")
    coded.dense_into(whole)
    target.copy_(whole[cut])


def _stream(target: Target, entries: list[Entry], sources: Mapping[str, Source]) -> None:
    """In file order, so that a disk reads ahead; on several threads, as much of the time goes into fresh pages. A
    module is read as a whole, so that few of them lie half done."""

    from tqdm.auto import tqdm  # not above: machines that only run kernels have no tqdm

    modules: dict[str, list[Entry]] = {}
    for entry in entries:
        modules.setdefault(entry.module, []).append(entry)
    order = sorted(modules.values(), key=lambda parts: min(sources[entry.name].place for entry in parts))
    total = sum(sources[entry.name].nbytes for entry in entries)
    is_quantised = target.quantization is not None or any(isinstance(each, CodedSource) for each in sources.values())
    is_silent = True if target.shard is not None and target.shard.rank else None  # None: where there is no terminal
    with (
        tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=is_silent, leave=False) as bar,
        ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads,
    ):
        try:
            for count in threads.map(lambda parts: target.fill(parts, sources), order):
                bar.update(count)
                if is_quantised:
                    give_back()  # codes leave more freed memory behind than they take
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _compare_tied_head(embedding: Tensor, head: StoredTensor, cut: Cut) -> None:
    shape = cut.shape(head.shape)
    embedding = embedding[: shape[0]]
    copy = torch.empty_like(embedding) if shape == tuple(embedding.shape) else None
    if copy is not None:
        read_part(head, cut, copy)
    if copy is None or not torch.equal(copy, embedding):
        logger.warning(
            "%s: lm_head.weight differs from the embedding, which is used: config.json says tie_word_embeddings",
            head.path,
        )
