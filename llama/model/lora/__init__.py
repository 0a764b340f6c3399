"""PEFT adapters: read and checked (adapter_config, adapter), and stacked on the device (loaded)."""

from llama.api.errors import AdapterError
from llama.model.lora.adapter import AdapterWeights, Pair, read_adapter
from llama.model.lora.loaded import LoadedAdapters

__all__ = ["AdapterError", "AdapterWeights", "LoadedAdapters", "Pair", "read_adapter"]
