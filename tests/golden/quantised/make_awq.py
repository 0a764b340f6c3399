"""Write AWQ folders with AutoAWQ's own packer: make_awq.py DIR, where the source of autoawq 0.2.9 is unpacked.

pip download --no-deps --no-binary :all: autoawq==0.2.9. The package as a whole no longer imports; two of its files are
loaded alone. Scales and zero points are those of the smallest and largest weight of a group, as its quantiser computes
them (pseudo_quantize_tensor).
"""

import importlib.util
import sys
import types
from pathlib import Path

import base_model
import torch


def load(source: Path):
    """awq.modules.linear.gemm and awq.utils.packing_utils, with stand-ins for what they import."""
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    for name, values in (
        ("awq.utils.module", {"try_import": lambda name: (None, "")}),
        ("awq.utils.utils", {"get_best_device": lambda: "cpu"}),
    ):
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    loaded = []
    for name in ("awq.utils.packing_utils", "awq.modules.linear.gemm"):
        spec = importlib.util.spec_from_file_location(name, source / (name.replace(".", "/") + ".py"))
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded.append(module)
    return loaded


def make(source, name, sizes, group, dense_layer=False):
    packing, gemm = load(source)
    folder = base_model.empty(name)
    model = base_model.model(torch.float16, sizes)
    skip = ["layers.1.mlp"] if dense_layer else []
    tensors = dict(model.state_dict())
    dense = {}
    for name, module in base_model.projections(model).items():
        if any(part in name for part in skip):
            continue
        del tensors[f"{name}.weight"]
        groups = module.weight.float().unflatten(1, (-1, group))
        low, high = groups.amin(2), groups.amax(2)
        scales = ((high - low).clamp(min=1e-5) / 15).half()
        zeros = (-torch.round(low / scales.float())).clamp(0, 15)
        rounded = torch.clamp(torch.round(groups / scales.float()[..., None]) + zeros[..., None], 0, 15)
        linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
        linear.weight = torch.nn.Parameter(
            ((rounded - zeros[..., None]) * scales.float()[..., None]).flatten(1), requires_grad=False
        )
        packed = gemm.WQLinear_GEMM.from_linear(
            linear, 4, group, scales=scales.t().contiguous(), zeros=zeros.t().contiguous()
        )
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in packed.state_dict().items()}
        exact = packing.dequantize_gemm(packed.qweight, packed.qzeros, packed.scales.float(), 4, group)
        dense[f"{name}.weight"] = exact.t().contiguous()
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": skip or None,
    }
    base_model.write(folder, tensors, torch.float16, {"quantization_config": quantization}, sizes=sizes)
    base_model.finish(folder, dense, {name: t for name, t in tensors.items() if name.endswith(".weight")}, sizes)


def main():
    source = Path(sys.argv[1])
    make(source, "awq", base_model.WIDE, 128)
    make(source, "awq_skipped_layer", base_model.SMALL, 32, dense_layer=True)


if __name__ == "__main__":
    main()
