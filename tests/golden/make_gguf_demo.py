#!/usr/bin/env python3
"""Write gguf_demo.json: what transformers' own GGUF loader makes of the demo model's file (it takes a minute).

    .venv/bin/python tests/golden/make_gguf_demo.py

Token ids of a few texts, and of two texts the logits of every position at 96 ids spread over the vocabulary.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from fetch_demo_model import fetch_gguf

TEXTS = [
    "The capital of France is Paris.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "<|im_start|>user\nWhat's 12 times 34?<|im_end|>\n<|im_start|>assistant\n",
    "  leading, trailing and   inner spaces  ",
    "tabs\tand\r\nline\n\n\nbreaks\n",
    "Привет, мир! 你好，世界。 مرحبا नमस्ते",
    "👩‍👩‍👧‍👦 🏳️‍🌈 naïve café",
    "WE'LL don't THEY'RE it's 'quoted'",
    "3.14159 and 1,000,000 and 2024-07-26",
    "<repo_name>x<|endoftext|><|im_end|",
    "",
]
NUM_LOGIT_TEXTS = 2
NUM_IDS = 96


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = fetch_gguf(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.linspace(0, model.config.vocab_size - 1, NUM_IDS).long()
    logits = []
    for text in TEXTS[:NUM_LOGIT_TEXTS]:
        with torch.inference_mode():
            rows = model(torch.tensor([tokenizer(text).input_ids])).logits[0, :, ids]
        logits.append([[round(value, 5) for value in row] for row in rows.tolist()])
    document = {
        "texts": TEXTS,
        "token_ids": [tokenizer(text).input_ids for text in TEXTS],
        "logit_ids": ids.tolist(),
        "logits": logits,
    }
    target = Path(__file__).with_name("gguf_demo.json")
    target.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
