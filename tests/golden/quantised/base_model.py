"""What the scripts of this folder share: a tiny Llama with random weights, and the reference beside each checkpoint.

Each make_*.py writes its folders anew with packages that are not the project's own: its docstring says which, and
they go into an environment apart that borrows PyTorch and transformers. `reference.safetensors` beside a checkpoint
holds input_ids, transformers' float32 logits on the dense weights, and the SHA-256 of each dense weight's float32
bytes, by the package that wrote the folder, computing in float32.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SMALL = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}  # groups of 128 fit


def config(sizes: dict[str, int] = SMALL, **changes) -> LlamaConfig:
    return LlamaConfig(
        **sizes,
        vocab_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )


def model(dtype: torch.dtype, sizes: dict[str, int] = SMALL, **changes) -> LlamaForCausalLM:
    """Weights large enough that attention is sharp; the modules differ in size, so that scales cannot be mixed up."""
    made = LlamaForCausalLM(config(sizes, **changes)).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        size = 0.4 if "k_proj" in name else 0.06 if "v_proj" in name else 0.15
        parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else size * noise)
    return made


def empty(name: str) -> Path:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def projections(model: LlamaForCausalLM) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if name.endswith("_proj")}


def finish(folder: Path, dense: dict[str, Tensor], plain: dict[str, Tensor], sizes: dict[str, int] = SMALL) -> None:
    """Write the reference: `dense` holds the dequantised weights in float32, `plain` what was not quantised."""
    (folder / "generation_config.json").unlink(missing_ok=True)
    judge = LlamaForCausalLM(config(sizes)).float().eval()
    weights = {name: tensor.float() for name, tensor in (plain | dense).items()}
    judge.load_state_dict(weights, strict=True)
    input_ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = judge(input_ids, use_cache=False).logits
    digests = {f"sha256.{name}": digest(tensor) for name, tensor in dense.items()}
    save_file({"input_ids": input_ids, "logits": logits, **digests}, folder / "reference.safetensors")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {size / 1000:.0f} kB, largest logit {logits.abs().max():.2f}")


def digest(tensor: Tensor) -> Tensor:
    """The zeros of some packages have a sign, which says nothing: adding zero takes it away."""
    assert tensor.dtype == torch.float32
    return torch.frombuffer(bytearray(hashlib.sha256((tensor + 0.0).contiguous().numpy()).digest()), dtype=torch.uint8)


def write(
    folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, quantization: dict[str, dict], **changes
) -> None:
    """config.json and model.safetensors, where the package has no way to write them."""
    config(**changes, architectures=["LlamaForCausalLM"], dtype=str(dtype)[6:]).save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text()) | quantization
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
