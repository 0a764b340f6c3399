"""Write the bitsandbytes folders through transformers: pip install --no-deps bitsandbytes==0.50.2 (and accelerate)"""

import tempfile

import base_model
import bitsandbytes.functional as bnb
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM


def make(name, **options):
    folder = base_model.empty(name)
    with tempfile.TemporaryDirectory() as dense_folder:
        base_model.model(torch.bfloat16).save_pretrained(dense_folder)
        model = LlamaForCausalLM.from_pretrained(
            dense_folder, quantization_config=BitsAndBytesConfig(**options), dtype=torch.bfloat16, device_map="cpu"
        )
    model.save_pretrained(folder)
    dense = {}
    for name, module in base_model.projections(model).items():
        weight = module.weight
        if options.get("load_in_8bit"):
            tensors = base_model.stored(folder)
            dense[f"{name}.weight"] = bnb.int8_vectorwise_dequant(tensors[f"{name}.weight"], tensors[f"{name}.SCB"])
        elif hasattr(weight, "quant_state"):
            weight.quant_state.dtype = torch.float32
            dense[f"{name}.weight"] = bnb.dequantize_4bit(weight.data, weight.quant_state)
    tensors = base_model.stored(folder)
    plain = {
        name: tensor for name, tensor in tensors.items() if name.endswith(".weight") and tensor.is_floating_point()
    }
    base_model.finish(folder, dense, plain)


def main():
    make(
        "bnb_nf4_double",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"],
    )
    make("bnb_nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    make("bnb_fp4", load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16)
    make("bnb_int8", load_in_8bit=True)


if __name__ == "__main__":
    main()
