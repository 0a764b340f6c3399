"""`llama convert`: other forms of a checkpoint into a Hugging Face folder, once."""

from argparse import Namespace
from pathlib import Path

from llama.cli.flags import Parser, UsageError
from llama.model.generation_config import GenerationConfig

DESCRIPTION = "Convert Meta's release of a Llama 3 model, or a GGUF file, to a Hugging Face folder."


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s INPUT OUTPUT [options]"
    parser.add_argument("input", metavar="INPUT", help="the folder that Meta's download made, or a GGUF file")
    parser.add_argument("output", metavar="OUTPUT", help="the folder to make; it must not exist")
    text = "of Meta's release: how much RoPE is scaled, 8 for Llama 3.1 (default), 32 for Llama 3.2"
    parser.add_argument("--rope-factor", type=float, metavar="NUMBER", help=text)
    parser.add_argument("--tokenizer-only", action="store_true", help="of Meta's release: tokenizer.model alone")
    text = "of a GGUF file: dtype of the weights (bfloat16); those of Meta's release keep theirs"
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help=text)
    text = "of a GGUF file: linear layers keep its codes (Q4_0, Q4_1, Q8_0, Q4_K, Q6_K) instead of becoming dense"
    parser.add_argument("--keep-quantised", action="store_true", help=text)


def run(options: Namespace) -> int:
    source, output = Path(options.input), Path(options.output)
    if not options.input or not source.exists():
        told = "INPUT is the folder that Meta's download made, or a GGUF file"
        raise ValueError(f"{options.input or repr('')}: there is no such file or folder; {told}")
    if source.is_dir():
        if options.dtype is not None or options.keep_quantised:
            raise UsageError("--dtype and --keep-quantised are for a GGUF file: Meta's weights stay as they are")
        from llama.convert import meta

        meta.convert(source, output, tokenizer_only=options.tokenizer_only, rope_factor=options.rope_factor)
    else:
        if options.tokenizer_only or options.rope_factor is not None:
            raise UsageError("--rope-factor and --tokenizer-only are for Meta's release, a folder")
        from llama.convert import gguf

        kept = options.keep_quantised
        dense = gguf.convert(source, output, dtype=options.dtype or "bfloat16", keep_quantised=kept)
        for kind, count in dense.items():
            print(f"{count} linear layers became dense, for their type is {kind}")
    print(f"wrote {output}")
    if sampling := GenerationConfig.from_pretrained(output).sampling:
        told = ", ".join(f"{name} {value}" for name, value in sampling.items())
        print(f"a request that names no sampling gets {told}: see generation_config.json")
    return 0
