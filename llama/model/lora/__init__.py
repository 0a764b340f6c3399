"""PEFT adapters: read and checked (adapter_config, adapter), and stacked by slot on the device (slots)."""

from llama.api.errors import AdapterError
from llama.model.lora.adapter import Adapter, Pair, read_adapter
from llama.model.lora.slots import AdapterUse, LoraSlots

__all__ = ["Adapter", "AdapterError", "AdapterUse", "LoraSlots", "Pair", "read_adapter"]
