"""Curves in braille: metrics over steps or time, smoothed, on a log scale, zoomed. They read without colour as well."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from textual import events
from textual.containers import Container
from textual.content import Content
from textual.message import Message
from textual.widget import Widget

from core.text import clean, number

Point = tuple[float, float | None]
Points = Sequence[Point]
BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
MARKS = "ox+*#%"
LINE_HUES = ("$text-accent", "$text-primary", "$text-success", "$text-error", "$text-secondary", "$text-warning")
ZOOMS = (1.0, 0.5, 0.25, 0.1)
NOBODY = -1
STEP_PANELS = (
    ("loss", (("loss", "loss"), ("eval_loss", "held-out"))),
    ("margin", (("rewards/margins", "margin"), ("eval_rewards/margins", "held-out"))),
    ("rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"))),
    ("KL", (("kl", "KL"), ("eval_kl", "held-out"))),
    ("learning rate", (("learning_rate", "rate"),)),
    ("gradient norm", (("grad_norm", "gradient"),)),
    ("tokens/s", (("tokens_per_s", "tokens/s"),)),
)
TIME_PANELS = (("memory", "GiB"), ("utilisation", "%"), ("temperature", "°C"), ("power", "W"))
UNTOLD = ("num_tokens", "vram_peak_bytes", "eval_num_tokens", "eval_runtime")
MAX_PANELS = 20


@dataclass(frozen=True)
class View:
    """How curves are looked at."""

    smooth: bool = False
    log: bool = False
    zoom: int = 0
    """Index into ZOOMS: the share of the axis, counted from its end, that is shown."""

    def words(self) -> str:
        """What is switched on, empty for the plain view."""
        zoomed = f"last {ZOOMS[self.zoom]:.0%}" if self.zoom else ""
        return " · ".join(filter(None, ["smoothed" if self.smooth else "", "log scale" if self.log else "", zoomed]))


@dataclass(frozen=True)
class Panel:
    """Curves that share a scale: (name, points) each."""

    title: str
    lines: tuple[tuple[str, Points], ...]
    unit: str = ""
    timed: bool = False
    """The axis is seconds, not steps."""
    counted: str = "step"
    """What the axis counts where it is not seconds."""


def panels(
    stage: str, series: Mapping[str, Points], sensors: Mapping[str, Sequence[tuple[str, Points]]]
) -> list[Panel]:
    """Everything that can be drawn of a stage, what matters most first; a metric that was never logged is left out."""
    found, told = [], {*UNTOLD}
    for title, members in STEP_PANELS:
        told |= {key for key, _ in members}
        if lines := tuple((name, series[key]) for key, name in members if series.get(key)):
            found.append(Panel(f"{stage} {title}".strip(), lines))
    for title, unit in TIME_PANELS:
        if lines := tuple(sensors.get(title) or ()):
            found.append(Panel(title, lines, unit, timed=True))
    rest = [key for key in series if key not in told and len(series[key]) > 1]
    found += [Panel(f"{stage} {key}".strip(), ((key, series[key]),)) for key in sorted(rest)]
    return found[:MAX_PANELS] or [Panel(f"{stage} loss".strip(), (("loss", ()),))]


def smoothed(points: Points, reach: float) -> list[Point]:
    """An exponential mean in which what lies `reach` back counts half; it starts anew after a gap."""
    result: list[Point] = []
    total = weight = 0.0
    before: float | None = None
    for x, value in points:
        if value is None:
            total = weight = 0.0
            before = None
            result.append((x, None))
            continue
        fade = 0.5 ** ((x - before) / reach) if before is not None and reach > 0 else 0.0
        total, weight, before = total * fade + value, weight * fade + 1, x
        result.append((x, total / weight))
    return result


def seen(lines: Sequence[tuple[str, Points]], view: View) -> tuple[list[list[Point]], bool]:
    """The points of each line as the view shows them, and whether the scale is logarithmic.

    On a log scale values are powers of ten and 0 is a gap; it is left linear where a value is negative.
    """
    ends = [(points[0][0], points[-1][0]) for _, points in lines if points]
    if not ends:
        return [[] for _ in lines], False
    first, last = min(end[0] for end in ends), max(end[1] for end in ends)
    start = last - (last - first) * ZOOMS[view.zoom]
    values = [value for _, points in lines for _, value in points if value is not None]
    log = view.log and bool(values) and min(values) >= 0 and max(values) > 0
    shown = []
    for _, points in lines:
        line = smoothed(points, (last - first) * ZOOMS[view.zoom] / 40) if view.smooth else list(points)
        line = line[bisect_left(line, start, key=lambda point: point[0]) :] if view.zoom else line
        shown.append([(x, (math.log10(y) if y and y > 0 else None) if log else y) for x, y in line])
    return shown, log


@dataclass(frozen=True)
class Frame:
    """The part of the plane that is drawn."""

    first: float
    last: float
    low: float
    high: float

    @classmethod
    def around(cls, lines: Sequence[Points]) -> "Frame | None":
        """The smallest frame with every finite point; None where there is none."""
        values = [value for points in lines for _, value in points if value is not None]
        xs = [x for points in lines for x in ((points[0][0], points[-1][0]) if points else ())]
        return cls(min(xs), max(xs), min(values), max(values)) if values else None

    def dot(self, x: float, value: float, columns: int, rows: int) -> tuple[int, int]:
        """Where a point lies among `columns` by `rows` dots; a frame without extent has it in the middle."""
        across = (x - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        down = (self.high - value) / (self.high - self.low) if self.high > self.low else 0.5
        return round(across * (columns - 1)), round(down * (rows - 1))


def plot(lines: Sequence[Points], width: int, height: int) -> list[list[tuple[str, int]]]:
    """The curves as `height` rows of `width` cells, each row as stretches of (text, index of the line or NOBODY).

    None is a gap. Several lines carry marks, a letter each, so that they can be told apart without colour.
    """
    frame = Frame.around(lines)
    if frame is None or width < 1 or height < 1:
        return [[(" " * max(0, width), NOBODY)] for _ in range(height)]
    dots = [[0] * width for _ in range(height)]
    owner = [[NOBODY] * width for _ in range(height)]
    marks: dict[tuple[int, int], int] = {}
    for index, points in enumerate(lines):
        next_mark = -1 + 3 * index
        sparse = len(points) * 4 <= width
        corners = [None if y is None else frame.dot(x, y, 2 * width, 4 * height) for x, y in points]
        for across, down in _drawn(corners):
            dots[down // 4][across // 2] |= BRAILLE[down % 4][across % 2]
            owner[down // 4][across // 2] = index
            if not sparse and across // 2 >= next_mark:
                marks[(down // 4, across // 2)] = index
                next_mark = across // 2 + 12
        if sparse:
            marks |= {(corner[1] // 4, corner[0] // 2): index for corner in corners if corner}
    if len(lines) < 2:
        marks = {}
    by_row: list[dict[int, int]] = [{} for _ in range(height)]
    for (row, x), index in marks.items():
        by_row[row][x] = index
    return [_stretches(*cells) for cells in zip(dots, owner, by_row, strict=True)]


def _stretches(dots: list[int], owner: list[int], marks: dict[int, int]) -> list[tuple[str, int]]:
    """A row of cells as few stretches."""
    found: list[tuple[str, int]] = []
    for x, bits in enumerate(dots):
        who = marks.get(x, owner[x])
        letter = MARKS[who % len(MARKS)] if x in marks else chr(0x2800 + bits) if bits else " "
        if found and found[-1][1] == who:
            found[-1] = (found[-1][0] + letter, who)
        else:
            found.append((letter, who))
    return found


def _drawn(corners: Sequence[tuple[int, int] | None]) -> Iterator[tuple[int, int]]:
    """The dots of the line through `corners`, broken at None. Corners above one another are one upright stroke."""
    at = low = high = -1
    before: tuple[int, int] | None = None
    for corner in [*corners, None]:
        if before and corner and corner[0] == at:
            low, high = min(low, corner[1]), max(high, corner[1])
        else:
            if before:
                yield from ((at, down) for down in range(low, high + 1))
            if before and corner:
                yield from _line(before, corner)
            if corner:
                at, low, high = corner[0], corner[1], corner[1]
        before = corner


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots from start to end."""
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / count), round(start[1] + (end[1] - start[1]) * i / count))
        for i in range(count + 1)
    ]


def ticks(frame: Frame, rows: int, log: bool) -> dict[int, str]:
    """Figures for the scale on the left, by row: both ends always, between them every fourth row or so."""
    count = max(1, (rows - 1) // 4)
    at = sorted({round(index * (rows - 1) / count) for index in range(count + 1)})
    if frame.high == frame.low:
        at = [rows // 2]
    span = max(1, rows - 1)
    values = [frame.high - (frame.high - frame.low) * row / span for row in at]
    values = [10**value if log else value for value in values]
    return dict(zip(at, scale_words(values), strict=True))


def scale_words(values: Sequence[float]) -> list[str]:
    """Figures with as many digits as tell them apart. What is 0 but for rounding is 0."""
    extent = max((abs(value) for value in values), default=0)
    values = [0.0 if abs(value) < extent * 1e-9 else value for value in values]
    words: list[str] = []
    for digits in (2, 3, 4, 5, 6):
        words = [number(value, digits) for value in values]
        if len(set(words)) == len(set(values)):
            break
    return words


def seconds_words(seconds: float) -> str:
    """Seconds short enough for an axis."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3 * 3600 else f"{seconds / 3600:.1f} h"


class Chart(Widget):
    """One panel: its name with the newest figures above, the scale on the left, steps or time below."""

    def __init__(self, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.panel: Panel | None = None
        self._view = View()

    def show(self, panel: Panel, view: View | None = None) -> None:
        """Show `panel`; nothing is redrawn where it is the same."""
        view = view or View()
        if (panel, view) != (self.panel, self._view):
            self.panel, self._view = panel, view
            self.refresh()

    def render(self) -> Content:
        if self.panel is None:
            return Content("")
        width, height = self.content_size
        lines, log = seen(self.panel.lines, self._view)
        head = self._head(self.panel, width)
        finite = sum(value is not None for points in lines for _, value in points)
        frame = Frame.around(lines)
        if height < 4 or width < 16:
            return head
        if frame is None or finite < 2:
            words = "a curve takes two points" if finite else "nothing logged yet"
            return Content("\n").join([head, Content.styled(words, "$foreground-muted")])
        rows = height - 2
        marks = ticks(frame, rows, log)
        margin = max(5, *(len(mark) for mark in marks.values()))
        across = width - margin - 1
        drawn = [head]
        for row, stretches in enumerate(plot(lines, across, rows)):
            scale = f"{marks[row]:>{margin}}┤" if row in marks else f"{'':>{margin}}│"
            cells = [(text, LINE_HUES[who % len(LINE_HUES)] if who >= 0 else "") for text, who in stretches]
            drawn.append(Content.assemble((scale, "$foreground-muted"), *cells))
        axis = " " * (margin + 1) + self._axis(frame, across)
        return Content("\n").join([*drawn, Content.styled(axis, "$foreground-muted")])

    def _head(self, panel: Panel, width: int) -> Content:
        """Name and newest figures; the figures give way where there is no room for them."""
        full = self._legend(panel, figures=True)
        return full if full.cell_length <= width else self._legend(panel, False).truncate(max(1, width), ellipsis=True)

    @staticmethod
    def _legend(panel: Panel, figures: bool) -> Content:
        parts: list[str | tuple[str, str]] = [(clean(panel.title, 40), "bold")]
        for index, (name, points) in enumerate(panel.lines):
            newest = next((value for _, value in reversed(points) if value is not None), None)
            hue = LINE_HUES[index % len(LINE_HUES)]
            mark = f"{MARKS[index % len(MARKS)]} {clean(name, 28)} " if len(panel.lines) > 1 else ""
            figure = f"{number(newest, 3)} {panel.unit if newest is not None else ''}"
            parts.append((f"  {mark}{figure if figures or not mark else ''}".rstrip(), hue))
        if gaps := sum(value is None for _, points in panel.lines for _, value in points):
            parts.append((f"  {gaps} not finite", "$text-warning"))
        return Content.assemble(*parts)

    def _axis(self, frame: Frame, width: int) -> str:
        """Figures under the curve, the newest at its end."""
        assert self.panel
        timed = self.panel.timed
        first = seconds_words(frame.first) if timed else f"{frame.first:.0f}"
        last = seconds_words(frame.last) if timed else f"{self.panel.counted} {frame.last:.0f}"
        middle = (frame.first + frame.last) / 2
        half = seconds_words(middle) if timed else f"{middle:.0f}"
        left = f"{first:<{width // 2 - len(half) // 2}}{half}" if width > 36 else first
        return f"{left}{last:>{max(1, width - len(left))}}"[:width]


class ChartGrid(Container):
    """As many charts as there is room for, beside and below each other."""

    class Laid(Message):
        """There is room for more or fewer charts than before."""

    CHARTS = 6
    CELL_WIDTH, CELL_HEIGHT = 34, 9

    def __init__(self, id: str | None = None) -> None:
        super().__init__(*(Chart(classes="curve") for _ in range(self.CHARTS)), id=id)
        self._panels: list[Panel] = []
        self._view = View()
        self._first = 0

    @property
    def room(self) -> tuple[int, int]:
        """Columns and rows of charts that fit."""
        narrow = self.screen.has_class("-narrow")
        columns = 1 if narrow else max(1, min(3, self.size.width // self.CELL_WIDTH))
        rows = max(1, min(self.CHARTS // columns, self.size.height // self.CELL_HEIGHT))
        return columns, rows

    def show(self, panels: list[Panel], first: int, view: View) -> None:
        """Show `panels` from the index `first` on."""
        self._panels, self._first, self._view = panels, first, view
        self._lay()

    def shown(self) -> range:
        """The indices of the panels on the screen: the chosen one first, or the last ones where few are left."""
        columns, rows = self.room
        first = max(0, min(self._first, len(self._panels) - columns * rows))
        return range(first, min(len(self._panels), first + columns * rows))

    def on_resize(self, event: events.Resize) -> None:
        self._lay()
        self.post_message(self.Laid())

    def _lay(self) -> None:
        columns, _ = self.room
        shown = self.shown()
        columns = max(1, min(columns, len(shown)))
        self.styles.grid_size_columns = columns
        self.styles.grid_size_rows = max(1, -(-len(shown) // columns))
        for place, chart in enumerate(self.query_children(Chart)):
            chart.display = place < len(shown)
            if place < len(shown):
                chart.show(self._panels[shown[place]], self._view)


def over_time(points: Points, clock: Points) -> list[Point]:
    """Points over steps as points over seconds; `clock` is (step, seconds), rising."""
    if not clock:
        return []
    steps = [step for step, _ in clock]
    found: list[Point] = []
    for step, value in points:
        at = min(bisect_left(steps, step), len(clock) - 1)
        found.append((clock[at][1] or 0.0, value))
    return found


