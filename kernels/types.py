"""The values that ops take and give back: plain tensors and integers, no requests and no seeds.

Ragged says which tokens belong to which sequence, KVLayer holds one layer's keys and values, TokenAdapters says which
LoRA adapter a token uses. SamplerRows says how each row of logits becomes a token; SamplerState is the memory that
penalties need, one row per sequence, kept on the device and updated by `sample` itself; Sampled is the answer.
Bit masks are packed little end first: token t is bit t % 32 of word t // 32.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from llama.kernels.cpu.layout import Layout, LoraLayout
from llama.kernels.cpu.pieces import Pieces
from llama.kernels.logprobs import Logprobs

MOST_RUN_ROWS = 64  # of Ragged.run_len, times query heads per KV head
_MOST_ALIGNED, _MOST_ALIGNED_ROWS = 16, 32  # 16 divides every tile of keys; with more rows some GPUs' registers spill

LOGPROBS_OFF, LOGPROBS_RAW, LOGPROBS_PROCESSED = 0, 1, 2


def kind_of(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """All that a kernel's launch depends on of a tensor: of its address, whether it is a multiple of 16."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() & 15


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over a model of this dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# (cos, sin) float32, [tokens, 1, head_dim] each, with x_rotated = x * cos + (x with its halves swapped) * sin: the
# first half of sin is negated.
CosSin = tuple[torch.Tensor, torch.Tensor]


class Runs(NamedTuple):
    """How Triton's attention gives a token the same bits in every batch and chunk: all sequences of a Ragged are runs,
    of at most `most` queries (its run_len), none of which reaches across a position that is a multiple of `most`.

    Then the contexts of a run's queries end in one tile of keys, and are cut into chunks alike.
    """

    most: int

    @classmethod
    def of(cls, group: int) -> "Runs":
        """For so many query heads per KV head."""
        return cls(1 << max(1, min(_MOST_ALIGNED, _MOST_ALIGNED_ROWS // group)).bit_length() - 1)


@dataclass(frozen=True)
class Ragged:
    """One step's tokens, sequence behind sequence without padding, and where their keys and values lie in the cache.

    Sequence s owns the tokens query_starts[s] : query_starts[s + 1], the last of its context_lens[s] tokens. ValueError
    where the tensors do not fit together.
    """

    block_tables: torch.Tensor  # [seqs, max_blocks] int32; entries past a sequence's context are arbitrary valid ids
    query_starts: torch.Tensor  # [seqs + 1] int32
    context_lens: torch.Tensor  # [seqs] int32, tokens whose K and V exist once this step has stored its own
    slots: torch.Tensor  # [tokens] int64, block id * block_size + offset of each token; -1 = padding, not stored
    num_decodes: int  # the first num_decodes sequences have exactly one query
    block_size: int  # tokens per block
    # Above 1, a power of two: all sequences are runs of at most so many queries, some perhaps of none, and num_decodes
    # is 0. They are computed like decodes, which a CUDA graph can hold.
    run_len: int = 1
    # On the CPU: a token's attention has the same bits whoever computes beside it and however its sequence is cut; its
    # rows are computed in such pieces. None = the fastest way. Triton asks for `Runs` instead.
    fixed: Pieces | None = None
    # No sequence reads what another one stores in this step, as a draft's decode reads what those before it store.
    is_disjoint: bool = False

    def __post_init__(self) -> None:
        tables, starts, lens = self.block_tables, self.query_starts, self.context_lens
        num_seqs = lens.shape[0]
        most_decodes = num_seqs if self.run_len == 1 else 0
        fits = tables.shape[0] == num_seqs and starts.shape[0] == num_seqs + 1
        if not fits or self.num_decodes > most_decodes:
            sizes = f"{list(tables.shape)}, {list(starts.shape)}, {list(lens.shape)}, {self.num_decodes}"
            raise ValueError(f"block_tables, query_starts, context_lens and num_decodes do not fit together: {sizes}")
        if not tables.dtype == starts.dtype == lens.dtype == torch.int32 or self.slots.dtype != torch.int64:
            dtypes = f"{tables.dtype}, {starts.dtype}, {lens.dtype}, {self.slots.dtype}"
            raise ValueError(f"block_tables, query_starts and context_lens must be int32 and slots int64, got {dtypes}")

    @cached_property
    def kind(self) -> Hashable:
        """What a kernel's launch depends on: all but what the tensors hold and where they lie."""
        tensors = self.block_tables, self.query_starts, self.context_lens, self.slots
        of_tensors = tuple((t.shape, t.stride(), t.device) for t in tensors)
        return of_tensors, self.num_decodes, self.block_size, self.run_len

    @cached_property
    def buffers(self) -> dict[Hashable, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Working memory on a GPU: the first layer makes it, those that follow use it again."""
        return {}

    @cached_property
    def cpu_layout(self) -> Layout:
        """What the CPU's ops need to know beside the tensors, for all layers; made when the first of them asks."""
        return Layout.of(
            self.block_tables,
            self.query_starts,
            self.context_lens,
            self.slots,
            num_decodes=self.num_decodes,
            block_size=self.block_size,
            is_fixed=self.fixed is not None,
        )


@dataclass(frozen=True)
class KVLayer:
    """One layer's part of the paged cache: [num_blocks, block_size, kv_heads, head_dim], K and V alike.

    With `scales` [2, kv_heads] float32, of K and of V, the tensors are the bytes (uint8) of float8 e4m3: what is stored
    is clamp(k / scale, -448, 448), what is read is that times the scale.
    """

    k: torch.Tensor
    v: torch.Tensor
    scales: torch.Tensor | None = None

    def __post_init__(self) -> None:
        k, v = self.k, self.v
        if k.dim() != 4 or k.shape != v.shape or k.stride() != v.stride() or k.dtype != v.dtype:
            raise ValueError(
                "k and v of a cache must have the same four dimensions, strides and dtype, "
                f"got {k.dtype} {list(k.shape)} and {v.dtype} {list(v.shape)}"
            )
        scales = self.scales
        if (scales is not None) != (k.dtype == torch.uint8):
            raise ValueError(f"a cache has scales where it is uint8, and there alone, got {k.dtype}")
        if scales is not None and (scales.shape != (2, k.shape[2]) or scales.dtype != torch.float32):
            raise ValueError(f"scales must be float32 {[2, k.shape[2]]}, got {scales.dtype} {list(scales.shape)}")

    @cached_property
    def kind(self) -> Hashable:
        """What a kernel's launch depends on: all but what the tensors hold, and of their addresses the last bits."""
        tensors = (self.k, self.v) if self.scales is None else (self.k, self.v, self.scales)
        return tuple(map(kind_of, tensors))

    @cached_property
    def slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V as [slots, kv_heads, head_dim], views, for the CPU: its caches have no gaps between blocks."""
        return self.k.flatten(0, 1), self.v.flatten(0, 1)


@dataclass(frozen=True)
class QuantizedWeight:
    """w[n, k] = (q[n, k] - zeros[g, n]) * scales[g, n] + minima[g, n] in float32, in this order; g = k // group_size.

    `codes` are q, int8 or float8_e4m3fn [N, K], or int16 [N, K / 4]: words of four q from -8 to 7, as
    `llama.kernels.cpu.matmul.pack_nibbles` lays them. Scales and minima are floats, zeros int8, all [G, N] with G =
    ceil(K / group_size); None = nothing is subtracted, nothing is added.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_size: int
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.codes.dtype not in (torch.int8, torch.int16, torch.float8_e4m3fn):
            raise ValueError(f"codes must be int8, int16 or float8_e4m3fn, got {self.codes.dtype}")
        groups = -(-columns // self.group_size)
        for name in ("scales", "zeros", "minima"):
            values = getattr(self, name)
            if values is not None and tuple(values.shape) != (groups, rows):
                raise ValueError(f"{name} must be {[groups, rows]}, got {list(values.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        rows, columns = self.codes.shape
        return rows, columns * 4 if self.codes.dtype == torch.int16 else columns

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in (self.codes, self.scales, self.zeros, self.minima) if t is not None)

    @cached_property
    def kind(self) -> Hashable:
        """What a kernel's launch depends on: see KVLayer."""
        tensors = self.codes, self.scales, self.zeros, self.minima
        return tuple(None if t is None else kind_of(t) for t in tensors), self.group_size


@dataclass(frozen=True)
class TokenAdapters:
    """Which LoRA adapter each token of a step uses."""

    indices: torch.Tensor  # [tokens] int32, from 1 on; 0 = none, the base model alone
    fixed: Pieces | None = None  # see Ragged

    def __post_init__(self) -> None:
        if self.indices.dim() != 1 or self.indices.dtype != torch.int32:
            raise ValueError(
                f"adapter indices must be int32 [tokens], got {self.indices.dtype} {list(self.indices.shape)}"
            )

    @cached_property
    def cpu_layout(self) -> LoraLayout:
        """Tokens brought together by adapter, for all modules; made when the first op on the CPU asks."""
        return LoraLayout.of(self.indices, self.fixed)


@dataclass(frozen=True, slots=True)
class SamplerRows:
    """How each row of logits [rows, vocab] becomes a token. Float tensors are float32, or float64 for float64 logits.

    The flags are what the host knows of the tensors' content; they let an op skip work without reading the device. A
    flag may be set without need, never missing where it is needed.
    """

    penalty_rows: torch.Tensor  # [rows] int32, row of SamplerState; -1 = no penalty (and tokens are not counted)
    keys: torch.Tensor  # [rows, 2] int32, bit patterns of the two noise key words mixed from (seed, position)
    temperature: torch.Tensor  # [rows] 0 = greedy
    top_p: torch.Tensor  # [rows] 1 = off
    top_k: torch.Tensor  # [rows] int32, 0 = off
    min_p: torch.Tensor  # [rows] 0 = off
    repetition_penalty: torch.Tensor  # [rows] 1 = off
    frequency_penalty: torch.Tensor  # [rows] 0 = off
    presence_penalty: torch.Tensor  # [rows] 0 = off
    logprobs_modes: torch.Tensor  # [rows] int8, LOGPROBS_OFF, LOGPROBS_RAW or LOGPROBS_PROCESSED

    # Sparse additions to the logits, by row: row r owns entries bias_starts[r] : bias_starts[r + 1], ids unique within
    # a row. -inf forbids a token. All three are None where no row has any.
    bias_starts: torch.Tensor | None = None  # [rows + 1] int32
    bias_ids: torch.Tensor | None = None  # [entries] int32
    bias_values: torch.Tensor | None = None  # [entries]

    mask: torch.Tensor | None = (
        None  # [rows, ceil(vocab / 32)] int32, bit set = allowed; rows without a grammar: all set
    )

    num_logprobs: int = -1  # the most top entries that a row wants beside its own token; -1 = no row wants logprobs
    any_penalty: bool = False  # some penalty row is >= 0
    any_filter: bool = False  # some sampled row has top_k, top_p or min_p on
    all_greedy: bool = False  # every temperature is 0
    any_processed: bool = False  # some row is LOGPROBS_PROCESSED

    def __len__(self) -> int:
        return self.penalty_rows.shape[0]


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token per row. A bad row (see `sample`) holds token 0 and means nothing."""

    token_ids: torch.Tensor  # [rows] int64
    is_bad: torch.Tensor  # [rows] bool
    logprobs: Logprobs[torch.Tensor] | None  # None where rows.num_logprobs is -1; rows of LOGPROBS_OFF hold zeros


class SamplerState:
    """Which tokens each row's prompt holds and how often each token has been generated in it.

    A row is one sequence's; it takes 4 bytes per token of the vocabulary (and a bit), so the state is made when the
    first request with a penalty comes. Rows are independent; their owner sets a row before a new sequence uses it.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.prompt_mask = torch.zeros(num_rows, -(-vocab_size // 32), dtype=torch.int32, device=device)
        self.counts = torch.zeros(num_rows, vocab_size, dtype=torch.int32, device=device)

    def set_row(
        self, row: int, prompt_token_ids: Sequence[int] | torch.Tensor, output_token_ids: Sequence[int] | torch.Tensor
    ) -> None:
        """Give `row` to a sequence with this prompt that has generated these tokens so far."""
        # Each token once, so that adding its bit is setting it; told apart before they are sent: nothing waits then.
        ids = self._ids(torch.as_tensor(prompt_token_ids, dtype=torch.int64, device="cpu").unique())
        bits = (1 << (ids % 32)).to(torch.int32)
        self.prompt_mask[row] = 0
        self.prompt_mask[row].index_add_(0, ids // 32, bits)
        ids = self._ids(output_token_ids)
        self.counts[row] = 0
        self.counts[row].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))

    def copy_of(self, rows: torch.Tensor) -> "SamplerState":
        """A state of its own whose row i is row rows[i] of this one."""
        copy = SamplerState(0, self.counts.shape[1], self.counts.device)
        copy.prompt_mask, copy.counts = self.prompt_mask[rows], self.counts[rows]
        return copy

    def _ids(self, token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(token_ids, dtype=torch.int64, device="cpu").to(self.counts.device, non_blocking=True)
