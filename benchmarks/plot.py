"""The roofline plot.

python -m benchmarks.plot benchmarks/results/znver3-decode.json docs/roofline.svg
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.peers import PEERS
from pa_compiler.runtime import files

_OURS = {"ours": ("o", "#0b6e99"), "ours-packed": ("D", "#0b9972")}
_PEER = "#c44e00"
_STEP = 1.09  # between cases of the same intensity, which would hide each other


def plot(measured: dict[str, Any], path: Path) -> None:
    """Draw what was measured on the smallest number of threads: limits, our points and the best peer's, case by case.

    Args:
        measured: What report.as_json returns.
        path: The SVG to write; the same measurements give the same bytes.
    """
    threads = min(case["num_threads"] for case in measured["cases"])
    cases = [case for case in measured["cases"] if case["num_threads"] == threads]
    plt.rcParams |= {"svg.hashsalt": "pa_compiler", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    _draw_roof(axes, cases)
    seen: Counter[float] = Counter()
    for case in sorted(cases, key=lambda case: case["name"]):
        intensity = case["flops"] / case["kv_bytes"]
        _draw_case(axes, case, intensity * _STEP ** seen[intensity])
        seen[intensity] += 1
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte of keys and values", ylabel="GFLOP/s")
    axes.set_xticks(ticks := [0.5, 1, 2, 4, 8, 16, 32, 64], [f"{tick:g}" for tick in ticks])
    axes.set_yticks(ticks := [1, 2, 5, 10, 20, 50, 100, 200], [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    rates = [case["flops"] / row["seconds"][0] / 1e9 for case in cases for row in case["results"] if row["seconds"]]
    axes.set_ylim(min(rates) / 2, 1.5 * max(case["roofline"]["bf16_arithmetic"] for case in cases) / 1e9)
    axes.set_xlim(0.35, 110)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    noun = "thread" if threads == 1 else "threads"
    axes.set_title(f"Paged decode attention, {measured['cpu']}, {threads} {noun}", loc="left", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="lower right", frameon=False, fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    files.write(path, image.getvalue())
    plt.close(figure)


def _draw_roof(axes: Axes, cases: list[dict[str, Any]]) -> None:
    """The limits: medians over all cases' rounds."""
    rooflines = [case["roofline"] for case in cases]
    bandwidth = float(np.median([roofline["bandwidth"] for roofline in rooflines])) / 1e9
    intensity = np.geomspace(0.25, 128, 400)
    peaks: dict[float, list[str]] = {}
    for name, key in (("float32", "arithmetic"), ("bfloat16", "bf16_arithmetic")):
        peak = float(np.median([roofline[key] for roofline in rooflines])) / 1e9
        peaks.setdefault(round(peak, 3), []).append(name)
    for peak, names in peaks.items():
        axes.plot(intensity, np.minimum(peak, bandwidth * intensity), color="0.25", lw=1.3)
        text = f"{' and '.join(names)}: {peak:.0f} GFLOP/s"
        axes.annotate(text, (100, peak), (0, 4), textcoords="offset points", ha="right", fontsize=8.5, color="0.25")
    axes.annotate(
        f"memory: {bandwidth:.0f} GB/s", (0.5, 0.5 * bandwidth), (-6, 8), textcoords="offset points", fontsize=8.5,
        color="0.25", rotation=38, rotation_mode="anchor",
    )  # fmt: skip


def _draw_case(axes: Axes, case: dict[str, Any], x: float) -> None:
    """Our points and the best peer's at one intensity, joined, with the case's name below."""
    rates = {row["contender"]: case["flops"] / row["seconds"][0] / 1e9 for row in case["results"] if row["seconds"]}
    shown = {name: rate for name, rate in rates.items() if name in _OURS or name == case["best_peer"]}
    axes.plot([x, x], [min(shown.values()), max(shown.values())], color="0.8", lw=1, zorder=1)
    for name, rate in shown.items():
        marker, color = _OURS.get(name, ("o", _PEER))
        face, label = (color, PEERS[name].title) if name in _OURS else ("white", "the best other library")
        axes.scatter(x, rate, s=34, marker=marker, edgecolor=color, facecolor=face, label=label, zorder=2)
    style = {"rotation": 90, "ha": "center", "va": "top", "fontsize": 7.5, "color": "0.35"}
    axes.annotate(case["name"], (x, min(shown.values())), (0, -7), textcoords="offset points", **style)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
