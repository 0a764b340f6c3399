"""The network computes in its own dtype, whatever torch.autocast says to the caller's code around it; and the caller's
functions compute in ordinary PyTorch, whatever the engine around them is in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def ordinary() -> Iterator[None]:
    """For a caller's function inside a step: there are no gradients unless it asks for them (torch.enable_grad), which
    inference mode would not give. What it sees must be cloned in here: a tensor of inference mode has none."""
    with torch.inference_mode(False), torch.no_grad():
        yield
