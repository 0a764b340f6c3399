"""Text to token ids and back: the checkpoint's tokenizer, an incremental decoder and stop strings."""

from llama.text.tokenizer.incremental import IncrementalDecoder
from llama.text.tokenizer.stop import StopMatcher
from llama.text.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDecoder", "StopMatcher", "Tokenizer"]
