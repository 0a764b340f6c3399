#!/usr/bin/env python3
"""Convert a GGUF file of Llama architecture to a Hugging Face folder; `llama convert` does the same.

python tools/convert_gguf.py --input model.gguf --output DIR [--dtype bfloat16] [--keep-quantised]
"""

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="the .gguf file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to make; must not exist")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights written")
    text = "linear layers keep the file's codes (Q4_0, Q4_1, Q8_0, Q4_K, Q6_K) instead of becoming dense"
    parser.add_argument("--keep-quantised", action="store_true", help=text)
    options = parser.parse_args(arguments)
    try:
        from llama.convert.gguf import convert  # in here: an extra of the package brings what it needs

        dense = convert(options.input, options.output, dtype=options.dtype, keep_quantised=options.keep_quantised)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"convert_gguf: {error}")
    for kind, count in dense.items():
        print(f"{count} linear layers became dense, for their type is {kind}")


if __name__ == "__main__":
    main()
