"""Llama 3.1, from a config to logits. Start reading here.

Tokens of all sequences lie flat in one dimension: [tokens, ...]; `Batch` says who is who and `KVCache` holds the past.
The model knows neither requests nor CUDA graphs nor quantisation: those live in engine/ and in Linear. The residual
stream is in the model's dtype; norms, rotary embedding and softmax compute in at least float32.
"""

import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.api.errors import ParameterError, checked_integer
from llama.kernels import ops
from llama.kernels.cpu.pieces import Pieces
from llama.kernels.types import CosSin, KVLayer, Runs
from llama.model.adapters import StepAdapters
from llama.model.batch import Batch
from llama.model.checkpoint import Checkpoint, save_pretrained
from llama.model.checkpoint.layout import Entry, entries_of, layout
from llama.model.communicator import Communicator
from llama.model.config import ModelConfig
from llama.model.digest import Digests
from llama.model.kv_cache import KVCache
from llama.model.linear import Linear
from llama.model.module import Module, check_device, check_place
from llama.model.packing import Packing, TiedHead, prepare, unpack, untied
from llama.model.parallel import Shard
from llama.model.research import Research
from llama.model.rope import attention_factor, frequencies
from llama.model.weights.quantised import SCHEMES


class RMSNorm(Module):
    """x / rms(x) * weight, after adding x to the residual stream where there is one."""

    def __init__(self, size: int, eps: float, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """-> (normed, the new residual), both [tokens, hidden]."""
        weight = self._parameters.get("weight")
        weight = self.weight if weight is None else weight
        if residual is None:
            return ops.rms_norm(x, weight, self.eps), x
        return ops.add_rms_norm(x, residual, weight, self.eps)


class Embedding(Module):
    """Rows of a table by token id."""

    lookup: Callable[[Tensor, Tensor], Tensor]  # F.embedding, or a communicator's where the rows are cut

    def __init__(self, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lookup = F.embedding

    def forward(self, token_ids: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        y = self.lookup(token_ids, self.weight)
        return y if adapters is None else adapters.add(self, token_ids, y)


class Attention(Module):
    """Grouped-query attention over the paged cache, with rotary positions."""

    def __init__(self, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.scale = config.head_dim**-0.5
        heads = self.num_heads + 2 * self.num_kv_heads
        bias = config.attention_bias
        self.qkv_proj = Linear(config.hidden_size, heads * self.head_dim, bias=bias, device=device, dtype=dtype)
        self.o_proj = Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, batch: Batch, cos_sin: CosSin, kv_layer: KVLayer) -> Tensor:
        return self.o_proj(self.mix(self.qkv_proj(x, batch.adapters), batch, cos_sin, kv_layer), batch.adapters)

    def mix(self, qkv: Tensor, batch: Batch, cos_sin: CosSin, kv_layer: KVLayer) -> Tensor:
        """What is between the projections: [tokens, heads * head_dim]."""
        heads = self.num_heads + 2 * self.num_kv_heads
        qkv = qkv.view(qkv.shape[0], heads, self.head_dim)
        q, k, v = qkv.split_with_sizes((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        taps = batch.taps
        if taps is not None:
            q, k, v = taps.at(self, "q_pre", q), taps.at(self, "k_pre", k), taps.at(self, "v", v)
        q = ops.rope_and_store(q, k, v, cos_sin, kv_layer, batch)
        if taps is not None:
            q = taps.at(self, "q", q)
            taps.stored(self, "k", kv_layer, batch.slots, q.dtype)
        mixed = ops.paged_attention(q, kv_layer, batch, self.scale)
        if taps is not None:
            mixed = taps.at(self, "z", mixed)
        return mixed.flatten(1)


class MLP(Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one matmul."""

    def __init__(self, config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, size, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(hidden, 2 * size, bias=bias, is_gated=True, device=device, dtype=dtype)
        self.down_proj = Linear(size, hidden, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        act = self.gate_up_proj.gated(x, batch.adapters)
        if batch.taps is not None:
            act = batch.taps.at(self, "mlp_act", act)
        return self.down_proj(act, batch.adapters)


class Block(Module):
    """One decoder layer. Its output is the pair (MLP's output, residual), whose sum is the layer's hidden state, or
    (that sum, None)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: type[Attention],
        mlp: type[MLP],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, device=device, dtype=dtype)
        self.self_attn = attention(config, device=device, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(hidden, eps, device=device, dtype=dtype)
        self.mlp = mlp(config, device=device, dtype=dtype)
        # The layer's hidden state, of a step that it can compute in fewer kernels (llama/model/fused.py); else None.
        self.fused: Callable[[Tensor, Tensor | None, Batch, CosSin, KVLayer], Tensor | None] | None = None

    def forward(
        self, x: Tensor, residual: Tensor | None, batch: Batch, cos_sin: CosSin, kv_layer: KVLayer
    ) -> tuple[Tensor, Tensor | None]:
        if batch.taps is not None:
            return self._tapped(x, residual, batch, cos_sin, kv_layer)
        if self.fused is not None and (hidden := self.fused(x, residual, batch, cos_sin, kv_layer)) is not None:
            return hidden, None
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, batch, cos_sin, kv_layer)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x, batch), residual

    def _tapped(
        self, x: Tensor, residual: Tensor | None, batch: Batch, cos_sin: CosSin, kv_layer: KVLayer
    ) -> tuple[Tensor, Tensor | None]:
        """The same, past the points of the layer."""
        taps = batch.taps
        assert taps is not None
        x, residual = self.input_layernorm(*taps.residual(self, "resid_pre", x, residual))
        x = taps.at(self, "attn_in", x)
        x = taps.at(self, "attn_out", self.self_attn(x, batch, cos_sin, kv_layer))
        x, residual = self.post_attention_layernorm(*taps.residual(self, "resid_mid", x, residual))
        x = taps.at(self, "mlp_in", x)
        x = taps.at(self, "mlp_out", self.mlp(x, batch))
        return taps.residual(self, "resid_post", x, residual)


class Transformer(Research):
    """A Llama. `Transformer(config, ...)` has random weights (`seed=None` leaves them unset), `from_pretrained` those
    of a checkpoint.

    Parameters are named as Hugging Face names them, but for the fused `qkv_proj` and `gate_up_proj`. They want no
    gradient: this is inference. Forward hooks fire on every module. `attention` and `mlp` are classes with the
    constructor and `forward` of Attention and MLP, in place of these (docs/research.md).

    With a `communicator` it is one rank's part of the model (llama/model/parallel.py); all ranks compute each forward
    together, and all have its logits.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        attention: type[Attention] = Attention,
        mlp: type[MLP] = MLP,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int | None = 0,
        communicator: Communicator | None = None,
    ) -> None:
        super().__init__()
        check_place(device, dtype)
        self._config = config
        self.communicator = communicator
        self.shard = Shard(config) if communicator is None else communicator.shard
        local = self.local_config = config if communicator is None else self.shard.local
        self.embed_tokens = Embedding(local, device=device, dtype=dtype)
        block = partial(Block, local, attention=attention, mlp=mlp, device=device, dtype=dtype)
        self.layers = nn.ModuleList(block() for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        self.lm_head = Linear(config.hidden_size, local.vocab_size, device=device, dtype=dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        if communicator is not None:
            self._join(communicator)
        self.requires_grad_(False)
        self.kv_scales: Tensor | None = None  # [layers, 2, kv_heads], where the checkpoint has some for a cache in fp8
        self.packing: Packing = "auto"
        self._tied = TiedHead()
        self.digests = Digests()
        self.fixed: Pieces | Runs | None = None  # of batches, where `fixed_rows.fix_rows` has been called
        self.register_buffer("frequencies", frequencies(config, device), persistent=False)
        self.attention_factor = attention_factor(config)
        self.register_load_state_dict_post_hook(Transformer._complete)
        if seed is not None and self.device.type != "meta":
            self._fill_randomly(seed)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        config: ModelConfig | None = None,
        attention: type[Attention] = Attention,
        mlp: type[MLP] = MLP,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str = "auto",
        quantization: str | None = None,
        check_weights: bool = False,
        communicator: Communicator | None = None,
    ) -> "Transformer":
        """Load a Hugging Face folder, strictly; `dtype` "auto" is the checkpoint's, `check_weights` refuses NaN and
        infinities. A quantised folder stays quantised; `quantization` "int8", "int4" or "fp8" rounds the linear layers
        of a dense one while they are read. `config` takes the place of the folder's. Parameters that `attention` or
        `mlp` have and the folder lacks start at random (norms at 1), and one warning names them. Raises ParameterError,
        ConfigError or CheckpointError."""
        check_device(device)
        build = partial(cls, attention=attention, mlp=mlp, device="meta", seed=None, communicator=communicator)
        entries = None
        if (attention, mlp) != (Attention, MLP):

            def entries(config: ModelConfig) -> list[Entry]:
                return entries_of(build(config), config)

        checkpoint = Checkpoint(path, config, entries)
        model = build(checkpoint.config, dtype=checkpoint.resolve(dtype))
        shard = None if communicator is None else communicator.shard
        checkpoint.load(model, device=device, quantization=quantization, check_weights=check_weights, shard=shard)
        scales = checkpoint.kv_scales
        model.kv_scales = scales if scales is None else scales[:, :, model.shard.kv_heads]
        if checkpoint.absent:
            names = [f"{entry.module}.{entry.leaf}" for entry in checkpoint.absent]
            for entry in checkpoint.absent:
                owner = model.get_submodule(entry.module)
                empty = torch.empty_like(owner.get_parameter(entry.leaf), device=device)
                setattr(owner, entry.leaf, nn.Parameter(empty, requires_grad=False))
            model._fill_randomly(0, names)
            warnings.warn(f"{path} has nothing for {', '.join(names)}: they start at random", stacklevel=2)
        model._complete()
        return model

    def quantise(self, scheme: str) -> None:
        """Round the weights of the linear layers to "int8", "int4" or "fp8", in place; embedding, norms and head stay
        as they are. ValueError for another scheme, or a model that is quantised already."""
        self.needs_whole("quantise")
        is_coded = any(isinstance(module, Linear) and module.coded is not None for module in self.modules())
        if scheme not in SCHEMES or is_coded:
            legal = "None for a quantised model" if is_coded else f"one of {', '.join(SCHEMES)} for a dense model"
            raise ParameterError(f"quantization must be {legal}, got {scheme!r}", "quantization")
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, Linear):
                    module.quantise(scheme)

    def dequantise(self) -> None:
        """Hold all weights as dense parameters, in place."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.widen()
        self._complete()

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that this and transformers load: all of it or nothing. `path` must be new or empty."""
        self.needs_whole("save_pretrained")
        save_pretrained(self, self.config, path, kv_scales=self.kv_scales)

    @property
    def config(self) -> ModelConfig:  # type: ignore[override]
        """Fixed: what follows from it, such as the rotary frequencies, is made once."""
        return self._config

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """-> logits [rows, vocab] in the model's dtype, of the tokens `batch.logit_rows` (None = all)."""
        logits = self.head(self.hidden(batch, kv), batch, batch.logit_rows)
        return logits if batch.taps is None else batch.taps.at(self, "logits", logits)

    def hidden(self, batch: Batch, kv: KVCache) -> Tensor:
        """-> [tokens, hidden] after the last norm, of every token; `head` makes logits of it."""
        if self.lm_head.form is not None and self.config.tie_word_embeddings:
            self._tied.renew(self.lm_head, self.embed_tokens.weight)
        rotation = ops.cos_sin(batch.positions, self.frequencies, self.attention_factor)
        x, residual = self.embed_tokens(batch.token_ids, batch.adapters), None
        if batch.taps is not None:
            x = batch.taps.at(self, "embed", x)
        for layer, kv_layer in zip(self.layers, kv.layers, strict=True):
            x, residual = layer(x, residual, batch, rotation, kv_layer)
        x = self.norm(x, residual)[0]
        return x if batch.taps is None else batch.taps.at(self, "norm", x)

    def head(self, hidden: Tensor, batch: Batch, rows: Tensor | None = None) -> Tensor:
        """Logits of the tokens `rows` (None = all) of what `hidden` returned for `batch`."""
        adapters = batch.adapters
        if rows is not None:
            hidden = hidden.index_select(0, rows)
            adapters = None if adapters is None else adapters.rows(rows)
        return self.lm_head(hidden, adapters)

    def prepare(self, layout: str = "balanced", packing: Packing | None = None) -> None:
        """Pack the weights for this machine's CPU, in place, where that is faster; nothing on other devices.

        `packing` "auto" goes by a table of shapes and dtypes (llama/model/packing.py), "always" packs what can be
        packed, "never" no dense weight. What was said last holds for later calls that do not say (an LLM makes one).
        Each dense weight is kept once, in its packed form (a head tied to the embedding is a second copy). A quantised
        one keeps its codes: alone ("compact"), with a form for few tokens ("balanced"), or with one for many as well
        ("fast"). Weights that require a gradient stay parameters. Idempotent; moving or casting the model undoes it.
        """
        self.packing = packing or self.packing
        prepare([module for module in self.modules() if isinstance(module, Linear)], layout, self.packing)
        self._tied.settle(self.embed_tokens.weight)

    def requires_grad_(self, requires_grad: bool = True) -> "Transformer":
        """A packed weight is a parameter again before it requires a gradient."""
        if requires_grad and unpack(self):
            self._complete()
        return super().requires_grad_(requires_grad)

    def _join(self, communicator: Communicator) -> None:
        """Have the parts of what ranks compute put together: of embedding, attention, MLP and logits."""
        self.embed_tokens.lookup = communicator.lookup
        self.lm_head.finish = communicator.gather
        for name, module in self.named_modules():
            if isinstance(module, Linear) and name.endswith(("o_proj", "down_proj")):
                module.finish = communicator.sum

    def _fill_randomly(self, seed: int, names: Collection[str] | None = None) -> None:
        """All parameters, or those of these names; a rank's are parts of the same numbers."""
        generator = torch.Generator(self.device).manual_seed(checked_integer("seed", seed, -(2**63), 2**64 - 1))
        for name, parameter in self.named_parameters():
            if names is not None and name not in names:
                continue
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif self.shard.size == 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                self._fill_part(name, parameter, generator)

    def _fill_part(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        module, _, leaf = name.rpartition(".")
        pairs = zip(layout(self.config), layout(self.local_config), strict=True)
        parts = [(whole, own) for whole, own in pairs if (whole.module, whole.leaf) == (module, leaf)]
        rows = parts[-1][0].start + parts[-1][0].shape[0]
        drawn = torch.empty(rows, *parts[0][0].shape[1:], dtype=parameter.dtype, device=parameter.device)
        drawn.normal_(0.0, 0.02, generator=generator)
        parameter.zero_()
        for whole, own in parts:
            cut = self.shard.cut(whole.name)
            part = drawn[whole.start : whole.start + whole.shape[0]][cut if drawn.dim() > 1 else cut.rows]
            parameter[own.start : own.start + len(part)] = part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        # A cast must not round the rotary frequencies, to_empty() must not lose them, a move must not untie the head.
        super()._apply(fn, recurse)
        self.fixed = None
        self.digests.forget()  # parameters keep their versions
        self._complete()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *told: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *told)
        if self.config.tie_word_embeddings and (wrong := untied(state_dict, prefix)):
            told[-1].append(wrong)

    def _complete(self, keys: object = None) -> None:
        """What follows from the configuration and the parameters; also behind load_state_dict, which tells `keys`."""
        self.frequencies = frequencies(self.config, self.device)
        if self.config.tie_word_embeddings and self.lm_head.form is None:
            self.lm_head.weight = self.embed_tokens.weight
