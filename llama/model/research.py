"""Research: a network alone, without engine and sampling: whole sequences in, logits and activations out.

What the model offers beside `forward`. Activations are read and changed at the points of `llama.model.taps`; with
`grad` everything can be differentiated.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from llama.api.errors import ParameterError
from llama.kernels import ops
from llama.kernels.types import KVLayer, wide_dtype
from llama.model.adapters import Stacks, StepAdapters
from llama.model.autocast import own_dtype
from llama.model.batch import Batch, rectangle
from llama.model.config import ModelConfig
from llama.model.digest import Digests
from llama.model.kv_cache import KVCache
from llama.model.module import Module
from llama.model.parallel import Shard
from llama.model.session import BLOCK_SIZE, ActivationCache, Session, checked_ids
from llama.model.taps import (
    Interventions,
    SequenceTaps,
    Span,
    StepTaps,
    bind,
    each,
    names_of,
    point_shape,
    resolve_points,
)


class Research(Module):
    """A base of networks: they have `norm`, `lm_head`, `digests`, `hidden` and `forward` (see Transformer)."""

    config: ModelConfig
    shard: Shard  # the whole model, or one rank's part of it
    norm: Any
    lm_head: Any
    digests: Digests

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def hidden(self, batch: Batch, kv: KVCache) -> Tensor:
        raise NotImplementedError

    def logits(
        self,
        token_ids: Tensor,
        stacks: Stacks | None = None,
        adapter_indices: Tensor | None = None,
        *,
        interventions: Interventions = None,
        grad: bool = False,
    ) -> Tensor:
        """[batch, seq] token ids -> [batch, seq, vocab] logits, float32 (float64 for a float64 model).

        The research entry: no engine, no sampling; the same forward over a cache made for this one call.
        adapter_indices [batch] says which adapter of `stacks` each sequence uses (0 = none). seq is at most
        config.longest_context; to try longer ones, change the config. `interventions` are one list for all
        sequences or a list (or None) for each. With `grad` every op is differentiable: in parameters that require it,
        in tensors of interventions and of `stacks`, in what `run_with_cache` reads.
        """
        logits, _ = self.run_with_cache(
            token_ids, (), stacks, adapter_indices, interventions=interventions, logits=True, grad=grad
        )
        assert logits is not None
        return logits

    @own_dtype
    def run_with_cache(
        self,
        token_ids: Tensor,
        points: str | Sequence[str] = "layers.*.resid_post",
        stacks: Stacks | None = None,
        adapter_indices: Tensor | None = None,
        *,
        interventions: Interventions = None,
        logits: bool = False,
        grad: bool = False,
    ) -> tuple[Tensor | None, ActivationCache]:
        """As `logits`, reading the points that names and patterns mean (see `taps.resolve_points`) after all changes
        there -> (logits or None, the points' values [batch, seq, ...]). The vocabulary head is computed only where
        `logits` asks for them or "logits" is among the points."""
        self.needs_whole("a forward of its own")
        config = self.config
        if not isinstance(token_ids, Tensor):
            raise ParameterError(f"token_ids must be an int64 tensor [batch, seq], got {token_ids!r}", "token_ids")
        rows, length = checked_ids(token_ids, config.vocab_size).shape
        if grad and torch.is_inference_mode_enabled():
            raise ParameterError("grad=True has no effect inside torch.inference_mode: leave it first", "grad")
        if length > (most := config.longest_context):
            raise ParameterError(f"token_ids has {length} tokens a row, the model's context is {most}", "token_ids")
        is_none = points is None or (isinstance(points, str | Sequence) and not points)
        read = () if is_none else resolve_points(points, config.num_hidden_layers)
        per_row = [bind(i, {}, config, length, like=self.norm.weight) for i in each(interventions, rows)]
        edited = {point for taps in per_row for point in taps.edits}
        adapters = self._adapters(stacks, adapter_indices, rows, length)
        self._check_grad(per_row, {} if stacks is None else stacks, grad)
        wide = wide_dtype(self.dtype)
        if not token_ids.numel():
            empty = torch.empty(rows, length, config.vocab_size, dtype=wide, device=self.device)
            shapes = {point: (rows, length, *point_shape(point, config)) for point in read}
            none = {point: torch.empty(shape, dtype=self.dtype, device=self.device) for point, shape in shapes.items()}
            return empty if logits else None, ActivationCache(none, config.num_hidden_layers)
        taps = None
        if read or edited or grad:
            spans = [Span(one, i * length, 0, length) for i, one in enumerate(per_row)]
            taps = StepTaps(names_of(self), spans, whole=dict.fromkeys(read, (rows, length)), grad=grad)
        num_blocks = -(-length // BLOCK_SIZE)
        ids = token_ids.to(self.device)
        batch = rectangle(ids, 0, num_blocks, BLOCK_SIZE, adapters=adapters, taps=taps)
        kv = KVCache(config, rows * num_blocks, BLOCK_SIZE, dtype=self.dtype, device=self.device)
        if grad:  # autograd does not follow a write into one of several views
            kv.layers = [KVLayer(torch.zeros_like(k.k), torch.zeros_like(k.v)) for k in kv.layers]
        with ops.on_device(self.device), torch.set_grad_enabled(True) if grad else nullcontext():
            # Through __call__, so that hooks on the whole model fire.
            y = self(batch, kv) if logits or "logits" in read else self.hidden(batch, kv)
            y = y.view(rows, length, -1).to(wide) if logits else None
        found = {} if taps is None else {point: taps.whole[point] for point in read}
        return y, ActivationCache(found, config.num_hidden_layers)

    def _adapters(self, stacks: Stacks | None, indices: Tensor | None, rows: int, length: int) -> StepAdapters | None:
        """Those of all tokens. ParameterError for one argument without the other, or indices that are none."""
        if stacks is None and indices is None:
            return None
        if stacks is None or indices is None:
            missing = "stacks" if stacks is None else "adapter_indices"
            raise ParameterError(f"stacks and adapter_indices go together: {missing} is None", missing)
        if not stacks.keys() <= set(self.modules()):
            raise ParameterError("stacks hold adapters of another model's modules: they would change nothing", "stacks")
        most = min((len(stack.a) for stack in stacks.values()), default=0)
        legal = f"adapter_indices must be an int32 or int64 tensor [{rows}] of 0 to {most}"
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
            raise ParameterError(f"{legal}, got {indices!r}", "adapter_indices")
        if indices.shape != (rows,) or not all(0 <= index <= most for index in indices.tolist()):
            raise ParameterError(f"{legal}, got {indices!r}", "adapter_indices")
        return StepAdapters.of(stacks, indices.to(self.device).int().repeat_interleave(length))

    def _check_grad(self, per_row: Sequence[SequenceTaps], stacks: Stacks, grad: bool) -> None:
        if grad or not torch.is_grad_enabled():
            return
        edits = [edit.intervention for taps in per_row for edits in taps.edits.values() for edit in edits]
        names = {module: name for name, module in self.named_modules()} if stacks else {}
        needy = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        needy += [
            f"an adapter of {names.get(module, module)}"
            for module, stack in stacks.items()
            if stack.a.requires_grad or stack.b.requires_grad
        ]
        parts = [(edit, value) for edit in edits for value in (getattr(edit, edit.tensor or "point"), edit.number[1])]
        needy += [edit.name for edit, value in parts if isinstance(value, Tensor) and value.requires_grad]
        if needy:
            raise ParameterError(
                f"{needy[0]} requires grad, and this forward is not differentiable: "
                "pass grad=True, or use torch.no_grad()",
                "grad",
            )

    @own_dtype
    def unembed(self, resid: Tensor) -> Tensor:
        """The final norm and the head over a residual [..., hidden] -> logits [..., vocab], float32 (float64 for a
        float64 model): the logit lens."""
        self.needs_whole("unembed")
        size, dtype = self.config.hidden_size, self.dtype
        if not isinstance(resid, Tensor) or resid.shape[-1:] != (size,) or resid.dtype != dtype:
            seen = f"{resid.dtype} {list(resid.shape)}" if isinstance(resid, Tensor) else repr(resid)
            raise ParameterError(f"resid must be a {dtype} tensor [..., {size}], got {seen}", "resid")
        with ops.on_device(self.device):
            logits: Tensor = self.lm_head(self.norm(resid.to(self.device).reshape(-1, size))[0])
        return logits.view(*resid.shape[:-1], self.config.vocab_size).to(wide_dtype(dtype))

    def session(self, max_tokens: int) -> Session:
        """An empty sequence of at most `max_tokens` with a cache of its own."""
        self.needs_whole("session")
        return Session(self, max_tokens)

    def digest(self) -> str:
        """Of the config and of all bytes of every weight. What another model computed has another one.

        It reads each weight once, over 1 GB/s on a core (a packed one is unpacked, at a third of that), and later calls
        read only what has changed: with `update_weights`, `load_state_dict`, `prepare`, or in place as PyTorch counts
        it. A change through `.data` is seen after `digests.forget()`, which `LLM.reset_prefix_cache` does too."""
        self.needs_whole("digest")
        return self.digests.of(self, self.config)

    def needs_whole(self, what: str) -> None:
        """ParameterError where this is one rank's part: what is asked of it alone, the other ranks do not do."""
        if self.shard.size > 1:
            raise ParameterError(
                f"{what} needs the whole model in one process, this one has tensor_parallel_size={self.shard.size}",
                "tensor_parallel_size",
            )
