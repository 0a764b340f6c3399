"""Which tensor of a Hugging Face checkpoint is which rows of which of our parameters.

Hugging Face keeps q, k, v and gate, up apart; ours lie fused, one after the other along dimension 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from llama.model.config import ModelConfig


class Entry(NamedTuple):
    name: str  # in the checkpoint
    module: str  # ours; its weight or bias holds the tensor in rows [start, start + shape[0])
    start: int
    shape: tuple[int, ...]
    keys: str  # the keys of config.json that decide the shape

    @property
    def leaf(self) -> str:
        """weight or bias."""
        return self.name.rpartition(".")[2]


def layout(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of a checkpoint, in the order of the forward pass. A tied head has none of its own."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Entry("model.embed_tokens.weight", "embed_tokens", 0, (vocab, hidden), "vocab_size, hidden_size")
    for index in range(config.num_hidden_layers):
        yield from _layer(config, f"layers.{index}.")
    yield Entry("model.norm.weight", "norm", 0, (hidden,), "hidden_size")
    if not config.tie_word_embeddings:
        yield Entry("lm_head.weight", "lm_head", 0, (vocab, hidden), "vocab_size, hidden_size")


def entries_of(module: nn.Module, config: ModelConfig) -> list[Entry]:
    """The layout of a network that may have other parts: entries of parameters that it lacks are left out, and
    parameters of its own stand under their own names."""
    parameters = dict(module.named_parameters())
    entries = [
        entry for entry in layout(config) if f"{entry.module}.{entry.leaf}" in parameters or _has_form(module, entry)
    ]
    known = {f"{entry.module}.{entry.leaf}" for entry in entries}
    for name, parameter in parameters.items():
        if name not in known:
            path, _, leaf = name.rpartition(".")
            if leaf not in ("weight", "bias"):
                raise ValueError(f"a parameter must be called weight or bias to be kept in a checkpoint, got {name}")
            entries.append(Entry(f"model.{name}", path, 0, tuple(parameter.shape), "the network's own classes"))
    return entries


def _has_form(module: nn.Module, entry: Entry) -> bool:
    """Its weight lies in another form than a parameter."""
    try:
        return getattr(module.get_submodule(entry.module), "form", None) is not None
    except AttributeError:
        return False


def _layer(config: ModelConfig, prefix: str) -> Iterator[Entry]:
    hidden, size = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    q_keys = "num_attention_heads, head_dim, hidden_size"
    kv_keys = "num_key_value_heads, head_dim, hidden_size"
    mlp_keys = "intermediate_size, hidden_size"
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    for name, module, start, shape, keys in (
        (prefix + "input_layernorm", prefix + "input_layernorm", 0, (hidden,), "hidden_size"),
        (attention + "q_proj", attention + "qkv_proj", 0, (q, hidden), q_keys),
        (attention + "k_proj", attention + "qkv_proj", q, (kv, hidden), kv_keys),
        (attention + "v_proj", attention + "qkv_proj", q + kv, (kv, hidden), kv_keys),
        (attention + "o_proj", attention + "o_proj", 0, (hidden, q), q_keys),
        (prefix + "post_attention_layernorm", prefix + "post_attention_layernorm", 0, (hidden,), "hidden_size"),
        (mlp + "gate_proj", mlp + "gate_up_proj", 0, (size, hidden), mlp_keys),
        (mlp + "up_proj", mlp + "gate_up_proj", size, (size, hidden), mlp_keys),
        (mlp + "down_proj", mlp + "down_proj", 0, (hidden, size), mlp_keys),
    ):
        yield Entry(f"model.{name}.weight", module, start, shape, keys)
        for part, flag in (("self_attn", "attention_bias"), ("mlp", "mlp_bias")):
            if f".{part}." in name and getattr(config, flag):
                yield Entry(f"model.{name}.bias", module, start, shape[:1], f"{flag}, {keys}")
