"""Quantised checkpoints as others publish them: what config.json says of them, and how each format lays out a weight.

The tensors that a module has decide what it is, for the lists of modules left dense differ from writer to writer; what
config.json says is held against them.
"""

from llama.model.checkpoint.quantised.config import find_quantization, scheme_for
from llama.model.checkpoint.quantised.source import CodedSource, find_coded

__all__ = ["CodedSource", "find_coded", "find_quantization", "scheme_for"]
