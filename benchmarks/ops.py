"""Ops against the ceilings of the device and against their peers, all in one run.

python -m benchmarks.ops --op all            on a GPU: bfloat16, the shapes of Llama 3.1 8B, with codes also the 70B's
python -m benchmarks.ops --op all --tiny     anywhere: small shapes, on the CPU through Triton's interpreter
"""

import argparse
import os

import torch

from benchmarks.common import close, ratio, summary

OP_NAMES = (
    "norm",
    "silu_mul",
    "rope_and_store",
    "decode_attention",
    "prefill_attention",
    "quantized_matmul",
    "sample",
)


def _measure(workload, timer, limits: dict[str, float], peers: bool) -> dict:
    candidates: dict[str, list] = {}
    for seed in range(timer.num_sets(workload.bytes)):
        for name, call in workload.make(10 * seed).items():
            if name == "ours" or peers:
                candidates.setdefault(name, []).append(call)
    seconds, errors = timer.measure(candidates)
    ours = summary(seconds["ours"])
    ratios = {
        "of_copy_bandwidth": workload.bytes / ours["median"] / limits["copy_bytes_per_second"],
        "of_matmul_rate": workload.flops / ours["median"] / limits["matmul_flops_per_second"],
    }
    ratios |= {
        f"faster_than {name}": ratio(theirs, seconds["ours"]) for name, theirs in seconds.items() if name != "ours"
    }
    others = {name: summary(values) for name, values in seconds.items() if name != "ours"}
    kept = {"op": workload.op, "shape": workload.shape, **ours, "bytes": workload.bytes, "flops": workload.flops}
    return {**kept, "peers": others, "absent_peers": errors, "ratios": ratios}


def _show(row: dict, against: list[str]) -> None:
    shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    micro = " ".join(f"{row[key] * 1e6:10.1f}" for key in ("median", "p10", "p90"))
    rates = f"{row['bytes'] / row['median'] / 1e9:8.1f} {row['flops'] / row['median'] / 1e12:8.2f}"
    reached = ", ".join(
        f"{row['ratios']['of_copy_bandwidth' if limit == 'copy' else 'of_matmul_rate']:.1%} of {limit}"
        for limit in against
    )
    peers = ", ".join(f"{row['ratios'][f'faster_than {name}']:.2f}x {name}" for name in row["peers"])
    absent = ", ".join(f"{name} cannot run: {error}" for name, error in row["absent_peers"].items())
    print(f"{row['op']:<18} {shape:<58} {micro} {rates}  {reached}; {peers}" + (f"; {absent}" if absent else ""))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", choices=("all", *OP_NAMES), default=["all"])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default=None)
    parser.add_argument("--rounds", type=int, default=None, help="how often each candidate is timed")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    arguments = parser.parse_args()

    cuda = torch.cuda.is_available()
    if not cuda:
        if not arguments.tiny:
            parser.error("there is no GPU here: only --tiny can run")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton and our ops are imported, below
    from benchmarks.device import Timer, ceilings
    from benchmarks.op_workloads import OPS, Setting

    dtype = getattr(torch, arguments.dtype or ("bfloat16" if cuda else "float32"))
    timer = Timer(torch.device("cuda" if cuda else "cpu"), arguments.rounds or (50 if cuda else 3))
    setting = Setting(timer.device, dtype, arguments.tiny)
    limits = ceilings(timer, dtype, tiny=arguments.tiny)
    print(
        f"{timer.device}, {dtype}: copy {limits['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"matmul {limits['matmul_flops_per_second'] / 1e12:.2f} TFLOP/s"
    )
    print(f"{'':<77} {'us median':>10} {'p10':>10} {'p90':>10} {'GB/s':>8} {'TFLOP/s':>8}")
    names = OP_NAMES if "all" in arguments.op else arguments.op
    results = []
    for name in names:
        for workload in OPS[name](setting):
            torch.compiler.reset()  # a new shape is a new compilation, not a recompilation that counts
            row = _measure(workload, timer, limits, not arguments.no_peers)
            results.append(row)
            _show(row, workload.against)
    close("ops", unit="s", dtype=str(dtype)[6:], tiny=arguments.tiny, ceilings=limits, results=results)


if __name__ == "__main__":
    main()
