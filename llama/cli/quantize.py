"""`llama quantize`: a dense checkpoint into a quantised one."""

from argparse import Namespace
from pathlib import Path

from llama.cli.flags import Parser

DESCRIPTION = "Round a checkpoint's linear layers to int8, int4 or fp8: a compressed-tensors folder."


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s --input DIR --output DIR --scheme int8|int4|fp8"
    parser.add_argument("--input", required=True, metavar="DIR", help="folder of the dense model")
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to make, new or empty")
    text = "int8 or fp8, a scale per row; int4, a scale per 128 columns"
    parser.add_argument("--scheme", required=True, choices=("int8", "int4", "fp8"), help=text)


def run(options: Namespace) -> int:
    from llama.convert.quantise import quantise

    quantise(Path(options.input), Path(options.output), options.scheme)
    print(f"wrote {options.output}")
    return 0
