"""`llama merge`: a base model and an adapter into one checkpoint."""

from argparse import Namespace
from pathlib import Path

from llama.cli.flags import Parser

DESCRIPTION = "Merge a PEFT adapter into its base model: a checkpoint that computes both at the cost of the base alone."


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s BASE ADAPTER OUTPUT [options]"
    parser.add_argument("base", metavar="BASE", help="folder of the base model")
    parser.add_argument("adapter", metavar="ADAPTER", help="the PEFT adapter's folder")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to make, new or empty")
    text = "dtype of the merged weights, auto = the base's (%(default)s)"
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=text)


def run(options: Namespace) -> int:
    from llama.convert.merge import merge

    merge(Path(options.base), Path(options.adapter), Path(options.output), dtype=options.dtype)
    print(f"wrote {options.output}")
    return 0
