"""Curves as SVG for a page: no script, colours by CSS classes (light and dark), told apart without colour as well."""

import math
from collections.abc import Callable, Sequence
from html import escape

from core.text import clean, number

Points = Sequence[tuple[float, float | None]]
Place = Callable[[float], float]
WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40
MAX_POINTS = 800
DASHES = ("", "7 4", "2 3", "9 3 2 3", "14 4", "1 4")


def chart(lines: Sequence[tuple[str, Points]], axis: str, *, log: bool = False, seconds: bool = False) -> str:
    """The curves of `lines`, (name, points) each, over `axis`; None is a gap. Empty where there is nothing to draw.

    With `log` the scale is logarithmic where every value is above 0; with `seconds` the axis is time.
    """
    drawn = [(name, thinned(points)) for name, points in lines]
    values = [y for _, points in drawn for _, y in points if y is not None and math.isfinite(y)]
    xs = [x for _, points in drawn for x, y in points if y is not None]
    if len(values) < 2 or min(xs) == max(xs):
        return ""
    log = log and min(values) > 0
    low, high = _scaled(min(values), log), _scaled(max(values), log)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    first, last = min(xs), max(xs)

    def across(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return TOP + (high - _scaled(y, log)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    marks = [10**value if log else value for value in steps(low, high, 4)]
    words = digits(marks)
    parts = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(mark):.1f}" y2="{down(mark):.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{down(mark) + 4:.1f}" text-anchor="end">{escape(word)}</text>'
        for mark, word in zip(marks, words, strict=True)
    ]
    below = HEIGHT - BOTTOM + 16
    for at in steps(first, last, 6):
        word = _time(at, last) if seconds else f"{at:,.0f}"
        parts.append(f'<text class="tick" x="{across(at):.1f}" y="{below}" text-anchor="middle">{escape(word)}</text>')
    parts.append(
        f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis)}'
        "</text>"
    )
    for index, (_, points) in enumerate(drawn):
        parts += _line(points, across, down, index)
    named = ", ".join(clean(name, 60) for name, _ in drawn)
    title = escape(f"{named} over {axis}")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}"><title>{title}</title>'
    return head + "".join(parts) + "</svg>"


def _line(points: Points, across: Place, down: Place, index: int) -> list[str]:
    """The stretches of one curve between gaps; a point by itself is a dot."""
    stretches: list[list[str]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            stretches.append([])
        else:
            stretches[-1].append(f"{across(x):.1f},{down(y):.1f}")
    dash = f' stroke-dasharray="{DASHES[index % len(DASHES)]}"' if index % len(DASHES) else ""
    parts = []
    for stretch in filter(None, stretches):
        if len(stretch) == 1:
            at, height = stretch[0].split(",")
            parts.append(f'<circle class="dot c{index % 6}" cx="{at}" cy="{height}" r="3"/>')
        else:
            parts.append(f'<polyline class="curve c{index % 6}"{dash} points="{" ".join(stretch)}"/>')
    return parts


def key(index: int) -> str:
    """A short piece of the line that stands for curve `index`, for a legend."""
    dash = f' stroke-dasharray="{DASHES[index % len(DASHES)]}"' if index % len(DASHES) else ""
    return (
        f'<svg class="key" viewBox="0 0 28 8" aria-hidden="true"><line class="curve c{index % 6}"{dash} x1="1" y1="4" '
        'x2="27" y2="4"/></svg>'
    )


def _scaled(value: float, log: bool) -> float:
    return math.log10(value) if log else value


def thinned(points: Points, limit: int = MAX_POINTS) -> list[tuple[float, float | None]]:
    """At most about `limit` points: of each stretch its smallest and its largest, or a gap."""
    if len(points) <= limit:
        return list(points)
    width, kept = -(-len(points) * 2 // limit), []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        gap = next((point for point in stretch if point[1] is None), None)
        if gap is not None:
            kept.append(gap)
        else:
            ends = {min(stretch, key=lambda point: point[1] or 0), max(stretch, key=lambda point: point[1] or 0)}
            kept += sorted(ends)
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def steps(low: float, high: float, count: int) -> list[float]:
    """Round figures between `low` and `high`, about `count` of them: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((power * factor for factor in (1, 2, 5, 10) if power * factor >= rough), power * 10)
    first = math.ceil(low / step - 1e-9)
    found = [(first + place) * step for place in range(int((high - low) / step) + 2)]
    return [value for value in found if value <= high + step * 1e-9]


def digits(values: Sequence[float]) -> list[str]:
    """Figures with as few digits as tell them apart."""
    words: list[str] = []
    for count in (2, 3, 4, 5, 6):
        words = ["0" if abs(value) < 1e-12 else number(value, count) for value in values]
        if len(set(words)) == len(values):
            break
    return words


def _time(seconds: float, last: float) -> str:
    if last < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if last < 3 * 3600 else f"{seconds / 3600:.1f} h"
