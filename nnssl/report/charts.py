"""Curves and dot plots, drawn twice from the same data: as SVG in the page, which takes the page's colors and
can be read off with the pointer, and with matplotlib as PNG.

SVG of our own: a page of a hundred curves stays below a megabyte and needs nobody's JavaScript (plotly's
alone is 4 MB). Models differ by color and by dashes, so that neither print nor color blindness merges them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from nnssl.files import replacing

# after Okabe and Ito, dark enough on white; the page has lighter ones for dark screens
COLORS = ("#0072b2", "#c04f00", "#007a5a", "#a3487c", "#7a6400", "#3b7d9e", "#555555")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 2 1 2 1 2", "12 4", "1 2")
PNG_MARK = {"Software": "nnssl report"}  # by which a later report knows its own pictures
MARKS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 10, 38


@dataclass(frozen=True)
class Series:
    """One line. style: index of color and dashes, the same for a model in all charts."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over one axis. note: what is shown, below the title; limits: of the y axis, None: of the data."""

    title: str
    series: Sequence[Series]
    y_label: str
    x_label: str = "epoch"
    note: str = ""
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Row:
    """Dots in a row, and a mark with an interval (None: no interval). labels: what the dots are."""

    name: str
    dots: Sequence[float]
    labels: Sequence[str]
    mark: float
    interval: tuple[float, float] | None = None
    style: int = 0


@dataclass(frozen=True)
class Dots:
    """Rows of dots over one axis. zero: whether a line marks 0."""

    title: str
    rows: Sequence[Row]
    x_label: str
    note: str = ""
    zero: bool = False
    limits: tuple[float, float] | None = field(default=None)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    return f"{value:.6g}"


def span(values: Sequence[float], limits: tuple[float, float] | None = None) -> tuple[float, float]:
    """Of an axis: the limits, or the data's with a margin."""
    if limits is not None:
        return limits
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


class _Scale:
    """Linear, from data to drawing."""

    def __init__(self, span: tuple[float, float], start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = *span, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return self.start + share * (self.end - self.start)


def _frame(x: _Scale, y: _Scale | None, x_label: str, y_label: str, whole: bool, height: float) -> list[str]:
    """Grid, ticks and labels."""
    bottom, parts = height - BOTTOM, []
    for tick in ticks(x.low, x.high):
        if whole and tick != int(tick):
            continue
        parts.append(
            f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{label(tick)}</text>'
        )
    for tick in ticks(y.low, y.high) if y else []:
        assert y is not None, "ticks come from it"
        parts.append(
            f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="{x.start - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{label(tick)}</text>'
        )
    middle = (x.start + x.end) / 2
    parts.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        parts.append(
            f'<text transform="translate(11 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
    return parts


def chart_svg(chart: Chart) -> str:
    """Drawing with the data in `data-chart`, for the page's pointer."""
    xs = [v for s in chart.series for v in s.x]
    low, high = (min(xs), max(xs)) if xs else (0.0, 1.0)
    x = _Scale((low, high) if high > low else (low - 0.5, low + 0.5), LEFT, WIDTH - RIGHT)
    y = _Scale(span([v for s in chart.series for v in s.y], chart.limits), HEIGHT - BOTTOM, TOP)
    parts = _frame(x, y, chart.x_label, chart.y_label, chart.x_label == "epoch", HEIGHT)
    for s in chart.series:
        lines: list[list[str]] = [[]]
        for a, b in zip(s.x, s.y, strict=True):
            if math.isfinite(b):
                lines[-1].append(f"{x(a):.1f},{y(b):.1f}")
            elif lines[-1]:
                lines.append([])
        kept = [line for line in lines if line]
        parts += [
            f'<polyline class="s{s.style % len(COLORS)}" points="{" ".join(line)}"/>'
            for line in kept
            if len(line) > 1
        ]
        # a value between two gaps is a point
        parts += [
            '<circle class="s{}" cx="{}" cy="{}" r="2.5"/>'.format(s.style % len(COLORS), *line[0].split(","))
            for line in kept
            if len(line) == 1
        ]
    data = {
        "x": [x.low, x.high, x.start, x.end],
        "label": chart.x_label,
        "series": [
            {"name": s.name, "x": list(s.x), "y": [round_to(v, 5) for v in s.y]} for s in chart.series
        ],
    }
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}" '
        f"data-chart='{escape(json.dumps(data), quote=True)}'>{''.join(parts)}"
        f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )


def round_to(value: float, digits: int) -> float | None:
    """To significant digits; None for what is not finite (JSON has no NaN)."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def dots_svg(dots: Dots) -> str:
    height = TOP + 34 * len(dots.rows) + BOTTOM
    values = [v for r in dots.rows for v in (*r.dots, r.mark, *(r.interval or ()))]
    x = _Scale(span([*values, 0.0] if dots.zero else values, dots.limits), LEFT - 38, WIDTH - RIGHT - 8)
    parts = _frame(x, None, dots.x_label, "", False, height)
    if dots.zero:
        parts.append(
            f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        )
    for i, row in enumerate(dots.rows):
        style, top = f"s{row.style % len(COLORS)}", TOP + 34 * i
        line = top + 23
        parts.append(f'<text class="name" x="{x.start}" y="{top + 10}">{escape(row.name)}</text>')
        parts += [
            f'<circle class="dot {style}" cx="{x(v):.1f}" cy="{line}" r="3"><title>{escape(name)}: '
            f"{v:.4g}</title></circle>"
            for v, name in zip(row.dots, row.labels, strict=True)
            if math.isfinite(v)
        ]
        if row.interval is not None:
            low, high = (x(v) for v in row.interval)
            parts.append(
                f'<line class="interval {style}" x1="{low:.1f}" x2="{high:.1f}" y1="{line}" y2="{line}"/>'
            )
        if math.isfinite(row.mark):
            at = x(row.mark)
            parts.append(
                f'<line class="mark {style}" x1="{at:.1f}" x2="{at:.1f}" y1="{line - 7}" y2="{line + 7}">'
                f"<title>mean {row.mark:.4g}</title></line>"
            )
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(dots.title)}">'
        f"{''.join(parts)}</svg>"
    )


def swatch(style: int) -> str:
    """Sample of a line for legends."""
    return (
        f'<svg class="swatch" viewBox="0 0 30 8" aria-hidden="true">'
        f'<polyline class="s{style % len(COLORS)}" points="1,4 29,4"/></svg>'
    )


def draw(charts: Sequence[Chart | Dots], path: str | os.PathLike[str]) -> None:
    """All of them in one PNG, three to a row."""
    from matplotlib.figure import Figure

    if not charts:
        return
    columns = min(3, len(charts))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    axes: Any = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(charts) :]:
        axis.set_axis_off()
    for axis, chart in zip(axes, charts, strict=False):
        if isinstance(chart, Chart):
            _draw_lines(axis, chart)
        else:
            _draw_dots(axis, chart)
        axis.set_title(chart.title, fontsize=10)
        axis.grid(alpha=0.3)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, metadata=PNG_MARK)


def _draw_lines(axis: Any, chart: Chart) -> None:
    for s in chart.series:
        i = s.style % len(COLORS)
        dashes = [float(n) / 1.6 for n in DASHES[i].split()]
        axis.plot(
            s.x,
            s.y,
            color=COLORS[i],
            linewidth=1.6,
            linestyle=(0, dashes) if dashes else "-",
            label=s.name,
            marker="." if len(s.x) < 2 else None,
        )
    axis.set(xlabel=chart.x_label, ylabel=chart.y_label)
    if chart.limits:
        axis.set_ylim(*chart.limits)
    axis.legend(fontsize=8)


def _draw_dots(axis: Any, dots: Dots) -> None:
    for i, row in enumerate(dots.rows):
        style = row.style % len(COLORS)
        axis.plot(row.dots, [-i] * len(row.dots), MARKS[style], color=COLORS[style], alpha=0.35, markersize=4)
        if row.interval:
            axis.plot(row.interval, [-i, -i], color=COLORS[style], linewidth=3)
        axis.plot([row.mark], [-i], "|", color=COLORS[style], markersize=18, markeredgewidth=3)
    if dots.zero:
        axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks([-i for i in range(len(dots.rows))], [row.name for row in dots.rows], fontsize=8)
    axis.set(xlabel=dots.x_label, ylim=(0.6 - len(dots.rows), 0.6))
