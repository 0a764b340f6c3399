"""Linear: a weight that knows its own matmul, and a bias where the checkpoint has one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.kernels import ops
from llama.kernels.cpu.pieces import Pieces
from llama.kernels.exact_pieces import ExactPieces
from llama.kernels.types import QuantizedWeight
from llama.model.adapters import StepAdapters
from llama.model.module import Module
from llama.model.weights.form import WeightForm
from llama.model.weights.packed import OneDNNGated, pack
from llama.model.weights.quantised import CodedForm, Joined, Quantised, quantise


class Linear(Module):
    """y = x W^T + bias with W [out_features, in_features].

    W is the parameter `weight`, or lies in another `form`; then `weight` is None. The bias is always a parameter.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    form: WeightForm | None
    finish: Callable[[Tensor], Tensor] | None  # what other ranks add to the output
    pieces: Pieces | ExactPieces | None  # of the rows of x, where each is to have the same bits in any crowd
    multiply: Callable[[Tensor, Tensor], Tensor]  # x and a dense W

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        is_gated: bool = False,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        """`is_gated`: the first half of W's rows is SwiGLU's gate, the second what the gate multiplies."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.is_gated = is_gated
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), requires_grad=False)
        self.form = None
        self.finish = None
        self.pieces, self.multiply = None, F.linear

    def forward(self, x: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        """x [tokens, in_features] -> [tokens, out_features]; `adapters` says which tokens use an adapter."""
        weight = self._parameters.get("weight")  # as an attribute it is looked for in vain first, for a microsecond
        if weight is not None and self.pieces is None:
            y = F.linear(x, weight, self.bias)
        elif x.requires_grad or (self.form is None and self.pieces is None):  # or it is pruned, or parametrised
            y = F.linear(x, self.dense_weight(), self.bias)
        else:
            y = self._product(x) if self.pieces is None else self.pieces.apply(self._product, x)
            if self.bias is not None:
                y = y.add_(self.bias)
        if adapters is not None:
            y = adapters.add(self, x, y)
        return y if self.finish is None else self.finish(y)

    def gated(self, x: Tensor, adapters: StepAdapters | None = None) -> Tensor:
        """silu(gate) * up of what `forward` gives: [tokens, out_features / 2]."""
        is_apart = self._is_bare and not self.is_hooked and (adapters is None or not adapters.concern(self))
        if is_apart and isinstance(self.form, OneDNNGated):
            return self.form.gated(x)
        return ops.silu_mul(self(x, adapters))

    @property
    def _is_bare(self) -> bool:
        """Whether nothing stands beside W."""
        return self.bias is None and self.finish is None and self.pieces is None

    def into(self, out: Tensor, x: Tensor, adapters: StepAdapters | None = None) -> None:
        """`forward`, its result in `out`: at once where W is a plain tensor and nothing comes behind the product."""
        if self.form is None and self._is_bare and adapters is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            out.copy_(self(x, adapters))

    def _product(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight) if self.form is None else self.form(x)

    @property
    def bare(self) -> Tensor | QuantizedWeight | None:
        """W, where y is x W^T with it as it lies, and nothing else; None where there is more to it."""
        if not self._is_bare:
            return None
        if self.form is None:
            return self.weight
        return self.form.bare if isinstance(self.form, Quantised) else None

    def prepare(self, layout: str = "balanced") -> None:
        """Take the form that is fastest on this machine, if there is a faster one; `layout` is for a quantised W."""
        if self.coded is not None:
            self.coded.prepare(layout)
        elif self.form is None and (form := pack(self.weight, is_gated=self.is_gated)) is not None:
            self.take(form)

    @property
    def is_prepared(self) -> bool:
        coded = self.coded
        return self.form is not None if coded is None else coded.is_prepared

    def take(self, form: WeightForm) -> None:
        """W lies in `form` from now on."""
        self.form = form
        self.weight = None  # type: ignore[assignment]

    def quantise(self, scheme: str) -> None:
        """Round a dense W to "int8", "int4" or "fp8"."""
        self.take(quantise(self.dense_weight(), scheme))

    @property
    def device(self) -> torch.device:
        if self.form is None:
            return self.weight.device
        return torch.device("cpu") if self.coded is None else self.coded.device  # packed weights are a CPU's

    @property
    def coded(self) -> CodedForm | None:
        """The form of a quantised W, None where W is none."""
        return self.form if isinstance(self.form, Quantised | Joined) else None

    def dense_weight(self) -> Tensor:
        """[out_features, in_features] in the model's dtype, bit for bit; a copy where W lies in another form."""
        return self.weight if self.form is None else self.form.dense()

    def widen(self) -> None:
        """Hold W as the dense parameter `weight`, whatever form it had."""
        if self.form is not None:
            self.weight = nn.Parameter(self.dense_weight(), requires_grad=False)
            self.form = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear":
        if (coded := self.coded) is not None:  # codes move, and what they stand for is in the model's dtype
            like = fn(torch.empty(0, dtype=coded.dtype, device=coded.device))
            self.take(coded.to(like.device, like.dtype))
        else:
            self.widen()  # a packed weight neither moves nor casts
        self.pieces, self.multiply = None, F.linear
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.dense_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *told: Any) -> None:
        # A packed W takes values as a dense one does, and is packed anew; a quantised one takes none.
        given = prefix + "weight" in state_dict
        if given and self.coded is not None:
            told[-1].append(f"{prefix}weight is quantised: load the model dense to change it")
            return
        was_packed = given and self.form is not None
        if was_packed:
            self.widen()
        super()._load_from_state_dict(state_dict, prefix, *told)
        if was_packed:
            self.prepare()

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"
