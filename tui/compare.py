"""Runs beside each other: their curves over one another, the settings in which they differ, their results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Static
from textual.worker import get_current_worker

from core.compare import (
    AXES,
    RESULTS,
    Side,
    change_rows,
    differences,
    evaluation_rows,
    over_examples,
    same_prompts,
    shared_answers,
    sides_of,
)
from core.events import StageState
from core.runs import Run
from core.stages import TRAINING_STAGES
from core.text import clean, duration, number
from core.watch import GLYPHS
from tui.charts import LINE_HUES, MARKS, STEP_PANELS, ZOOMS, Chart, Panel, View, over_time
from tui.follow import Follower, Snapshot
from tui.report import STAGE_NAMES, energy_words
from tui.widgets import Banner, Room, Words

PERIOD_S = 2.0
MAX_RUNS = len(MARKS)
HEAD_WIDTH = 14
METRICS = tuple(
    (key, title if name in (title, title.split()[0], title.split()[-1]) else f"{title} {name}")
    for title, keys in STEP_PANELS
    for key, name in keys
)


class CompareScreen(Room[None]):
    """Two to six runs, live or past."""

    BINDINGS = [
        Binding("m", "metric(1)", "Metric"),
        Binding("M", "metric(-1)", "Metric before", show=False),
        Binding("t", "axis", "Axis"),
        Binding("a", "answers", "Answers"),
        Binding("e", "view('smooth')", "Smooth"),
        Binding("y", "view('log')", "Log scale"),
        Binding("z", "view('zoom')", "Zoom"),
        Binding("escape,h", "dismiss", "Home", key_display="esc"),
        Binding("q", "app.quit", "Quit"),
        Binding("question_mark,f1", "app.help", "Help", key_display="?"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]
    place = "compare"

    @dataclass
    class Seen(Message):
        """The runs as they are now, in their order, and what lies in their folders."""

        snapshots: list[Snapshot]
        sides: list[Side]

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__()
        self.runs = list(runs)[:MAX_RUNS]
        self.wake = Event()
        self.seen_now: CompareScreen.Seen | None = None
        self.curve = 0
        self.axis = 0
        self.view = View()

    def body(self) -> ComposeResult:
        yield Words("reading the logs …", id="legend")
        with VerticalScroll(id="scroll"):
            yield Words(id="metrics")
            yield Chart(id="overlay")
            yield Static(id="results", markup=False)
            yield Static(id="evaluations", markup=False)
            yield Words(id="changes")
            yield Static(id="differences", markup=False)

    def on_mount(self) -> None:
        self.query_one("#scroll").focus()
        self.follow()

    def on_unmount(self) -> None:
        self.wake.set()

    @work(thread=True, group="follow", exit_on_error=False)
    def follow(self) -> None:
        """Read every run, then again while something changes."""
        worker = get_current_worker()
        followers = [Follower(run) for run in self.runs]
        sides = sides_of(self.runs)
        known: list[Snapshot | None] = [None] * len(followers)
        while not worker.is_cancelled:
            fresh = [follower.read() for follower in followers]
            known = [new or old for new, old in zip(fresh, known, strict=True)]
            if any(fresh) and all(known):
                self.post_message(self.Seen([one for one in known if one], sides))
            self.wake.wait(PERIOD_S)
            self.wake.clear()

    @on(Seen)
    def seen(self, event: Seen) -> None:
        self.seen_now = event
        with self.app.batch_update():
            self.paint(event)

    def curves(self) -> list[tuple[str, str]]:
        """What at least one run has logged, as (stage, metric): what most have first, and of that KTO before SFT."""
        if not self.seen_now:
            return []
        stages = [stage for snapshot in self.seen_now.snapshots for stage in snapshot.state.stages]
        having = {
            (name, key): sum(stage.name == name and len(stage.series.get(key, [])) > 1 for stage in stages)
            for name in reversed(TRAINING_STAGES)
            for key, _ in METRICS
        }
        return sorted((curve for curve, runs in having.items() if runs), key=lambda curve: -having[curve])

    def paint(self, event: Seen) -> None:
        """Everything on this screen is painted here."""
        snapshots = event.snapshots
        self.query_one(Banner).say(f"{len(snapshots)} runs")
        self.query_one("#legend", Words).say(legend_words(snapshots))
        curves = self.curves()
        self.curve = self.curve % len(curves) if curves else 0
        words = "no run has logged a step" if not curves else f"{self.curve + 1} of {len(curves)}: m goes on"
        over = AXES[self.axis].replace("time", "training time")
        self.query_one("#metrics", Words).say(
            Content.assemble((f"{words}  over {over}", "$foreground-muted"), (f"  {self.view.words()}", "bold"))
        )
        if curves:
            stage, key = curves[self.curve]
            lines = tuple(self._line(index, snapshot, stage, key) for index, snapshot in enumerate(snapshots))
            title = f"{STAGE_NAMES[stage]} {dict(METRICS)[key]}"
            timed = AXES[self.axis] == "time"
            counted = "example" if AXES[self.axis] == "examples" else "step"
            self.query_one(Chart).show(Panel(title, lines, timed=timed, counted=counted), self.view)
        self.query_one("#results", Static).update(results_table(snapshots))
        self.paint_evaluations(event.sides)
        self.query_one("#differences", Static).update(
            differences_table([side.settings for side in event.sides], [side.name for side in event.sides])
        )

    def paint_evaluations(self, sides: Sequence[Side]) -> None:
        """What the runs' last models earned, and whether the prompts were the same."""
        rows = evaluation_rows(sides)
        place, said = self.query_one("#evaluations", Static), self.query_one("#changes", Words)
        place.display = said.display = bool(rows)
        place.update(evaluations_table(rows, [side.name for side in sides]) if rows else "")
        several = sum(bool(side.report) for side in sides) > 1
        other = ["They answered other prompts; below, only those that both answered count."]
        said.say("\n".join([*(other if several and not same_prompts(sides) else []), *change_rows(sides)]))

    def _line(self, index: int, snapshot: Snapshot, stage_name: str, key: str) -> tuple[str, Any]:
        stage = next((stage for stage in snapshot.state.stages if stage.name == stage_name), None)
        points = stage.series.get(key, []) if stage else []
        if AXES[self.axis] == "time":
            return short(snapshot), over_time(points, snapshot.clocks.get(stage_name, []))
        if AXES[self.axis] == "examples":
            return short(snapshot), over_examples(points, stage.totals.get("batch") or 1 if stage else 1)
        return short(snapshot), points

    def action_metric(self, by: int) -> None:
        self.curve += by
        self._again()

    def action_axis(self) -> None:
        self.axis = (self.axis + 1) % len(AXES)
        self._again()

    def action_answers(self) -> None:
        """The prompts that several of the runs answered, those first on which they differ."""
        shared = shared_answers(self.seen_now.sides) if self.seen_now else []
        if not shared:
            words = "Evaluate two of the runs on the same prompts: v at home or on the dashboard."
            self.notify(words, title="No prompt was answered by two of these runs", markup=False)
            return
        from tui.evaluation import SideBySide, items_of_shared

        names = [short(snapshot) for snapshot in self.seen_now.snapshots] if self.seen_now else []
        self.app.push_screen(SideBySide(items_of_shared(shared, names)))

    def action_view(self, what: str) -> None:
        if what == "zoom":
            self.view = replace(self.view, zoom=(self.view.zoom + 1) % len(ZOOMS))
        elif what == "log":
            self.view = replace(self.view, log=not self.view.log)
        else:
            self.view = replace(self.view, smooth=not self.view.smooth)
        self._again()

    def _again(self) -> None:
        if self.seen_now:
            self.paint(self.seen_now)


def short(snapshot: Snapshot) -> str:
    """The end of a run's name, which tells runs apart best."""
    name = clean(snapshot.run.name, 100)
    return name if len(name) <= 18 else f"…{name[-17:]}"


def legend_words(snapshots: Sequence[Snapshot]) -> Content:
    """A line a run: the mark of its curve, its status, name and note."""
    lines = []
    for index, snapshot in enumerate(snapshots):
        note = f"  {clean(snapshot.note.text, 60)}" if snapshot.note.text else ""
        status = f"{GLYPHS.get(snapshot.status, '?')} {clean(snapshot.status, 12)}"
        lines.append(
            Content.assemble(
                (f" {MARKS[index]} ", f"bold reverse {LINE_HUES[index]}"),
                (f"  {clean(snapshot.run.name, 100)}", "bold"), f"  {status}", (note, "$foreground-muted"),
            )  # fmt: skip
        )
    return Content("\n").join(lines)


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, title=Text(title, style="bold"), title_justify="left")
    table.add_column("", no_wrap=True)
    for mark, name in zip(MARKS, names, strict=False):
        head = Text.assemble((f" {mark} ", "reverse"), " ", clean(name, 100)[-HEAD_WIDTH:])
        table.add_column(head, justify="right", overflow="ellipsis")
    return table


def results_table(snapshots: Sequence[Snapshot]) -> Table:
    """How the runs ended, a column a run."""
    table = _table("Results", [snapshot.run.name for snapshot in snapshots])

    def row(word: str, cells: Sequence[str]) -> None:
        if any(cell not in ("–", "") for cell in cells):
            table.add_row(Text(word, style="dim"), *(Text(clean(cell, 60)) for cell in cells))

    row("status", [snapshot.status for snapshot in snapshots])
    row("took", [duration(snapshot.took_s) for snapshot in snapshots])
    row("energy", [energy_words(snapshot.energy_j) or "–" for snapshot in snapshots])
    for name in TRAINING_STAGES:
        stages = [next((s for s in snapshot.state.stages if s.name == name), None) for snapshot in snapshots]
        row(f"{STAGE_NAMES[name]} steps", [f"{s.step}/{s.total_steps}" if s and s.step else "–" for s in stages])
        for key, word, digits in RESULTS:
            row(f"{STAGE_NAMES[name]} {word}", [_last(stage, key, digits) for stage in stages])
    return table


def _last(stage: StageState | None, key: str, digits: int) -> str:
    return number(stage.last(key), digits) if stage else "–"


def differences_table(settings: Sequence[dict[str, Any]], names: Sequence[str]) -> Table:
    """The settings that are not the same in every run, a column a run; a plan that cannot be read differs in none."""
    unlike = differences(settings)
    table = _table("Settings that differ" if unlike else "Settings: all the same", names)
    for path, values in unlike:
        cells = ["–" if value is None else str(value) for value in values]
        table.add_row(Text(path, style="dim"), *(Text(clean(cell, 60)) for cell in cells))
    return table


def evaluations_table(rows: Sequence[tuple[str, list[str]]], names: Sequence[str]) -> Table:
    """What each run's last model earned on its held-out prompts, a column a run."""
    table = _table("Held-out prompts, share right and its 95 % interval", names)
    for word, cells in rows:
        table.add_row(Text(word, style="dim"), *(Text(clean(cell, 40)) for cell in cells))
    return table
