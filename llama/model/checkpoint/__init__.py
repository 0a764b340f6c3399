"""Weights on disk: Hugging Face folders of safetensors, read by streaming and written atomically, for any module.

`layout` says which tensor of a checkpoint is which rows of which parameter, `shards` reads and writes the safetensors
format, `load` and `save` put the two together. No pickle anywhere: other formats get an error that names a converter.
"""

from llama.api.errors import CheckpointError
from llama.model.checkpoint.load import Checkpoint
from llama.model.checkpoint.save import save_pretrained

__all__ = ["Checkpoint", "CheckpointError", "save_pretrained"]
