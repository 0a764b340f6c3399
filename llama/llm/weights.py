"""New values for the weights of a model that an engine runs: for training loops that generate between their steps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llama.api.errors import ParameterError
from llama.model.checkpoint.layout import Entry, entries_of
from llama.model.fixed_rows import fix_rows
from llama.model.linear import Linear
from llama.model.transformer import Transformer


def update_weights(model: Transformer, named_tensors: Iterable[tuple[str, Tensor]]) -> int:
    """Copy tensors under their names in a Hugging Face checkpoint into the model, any subset, on any device and in any
    float dtype -> how many. ParameterError names a tensor that is not the model's or does not fit; those before it
    are in place by then."""
    model.needs_whole("update_weights")
    entries = {entry.name: entry for entry in entries_of(model, model.config)}
    touched: dict[nn.Module, bool] = {}  # module -> whether it was packed
    count = 0
    try:
        for name, tensor in named_tensors:
            entry = entries.get(name)
            if entry is None:
                raise ParameterError(
                    f"the model has no tensor {name!r}; {next(iter(entries))!r} is one", "named_tensors"
                )
            _check(entry, tensor)
            owner = model.get_submodule(entry.module)
            if isinstance(owner, Linear) and owner not in touched:
                if owner.coded is not None:
                    raise ParameterError(f"{name} is quantised: load the model dense to update it", "named_tensors")
                touched[owner] = owner.is_prepared
                owner.widen()
            parameter = owner.get_parameter(entry.leaf)
            parameter.detach().narrow(0, entry.start, entry.shape[0]).copy_(tensor.detach())
            count += 1
            if owner is model.embed_tokens and model.config.tie_word_embeddings and model.lm_head.form is not None:
                touched[model.lm_head] = True
                model.lm_head.form, model.lm_head.weight = None, model.embed_tokens.weight
    finally:
        for owner, was_packed in touched.items():
            if was_packed and isinstance(owner, Linear):
                owner.prepare()
        if model.fixed is not None:
            fix_rows(model)
    return count


def _check(entry: Entry, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != entry.shape or not tensor.is_floating_point():
        found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ParameterError(f"{entry.name} must be floats {list(entry.shape)}, got {found}", "named_tensors")
    if not bool(torch.isfinite(tensor).all()):
        raise ParameterError(f"{entry.name} holds NaN or infinities", "named_tensors")
