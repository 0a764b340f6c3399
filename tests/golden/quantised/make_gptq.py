"""Write the GPTQ folders with gptqmodel: GPTQMODEL_CPU_WORKERS=2 make_gptq.py TOKENIZER, any folder with a tokenizer.

pip install --no-deps gptqmodel==7.7.0 logbar tokenicer device-smi pypcre defuser threadpoolctl datasets pyarrow dill
pandas python-dateutil six multiprocess xxhash pillow. Calibrated on eight rows of random tokens.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import base_model
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
KEPT = ("config.json", "model.safetensors", "quantize_config.json")


def make(name, sizes=base_model.SMALL, **options):
    folder = base_model.empty(name)
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 96, (48,), generator=generator).tolist() for _ in range(8)]
    with tempfile.TemporaryDirectory() as scratch:
        dense_folder, quantised = Path(scratch, "dense"), Path(scratch, "quantised")
        base_model.model(torch.float16, sizes).save_pretrained(dense_folder)
        for file in TOKENIZER:
            shutil.copy(Path(sys.argv[1], file), dense_folder)
        model = GPTQModel.load(str(dense_folder), QuantizeConfig(**options), device="cpu", dtype=torch.float16)
        model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
        model.save(str(quantised))
        read_back = GPTQModel.load(str(quantised), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
        dense = {
            f"{module}.weight": exact(linear) for module, linear in base_model.projections(read_back.model).items()
        }
        for file in KEPT:
            shutil.copy(quantised / file, folder)
    for file in ("config.json", "quantize_config.json"):
        forget_scratch(folder / file)
    tensors = base_model.stored(folder)
    base_model.finish(folder, dense, {name: t for name, t in tensors.items() if name.endswith(".weight")}, sizes)


def exact(linear):
    """What the package's own dequantisation gives where the scales are float32 (float16 ones hold the same values)."""
    linear.scales = linear.scales.float()
    return linear.dequantize_weight().float().t().contiguous()


def forget_scratch(path):
    document = json.loads(path.read_text())
    document.get("quantization_config", document)["meta"].pop("offload_to_disk_path", None)
    path.write_text(json.dumps(document, indent=2) + "\n")


def main():
    make("gptq", base_model.WIDE, bits=4, group_size=128, sym=True, desc_act=False)
    make("gptq_desc_act", bits=4, group_size=32, sym=False, desc_act=True, act_group_aware=False)
    make("gptq_v2", bits=4, group_size=32, sym=False, desc_act=False, format="gptq_v2")
    make("gptq_v2_sym", bits=4, group_size=32, sym=True, desc_act=False, format="gptq_v2")
    make("gptq_channel", bits=4, group_size=-1, sym=True, desc_act=False, act_group_aware=False)
    make("gptq_8bit", bits=8, group_size=32, sym=True, desc_act=False)
    make("gptq_8bit_asym", bits=8, group_size=32, sym=False, desc_act=True, act_group_aware=False)


if __name__ == "__main__":
    main()
