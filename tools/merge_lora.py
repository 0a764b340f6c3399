"""Merge a PEFT adapter into its base model; `llama merge` does the same.

python tools/merge_lora.py --base checkpoints/base --adapter adapters/mine --output checkpoints/merged
"""

import argparse
import sys
from pathlib import Path

from llama.convert.merge import merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="the base model's folder")
    parser.add_argument("--adapter", type=Path, required=True, help="the PEFT adapter's folder")
    parser.add_argument("--output", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--dtype", default="auto", help="of the merged weights: auto (the base's), float32, bfloat16")
    arguments = parser.parse_args()
    try:
        merge(arguments.base, arguments.adapter, arguments.output, dtype=arguments.dtype)
    except (ValueError, OSError) as error:
        sys.exit(f"merge_lora: {error}")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
