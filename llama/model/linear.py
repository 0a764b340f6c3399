"""Linear: a weight that knows its own matmul. No bias: Llama has none."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T with W [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype), False)

    def forward(self, x: Tensor) -> Tensor:  # [tokens, in_features] -> [tokens, out_features]
        return F.linear(x, self.weight)

    def dense_weight(self) -> Tensor:
        """[out_features, in_features] in the model's dtype."""
        return self.weight

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"
