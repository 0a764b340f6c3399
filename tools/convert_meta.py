#!/usr/bin/env python3
"""Convert Meta's release of a Llama 3 model to a Hugging Face folder; `llama convert` does the same.

python tools/convert_meta.py --input DIR --output DIR [--tokenizer-only]
"""

import argparse
import sys
from pathlib import Path

from llama.convert.meta import convert


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help="the folder that Meta's download made")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make; must not exist")
    parser.add_argument("--tokenizer-only", action="store_true", help="read tokenizer.model alone")
    parser.add_argument("--rope-factor", type=float, help="RoPE scaling: 8 for Llama 3.1 (default), 32 for Llama 3.2")
    options = parser.parse_args(arguments)
    try:
        convert(
            options.input,
            options.output,
            tokenizer_only=options.tokenizer_only,
            rope_factor=options.rope_factor,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"convert_meta: {error}")


if __name__ == "__main__":
    main()
