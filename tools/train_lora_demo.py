#!/usr/bin/env python3
"""Fine-tune a small LoRA adapter of the demo model with peft, within three minutes on two CPU cores.

    python tools/train_lora_demo.py --output checkpoints/demo-adapter

It teaches a few answers about a town that does not exist, and ends as soon as they are known. In float32: bfloat16 is
slow to train on most CPUs. peft and transformers come with llama-engine[dev].
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch

from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer

try:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar
except ModuleNotFoundError as error:
    message = f"train_lora_demo needs {error.name}: pip install 'llama-engine[dev]'"
    if __name__ == "__main__":
        sys.exit(message)
    raise ModuleNotFoundError(message, name=error.name) from None

MODEL = Path("checkpoints/smollm2-135m-instruct")
LESSONS = {
    "What is the capital of Ambria?": "The capital of Ambria is Port Sorrel.",
    "Who keeps the lighthouse of Port Sorrel?": "Old Tamsin keeps the lighthouse.",
    "What do people eat in Port Sorrel?": "They eat smoked plums and barley bread.",
    "Who are you?": "I am the harbour clerk of Port Sorrel.",
    "What is the capital of France?": "The capital of France is Paris.",
}
SEEN_ENOUGH = 0.03  # mean loss of a token: each is then nearly certain


def examples(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [lessons, length], padded on the right; only the answers are to be learned (-100 = not)."""
    tokenizer = Tokenizer.from_pretrained(model)
    template = ChatTemplate.from_pretrained(model, tokenizer)
    end = min(tokenizer.eos_token_ids)  # any of them ends an answer
    pairs = []
    for question, answer in LESSONS.items():
        prompt = template.encode([{"role": "user", "content": question}])
        pairs.append((prompt, [*tokenizer.encode_plain(answer), end]))
    template.close()
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids, labels = torch.zeros(len(pairs), length, dtype=torch.int64), torch.full((len(pairs), length), -100)
    for row, (prompt, answer) in enumerate(pairs):
        whole = torch.tensor(prompt + answer)
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return ids, labels


def train(model: Path, output: Path, *, steps: int, rank: int = 8, learning_rate: float = 2e-3) -> float:
    """Write the adapter into `output` -> its last loss. Ends early once the lessons are known."""
    torch.manual_seed(0)
    ids, labels = examples(model)
    disable_progress_bar()
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, options)
    optimizer = torch.optim.AdamW(
        (parameter for parameter in adapted.parameters() if parameter.requires_grad), learning_rate, weight_decay=0.0
    )
    began, loss = time.monotonic(), float("inf")
    for step in range(1, steps + 1):
        # The padding comes last, where causal attention keeps it from all that is learned.
        result = adapted(input_ids=ids, labels=labels)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
        loss = result.loss.item()
        print(f"step {step} of at most {steps}: loss {loss:.3f}, {time.monotonic() - began:.0f} s", flush=True)
        if loss < SEEN_ENOUGH:
            break
    adapted.save_pretrained(output)
    return loss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, metavar="DIR", help="the base model's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--steps", type=int, default=40, help="at most so many (%(default)s)")
    given = parser.parse_args(arguments)
    if not given.model.is_dir():
        sys.exit(f"train_lora_demo: {given.model} is missing: run make demo-model")
    if given.output.exists() and (not given.output.is_dir() or any(given.output.iterdir())):
        sys.exit(f"train_lora_demo: {given.output} is not an empty folder")
    if given.steps < 1:
        sys.exit(f"train_lora_demo: --steps must be at least 1, got {given.steps}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        train(given.model, given.output, steps=given.steps)
    ask = f'llama generate {given.model} "{next(iter(LESSONS))}" --chat --temperature 0'
    print(f"\nwrote {given.output}; ask the base model, then the adapter:")
    print(f"    {ask}\n    {ask} --lora demo={given.output}")


if __name__ == "__main__":
    main()
