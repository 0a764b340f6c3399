#!/usr/bin/env python3
"""Fetch Meta's Llama 3 tokenizer (the Tokenizer class and tokenizer.model) for the tests that compare with it.

python tools/fetch_meta_tokenizer.py --output .cache/meta-llama3-tokenizer
"""

import argparse
import sys
from pathlib import Path

from wheels import extract, fetch_wheel

from llama.model.checkpoint.save import new_folder

PACKAGE = "llama_models"
MEMBERS = [
    f"{PACKAGE}/{name}"
    for name in (
        "__init__.py",
        "tokenizer_utils.py",
        "llama3/__init__.py",
        "llama3/tokenizer.py",
        "llama3/tokenizer.model",
    )
]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output = parser.parse_args(arguments).output
    if output.is_dir():
        print(f"{output} is there already")
        return
    try:
        wheel = fetch_wheel("llama-models", "0.3.0", "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f")
        with new_folder(output) as folder:
            extract(wheel, MEMBERS, folder)
    except (ValueError, OSError) as error:
        sys.exit(f"fetch_meta_tokenizer: {error}")


if __name__ == "__main__":
    main()
