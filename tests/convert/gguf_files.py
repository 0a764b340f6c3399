"""Tiny GGUF files: a Llama whose matrices have any of the types, with the values that they stand for."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.gguf.dequant import dequantize as transformers_dequantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama.convert.bpe import byte_alphabet

CONFIG = LlamaConfig(
    vocab_size=272,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
# Where a block of each K-quant keeps its half-precision scales.
K_SCALES = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_blocks(kind, rows, columns, generator):
    """Valid K-quant bytes, which the gguf package can read but not make. [rows, bytes]"""
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (rows, columns // block_size, type_size), dtype=np.uint8)
    for offset in K_SCALES[kind]:
        scales = generator.uniform(0.0005, 0.002, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[:, :, offset : offset + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


def encode(kind, shape, generator):
    """A random matrix as the file stores it, and the float32 values that it stands for."""
    if kind in K_SCALES:
        data = random_blocks(kind, *shape, generator)
    else:
        values = generator.normal(0, shape[1] ** -0.5, shape).astype(np.float32)
        if kind in (Type.F32, Type.F16):
            data = values.astype(np.float16 if kind == Type.F16 else np.float32)
            return data, data.astype(np.float32)
        data = quantize(values, kind)
        if kind in (Type.BF16, Type.Q5_0, Type.Q5_1):  # transformers does not read these
            found = dequantize(data, kind)
            assert (np.abs(found - values) <= {Type.BF16: 0.002, Type.Q5_0: 0.02, Type.Q5_1: 0.01}[kind]).all()
            return data, found
    expected = transformers_dequantize(torch.from_numpy(data), int(kind)).reshape(shape)
    return data, expected.float().numpy()


def rope_factors(config):
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return (plain / scaled).numpy()


def interleaved(data, num_heads):
    """Rows as llama.cpp's converter orders those of q and k: pair (i, i + D/2) of a head side by side."""
    rows = data.reshape(num_heads, 2, data.shape[0] // num_heads // 2, *data.shape[1:])
    return rows.swapaxes(1, 2).reshape(data.shape)


def write_gguf(
    path,
    kind,
    *,
    kinds=None,
    fields=None,
    extra=None,
    pre="llama-bpe",
    architecture="llama",
    num_tokens=CONFIG.vocab_size,
    endianess=gguf.GGUFEndian.LITTLE,
):
    """A tiny model whose matrices are all of one type, or by the short name in `kinds`; returns what it stands for, as
    a state dict."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_dimension_count(CONFIG.head_dim)
    writer.add_rope_freq_base(CONFIG.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    tokens = [*byte_alphabet().values(), "he", "ll", "hell", "hello", "Ġhello", "<tool>", *SPECIAL]
    tokens += [f"[PAD{i}]" for i in range(num_tokens - len(tokens))]
    types = {"<tool>": gguf.TokenType.USER_DEFINED} | dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([types.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(tokens.index("<|begin_of_text|>"))
    writer.add_eos_token_id(tokens.index("<|eot_id|>"))
    writer.add_chat_template("{{ messages[0].content }}")
    for key, value in (fields or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](key, value)
    state = {}
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(CONFIG).state_dict().items()}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {f"model.layers.0.{name}": f"blk.0.{short}" for name, short in LAYER_NAMES.items()}
    of_all, kinds = kind, kinds or {}
    for name, shape in shapes.items():
        kind = kinds.get(names[name.removesuffix(".weight")].rpartition(".")[2], of_all)
        data, values = encode(kind, tuple(shape), generator) if len(shape) == 2 else (np.ones(shape, np.float32),) * 2
        state[name] = torch.from_numpy(values)
        if "q_proj" in name or "k_proj" in name:
            data = interleaved(data, CONFIG.num_attention_heads if "q_proj" in name else CONFIG.num_key_value_heads)
        writer.add_tensor(
            f"{names[name.removesuffix('.weight')]}.weight", data, raw_dtype=kind if len(shape) == 2 else None
        )
    writer.add_tensor("rope_freqs.weight", rope_factors(CONFIG))
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state
