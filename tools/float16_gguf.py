#!/usr/bin/env python3
"""The demo model's GGUF file and a copy with its weights as float16: the same weights for a peer that reads GGUF alone.

python tools/float16_gguf.py --original smollm2-q4_1.gguf --float16 smollm2-f16.gguf
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from fetch_demo_model import fetch_gguf

try:
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize
except ModuleNotFoundError as error:
    message = f"float16_gguf needs {error.name}: pip install 'llama-engine[tools]'"
    if __name__ == "__main__":
        sys.exit(message)
    raise ModuleNotFoundError(message, name=error.name) from None

WRITTEN_BY_THE_WRITER = ("GGUF.", "general.architecture", "general.file_type")


def write_float16(source: Path, target: Path) -> None:
    """Copy metadata and tensors; matrices become float16, vectors stay float32, as llama.cpp wants them."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, stored in reader.fields.items():
        if name.startswith(WRITTEN_BY_THE_WRITER):
            continue
        kind = stored.types[0]
        items = stored.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, stored.contents(), kind, sub_type=items)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type))
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", type=Path, required=True, metavar="FILE")
    parser.add_argument("--float16", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.original.write_bytes(fetch_gguf(Path(folder)).read_bytes())
    write_float16(arguments.original, arguments.float16)


if __name__ == "__main__":
    main()
