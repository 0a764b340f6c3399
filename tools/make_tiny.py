#!/usr/bin/env python3
"""Make a Llama checkpoint of random weights: tiny for tests, or as large as a load measurement needs.

    python tools/make_tiny.py --output DIR [--config config.json] [--gigabytes 2] [--dtype bfloat16] [--seed 0]

Its tokenizer knows the 256 bytes and Llama 3.1's special tokens, so any text can be encoded. With --gigabytes, layers
are added until the weights take at least so many 10^9 bytes; with --config, the sizes are those of that file.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer

from llama.convert.bpe import build_tokenizer, byte_alphabet, llama3_pre_tokenizer
from llama.convert.folder import DTYPES, llama3_rope_scaling, write_generation_config
from llama.convert.meta import SPECIAL_TOKENS, write_meta_tokenizer
from llama.model.checkpoint.layout import Entry
from llama.model.checkpoint.save import new_folder, write_checkpoint
from llama.model.config import ModelConfig

VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

TINY = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=131072,
    rope_scaling=llama3_rope_scaling(8.0),
    bos_token_id=256 + SPECIAL_TOKENS.index("<|begin_of_text|>"),
    eos_token_ids=tuple(256 + SPECIAL_TOKENS.index(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")),
)
# The shapes of a small model in earnest, so that a load measurement moves tensors of the usual size.
LARGE = dataclasses.replace(
    TINY, hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8, head_dim=64
)


def byte_tokenizer() -> Tokenizer:
    """Ids 0 .. 255 are the bytes; the special tokens follow."""
    return build_tokenizer(
        {character: byte for byte, character in byte_alphabet().items()},
        [],
        llama3_pre_tokenizer(),
        special_tokens=SPECIAL_TOKENS,
        bos_token=SPECIAL_TOKENS[0],
        ignore_merges=True,
    )


def random_tensor(entry: Entry, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Matrices that keep the size of what they multiply, and norms about 1, so logits of a deep model stay ordinary."""
    noise = torch.randn(entry.shape, generator=generator)
    return (1 + 0.1 * noise if noise.dim() == 1 else noise * noise.shape[1] ** -0.5).to(dtype)


def make(output: Path, config: ModelConfig, *, dtype: str, seed: int) -> None:
    """Write the folder; a vocabulary too small for the byte tokenizer gets none."""
    generator = torch.Generator().manual_seed(seed)
    with new_folder(output) as folder:
        write_generation_config(folder, config, pad_token_id=None)
        if config.vocab_size >= VOCAB_SIZE:
            write_meta_tokenizer(folder, byte_tokenizer(), config.max_position_embeddings)
        write_checkpoint(folder, config, DTYPES[dtype], lambda entry: random_tensor(entry, DTYPES[dtype], generator))


def deepened(config: ModelConfig, num_bytes: float, dtype: str) -> ModelConfig:
    """`config` with as many layers as bring the weights to `num_bytes`."""
    size = DTYPES[dtype].itemsize
    one = dataclasses.replace(config, num_hidden_layers=1).num_parameters
    layer = dataclasses.replace(config, num_hidden_layers=2).num_parameters - one
    return dataclasses.replace(config, num_hidden_layers=max(1, 1 - int((one * size - num_bytes) // (layer * size))))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make; must not exist")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--config", type=Path, metavar="FILE", help="a config.json to take the sizes from")
    size.add_argument("--gigabytes", type=float, help="add layers until the weights are so large")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = TINY
    try:
        if options.config is not None:
            config = ModelConfig.from_pretrained(options.config)
        elif options.gigabytes is not None:
            config = deepened(LARGE, options.gigabytes * 1e9, options.dtype)
        make(options.output, config, dtype=options.dtype, seed=options.seed)
    except (ValueError, OSError) as error:
        sys.exit(f"make_tiny: {error}")


if __name__ == "__main__":
    main()
