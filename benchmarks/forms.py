"""Plain and packed linear layers by dtype, shape and rows: what the table in llama/model/packing.py rests on.

A form is as good as the geometric mean of its times over the rows. Where the table's choice costs more than a tenth
above the other form, the last column says so, and the last line counts it.
"""

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.common import close, timed
from llama.model.packing import library_for
from llama.model.weights.packed import library_of, pack

SHAPES = ((64, 64), (320, 64), (256, 256), (512, 256), (768, 256), (576, 576), (1536, 256), (960, 576), (3072, 576))
WRONG = 1.1


def seconds_per_call(form: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, calls: int) -> float:
    return timed(lambda: [form(x) for _ in range(calls)]) / calls


@torch.inference_mode()
def measure(shape: tuple[int, int], dtype: torch.dtype, rows: list[int], seconds: float) -> dict | None:
    """Microseconds of a call of either form, by number of rows; best of several runs in turn."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.05).to(dtype)
    packed = pack(weight)
    if packed is None:
        return None
    forms = {"plain": lambda x: F.linear(x, weight), "packed": packed}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for count in rows:
        x = torch.randn(count, shape[1]).to(dtype)
        once = sum(seconds_per_call(form, x, 3) for form in forms.values())
        calls = max(1, int(seconds / 7 / once))
        found = [[seconds_per_call(form, x, calls) for form in forms.values()] for _ in range(7)]
        for name, values in zip(forms, zip(*found, strict=True), strict=True):
            times[name].append(min(values) * 1e6)
    means = {name: math.exp(sum(map(math.log, values)) / len(values)) for name, values in times.items()}
    chosen, other = ("packed", "plain") if library_for(shape, dtype) else ("plain", "packed")
    return {"shape": shape, "chosen": chosen, "us": times, "chosen_by_other": means[chosen] / means[other]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each dtype, shape and number of rows")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, list[dict]] = {}
    for name in arguments.dtype:
        dtype = getattr(torch, name)
        print(f"{name} ({library_of(dtype)}), microseconds plain/packed for {arguments.rows} rows")
        found = [measure(shape, dtype, arguments.rows, arguments.seconds) for shape in SHAPES]
        results[name] = [result for result in found if result is not None]
        for result in results[name]:
            pairs = " ".join(f"{a:8.1f}/{b:.1f}" for a, b in zip(*result["us"].values(), strict=True))
            remark = "another choice is faster" if result["chosen_by_other"] > WRONG else ""
            rows, columns = result["shape"]
            print(f"  {rows:5} x {columns:<5}{pairs}  {result['chosen']:7} {result['chosen_by_other']:5.2f}  {remark}")
    wrong = sum(result["chosen_by_other"] > WRONG for found in results.values() for result in found)
    print(f"{wrong} choices of the table cost more than a tenth above the other form here")
    close("forms", unit="us", results=results, wrong=wrong)


if __name__ == "__main__":
    main()
