"""GGUF files of a Hugging Face folder's weights, rounded as llama.cpp rounds them, for comparisons with llama.cpp.

    python -m benchmarks.gguf_files --model checkpoints/smollm2-135m-instruct --output DIR
    python -m benchmarks.gguf_files --preset llama-3.2-1b --layers 4 --vocab-size 32064 --output DIR

Writes DIR/Q8_0.gguf and DIR/Q4_0.gguf; of a preset DIR/model too, with random weights. Tokens have stand-in names:
only ids go in and come out. Embedding and head are Q8_0 in both, as llama.cpp has them where 256 does not divide a row.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import quantize

from benchmarks.random_models import cut_preset
from llama import Transformer
from llama.convert.gguf import LAYER_TENSORS, ROOT_TENSORS
from llama.model.checkpoint.layout import layout
from llama.model.checkpoint.save import stored_rows

KINDS = {"Q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0), "Q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0)}
_ROOT = {name: theirs for theirs, name in ROOT_TENSORS.items()}
_LAYER = {name: theirs for theirs, name in LAYER_TENSORS.items()}


def name_of(entry: str) -> str:
    """A tensor's name in GGUF."""
    if entry in _ROOT:
        return _ROOT[entry]
    layer, _, name = entry.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER[name]}"


def permute_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Back from the half-split layout: see `llama.convert.folder.unpermute_rope`."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def write(model: Transformer, path: Path, kind: str) -> None:
    config = model.config
    if config.rope_scaling is not None or config.attention_bias or config.mlp_bias:
        raise ValueError(f"{path}: a model with scaled RoPE or biases is not written")
    writer, (of_matrices, file_type) = gguf.GGUFWriter(path, "llama"), KINDS[kind]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    for entry in layout(config):
        weight = stored_rows(model, entry).float()
        if entry.name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = permute_rope(weight, weight.shape[0] // config.head_dim)
        values = weight.numpy()
        if values.ndim == 1:
            writer.add_tensor(name_of(entry.name), values.astype(np.float32))
        else:
            of = of_matrices if entry.name.startswith("model.layers.") else Type.Q8_0
            writer.add_tensor(name_of(entry.name), quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path)
    what.add_argument("--preset", help="its shapes, with random weights and without scaled RoPE")
    parser.add_argument("--layers", type=int, help="of the preset (all)")
    parser.add_argument("--vocab-size", type=int, help="of the preset (its own)")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    if given.model is not None:
        model = Transformer.from_pretrained(given.model)
    else:
        model = Transformer(cut_preset(given.preset, given.layers, given.vocab_size), dtype=torch.bfloat16)
        model.save_pretrained(given.output / "model")
    for kind in given.kinds:
        write(model, given.output / f"{kind}.gguf", kind)
        print(f"wrote {given.output / f'{kind}.gguf'}")


if __name__ == "__main__":
    main()
