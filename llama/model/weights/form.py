"""What a form of a weight does. The plainest one, a dense parameter, is `Linear.weight` and has no class of its own."""

from typing import Protocol

import torch
from torch import Tensor


class WeightForm(Protocol):
    """W [out_features, in_features], laid out for its matmul."""

    dtype: torch.dtype  # of the model

    def __call__(self, x: Tensor) -> Tensor:
        """x W^T: x [tokens, in_features] -> [tokens, out_features] in x.dtype."""

    def dense(self) -> Tensor:
        """W in the model's dtype, a tensor of its own."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
