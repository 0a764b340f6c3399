"""Makes Triton's interpreter quicker, and, where a test asks for it, its products like a GPU's.

Quicker: about twice for kernels that call many device functions.

It patches triton.language before every call of a device function, which takes about a millisecond; tl.sum and tl.zeros
are such functions too. A launch has patched the package by then, and the modules that triton.language itself consists
of stay patched once they are. So one patch per module of callers is enough.
"""

import numpy as np
import pytest
from triton.runtime import interpreter


def _call(self, *args, _patched=set(), **kwargs):  # noqa: B006 one set for all calls is what is wanted
    module = self.fn.__module__
    if module not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(module)
    return self.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call


@pytest.fixture
def row_by_row(monkeypatch):
    """The interpreter's products are NumPy's, in which a row's bits depend on its place."""
    matmul = np.matmul
    rows = lambda a, b, **options: np.concatenate([matmul(row[None].copy(), b, **options) for row in a])  # noqa: E731
    monkeypatch.setattr(np, "matmul", rows)
