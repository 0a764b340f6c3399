"""`llama info`: what a model is and what it needs, from config.json alone; neither torch nor weights are touched."""

import re
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from llama.cli.flags import Parser, UsageError, checked, integer
from llama.engine.budget import blocks_in, free_cpu_bytes, kv_bytes_on_cpu
from llama.engine.config import EngineConfig
from llama.hub import model_folder
from llama.model.config import ModelConfig
from llama.model.generation_config import GenerationConfig
from llama.model.parallel import Shard

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
    models = [own] if options.draft_model is None else [own, ModelConfig.from_pretrained(options.draft_model)]
    of = f" of 1 in {size}" if size > 1 else ""
    memory, where = options.memory or (free_cpu_bytes(), "this machine's CPU")
    forms: Iterable[str] = _weight_forms(own, dtype, options, folder) if options.weight_forms else ()
    rows = [
        ("architecture", _architecture(config)),
        ("parameters", f"{config.num_parameters:,}"),
        *((f"weights{of}", f"{name:9}{own.num_parameters * each:>20,} bytes") for name, each in BYTES.items()),
        *((f"weights{of}", f"{name:9}{_weight_bytes(own, dtype, name):>20,} bytes") for name in SCHEMES),
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
        f"{'tied' if config.tie_word_embeddings else 'separate'} head, stored in {config.dtype or 'an unnamed dtype'}"
    )


def _generation(generation: GenerationConfig, config: ModelConfig) -> str:
    eos = sorted({*generation.eos_token_ids, *config.eos_token_ids})
    sampling = ", ".join(f"{name} {value}" for name, value in generation.sampling.items()) or "neutral sampling"
    return f"{sampling}; ends at {', '.join(map(str, eos)) or 'no token'}"


def _weight_bytes(config: ModelConfig, dtype: str, scheme: str | None) -> int:
    """On a GPU; a CPU may keep a second form of a weight for few tokens. All but the layers' codes is in `dtype`."""
    if scheme is None:
        return config.num_parameters * BYTES[dtype]
    hidden, size = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (size, hidden), (size, hidden), (hidden, size)]
    weights = config.num_hidden_layers * sum(rows * columns for rows, columns in shapes)

    def groups(columns: int) -> int:  # of a row, each with a scale
        sizes = (128, 64, 32) if scheme == "int4" else ()
        return next((columns // each for each in sizes if columns % each == 0), 1)

    scales = config.num_hidden_layers * sum(rows * groups(columns) for rows, columns in shapes)
    return weights * SCHEMES[scheme] // 8 + (config.num_parameters - weights + scales) * BYTES[dtype]


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


def _fits(models: list[ModelConfig], dtype: str, memory: int, options: Namespace) -> str:
    """What an engine of default options would allocate; on a GPU it also sets aside what steps take, which it
    measures."""
    config = models[0]
    is_cpu, scheme, ranks = options.memory is None, options.quantization, options.tensor_parallel_size
    engine = EngineConfig().resolved(config, "cpu" if is_cpu else "cuda")
    weights = _weight_bytes(config, dtype, scheme) + sum(_weight_bytes(model, dtype, None) for model in models[1:])
    sizes = [1 if options.kv_cache_dtype == "fp8" else BYTES[dtype], *[BYTES[dtype]] * (len(models) - 1)]
    per_token = sum(model.kv_values_per_token * size for model, size in zip(models, sizes, strict=True))
    per_block = per_token * engine.block_size
    what = f"{scheme or dtype} weights of {_gib(weights)} in {_gib(memory)}"
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
