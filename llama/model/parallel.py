"""Tensor parallelism: which part of each weight a rank has. The only place that knows how a weight is cut. No torch.

The projections that read the residual stream are cut by rows (attention's by KV-head groups, whose KV head several
ranks hold where there are more ranks than KV heads), those that write to it by columns: a layer's two outputs are then
sums over the ranks. Embedding and head are cut by rows, the last rank's padded where the vocabulary does not divide.
Norms are whole everywhere. (Shoeybi et al., Megatron-LM, 2019.)
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from llama.api.errors import ParameterError
from llama.model.config import ModelConfig

_COLUMNS = ("o_proj", "down_proj")


class Cut(NamedTuple):
    """A part of a checkpoint's tensor: tensor[rows, columns], or tensor[rows] of a vector."""

    rows: slice
    columns: slice

    def is_whole(self, shape: tuple[int, ...]) -> bool:
        return self.shape(shape) == shape

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part of a tensor of this shape."""
        sizes = [len(range(size)[part]) for size, part in zip(shape, self, strict=False)]
        return tuple(sizes)


WHOLE = Cut(slice(None), slice(None))


def sizes(config: ModelConfig) -> list[int]:
    """The legal numbers of ranks: they divide the heads and the MLP; the KV heads, or these them."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        n
        for n in range(1, heads + 1)
        if heads % n == 0
        and config.intermediate_size % n == 0
        and (kv_heads % n == 0 or n % kv_heads == 0)
        and n <= config.vocab_size
    ]


def check_size(config: ModelConfig, size: int) -> None:
    """ParameterError with the legal values for a number of ranks that cannot share this model."""
    legal = sizes(config)
    if size not in legal:
        raise ParameterError(
            f"tensor_parallel_size must be one of {', '.join(map(str, legal))} for {config.num_attention_heads} heads, "
            f"{config.num_key_value_heads} KV heads and an MLP of {config.intermediate_size}, got {size}",
            "tensor_parallel_size",
        )


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model that `size` ranks share; ParameterError for a size that is not legal."""

    config: ModelConfig  # of the whole model
    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        check_size(self.config, self.size)

    @property
    def local(self) -> ModelConfig:
        """The sizes of the rank's own part. Its vocab_size is that of every rank, padding included."""
        config, size = self.config, self.size
        return replace(
            config,
            num_attention_heads=config.num_attention_heads // size,
            num_key_value_heads=max(1, config.num_key_value_heads // size),
            intermediate_size=config.intermediate_size // size,
            vocab_size=-(-config.vocab_size // size),
            bos_token_id=None,
            eos_token_ids=(),
        )

    @property
    def kv_heads(self) -> slice:
        """Of the model's KV heads, those that the rank holds."""
        count = self.config.num_key_value_heads
        first = self.rank * count // self.size
        return slice(first, first + max(1, count // self.size))

    @property
    def vocabulary(self) -> slice:
        """The token ids whose rows of embedding and head the rank holds."""
        most = self.config.vocab_size
        count = -(-most // self.size)
        return slice(min(most, self.rank * count), min(most, (self.rank + 1) * count))

    def part_of(self, name: str) -> slice | None:
        """Of the heads or columns of a point of the network (llama/model/taps.py), those that the rank computes; None
        where every rank has the whole."""
        if name in ("k_pre", "k", "v"):
            return self.kv_heads
        whole = {"mlp_act": self.config.intermediate_size}
        whole |= dict.fromkeys(("q_pre", "q", "z"), self.config.num_attention_heads)
        if name not in whole:
            return None
        count = whole[name] // self.size
        return slice(self.rank * count, (self.rank + 1) * count)

    def num_copies(self, name: str) -> int:
        """How many ranks compute the same part of a point."""
        return max(1, self.size // self.config.num_key_value_heads) if name in ("k_pre", "k", "v") else 1

    def cut(self, name: str) -> Cut:
        """The rank's part of the tensor that a checkpoint calls `name`, or of a module's weight."""
        leaf = "weight"
        if name.endswith((".weight", ".bias")):
            name, _, leaf = name.rpartition(".")
        kind = name.rpartition(".")[2]
        if kind in _COLUMNS:
            if leaf == "bias":  # added once
                return WHOLE if self.rank == 0 else Cut(slice(0, 0), slice(None))
            return Cut(slice(None), self._rows(kind))
        return Cut(self._rows(kind), slice(None))

    def _rows(self, kind: str) -> slice:
        """What the rank has of the dimension of this module that is cut."""
        config = self.config
        if kind in ("k_proj", "v_proj"):
            heads = self.kv_heads
            return slice(heads.start * config.head_dim, heads.stop * config.head_dim)
        if kind in ("embed_tokens", "lm_head"):
            return self.vocabulary
        if kind in ("q_proj", "o_proj"):
            count = config.num_attention_heads // self.size * config.head_dim
        elif kind in ("gate_proj", "up_proj", "down_proj"):
            count = config.intermediate_size // self.size
        else:
            return slice(None)
        return slice(self.rank * count, (self.rank + 1) * count)
