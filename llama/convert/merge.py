"""Merge a PEFT adapter into its base model: a checkpoint that computes base and adapter as one, at the base's cost."""

from pathlib import Path

import torch

from llama.convert.folder import copy_text_files
from llama.kernels.types import wide_dtype
from llama.model.checkpoint.save import new_folder
from llama.model.lora import read_adapter
from llama.model.lora.loaded import module_places
from llama.model.transformer import Transformer


def merge(base: Path, adapter: Path, output: Path, *, dtype: torch.dtype | str = "auto") -> None:
    """Write `output` (new or empty): W + B A for every adapted module, all else as in `base`.

    A tied model whose embedding or head alone is adapted has no merged form and is refused.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: exists already; merge into a new folder")
    model = Transformer.from_pretrained(base, dtype=dtype)
    model.dequantise()  # what is added to codes has none
    read = read_adapter(adapter, model, max_rank=1 << 20)
    tied = sorted({"embed_tokens", "lm_head"}.intersection(read.targets))
    if model.config.tie_word_embeddings and tied:
        raise ValueError(f"{base} ties its head to its embedding, so the adapter's {tied[0]} cannot be merged")
    wide = wide_dtype(model.dtype)
    places = module_places(model)
    for name, pair in read.pairs.items():
        module, index, starts = places[name]
        weight = module.get_parameter("weight")
        delta = pair.b.to(wide) @ pair.a.to(wide)
        delta, rows = (
            (delta.t(), slice(None)) if name.endswith("embed_tokens") else (delta, slice(*starts[index : index + 2]))
        )
        weight[rows] = (weight[rows].to(wide) + delta).to(weight.dtype)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        copy_text_files(base, folder)
