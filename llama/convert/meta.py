"""Convert Meta's release of a Llama 3 model to a Hugging Face folder.

The input holds params.json, tokenizer.model and consolidated.*.pth, one file per model-parallel rank. Weights keep
their dtype. No chat template is written (its text is Meta's): without one the engine uses its built-in format.
"""

import base64
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from llama.convert.bpe import build_tokenizer, byte_alphabet, llama3_pre_tokenizer, write_tokenizer
from llama.convert.folder import (
    DTYPES,
    LLAMA3_SAMPLING,
    llama3_rope_scaling,
    unpermute_rope,
    write_generation_config,
)
from llama.files import open_regular, read_json, some_of
from llama.model.checkpoint.layout import Entry
from llama.model.checkpoint.save import MAX_SHARD_BYTES, new_folder, write_checkpoint
from llama.model.config import ModelConfig
from llama.model.rope_scaling import checked_number

# Names of the first special tokens, in the order of their ids; the rest are reserved (llama-models, tokenizer.py).
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
NUM_SPECIAL_TOKENS = 256
STOP_TOKENS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")

# params.json does not tell the context: 8,192 tokens, and 131,072 with the scaled RoPE.
CONTEXT, SCALED_CONTEXT = 8192, 131072

# What is read of it, and what says nothing that the tensors do not.
KNOWN_PARAMS = frozenset(
    "dim n_layers n_heads n_kv_heads norm_eps rope_theta multiple_of ffn_dim_multiplier use_scaled_rope "
    "rope_scaling_factor vocab_size head_dim max_seq_len max_batch_size".split()
)

ROOT_TENSORS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
}


def check_input(source: Path, *, tokenizer_only: bool) -> None:
    """ValueError that names the path which is missing and what the folder is to hold."""
    holds = "tokenizer.model" if tokenizer_only else "params.json, tokenizer.model and consolidated.*.pth"
    if not source.is_dir():
        raise ValueError(f"{source} is no folder: the one that Meta's download made is needed, with {holds}")
    for name in ("tokenizer.model",) if tokenizer_only else ("params.json", "tokenizer.model"):
        if not (source / name).is_file():
            raise ValueError(f"{source / name} is missing: the folder that Meta's download made holds {holds}")


# Tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, from lines of base64 text and number."""
    ranks = {}
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no tokenizer.model of Llama 3: lines of base64 and a number") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a base64 token and its rank") from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the ranks are not 0 .. {len(ranks) - 1}")
    return ranks


def merges_from_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens whose concatenation is a token, in the order in which tiktoken would merge them.

    tiktoken merges whatever neighbours form the token of the lowest rank. A list of pairs says the same when all
    pairs of one token stand together, at that token's rank.
    """
    merges = []
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def special_tokens() -> list[str]:
    reserved = NUM_SPECIAL_TOKENS - len(SPECIAL_TOKENS)
    return [*SPECIAL_TOKENS, *(f"<|reserved_special_token_{2 + i}|>" for i in range(reserved))]


def convert_tokenizer(path: Path) -> Tokenizer:
    ranks = read_ranks(path)
    alphabet = byte_alphabet()
    text = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    return build_tokenizer(
        {text[token]: rank for token, rank in ranks.items()},
        [(text[left], text[right]) for left, right in merges_from_ranks(ranks)],
        llama3_pre_tokenizer(),
        special_tokens=special_tokens(),
        bos_token="<|begin_of_text|>",
        ignore_merges=True,
    )


def write_meta_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    write_tokenizer(folder, tokenizer, model_max_length=context, special=special, chat_template=None)


# Weights


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        open_regular(path).close()
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever the unpickler finds in a file that is damaged or means harm
        why = str(error).strip().splitlines()
        raise ValueError(
            f"{path} cannot be read as tensors ({type(error).__name__}: {why[0] if why else ''})"
        ) from None
    if not (isinstance(tensors, dict) and all(isinstance(name, str) and _is_plain(tensors[name]) for name in tensors)):
        raise ValueError(f"{path} holds no tensors by name")
    return tensors


def _is_plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"


class MetaShards:
    """The tensors of all ranks, mapped into memory, each put together when it is asked for."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.glob("consolidated.*.pth"))
        if not paths:
            raise ValueError(f"{folder} holds no consolidated.*.pth, the files with Meta's weights")
        self.ranks = [_load(path) for path in paths]
        self.names = [name for name in self.ranks[0] if name != "rope.freqs"]
        for path, rank in zip(paths, self.ranks, strict=True):
            if rank.keys() != self.ranks[0].keys():
                odd = sorted(rank.keys() ^ self.ranks[0].keys())
                raise ValueError(f"{path} and {paths[0]} hold different tensors: {', '.join(odd[:10])}")
        self._files = folder, {path.name for path in paths}
        dtypes = {str(rank[name].dtype).removeprefix("torch.") for rank in self.ranks for name in self.names}
        if len(dtypes) > 1 or not dtypes <= DTYPES.keys():
            raise ValueError(f"weights of dtype {', '.join(sorted(dtypes))}; all must be one of {', '.join(DTYPES)}")
        self.dtype = DTYPES[dtypes.pop()]

    def check_count(self, rows: int) -> None:
        """ValueError where files are missing: all of them together have that many rows of wq, each as many."""
        wq, (folder, names) = self.ranks[0].get("layers.0.attention.wq.weight"), self._files
        if wq is None or not wq.numel() or rows % len(wq):
            return
        wanted = {f"consolidated.{number:02d}.pth" for number in range(rows // len(wq))}
        if wanted != names and len(wanted) >= len(names):
            raise ValueError(
                f"{folder}: the weights are cut into {len(wanted)} files, and these are not there: "
                f"{some_of(wanted - names)}"
            )

    def join(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor of this shape: replicated on every rank, or split along the axis where they differ."""
        parts = [rank[name] for rank in self.ranks]
        if parts[0].shape == shape:
            return parts[0]
        for axis in range(len(shape)) if all(part.dim() == len(shape) for part in parts) else ():
            if sum(part.shape[axis] for part in parts) == shape[axis]:
                whole = torch.cat(parts, axis)
                if whole.shape == shape:
                    return whole
        found = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ValueError(f"{name}: shards of {found} do not make up {shape}")


def feed_forward_size(params: dict[str, Any]) -> int:
    """Width of the MLP: two thirds of 4 x dim, scaled, rounded up (llama-models, FeedForward)."""
    size = int(8 * params["dim"] / 3)
    if (multiplier := params.get("ffn_dim_multiplier")) is not None:
        size = int(multiplier * size)
    multiple: int = params.get("multiple_of") or 256
    return -(-size // multiple) * multiple


def read_params(folder: Path) -> dict[str, Any]:
    params = read_json(folder / "params.json", hint="Meta's releases have one beside the weights")
    missing = [key for key in ("dim", "n_layers", "n_heads", "norm_eps", "rope_theta") if params.get(key) is None]
    if missing:
        raise ValueError(f"params.json lacks {', '.join(missing)}")
    for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of"):
        value = params.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"params.json: {key} must be a positive integer, got {value!r}")
    if (multiplier := params.get("ffn_dim_multiplier")) is not None:
        checked_number("params.json: ffn_dim_multiplier", multiplier, 0, 1e3)
    if not isinstance(scaled := params.get("use_scaled_rope"), bool | None):
        raise ValueError(f"params.json: use_scaled_rope must be true or false, got {scaled!r}")
    for key in sorted(params.keys() - KNOWN_PARAMS):  # null, false and the like turn a feature off
        if params[key]:
            raise ValueError(f"params.json has {key}: only plain Llama text models can be converted")
    return params


def read_config(params: dict[str, Any], shards: MetaShards, tokenizer: Tokenizer, factor: float | None) -> ModelConfig:
    """The vocabulary and the tied head are read off the tensors: params.json need not tell them."""
    dim, heads = params["dim"], params["n_heads"]
    for name in ("tok_embeddings.weight", "output.weight"):
        if name not in shards.names:
            raise ValueError(f"consolidated.*.pth lack {name}")
    shards.check_count(dim)
    parts = [rank["tok_embeddings.weight"].shape for rank in shards.ranks]
    if any(len(part) != 2 for part in parts):
        raise ValueError(f"tok_embeddings.weight should have two dimensions, found {list(parts[0])}")
    rows = sum(part[0] for part in parts) if parts[0][1] == dim else parts[0][0]
    if rows < tokenizer.get_vocab_size():
        raise ValueError(f"tokenizer.model has {tokenizer.get_vocab_size()} tokens, the embeddings only {rows} rows")
    tied = torch.equal(shards.join("tok_embeddings.weight", (rows, dim)), shards.join("output.weight", (rows, dim)))
    scaled = bool(params.get("use_scaled_rope", False))
    if factor is not None and not scaled:
        raise ValueError(f"--rope-factor {factor:g} is given, but params.json has no use_scaled_rope")
    factor = params.get("rope_scaling_factor") if factor is None else factor
    if scaled and factor is None:
        if tied:
            raise ValueError("params.json does not say by how much RoPE is scaled: give --rope-factor (Llama 3.2: 32)")
        factor = 8.0
    return ModelConfig(
        vocab_size=rows,
        hidden_size=dim,
        intermediate_size=feed_forward_size(params),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        head_dim=dim // heads,
        max_position_embeddings=SCALED_CONTEXT if scaled else CONTEXT,
        rms_norm_eps=params["norm_eps"],
        rope_theta=params["rope_theta"],
        rope_scaling=llama3_rope_scaling(factor) if scaled and factor is not None else None,
        tie_word_embeddings=tied,
        bos_token_id=_token_id(tokenizer, "<|begin_of_text|>"),
        eos_token_ids=tuple(_token_id(tokenizer, token) for token in STOP_TOKENS),
    )


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    token_id: int | None = tokenizer.token_to_id(token)
    assert token_id is not None, f"every tokenizer of Meta's has {token}"
    return token_id


class Weights:
    """The shards' tensors by their Hugging Face names; nothing missing, nothing left over."""

    def __init__(self, shards: MetaShards, config: ModelConfig) -> None:
        self.shards, self.config = shards, config
        self.names = {ROOT_TENSORS[name]: name for name in shards.names if name in ROOT_TENSORS}
        for layer in range(config.num_hidden_layers):
            for name, hf_name in LAYER_TENSORS.items():
                self.names[f"model.layers.{layer}.{hf_name}"] = f"layers.{layer}.{name}"
        if odd := sorted(set(self.names.values()) ^ set(shards.names)):
            raise ValueError(f"missing or unknown tensors: {', '.join(odd[:10])}")

    def read(self, entry: Entry) -> torch.Tensor:
        name = self.names[entry.name]
        weight = self.shards.join(name, entry.shape)
        if name.endswith("wq.weight"):
            return unpermute_rope(weight, self.config.num_attention_heads)
        if name.endswith("wk.weight"):
            return unpermute_rope(weight, self.config.num_key_value_heads)
        return weight


def convert(
    source: Path,
    output: Path,
    *,
    tokenizer_only: bool = False,
    rope_factor: float | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Make the folder `output`. rope_factor: by how much RoPE is scaled, where params.json does not say it (8 for Llama
    3.1, 32 for 3.2). Raises ValueError and OSError."""
    check_input(source, tokenizer_only=tokenizer_only)
    tokenizer = convert_tokenizer(source / "tokenizer.model")
    if tokenizer_only:
        with new_folder(output) as folder:
            write_meta_tokenizer(folder, tokenizer, SCALED_CONTEXT)
        return
    shards = MetaShards(source)
    config = read_config(read_params(source), shards, tokenizer, rope_factor)
    weights = Weights(shards, config)
    with new_folder(output) as folder:
        write_generation_config(folder, config, tokenizer.token_to_id("<|finetune_right_pad_id|>"), LLAMA3_SAMPLING)
        write_meta_tokenizer(folder, tokenizer, config.max_position_embeddings)
        write_checkpoint(folder, config, shards.dtype, weights.read, max_shard_bytes)
