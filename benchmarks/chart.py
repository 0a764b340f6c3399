"""A bar chart of what `benchmarks.peers` found, as an SVG that is read on a light and on a dark page.

    python -m benchmarks.chart benchmarks/results/peers-*.json --out docs/peers.svg

A bar is how many times faster ours is: the median of theirs / ours from the same round, on a logarithmic scale. A line
stands where both are equally fast. One panel for each document and part, one row for each workload and engine.
"""

import argparse
import json
import math
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

LABELS, BARS, ROW, PANEL = 250, 420, 20, 64  # widths and heights in pixels
LEAST, MOST = 0.25, 16.0  # of the scale
ALIKE = {"Q8_0": "int8", "Q4_0": "int4"}
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16)
COLOURS = {  # a page's own, then on a dark one
    "text": ("#1f2328", "#e6edf3"),
    "faint": ("#d0d7de", "#30363d"),
    "ahead": ("#2f6fde", "#6ea8fe"),
    "behind": ("#c4500c", "#f0883e"),
}


class Row(NamedTuple):
    workload: str
    engine: str
    ratio: float


def rows_of(workloads: dict[str, dict[str, Any]]) -> list[Row]:
    """Of one part; engines without a ratio are ours. Theirs in codes stand beside ours of as many bits, if we ran."""
    rows = []
    for workload, engines in workloads.items():
        for engine, found in engines.items():
            if "by_ours" not in found or engine.startswith("ours"):
                continue
            form = next((f"ours {ours}" for theirs, ours in ALIKE.items() if engine.endswith(theirs)), "")
            is_coded = f"by_{form}" in found
            told = f"{engine} by {form}" if is_coded else engine
            rows.append(Row(workload, told, found[f"by_{form}" if is_coded else "by_ours"]))
    return rows


def panels(document: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """Title and rows."""
    results, machine = document["results"], document["machine"]
    cpu = f"{machine['cpu']}, {machine['capability']}"
    found = []
    if "starts" in results:
        found.append((f"a process with the tiny preset · {cpu}", rows_of(results["starts"])))
    if "tiny" in results:
        found.append((f"tiny preset, float32 · {cpu}", rows_of(results["tiny"])))
    if "model" in results:
        name = Path(document["model"]).name
        found.append((f"{name}, {document['dtype']} · {cpu}", rows_of(results["model"]["workloads"])))
    return [(title, rows) for title, rows in found if rows]


def place(ratio: float) -> float:
    """Pixels from the left edge of the bars."""
    clipped = min(max(ratio, LEAST), MOST)
    return BARS * math.log(clipped / LEAST) / math.log(MOST / LEAST)


def draw(documents: list[dict[str, Any]]) -> str:
    every = [panel for document in documents for panel in panels(document)]
    height = sum(PANEL + ROW * (len(rows) + 1) for _, rows in every) + 10
    light, dark = ("".join(f".{name}{{fill:{c[i]};stroke:{c[i]}}}" for name, c in COLOURS.items()) for i in (0, 1))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LABELS + BARS + 70} {height}" role="img" '
        f'aria-label="How many times faster ours is">',
        f"<style>text{{font:12px sans-serif;stroke:none!important}}{light}"
        f"@media(prefers-color-scheme:dark){{{dark}}}</style>",
    ]
    top = 0
    for title, rows in every:
        parts.append(f'<text class="text" x="0" y="{top + 18}" style="font-weight:600">{escape(title)}</text>')
        bottom = top + PANEL + ROW * len(rows)
        for tick in TICKS:
            x, kind = LABELS + place(tick), "text" if tick == 1 else "faint"
            parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top + PANEL - 16}" y2="{bottom}"/>')
            parts.append(f'<text class="text" x="{x:.1f}" y="{top + PANEL - 20}" text-anchor="middle">{tick:g}×</text>')
        for i, row in enumerate(rows):
            y, (low, high) = top + PANEL + ROW * i, sorted((place(1), place(row.ratio)))
            label = escape(f"{row.workload}, {row.engine}")
            kind = "ahead" if row.ratio >= 1 else "behind"
            parts.append(f'<text class="text" x="{LABELS - 8}" y="{y + 13}" text-anchor="end">{label}</text>')
            parts.append(
                f'<rect class="{kind}" x="{LABELS + low:.1f}" y="{y + 3}" width="{high - low:.1f}" height="13" rx="2"/>'
            )
            parts.append(f'<text class="text" x="{LABELS + high + 6:.1f}" y="{y + 13}">{row.ratio:.2f}</text>')
        top = bottom + ROW
    return "\n".join([*parts, "</svg>"]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    given.out.write_text(draw([json.loads(path.read_text()) for path in given.documents]))


if __name__ == "__main__":
    main()
