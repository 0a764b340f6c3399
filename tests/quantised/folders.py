"""The published folders of tests/golden/quantised, and copies of them with something changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

from llama.model.transformer import Transformer
from tests.model.models import hugging_face_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "quantised"
FOLDERS = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").exists())
LAYER = "model.layers.0."
Q = LAYER + "self_attn.q_proj"


def weights(folder: Path, dtype: str = "float32") -> dict:
    return hugging_face_weights(Transformer.from_pretrained(folder, dtype=dtype))


def copy(name: str, target: Path, tensors: Callable | None = None, config: Callable | None = None) -> Path:
    """The folder `name` at `target`; `tensors` and `config` change its tensors and its quantization_config in place."""
    shutil.copytree(GOLDEN / name, target)
    if tensors is not None:
        stored = load_file(target / "model.safetensors")
        tensors(stored)
        save_file({key: tensor.contiguous() for key, tensor in stored.items()}, target / "model.safetensors")
    if config is not None:
        document = json.loads((target / "config.json").read_text())
        config(document["quantization_config"])
        (target / "config.json").write_text(json.dumps(document))
    return target
