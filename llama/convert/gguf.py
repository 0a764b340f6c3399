"""Convert a GGUF file of Llama architecture to a Hugging Face folder: config, safetensors, tokenizer, chat template.

Quantised tensors are expanded, or kept as they are (`gguf_codes`), one by one, so memory holds one at a time. Whatever
the file says that a Llama model does not have (experts, biases, another RoPE scaling, another tokenizer) is refused by
name, never dropped.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from llama.convert.bpe import (
    build_tokenizer,
    gpt2_pre_tokenizer,
    llama3_pre_tokenizer,
    smollm_pre_tokenizer,
    write_tokenizer,
)
from llama.convert.folder import (
    DTYPES,
    LLAMA3_SAMPLING,
    legal_sampling,
    llama3_rope_scaling,
    unpermute_rope,
    write_generation_config,
)
from llama.files import open_regular
from llama.model.checkpoint.layout import Entry, layout
from llama.model.checkpoint.quantised.write import Coded, coded_tensors
from llama.model.checkpoint.save import new_folder, write_checkpoint
from llama.model.config import ModelConfig
from llama.model.rope_scaling import Llama3Scaling
from llama.model.weights.quantised import Quantised, of_coded

try:
    import gguf
    from gguf.quants import dequantize

    from llama.convert import gguf_codes
except ModuleNotFoundError as error:
    message = f"GGUF files need {error.name}: pip install 'llama-engine[tools]'"
    raise ModuleNotFoundError(message, name=error.name) from None

PRE_TOKENIZERS = {
    "smollm": smollm_pre_tokenizer,
    "llama-bpe": llama3_pre_tokenizer,
    "llama3": llama3_pre_tokenizer,
    "llama-v3": llama3_pre_tokenizer,
    "gpt-2": gpt2_pre_tokenizer,
}
# Of these llama.cpp adds BOS, and keeps whole a word that is in the vocabulary, unless the file says otherwise.
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")

ROOT_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
# Frequency factors of the scaled RoPE; they say the same as rope_scaling in config.json.
ROPE_FACTORS = "rope_freqs.weight"

# What is read below, or says nothing about the network.
KNOWN_KEYS = frozenset(
    "block_count context_length embedding_length feed_forward_length vocab_size tensor_data_layout expert_count "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base rope.scaling.type "
    "rope.scaling.original_context_length".split()
)
# Other keys that llama.cpp reads, with the values that change nothing.
NEUTRAL = {
    "rope.scaling.factor": (0, 1),  # without a type llama.cpp takes it for linear scaling
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.finetuned": (False,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "use_parallel_residual": (False,),
}


class GGUFFile:
    """Metadata by key, and tensors by name."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file")
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # the reader checks nothing: a damaged file ends in whatever comes first
            raise ValueError(f"{path} is truncated or damaged ({type(error).__name__}: {error})") from error
        self._fields = reader.fields
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if reader.byte_order != "I":  # the package expands such weights as if they were not
            raise ValueError(f"{path} is of the other byte order; turn it with llama.cpp's gguf_convert_endian.py")
        if (parts := self.get("split.count", 0)) not in (0, 1):  # 0 in a file that was joined
            raise ValueError(f"{path} is one of {parts} parts; join them with llama.cpp's llama-gguf-split --merge")
        architecture = self.get("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path}: architecture {architecture!r}; only 'llama' can be converted")
        for key in self._fields:
            name = key.removeprefix("llama.")
            if name != key and name not in KNOWN_KEYS and self.get(key) not in NEUTRAL.get(name, ()):
                raise ValueError(f"{path}: {key} is {self.get(key)!r}, which no Llama 3 model has")
        if self.get("tokenizer.ggml.add_eos_token"):
            raise ValueError(f"{path}: tokenizer.ggml.add_eos_token is set: prompts do not end with EOS here")

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"the file has no {key}")
        return self.get(key)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.require(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} must be a positive integer, the same in all layers, got {value!r}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.require(key)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{key} must be a list of texts, got {type(value).__name__}")
        return value

    @cached_property
    def tokens(self) -> list[str]:
        return self.texts("tokenizer.ggml.tokens")

    def token(self, name: str) -> str | None:
        """The text of the token that the file gives this role."""
        key = f"tokenizer.ggml.{name}_token_id"
        if (found := self.get(key)) is None:
            return None
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < len(self.tokens):
            raise ValueError(f"{key} must be an integer in [0, {len(self.tokens) - 1}], got {found!r}")
        return self.tokens[found]

    def array(self, name: str) -> np.ndarray:
        """A tensor expanded to float32, shape as in PyTorch (rows first)."""
        tensor = self.tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(f"{name} is stored as {tensor.tensor_type.name}, which is no form of weights") from None
        values = values.reshape(tuple(reversed(tensor.shape.tolist())))
        return np.require(values, dtype=np.float32, requirements=["C", "W"])  # F32 data is a read-only map


def shortest(value: float) -> float:
    """The float whose repr is that of the float32 stored: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_scaling(file: GGUFFile, head_dim: int, theta: float) -> Llama3Scaling | None:
    kind = file.get("llama.rope.scaling.type", "none")
    if kind != "none":
        raise ValueError(f"RoPE scaling {kind!r} is not Llama 3.1's")
    if ROPE_FACTORS not in file.tensors:
        return None
    found = file.array(ROPE_FACTORS)
    scaling = llama3_rope_scaling(round(float(found.max()), 3))
    expected = llama3_rope_factors(head_dim, theta, scaling)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
        raise ValueError(f"{ROPE_FACTORS} holds other factors than Llama 3's scaling by {scaling.factor}")
    return scaling


def llama3_rope_factors(head_dim: int, theta: float, scaling: Llama3Scaling) -> np.ndarray:
    """What each frequency is divided by. [head_dim / 2]  Formula: Meta's apply_scaling (llama-models, model.py)."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)  # within the original context
    smooth = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


def eos_token_ids(file: GGUFFile) -> tuple[int, ...]:
    """The file's end-of-text, -turn and -message ids, and those that Llama 3's names for them have."""
    ids = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    names = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    ids += [file.tokens.index(name) for name in names if name in file.tokens]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def read_config(file: GGUFFile) -> ModelConfig:
    if experts := file.get("llama.expert_count", 0):
        raise ValueError(f"a mixture of {experts} experts is not a Llama model")
    if "token_embd.weight" not in file.tensors:
        raise ValueError("the file has no tensor token_embd.weight")
    hidden_size = file.count("llama.embedding_length")
    num_heads = file.count("llama.attention.head_count")
    head_dim = file.count("llama.attention.key_length", hidden_size // num_heads)
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if file.get(key, head_dim) != head_dim:
            raise ValueError(f"{key} is {file.get(key)}, but a head has {head_dim} dimensions")
    theta = shortest(file.get("llama.rope.freq_base", 10000.0))
    return ModelConfig(
        vocab_size=int(file.tensors["token_embd.weight"].shape[1]),
        hidden_size=hidden_size,
        intermediate_size=file.count("llama.feed_forward_length"),
        num_hidden_layers=file.count("llama.block_count"),
        num_attention_heads=num_heads,
        num_key_value_heads=file.count("llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_position_embeddings=file.count("llama.context_length"),
        rms_norm_eps=shortest(file.require("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=theta,
        rope_scaling=rope_scaling(file, head_dim, theta),
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=eos_token_ids(file),
    )


class Weights:
    """The file's tensors by their Hugging Face names; nothing missing, nothing left over."""

    def __init__(self, file: GGUFFile, config: ModelConfig, dtype: torch.dtype) -> None:
        self.file, self.config, self.dtype = file, config, dtype
        self.names, unknown = {}, []
        for name in file.tensors:
            layer = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
            if name in ROOT_TENSORS:
                self.names[ROOT_TENSORS[name]] = name
            elif layer and layer[2] in LAYER_TENSORS:
                self.names[f"model.layers.{layer[1]}.{LAYER_TENSORS[layer[2]]}"] = name
            elif name != ROPE_FACTORS:
                unknown.append(name)
        expected = {entry.name for entry in layout(config)}
        unknown += [name for hf_name, name in self.names.items() if hf_name not in expected]
        if unknown:
            raise ValueError(f"tensors that a Llama model does not have: {', '.join(unknown[:10])}")
        if missing := sorted(expected - self.names.keys()):
            raise ValueError(f"missing tensors: {', '.join(missing[:10])}")

    def read(self, entry: Entry) -> torch.Tensor:
        name = self._checked(entry)
        return self._in_order(name, torch.from_numpy(self.file.array(name))).to(self.dtype)

    def read_coded(self, entry: Entry, *, with_minima: bool) -> Quantised:
        """Raises KeyError for a type that `gguf_codes` does not keep."""
        name = self._checked(entry)
        tensor = self.file.tensors[name]
        data = torch.from_numpy(np.require(tensor.data, requirements=["C", "W"])).view(entry.shape[0], -1)
        coded = gguf_codes.read_codes(self._in_order(name, data), tensor.tensor_type, with_minima=with_minima)
        form = of_coded(coded, self.dtype)
        assert form is not None, "groups of one size, in order"
        return form

    def _checked(self, entry: Entry) -> str:
        name = self.names[entry.name]
        shape = tuple(reversed(self.file.tensors[name].shape.tolist()))
        if shape != entry.shape:
            raise ValueError(f"{name} has shape {list(shape)}, expected {list(entry.shape)} by {entry.keys}")
        return name

    def _in_order(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        if name.endswith("attn_q.weight"):
            return unpermute_rope(rows, self.config.num_attention_heads)
        return unpermute_rope(rows, self.config.num_key_value_heads) if name.endswith("attn_k.weight") else rows


class Codes:
    """The linear layers that stay quantised, those of `gguf_codes`; `dense` counts the others by their type."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        linear = [entry for entry in layout(weights.config) if len(entry.shape) == 2 and entry.module != "embed_tokens"]
        kinds = {entry: weights.file.tensors[weights.names[entry.name]].tensor_type for entry in linear}
        self._kept = {entry: kind for entry, kind in kinds.items() if gguf_codes.can_keep(kind)}
        self.dense = Counter(kind.name for kind in kinds.values() if not gguf_codes.can_keep(kind))
        if not self._kept:
            found = ", ".join(sorted(self.dense))
            raise ValueError(f"nothing to keep quantised: linear layers are {found}, kept are {gguf_codes.KEPT}")
        # One format for the whole folder: MLX's where groups have minima, else compressed-tensors.
        self._with_minima = any(map(gguf_codes.has_minima, self._kept.values()))
        self._last: tuple[Entry, Coded] | None = None

    def coded_of(self, entry: Entry) -> Coded | None:
        """What there will be to write; its tensors are made again when their turn comes."""
        if entry not in self._kept:
            return None
        coded = self._read(entry)
        tensors = {
            leaf: stored._replace(make=partial(self._tensor, entry, leaf)) for leaf, stored in coded.tensors.items()
        }
        return Coded(coded.scheme, tensors)

    def _tensor(self, entry: Entry, leaf: str) -> torch.Tensor:
        return self._read(entry).tensors[leaf].make()

    def _read(self, entry: Entry) -> Coded:
        if self._last is None or self._last[0] != entry:
            form = self._weights.read_coded(entry, with_minima=self._with_minima)
            self._last = entry, coded_tensors(form)
        return self._last[1]


def read_tokenizer(file: GGUFFile, vocab_size: int) -> Tokenizer:
    kind, pre = file.require("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r}; known are byte-level BPEs ('gpt2') of: {known}"
        )
    tokens, bos_token = file.tokens, file.token("bos")
    types = file.get("tokenizer.ggml.token_type", [gguf.TokenType.NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type must be a list of {len(tokens)} types, one for each token")
    adds_bos = file.get("tokenizer.ggml.add_bos_token", pre in LLAMA3_NAMES)
    if adds_bos and bos_token is None:
        raise ValueError("the file asks for a BOS token before each text but names none")
    if len(tokens) > vocab_size:
        raise ValueError(f"{len(tokens)} tokens, but embeddings for {vocab_size}")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [(left, right) for left, _, right in (each.partition(" ") for each in file.texts("tokenizer.ggml.merges"))]
    for left, right in merges:
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(f"tokenizer.ggml.merges: {left!r} and {right!r} are not tokens that make a third")
    return build_tokenizer(
        vocab,
        merges,
        PRE_TOKENIZERS[pre](),
        special_tokens=[token for token, t in zip(tokens, types, strict=True) if t == gguf.TokenType.CONTROL],
        user_tokens=[token for token, t in zip(tokens, types, strict=True) if t == gguf.TokenType.USER_DEFINED],
        bos_token=bos_token if adds_bos else None,
        ignore_merges=pre in LLAMA3_NAMES,
    )


def read_sampling(file: GGUFFile) -> dict[str, float]:
    """What the file recommends; Meta's own defaults where it says nothing and has Llama 3's tokenizer."""
    names = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
    said = {name: file.get(f"general.sampling.{key}") for name, key in names.items()}
    found = {name: shortest(value) if isinstance(value, float) else value for name, value in said.items()}
    found = legal_sampling({name: value for name, value in found.items() if value is not None})
    return found or (LLAMA3_SAMPLING if file.get("tokenizer.ggml.pre") in LLAMA3_NAMES else {})


def convert(
    source: Path,
    output: Path,
    *,
    dtype: str = "bfloat16",
    keep_quantised: bool = False,
    sampling: Mapping[str, float] | None = None,
) -> Mapping[str, int]:
    """Make the folder `output` with weights of `dtype`. `sampling`: its generation defaults under Hugging Face's names,
    None = what `read_sampling` finds. Raises ValueError and OSError.

    `keep_quantised` writes linear layers with the file's own codes, where a published format can tell them: Q4_0, Q8_0
    and Q6_K as compressed-tensors, or all as MLX's affine form where some are Q4_1 or Q4_K. Returns how many had to
    become dense, by their type.
    """
    file = GGUFFile(source)
    config = read_config(file)
    weights = Weights(file, config, DTYPES[dtype])
    codes = Codes(weights) if keep_quantised else None
    tokenizer = read_tokenizer(file, config.vocab_size)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: file.token(key) for name, key in names.items()}
    pad_id = file.get("tokenizer.ggml.padding_token_id")
    if not isinstance(template := file.get("tokenizer.chat_template"), str | None):
        raise ValueError(f"tokenizer.chat_template must be a text, got {template!r}")
    with new_folder(output) as folder:
        write_generation_config(folder, config, pad_id, read_sampling(file) if sampling is None else sampling)
        write_tokenizer(
            folder,
            tokenizer,
            model_max_length=config.max_position_embeddings,
            special=special,
            chat_template=template,
        )
        coded_of = codes.coded_of if codes else lambda entry: None
        write_checkpoint(folder, config, weights.dtype, weights.read, coded_of=coded_of)
    return {} if codes is None else codes.dense
