"""The pictures of a page, as SVG: they scale, follow the colours of the page, and say more when one points at them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from pa_compiler.report.schedule import Merge, Run

_WIDTH = 900
_LEFT = 96
_ROW = 22
_COLOURS = 8
"""Colours of sequences and threads, the classes s0 to s7 of the page."""


_LABELS = {"bound": (-10, -9, "end"), "predicted": (-10, 14, "end"), "measured": (11, 5, "start")}
"""Where the label of a point is, so that those of points which lie close together are apart: the roof rises to the
right."""


class Point(NamedTuple):
    """A point of a roofline plot: what it is, its GFLOP/s, and its kind, a word of _LABELS."""

    label: str
    rate: float
    kind: str


def bar(mix: Mapping[str, int], instructions: int, legend: Mapping[str, str]) -> str:
    """The instructions of a loop, each kind as long as its share; the first ones of the legend on the left."""
    total = max(instructions, sum(mix.values()))
    parts, x = [], 0.0
    for at, (name, count) in enumerate(mix.items()):
        if count:
            width = 100 * count / total
            said = f"{count} {name}: {legend.get(name, name)}"
            parts.append(_rectangle(x, 0, width, 14, f"m{at}", said))
            x += width
    label = ", ".join(f"{count} {name}" for name, count in mix.items() if count) or "no other"
    return (
        f'<svg class="bar" viewBox="0 0 100 14" preserveAspectRatio="none" role="img" aria-label="{_safe(label)}">'
        f'<rect class="others" width="100" height="14"><title>{instructions} instructions</title></rect>'
        f"{''.join(parts)}</svg>"
    )


def gantt(runs: Sequence[Run], merges: Sequence[Merge], threads: int) -> str:
    """Which thread runs which work item when, and where partial results are merged."""
    end = max((run.end for run in runs), default=1.0) or 1.0
    scale = (_WIDTH - _LEFT - 8) / end
    parts = [_text(_LEFT - 8, (thread + 0.5) * _ROW + 4, f"thread {thread}", "end") for thread in range(threads)]
    for run in runs:
        x, width = _LEFT + run.begin * scale, max((run.end - run.begin) * scale, 1)
        colour = f"s{run.sequence % _COLOURS}"
        parts.append(_rectangle(x, run.thread * _ROW + 2, width, _ROW - 4, colour, run.said, edge=True))
        if width > 34:
            parts.append(_text(x + width / 2, (run.thread + 0.5) * _ROW + 4, str(run.sequence), "middle"))
    for merge in merges:
        x, y = _LEFT + merge.time * scale, (merge.thread + 0.5) * _ROW
        shape = f"M{x - 5:.1f} {y:.1f}l5 -7l5 7l-5 7z"
        parts.append(f'<path class="merge" d="{shape}"><title>{_safe(merge.said)}</title></path>')
    return _picture(threads * _ROW + 4, "Work items on threads, from left to right as they run", parts)


def blocks(runs: Sequence[Run], most: int = 64) -> str:
    """Which blocks of which sequence are read by which thread, for the first sequences."""
    shown = [run for run in runs if run.sequence < most]
    last = max((run.block_end for run in shown), default=1) or 1
    rows = 1 + max((run.sequence + run.sequences - 1 for run in shown), default=0)
    rows = min(rows, most)
    height, scale = min(_ROW, 640 / rows), (_WIDTH - _LEFT - 8) / last
    parts = [
        _text(_LEFT - 8, (row + 0.5) * height + 4, f"sequence {row}", "end")
        for row in range(0, rows, math.ceil(14 / height))
    ]
    for run in shown:
        x, width = _LEFT + run.block_begin * scale, max((run.block_end - run.block_begin) * scale, 1)
        tall = min(run.sequences, rows - run.sequence) * height
        colour = f"s{run.thread % _COLOURS}"
        parts.append(_rectangle(x, run.sequence * height + 1, width, max(tall - 2, 1), colour, run.said, edge=True))
    return _picture(rows * height + 4, f"Blocks 0 to {last - 1} of the sequences, in the colours of threads", parts)


def roofline(intensity: float, flops: float, bandwidth: float, points: Sequence[Point]) -> str:
    """GFLOP/s over FLOPs a byte, both logarithmic: the limits of a core, and points on the line of the spec."""
    top, height = 12, 260
    low_x, high_x = min(intensity, flops / bandwidth) / 8, max(intensity, flops / bandwidth) * 8
    rates = [point.rate for point in points if point.rate > 0]
    low_y, high_y = min([bandwidth * low_x, *rates]) / 1.3, flops * 1.5

    def x(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 150) * math.log(value / low_x) / math.log(high_x / low_x)

    def y(value: float) -> float:
        return top + height * (1 - math.log(value / low_y) / math.log(high_y / low_y))

    ridge = flops / bandwidth
    roof = f"M{x(low_x):.1f} {y(bandwidth * low_x):.1f}L{x(ridge):.1f} {y(flops):.1f}L{x(high_x):.1f} {y(flops):.1f}"
    parts = [f'<path class="axis" d="M{_LEFT} {top}V{top + height}H{_WIDTH - 150}"/>']
    parts += [
        f'<path class="grid" d="M{x(tick):.1f} {top}V{top + height}"/>' + _text(x(tick), top + height + 16, f"{tick:g}")
        for tick in _ticks(low_x, high_x)
    ]
    parts += [
        f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - 150}"/>'
        + _text(_LEFT - 6, y(tick) + 4, f"{tick:g}", "end")
        for tick in _ticks(low_y, high_y)
    ]
    parts.append(f'<path class="roof" d="{roof}"/>')
    parts.append(f'<path class="line" d="M{x(intensity):.1f} {top}V{top + height}"/>')
    parts.append(_text(x(high_x) + 6, y(flops) + 4, f"{flops:,.4g} GFLOP/s", "start"))
    parts.append(_text((_LEFT + _WIDTH - 150) / 2, top + height + 34, "FLOPs a byte of the caches"))
    for point in points:
        said = f"{point.label}: {point.rate:,.4g} GFLOP/s"
        place = f'cx="{x(intensity):.1f}" cy="{y(point.rate):.1f}"'
        parts.append(f'<circle class="{point.kind}" r="6" {place}><title>{_safe(said)}</title></circle>')
        right, down, anchor = _LABELS[point.kind]
        parts.append(_text(x(intensity) + right, y(point.rate) + down, said, anchor))
    return _picture(top + height + 40, "GFLOP/s over FLOPs a byte: the limits of a core, and this spec", parts)


def _ticks(low: float, high: float) -> Iterable[float]:
    """Powers of ten, of two where there are few of ten."""
    base = 10 if high / low > 1000 else 2
    first = math.ceil(math.log(low, base))
    return [base**power for power in range(first, math.floor(math.log(high, base)) + 1)]


def _rectangle(x: float, y: float, width: float, height: float, kind: str, said: str, edge: bool = False) -> str:
    kind += " edge" if edge else ""
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}">'
        f"<title>{_safe(said)}</title></rect>"
    )


def _text(x: float, y: float, said: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_safe(said)}</text>'


def _picture(height: float, said: str, parts: Iterable[str]) -> str:
    return (
        f'<svg class="picture" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{_safe(said)}">'
        f"{''.join(parts)}</svg>"
    )


def _safe(text: str) -> str:
    return html.escape(text)
