"""Line charts as SVG text, for pages that must carry everything they show."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34  # margins, with room for the numbers
MAX_POINTS = 400  # of a curve: beyond that, groups of neighbouring points are averaged
NUM_COLOURS = 6  # classes c0..c5 of train/output/page.html


def line_chart(title: str, series: Mapping[str, Points]) -> str:
    """Return a `<figure>` with a curve for each of `series`, its `(step, y)` points in order; "" if no series has a point.

    The points are in the attribute `data-lines` as well, from which the page's script shows the values under the pointer.
    """
    curves = {name: points for name, values in series.items() if len(points := thin_out(values))}
    if not curves:
        return ""
    keys = [f'<span class="key c{n % NUM_COLOURS}">{escape(name)}</span>' for n, name in enumerate(curves)]
    legend = f'<span class="legend">{" ".join(keys)}</span>' if len(keys) > 1 else ""
    xs, ys = np.concatenate(list(curves.values())).T
    x_range = float(xs.min()), float(max(xs.max(), xs.min() + 1e-9))
    rounded = {name: [[float(f"{v:.5g}") for v in point] for point in points] for name, points in curves.items()}
    data = escape(json.dumps({"x": x_range, "lines": rounded}))
    content = _draw(list(curves.values()), x_range, round_ticks(float(ys.min()), float(ys.max()), 4))
    return (
        f'<figure class="chart"><figcaption>{escape(title)} {legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step" '
        f"data-lines='{data}'>{content}</svg>"
        '<output class="readout">&nbsp;</output></figure>'
    )


def _draw(curves: Sequence[np.ndarray], x_range: tuple[float, float], y_ticks: list[float]) -> str:
    """Return the grid, the axes and the curves as SVG elements."""
    base, right = HEIGHT - BOTTOM, WIDTH - RIGHT

    def place_x(x: float) -> float:
        return LEFT + (x - x_range[0]) / (x_range[1] - x_range[0]) * (right - LEFT)

    def place_y(y: float) -> float:
        return base - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (base - TOP)

    parts = [_label(right, HEIGHT - 2, "end", "step"), _line("cursor", -9, TOP, -9, base)]
    for tick in y_ticks:
        y = place_y(tick)
        parts += [_line("grid", LEFT, y, right, y), _label(LEFT - 6, y + 4, "end", format_number(tick))]
    for tick in round_ticks(*x_range, 5):
        if x_range[0] <= tick <= x_range[1]:
            x = place_x(tick)
            parts += [_line("tick", x, base, x, base + 4), _label(x, base + 16, "middle", format_number(tick))]
    for number, points in enumerate(curves):
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="c{number % NUM_COLOURS}" points="{path}"/>')
    return "".join(parts)


def thin_out(points: Points) -> np.ndarray:
    """Return the finite points, `[n, 2] float64`, or the means of equal groups of neighbours if there are too many."""
    array = np.array(points, np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(axis=1)]
    if len(array) <= MAX_POINTS:
        return array
    return np.array([group.mean(axis=0) for group in np.array_split(array, MAX_POINTS)])


def round_ticks(low: float, high: float, max_steps: int) -> list[float]:
    """Return round numbers from at most `low` to at least `high`, in about `max_steps` steps."""
    if low == high:
        low, high = low - abs(low) / 2 - 1e-9, high + abs(high) / 2 + 1e-9
    magnitude = 10.0 ** math.floor(math.log10((high - low) / max_steps))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10, 20) if magnitude * factor * max_steps >= high - low)
    return [n * step for n in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def format_number(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}" if abs(value) >= 1e-12 else "0"


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="axis" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
