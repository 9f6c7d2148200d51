"""Line charts as SVG text, for pages that must carry everything they show."""

import json
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34  # margins, with room for the numbers
MOST_POINTS = 400  # of a line: beyond it points are averaged in groups
COLOURS = 6  # classes c0..c5 of train/output/page.html


def line_chart(title: str, series: Mapping[str, Points], x_label: str = "step") -> str:
    """A `<figure>` with one line for each of `series`, its `(x, y)` points in order of x; "" when no series has a point.

    The points are in the attribute `data-lines` as well, from which the page's script shows the values under the pointer.
    """
    kept = {name: thinned(points) for name, points in series.items()}
    lines = {name: points for name, points in kept.items() if len(points)}
    if not lines:
        return ""
    everything = np.concatenate(list(lines.values()))
    x_ticks = _ticks(everything[:, 0].min(), everything[:, 0].max(), 6)
    y_ticks = _ticks(everything[:, 1].min(), everything[:, 1].max(), 5)
    x_range = (everything[:, 0].min(), max(everything[:, 0].max(), everything[:, 0].min() + 1e-9))
    y_range = (y_ticks[0], y_ticks[-1])

    def place(points: np.ndarray) -> np.ndarray:
        x = LEFT + (points[:, 0] - x_range[0]) / (x_range[1] - x_range[0]) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (points[:, 1] - y_range[0]) / (y_range[1] - y_range[0]) * (HEIGHT - TOP - BOTTOM)
        return np.column_stack([x, y])

    parts = [_y_tick(tick, place(np.array([[x_range[0], tick]]))[0, 1]) for tick in y_ticks]
    inside = [tick for tick in x_ticks if x_range[0] <= tick <= x_range[1]]
    parts += [_x_tick(tick, place(np.array([[tick, y_range[0]]]))[0, 0]) for tick in inside]
    parts.append(f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(x_label)}</text>')
    for number, points in enumerate(lines.values()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in place(points))
        parts.append(f'<polyline class="c{number % COLOURS}" points="{path}"/>')
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/>')
    data = {
        "x": [float(x_range[0]), float(x_range[1])],
        "lines": {name: [[_short(x), _short(y)] for x, y in points] for name, points in lines.items()},
    }
    return (
        f'<figure class="chart"><figcaption>{escape(title)} {_legend(lines)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by {escape(x_label)}" '
        f"data-lines='{escape(json.dumps(data), quote=True)}'>{''.join(parts)}</svg>"
        '<output class="readout">&nbsp;</output></figure>'
    )


def thinned(points: Points, most: int = MOST_POINTS) -> np.ndarray:
    """`[n, 2] float64`: finite points, or the means of equal groups of neighbours where there are more than `most`."""
    array = np.array(points, np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    if len(array) <= most:
        return array
    return np.array([group.mean(axis=0) for group in np.array_split(array, most)])


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from at most `low` to at least `high`."""
    if low == high:
        low, high = low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9
    return [float(tick) for tick in MaxNLocator(count, min_n_ticks=2).tick_values(low, high)]


def _y_tick(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="axis" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value)}</text>'
    )


def _x_tick(value: float, x: float) -> str:
    y = HEIGHT - BOTTOM
    return (
        f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 4}"/>'
        f'<text class="axis" x="{x:.1f}" y="{y + 16}" text-anchor="middle">{_number(value)}</text>'
    )


def _legend(names: Mapping[str, object]) -> str:
    if len(names) < 2:
        return ""
    keys = (f'<span class="key c{n % COLOURS}">{escape(name)}</span>' for n, name in enumerate(names))
    return f'<span class="legend">{" ".join(keys)}</span>'


def _number(value: float) -> str:
    if value and abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}" if abs(value) >= 1e-12 else "0"


def _short(value: float) -> float:
    return float(f"{value:.5g}")
