"""The network computes in its own dtype, whatever torch.autocast says to the caller's code around it."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def own_dtype(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: without the thread's autocast, under which half of a layer would be in another dtype, and its keys
    would not fit the cache."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    return run(*args, **kwargs)
        return function(*args, **kwargs)

    return run
