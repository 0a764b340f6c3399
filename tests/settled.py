"""What wrappers of Triton kernels have settled, for tests that change what it goes by."""

import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent / "kernels" / "gpu"
_FILES = [path.relative_to(_FOLDER).with_suffix("") for path in _FOLDER.rglob("*.py")]
_MODULES = [".".join(("llama.kernels.gpu", *path.parts)) for path in _FILES]


def forget_settled() -> None:
    """Launches go by the constants of their modules, and by a target, which tests replace."""
    for name in _MODULES:
        kinds = getattr(sys.modules.get(name), "_KINDS", None)
        if kinds is not None:
            kinds.clear()
