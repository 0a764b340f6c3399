#!/usr/bin/env python3
"""Writes demo_generation.json: what transformers' generate says to 20 prompts with the demo model.

    python tests/golden/make_demo_generation.py        (after make demo-model; about two minutes)

float32, greedy, 64 tokens past any end of text. `close` lists the places where the two best logits lie within 0.01 of
each other, as [position, gap]: only there may another order of summation choose another token.
"""

import json
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent.parent / "checkpoints" / "smollm2-135m-instruct"
NUM_TOKENS = 64

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain why the sky is blue in two sentences.",
    "List three uses of a paper clip.",
    "Was ist 7 mal 8?",
    "Give me a Python function that reverses a string.",
    "Translate 'good morning' into Spanish.",
    "   Who wrote Hamlet?\n",
    "Name a mammal that lays eggs. 🥚",
    "What's 12 + 30?",
]
TEXTS = [
    "Once upon a time, in a village by the river,",
    "def fibonacci(n):\n    ",
    "The three laws of thermodynamics are",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, age FROM",
    "In 1969, the Apollo 11 mission",
    "La capital de España es",
    "The quick brown fox jumps over the lazy dog. " * 12,
    "Q: What do plants need to grow?\nA:",
]


def main() -> None:
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in QUESTIONS
    ]
    cases = [answer(tokenizer, model, prompt) for prompt in [*chats, *TEXTS]]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (HERE / "demo_generation.json").write_text(
        f'{{"made_with": {json.dumps(versions)}, "cases": [\n{lines}\n]}}\n', encoding="utf-8"
    )


def answer(tokenizer, model, prompt: str) -> dict:
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(out.logits)[:, 0].topk(2).values
    gaps = (best[:, 0] - best[:, 1]).tolist()
    token_ids = out.sequences[0, ids.shape[1] :].tolist()
    assert len(token_ids) == NUM_TOKENS
    return {
        "prompt": prompt,
        "prompt_token_ids": ids[0].tolist(),
        "token_ids": token_ids,
        "text": tokenizer.decode(token_ids, skip_special_tokens=True),
        "close": [[position, round(gap, 6)] for position, gap in enumerate(gaps) if gap < 0.01],
    }


if __name__ == "__main__":
    main()
