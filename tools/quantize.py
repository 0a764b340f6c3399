"""Round a checkpoint's linear layers to int8, int4 or fp8; `llama quantize` does the same.

python tools/quantize.py --input checkpoints/base --output checkpoints/base-int8 --scheme int8
"""

import sys

from llama.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
