"""The dashboard: one run, live or past, as its log tells it. Leaving it never stops the run."""

from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Container, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Static
from textual.worker import get_current_worker

from core import remedy, runner
from core.events import RunState, StageState
from core.remedy import Remedy
from core.runs import Run, request_stop
from core.stages import TRAINING_STAGES
from core.text import clean
from core.watch import shown_result
from tui.alerts import Alert, alerts
from tui.charts import ZOOMS, ChartGrid, Panel, View, panels
from tui.dialogs import Ended, LogScreen, PathsScreen, RunRoom
from tui.follow import Follower, LogTail, Recording, Snapshot
from tui.report import (
    STAGE_NAMES,
    alert_words,
    can_be_exported,
    can_go_on_with_kto,
    end_words,
    final_model,
    next_words,
    notes_words,
    now_words,
    paths_of,
    side_words,
    stage_state,
)
from tui.samples import SamplesScreen, newest_words
from tui.widgets import Banner, StepBar, Words, status_words

PERIOD_S = 1.0
GIVE_WAY_S = 1.0
PANEL_KEYS = ("m more", "e smooth", "y log", "z zoom")
SHORT = {"learning rate": "rate", "gradient norm": "gradient", "utilisation": "use", "temperature": "heat"}


class Body(VerticalScroll):
    """The part that scrolls; left and right go through the stages' curves."""

    BINDINGS = [
        Binding("left", "screen.stage(-1)", "Stage", key_display="←→"),
        Binding("right", "screen.stage(1)", "Curves of the next stage", show=False),
    ]


class DashboardScreen(RunRoom):
    BINDINGS = [
        Binding("s", "stop", "Stop"),
        Binding("a", "abort", "Abort"),
        Binding("f", "fix", "Fix and resume"),
        Binding("r", "resume", "Resume"),
        Binding("k", "kto", "KTO from here"),
        Binding("u", "export", "Export"),
        Binding("v", "evaluate", "Evaluate"),
        Binding("i", "try_it", "Try it"),
        Binding("l", "log", "Log"),
        Binding("p", "samples", "Samples", show=False),
        Binding("m", "panel(1)", "Next curves", show=False),
        Binding("M", "panel(-1)", "Curves before", show=False),
        *(
            Binding(str(digit), f"choose({digit - 1})", "Curves from the n-th on", show=False, key_display="1-9")
            for digit in range(1, 10)
        ),
        Binding("e", "view('smooth')", "Smooth the curves", show=False),
        Binding("y", "view('log')", "Log scale", show=False),
        Binding("z", "view('zoom')", "Zoom to the last part", show=False),
        Binding("w", "report", "Write a report to send", show=False),
        Binding("o", "paths", "Open folder: every path", show=False),
        Binding("c", "copy", "Copy the model's path", show=False),
        Binding("escape,h", "leave", "Home", key_display="esc"),
        Binding("q", "app.quit", "Quit"),
        Binding("question_mark,f1", "app.help", "Help", key_display="?"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]

    @dataclass
    class GoOn(Message):
        """KTO from this run's model is wanted."""

        run: Run

    @dataclass
    class Seen(Message):
        """The run as it is now."""

        snapshot: Snapshot

    @dataclass
    class Logged(Message):
        """New lines of the log, clean."""

        lines: list[str]

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run_shown = run
        self.place = run.name
        self.snapshot: Snapshot | None = None
        self.painted = Event()
        self.chosen_stage: str | None = None
        self.log_screen: LogScreen | None = None
        self._log_tail: LogTail | None = None
        self._result: Any = {}
        self._keys_for: tuple[str, int] = ("", 0)
        self.view = View()
        self.first_panel = 0

    def body(self) -> ComposeResult:
        yield StepBar(id="steps")
        yield Words("reading the log …", id="now")
        with Body(id="scroll"):
            yield Static(id="result", markup=False)
            yield Words(id="end")
            yield Words(id="alerts")
            with Container(id="columns"):
                with Vertical(id="left"):
                    yield Words(id="panels")
                    yield ChartGrid(id="charts")
                    yield Words(id="samples")
                    yield Words(id="notes")
                yield Words(id="side")

    def on_mount(self) -> None:
        self.query_one("#scroll").focus()
        self.call_after_refresh(self.painted.set)
        self.follow()

    def on_unmount(self) -> None:
        self.painted.set()
        self.wake.set()

    @work(thread=True, group="follow", exit_on_error=False)
    def follow(self) -> None:
        """Tail the run's files and post one snapshot a second while something changes."""
        worker, follower = get_current_worker(), Follower(self.run_shown)
        self.painted.wait(GIVE_WAY_S)  # a thread that reads makes the screen's first layout three times as long
        self.painted.clear()
        if glance := follower.glance():
            self.post_message(self.Seen(glance))
            self.painted.wait(GIVE_WAY_S)  # it is painted before the rest is read
        while not worker.is_cancelled:
            if snapshot := follower.read():
                self.post_message(self.Seen(snapshot))
            if (tail := self._log_tail) and (lines := tail.read()):
                self.post_message(self.Logged(lines))
            self.wake.wait(PERIOD_S)
            self.wake.clear()

    @on(Seen)
    def seen(self, event: Seen) -> None:
        before, self.snapshot = self.snapshot, event.snapshot
        if before and before.live and not before.partial and not event.snapshot.live:
            self.app.post_message(Ended(self.run_shown.name, event.snapshot.status))
        with self.app.batch_update():
            self.paint(event.snapshot)
        if (keys := (event.snapshot.status, len(self.trained()))) != self._keys_for:
            self._keys_for = keys
            self.refresh_bindings()

    @on(ChartGrid.Laid)
    def laid(self) -> None:
        if self.snapshot:
            self.paint_charts(self.shown_stage(self.snapshot.state), self.snapshot)
            self.call_after_refresh(self.painted.set)

    @on(Logged)
    def logged(self, event: Logged) -> None:
        if self.log_screen is not None and self.log_screen.is_attached:
            self.log_screen.add(event.lines)

    def paint(self, snapshot: Snapshot) -> None:
        """Everything on this screen is painted here."""
        state = snapshot.state
        self.query_one(Banner).say(status_words(snapshot.status))
        steps = [(STAGE_NAMES.get(stage.name, stage.name), stage_state(stage, snapshot)) for stage in state.stages]
        shown = self.shown_stage(state)
        here = state.stages.index(shown) if shown else -1
        self.query_one(StepBar).show(steps, here)
        self.query_one("#now", Words).say(now_words(snapshot, max(20, self.size.width - 4)))
        found = alerts(snapshot)
        self.paint_end(snapshot, [alert for alert in found if alert.weight > 1])
        self.paint_charts(shown, snapshot)
        answers = newest_words(state, max(20, self.query_one("#left").size.width - 2)) if state.samples else Content("")
        self.query_one("#samples").display = bool(answers)
        self.query_one("#samples", Words).say(answers)
        notes = notes_words(state, told=[alert.kind for alert in found])
        worth_knowing = alert_words([alert for alert in found if alert.weight < 2])
        self.query_one("#notes", Words).say(Content("\n").join(filter(None, [worth_knowing, notes])))
        self.query_one("#side", Words).say(side_words(snapshot))

    def paint_end(self, snapshot: Snapshot, worrying: list[Alert]) -> None:
        result = self.query_one("#result", Static)
        if snapshot.state.result != self._result:
            self._result = snapshot.state.result
            result.update(shown_result(self._result, max(20, self.size.width - 4)) or "")
        result.display = bool(self._result)
        width = self.size.width - 8
        words = Content("\n").join(filter(None, [say(snapshot, width) for say in (end_words, next_words)]))
        for name, said in (("#end", words), ("#alerts", alert_words(worrying))):
            place = self.query_one(name, Words)
            place.display = bool(said)
            place.say(said)

    def paint_charts(self, stage: StageState | None, snapshot: Snapshot) -> None:
        name = STAGE_NAMES.get(stage.name, stage.name) if stage else ""
        found = panels(name, stage.series if stage else {}, snapshot.sensors)
        self.first_panel = max(0, min(self.first_panel, len(found) - 1))
        grid = self.query_one(ChartGrid)
        anything = any(points for panel in found for _, points in panel.lines)
        grid.display = self.query_one("#panels").display = anything
        grid.show(found, self.first_panel, self.view)
        self.query_one("#panels", Words).say(
            panel_words(found, grid.shown(), self.view, name, self.query_one("#panels").size.width)
        )

    def trained(self) -> list[StageState]:
        """The stages that have curves."""
        stages = self.snapshot.state.stages if self.snapshot else []
        return [stage for stage in stages if stage.name in TRAINING_STAGES and stage.series.get("loss")]

    def shown_stage(self, state: RunState) -> StageState | None:
        """The stage whose curves are shown: the chosen one, else the newest that trains or has trained."""
        trained = [stage for stage in state.stages if stage.name in TRAINING_STAGES]
        chosen = next((stage for stage in trained if stage.name == self.chosen_stage), None)
        begun = [stage for stage in trained if stage.series.get("loss") or stage.state == "running"]
        return chosen or (begun[-1] if begun else None)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        live = self.snapshot is not None and self.snapshot.live
        if action == "stop":
            return live and self.snapshot is not None and self.snapshot.status == "running"
        if action == "abort":
            return live
        if action == "stage":
            return self.snapshot is not None and len(self.trained()) > 1
        if action == "resume":
            ended = self.snapshot is not None and not live and self.snapshot.status not in ("done", "deleted")
            return ended and not isinstance(self.run_shown, Recording)
        if action == "fix":
            card = self.snapshot.card if self.snapshot and not isinstance(self.run_shown, Recording) else None
            return card is not None and card.remedy is not None
        if action == "kto":
            return self.snapshot is not None and can_go_on_with_kto(self.snapshot)
        if action == "export":
            return self.snapshot is not None and can_be_exported(self.snapshot)
        if action in ("evaluate", "report"):
            return not isinstance(self.run_shown, Recording)
        if action == "try_it":
            return self.snapshot is not None and not live and not isinstance(self.run_shown, Recording)
        if action == "copy":
            return self.snapshot is not None
        return True

    def action_stop(self) -> None:
        self.ask(
            "Stop this run?",
            "It saves a checkpoint at the next step and ends; r resumes it from there.",
            "Stop it",
            lambda: request_stop(self.run_shown),
        )

    def action_abort(self) -> None:
        self.ask(
            "Abort this run?",
            "It ends now. Steps since its newest checkpoint are lost; r resumes it from there.",
            "Abort it",
            lambda: runner.abort(self.run_shown),
        )

    def action_resume(self) -> None:
        self.do(lambda: runner.resume(self.run_shown))

    def action_fix(self) -> None:
        """Apply the remedy that the card names, and resume."""
        found = self.snapshot.card.remedy if self.snapshot and self.snapshot.card else None
        if found is not None:
            self.do(lambda: fix_and_resume(self.run_shown, found))

    def action_stage(self, by: int) -> None:
        if not self.snapshot:
            return
        names = [stage.name for stage in self.trained()]
        shown = self.shown_stage(self.snapshot.state)
        if names:
            at = names.index(shown.name) if shown else 0
            self.chosen_stage = names[max(0, min(len(names) - 1, at + by))]
            self.paint(self.snapshot)

    def action_panel(self, by: int) -> None:
        """The next or the earlier curves, as many further as are shown."""
        shown = self.query_one(ChartGrid).shown()
        at = shown.stop if by > 0 else shown.start - len(shown)
        last = len(self._panels()) - 1
        self.action_choose(0 if at > last else max(0, at) if by > 0 or shown.start else last)

    def action_choose(self, index: int) -> None:
        if self.snapshot and index < len(self._panels()):
            self.first_panel = index
            self.paint(self.snapshot)

    def _panels(self) -> list[Panel]:
        if not self.snapshot:
            return []
        stage = self.shown_stage(self.snapshot.state)
        return panels("", stage.series if stage else {}, self.snapshot.sensors)

    def action_view(self, what: str) -> None:
        if what == "zoom":
            self.view = replace(self.view, zoom=(self.view.zoom + 1) % len(ZOOMS))
        elif what == "log":
            self.view = replace(self.view, log=not self.view.log)
        else:
            self.view = replace(self.view, smooth=not self.view.smooth)
        if self.snapshot:
            self.paint(self.snapshot)

    def action_kto(self) -> None:
        self.post_message(self.GoOn(self.run_shown))

    def action_export(self) -> None:
        self.ask_what_to_make(self.run_shown, self.wake.set)

    def action_try_it(self) -> None:
        from tui.chat import ChatScreen

        self.app.push_screen(ChatScreen(self.run_shown))

    def action_samples(self) -> None:
        self.app.push_screen(SamplesScreen(self.run_shown))

    def action_evaluate(self) -> None:
        from tui.evaluation import EvaluationScreen

        self.app.push_screen(EvaluationScreen(self.run_shown))

    def action_report(self) -> None:
        self.report(self.run_shown)

    def action_paths(self) -> None:
        if self.snapshot:
            self.app.push_screen(PathsScreen(f"paths of {self.run_shown.name}", paths_of(self.snapshot)))

    def action_copy(self) -> None:
        if self.snapshot:
            self.copy(final_model(self.snapshot) or str(self.run_shown.path))

    def action_log(self) -> None:
        self.log_screen = LogScreen(f"log of {self.run_shown.name}")
        self._log_tail = LogTail(self.run_shown.log_path)
        self.wake.set()
        self.app.push_screen(self.log_screen, self.log_left)

    def log_left(self, _: None) -> None:
        self.log_screen, self._log_tail = None, None

    def action_leave(self) -> None:
        self.dismiss(None)


def fix_and_resume(run: Run, found: Remedy) -> None:
    remedy.apply(run, found)
    runner.resume(run)


def panel_words(found: list[Panel], shown: range, view: View, stage: str, width: int = 0) -> Content:
    """The curves there are by number, those on the screen bold, and how they are looked at; no number alone at the
    end of a line of `width` cells."""
    labels: list[tuple[str, str]] = []
    for index, panel in enumerate(found[:9]):
        name = clean(panel.title.removeprefix(f"{stage} "), 40)
        name = SHORT.get(name, name)[:14]
        hue = "bold underline" if index in shown else "$foreground-muted"
        labels.append((f"{index + 1} {name}", hue))
    if len(found) > 9:
        labels.append((f"+{len(found) - 9}", "$foreground-muted"))
    said = view.words()
    keys = [(said, "bold reverse")] if said else [(key, "$foreground-muted") for key in PANEL_KEYS]
    parts, at = list[Any](), 0
    for label, hue in [*labels, *keys]:
        if at and width and at + len(label) > width:
            parts, at = [*parts, "\n"], 0
        parts += [(label, hue), "  "]
        at += len(label) + 2
    return Content.assemble(*parts[:-1])
