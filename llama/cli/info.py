"""`llama info`: what a model is and what it needs, from config.json alone. Weights are not touched; torch is imported
where the folder is quantised, with what reads that."""

import re
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llama.cli.flags import Parser, UsageError, checked, integer
from llama.engine.budget import blocks_in, free_cpu_bytes, kv_bytes_on_cpu
from llama.engine.config import EngineConfig
from llama.files import QUANTISATION_FILES, read_json
from llama.hub import model_folder
from llama.model.config import ModelConfig
from llama.model.generation_config import GenerationConfig
from llama.model.parallel import Shard

if TYPE_CHECKING:  # it imports torch
    from llama.model.checkpoint.quantised.config import Quantization

DESCRIPTION = "Say what a model is and what it needs, from its config.json alone."
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
SCHEMES = {"int8": 8, "fp8": 8, "int4": 4}  # bits of a code
_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1000), ("B", 1000), ("iB", 1024))
}


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s MODEL [options]"
    parser.add_argument("model", metavar="MODEL", help="folder of the checkpoint, its config.json, or an id of the hub")
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a model on the hub")
    text = "memory of a GPU to fit into, for example 80GiB or 24GB (what is free on this machine, for its CPU)"
    parser.add_argument("--memory", type=_size, metavar="SIZE", help=text)
    text = "folder of a draft model that is to fit beside it (speculative_config)"
    parser.add_argument("--draft-model", metavar="FOLDER", help=text)
    parser.add_argument("--dtype", choices=tuple(BYTES), help="dtype of weights and KV cache (the checkpoint's)")
    text = "the linear layers rounded, as serve does it"
    parser.add_argument("--quantization", choices=tuple(SCHEMES), help=text)
    text = "KV cache in fp8, or as the weights (%(default)s)"
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto", help=text)
    text = "also in which forms this machine's CPU would hold the linear layers (imports torch)"
    parser.add_argument("--weight-forms", action="store_true", help=text)
    text = "ranks that share it: what each of them holds (%(default)s)"
    parser.add_argument("-tp", "--tensor-parallel-size", type=integer(1, 1024), default=1, metavar="INT", help=text)


def run(options: Namespace) -> int:
    folder = model_folder(options.model, options.revision, config_only=True)
    config = ModelConfig.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder if folder.is_dir() else folder.parent)
    dtype = options.dtype or config.dtype or "bfloat16"
    size = options.tensor_parallel_size
    if size > 1 and options.draft_model is not None:
        raise UsageError("--draft-model has no place beside --tensor-parallel-size")
    own = checked(partial(Shard, config, 0), {"size": size}).local if size > 1 else config
    stored = _stored(folder, options)
    models = [_Model(own, stored)]
    if options.draft_model is not None:
        draft = Path(options.draft_model)
        models.append(_Model(ModelConfig.from_pretrained(draft), _stored(draft)))
    of = f" of 1 in {size}" if size > 1 else ""
    memory, where = options.memory or (free_cpu_bytes(), "this machine's CPU")
    forms: Iterable[str] = _weight_forms(own, dtype, options, folder) if options.weight_forms else ()
    held = [] if stored is None else [(f"weights{of}", f"{'stored':9}{models[0].nbytes(dtype):>20,} bytes")]
    rows = [
        ("architecture", f"{_architecture(config)}, {_stored_in(config, stored)}"),
        ("parameters", f"{config.num_parameters:,}"),
        *held,
        *((f"weights{of}", f"{name:9}{own.num_parameters * each:>20,} bytes") for name, each in BYTES.items()),
        *((f"weights{of}", f"{name:9}{_Model(own).nbytes(dtype, name):>20,} bytes") for name in SCHEMES),
        *(
            (f"KV per token{of}", f"{name:9}{own.kv_values_per_token * each:>20,} bytes")
            for name, each in (BYTES | {"fp8": 1}).items()
        ),
        ("generation", _generation(generation, config)),
        (f"fits {where}", _fits(models, dtype, memory, options)),
        *(("forms on this CPU", line) for line in forms),
    ]
    width = max(len(name) for name, _ in rows) + 2
    before = None
    for name, text in rows:
        print(f"{'' if name == before else name:{width}}{text}")
        before = name
    return 0


def _architecture(config: ModelConfig) -> str:
    rope = f"rope theta {config.rope_theta:g}"
    if (scaling := config.rope_scaling) is not None:
        original = getattr(scaling, "original_max_position_embeddings", None)
        rope += f" scaled x{scaling.factor:g}{f' from {original:,}' if original else ''} ({scaling.rope_type})"
    biased = [name for name, has in (("attention", config.attention_bias), ("MLP", config.mlp_bias)) if has]
    biases = f"biases in {' and '.join(biased)}, " if biased else ""
    return (
        f"Llama, {config.num_hidden_layers} layers, hidden {config.hidden_size:,}, MLP {config.intermediate_size:,}, "
        f"{config.num_attention_heads} heads and {config.num_key_value_heads} KV heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}, {rope}, {biases}"
        f"{'tied' if config.tie_word_embeddings else 'separate'} head"
    )


def _stored(path: Path, options: Namespace | None = None) -> "Quantization | None":
    """How the folder is quantised, None = not at all. The scheme that is asked for is refused as LLM does it."""
    file = path / "config.json" if path.is_dir() else path
    is_plain = not {"quantization_config", "quantization"} & read_json(file).keys()
    if is_plain and not any(file.with_name(name).exists() for name in QUANTISATION_FILES):
        return None
    from llama.model.checkpoint.quantised import find_quantization, scheme_for

    found = find_quantization(path)
    if options is not None:
        options.quantization = checked(scheme_for, {"word": options.quantization, "found": found})
    return found


def _stored_in(config: ModelConfig, stored: "Quantization | None") -> str:
    dtype = config.dtype or "an unnamed dtype"
    if stored is None:
        return f"stored in {dtype}"
    if stored.scheme is None and stored.method != "bitsandbytes":
        return f"stored in {dtype} ({stored.method}, no codes)"
    what = f"{stored.scheme} codes" if stored.scheme else "4 bits that become dense"
    return f"stored quantised ({stored.method}, {what}), the rest in {dtype}"


def _generation(generation: GenerationConfig, config: ModelConfig) -> str:
    eos = sorted({*generation.eos_token_ids, *config.eos_token_ids})
    sampling = ", ".join(f"{name} {value}" for name, value in generation.sampling.items()) or "neutral sampling"
    return f"{sampling}; ends at {', '.join(map(str, eos)) or 'no token'}"


class _Model(NamedTuple):
    """What is counted, and how its folder is quantised."""

    config: ModelConfig
    stored: "Quantization | None" = None

    def nbytes(self, dtype: str, scheme: str | None = None, is_cpu: bool = False) -> int:
        """Of the weights, rounded by `scheme` or as they are stored; all but the layers' codes is in `dtype`."""
        size, stored = BYTES[dtype], None if scheme else self.stored
        scheme = stored.scheme if stored else scheme
        total = self.config.num_parameters * size
        if scheme is None:
            return total
        copies = _copies(dtype, scheme) if is_cpu else 1
        linears = list(self._linears())
        coded = stored.coded([name for name, _, _ in linears]) if stored else set()
        for name, rows, columns in linears:
            groups, scale_bytes = _groups(columns, scheme), size
            if stored is not None:
                groups = -(-columns // stored.columns) if stored.columns > 0 else 1
                scale_bytes = stored.scale_bytes
                rows *= name in coded
            total += copies * rows * (columns * SCHEMES[scheme] // 8 + groups * scale_bytes) - rows * columns * size
        return total

    def _linears(self) -> Iterator[tuple[str, int, int]]:
        """(name, rows, columns) of those that may hold codes."""
        config = self.config
        hidden, size = config.hidden_size, config.intermediate_size
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        attention = (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, q))
        mlp = (("gate", size, hidden), ("up", size, hidden), ("down", hidden, size))
        for i in range(config.num_hidden_layers):
            for name, rows, columns in attention:
                yield f"model.layers.{i}.self_attn.{name}_proj", rows, columns
            for name, rows, columns in mlp:
                yield f"model.layers.{i}.mlp.{name}_proj", rows, columns
        if self.stored is not None and self.stored.has_coded_head and not config.tie_word_embeddings:
            yield "lm_head", config.vocab_size, hidden


def _groups(columns: int, scheme: str) -> int:
    """Of a row, each with a scale."""
    sizes = (128, 64, 32) if scheme == "int4" else ()
    return next((columns // each for each in sizes if columns % each == 0), 1)


def _weight_forms(config: ModelConfig, dtype: str, options: Namespace, folder: Path) -> Iterator[str]:
    """By shape and dtype; of a quantised folder its tensors tell, of which the first layer's are read."""
    import torch

    from llama.model.checkpoint.load import Checkpoint
    from llama.model.checkpoint.quantised import find_quantization
    from llama.model.packing import library_for, linear_shapes, quantised_forms, sample_of
    from llama.model.weights.quantised import Quantised

    wanted, shapes = getattr(torch, dtype), linear_shapes(config)
    samples: dict[str, Quantised] = {}
    if options.quantization is not None:
        rounded = [name for name in shapes if name != "lm_head"]
        samples = {name: sample_of(shapes[name], wanted, options.quantization) for name in rounded}
    elif folder.is_dir() and find_quantization(folder) is not None:
        head = shapes.pop("lm_head")
        shapes.clear()
        for entry, sample in Checkpoint(folder).samples(wanted):
            name = entry.name.split(".")[-2]
            shapes[name] = entry.shape[0], entry.shape[1]
            if sample is not None:
                samples[name] = sample
        shapes["lm_head"] = head
    sizes: Counter[str] = Counter()
    for name, shape in shapes.items():
        if name in samples:
            told, each = quantised_forms(samples[name], shape[0])
            sizes.update(each)
        else:
            library = library_for(shape, wanted)
            told = f"packed ({library})" if library else "plain"
        yield f"{name:13}{shape[0]:>8,} x {shape[1]:,} {told}"
    if sizes:
        layers = config.num_hidden_layers
        yield "in codes     " + ", ".join(f"{layout} {size * layers:,}" for layout, size in sizes.items()) + " bytes"


def _copies(dtype: str, scheme: str | None) -> int:
    """In how many forms an engine of default options holds codes on a CPU: a 16-bit model has a second one for few
    tokens, or one of 16 bits instead, but for int4 in float16."""
    return 2 if BYTES[dtype] == 2 and (dtype, scheme) != ("float16", "int4") else 1


def _fits(models: list[_Model], dtype: str, memory: int, options: Namespace) -> str:
    """What an engine of default options would allocate; on a GPU it also sets aside what steps take, which it
    measures."""
    config, stored = models[0]
    is_cpu, scheme, ranks = options.memory is None, options.quantization, options.tensor_parallel_size
    engine = EngineConfig().resolved(config, "cpu" if is_cpu else "cuda")
    weights = models[0].nbytes(dtype, scheme, is_cpu) + sum(model.nbytes(dtype, None, is_cpu) for model in models[1:])
    sizes = [1 if options.kv_cache_dtype == "fp8" else BYTES[dtype], *[BYTES[dtype]] * (len(models) - 1)]
    per_token = sum(model.config.kv_values_per_token * size for model, size in zip(models, sizes, strict=True))
    per_block = per_token * engine.block_size
    method = f" ({stored.method})" if stored else ""
    what = f"{scheme or (stored and stored.scheme) or dtype} weights{method} of {_gib(weights)} in {_gib(memory)}"
    if is_cpu:
        left = kv_bytes_on_cpu(memory - ranks * weights) // ranks
    else:
        left = int(memory * engine.gpu_memory_utilization) - weights
        what += f" used to {engine.gpu_memory_utilization:.0%}"
    if ranks > 1:
        what += f", the memory of all {ranks} ranks" if is_cpu else f", on each of {ranks} ranks"
    if left < per_block:
        return f"no: {what}"
    tokens, context = blocks_in(left, per_block, engine) * engine.block_size, config.max_position_embeddings
    if tokens < context:
        return f"{tokens:,} of {context:,} tokens of context, {what}"
    return f"all {context:,} tokens of context, {tokens // context:,} times over, {what}"


def _gib(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB"


def _size(text: str) -> tuple[int, str]:
    """Bytes, and the text itself."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?i?B?)", text)
    if match is None or match[2] not in _UNITS:
        raise ArgumentTypeError(f"takes a size such as 80GiB or 24GB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]]), text
