"""Round a dense checkpoint to int8, int4 or fp8: a compressed-tensors folder, which transformers and vLLM read too."""

from pathlib import Path

import torch

from llama.convert.folder import copy_text_files
from llama.model.checkpoint.save import new_folder
from llama.model.transformer import Transformer


def quantise(source: Path, output: Path, scheme: str, *, dtype: torch.dtype | str = "auto") -> None:
    """Write `output` (new or empty): linear layers in codes, embedding, norms and head in `dtype` ("auto": their own).
    int8 and fp8 have a scale per row (compressed-tensors' W8A8 and FP8_DYNAMIC, for which other engines round
    activations too), int4 one per 128 columns (W4A16). Raises ValueError and OSError."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output}: exists already; write to a new folder")
    model = Transformer.from_pretrained(source, dtype=dtype, quantization=scheme)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        copy_text_files(source, folder)
