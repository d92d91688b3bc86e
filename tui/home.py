"""Home: the history of runs, live, beside a preview of the selected one."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from rich.text import Text
from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Container, Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import DataTable
from textual.worker import get_current_worker

from core import runner
from core.plan import TRAINING_STAGES
from core.runs import Run, delete_run, request_stop
from core.text import clean, duration, number
from tui.dashboard import STAGE_NAMES, DashboardScreen, end_words, figures, stage_words
from tui.dialogs import RunRoom
from tui.draft import STEPS, Draft, draft_path, load_draft
from tui.follow import LIVE, Follower, History, Snapshot, machine_words
from tui.widgets import Banner, Chart, Words, status_text, status_words
from tui.wizard import WizardScreen

PERIOD_S = 1.5
COLUMNS = (
    ("status", 10),
    ("name", 28),
    ("method", 7),
    ("took", 11),
    ("loss", 6),
    ("margin", 6),
    ("started", 12),
    ("model", 24),
)


class RunsTable(DataTable[Text]):
    """The history; Enter opens the run under the cursor."""

    BINDINGS = [Binding("enter", "select_cursor", "Open")]


class HomeScreen(RunRoom):
    BINDINGS = [
        Binding("n", "new", "New"),
        Binding("d", "demo", "Demo"),
        Binding("enter", "open", "Open"),
        Binding("s", "stop", "Stop"),
        Binding("r", "resume", "Resume"),
        Binding("x", "delete", "Delete"),
        Binding("q", "app.quit", "Quit"),
        Binding("question_mark,f1", "app.help", "Help", key_display="?"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]
    place = "runs"

    @dataclass
    class Listed(Message):
        """The runs as they are now, newest first, and the machine in words."""

        rows: list[dict[str, Any]]
        machine: str

    @dataclass
    class Previewed(Message):
        """The selected run, read whole."""

        snapshot: Snapshot

    def __init__(self, folder: Path, runs_flag: str = "") -> None:
        super().__init__()
        self.folder, self.runs_flag = folder, runs_flag
        self.rows: dict[str, dict[str, Any]] = {}
        self.selected: str | None = None
        self._here = Event()
        self._left = False
        self._keys_for: tuple[str | None, str | None] = (None, None)

    def body(self) -> ComposeResult:
        yield Words("looking for a GPU …", id="machine")
        yield Words(f"runs in {clean(self.folder, 300)}", id="folder")
        yield Words(id="draft")
        with Container(id="rooms"):
            yield Words(id="greeting")
            yield RunsTable(id="runs", cursor_type="row")
            with Vertical(id="preview"):
                yield Words(id="preview-head")
                yield Chart(id="preview-chart")
                yield Words(id="preview-facts")
        yield Words(id="brief")

    def on_mount(self) -> None:
        table = self.query_one("#runs", DataTable)
        for name, width in COLUMNS:
            table.add_column(name, key=name, width=width)
        self.query_one("#rooms").add_class("-empty")
        self._here.set()
        self.watch_runs()

    @on(events.ScreenResume)
    def resumed(self) -> None:
        self._here.set()
        self.wake.set()
        self._say_place()

    @on(events.ScreenSuspend)
    def suspended(self) -> None:
        self._here.clear()

    def on_unmount(self) -> None:
        self._left = True
        self._here.set()
        self.wake.set()

    @work(thread=True, group="history", exit_on_error=False)
    def watch_runs(self) -> None:
        """List the runs and read the selected one, while home is on the screen."""
        worker, history, follower = get_current_worker(), History(self.folder), None
        while not (worker.is_cancelled or self._left):
            self.post_message(self.Listed(history.read(), machine_words()))
            if self.selected and (follower is None or follower.run.name != self.selected):
                follower = Follower(Run(self.folder / self.selected))
            if follower and (snapshot := follower.read()):
                self.post_message(self.Previewed(snapshot))
            self.wake.wait(PERIOD_S)
            self.wake.clear()
            self._here.wait()

    def _say_place(self) -> None:
        kept = load_draft(draft_path())
        self.query_one("#draft").display = kept is not None
        if kept:
            self.query_one("#draft", Words).say(f"▸ your draft is kept at {STEPS[kept.step]}: n goes on with it")

    @on(Listed)
    def listed(self, event: Listed) -> None:
        self.query_one("#machine", Words).say(event.machine)
        running = sum(row["status"] in LIVE for row in event.rows)
        self.query_one(Banner).say(count_words(len(event.rows), running))
        with self.app.batch_update():
            self._fill(event.rows)
        self.query_one("#rooms").set_class(not event.rows, "-empty")
        if not event.rows:
            self.selected = None
            self.set_focus(None)
            self.query_one("#greeting", Words).say(greeting())
        elif not self.query_one("#runs").has_focus and self.is_current:
            self.query_one("#runs").focus()
        if (keys := (self.selected, self.rows.get(self.selected or "", {}).get("status"))) != self._keys_for:
            self._keys_for = keys
            self.refresh_bindings()

    def _fill(self, rows: list[dict[str, Any]]) -> None:
        """Update changed cells in place; the table is built anew only where runs came or went, cursor kept."""
        table = self.query_one("#runs", DataTable)
        fresh, colours = {row["name"]: row for row in rows}, self.app.theme_variables
        if list(fresh) != list(self.rows):
            at = self.selected
            table.clear()
            for name, row in fresh.items():
                table.add_row(*cells(row, colours), key=name)
            if at in fresh:
                table.move_cursor(row=list(fresh).index(at))
        else:
            for name, row in fresh.items():
                if row != self.rows[name]:
                    for (column, _), now, before in zip(
                        COLUMNS, cells(row, colours), cells(self.rows[name], colours), strict=True
                    ):
                        if now != before or now.style != before.style:
                            table.update_cell(name, column, now)
        self.rows = fresh
        self._say_brief()

    @on(DataTable.RowHighlighted)
    def highlighted(self, event: DataTable.RowHighlighted) -> None:
        table = event.data_table  # where the cursor is now: the event may tell of a row from before a rebuild
        if not table.row_count:
            return
        name = str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)
        if name != self.selected:
            self.selected = name
            self.wake.set()
            self._say_brief()
            self.refresh_bindings()

    def _say_brief(self) -> None:
        row = self.rows.get(self.selected or "")
        parts = [row["method"], row["model"], f"started {started(row)}", row["note"]] if row else []
        self.query_one("#brief", Words).say("   ".join(clean(part, 60) for part in parts if part))

    @on(Previewed)
    def previewed(self, event: Previewed) -> None:
        snapshot = event.snapshot
        if snapshot.run.name != self.selected:
            return
        state = snapshot.state
        self.query_one("#preview-head", Words).say(
            Content("\n").join(
                [
                    Content.styled(clean(snapshot.run.name, 60), "bold"),
                    Content.assemble(status_words(snapshot.status), f"  {duration(snapshot.took_s)}"),
                ]
            )
        )
        trained = [stage for stage in state.stages if stage.name in TRAINING_STAGES and stage.series.get("loss")]
        chart = self.query_one("#preview-chart", Chart)
        chart.display = bool(trained)
        lines = [stage_words(stage, snapshot) for stage in state.stages]
        if trained:
            chart.show(f"{STAGE_NAMES[trained[-1].name]} loss", trained[-1].series["loss"])
            lines.append(Content(figures(trained[-1])))
        if end := end_words(snapshot):
            lines.append(end)
        self.query_one("#preview-facts", Words).say(Content("\n").join(lines))

    @on(DataTable.RowSelected)
    def row_selected(self, event: DataTable.RowSelected) -> None:
        self.action_open()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        status = self.rows.get(self.selected or "", {}).get("status")
        if action == "stop":
            return status == "running"
        if action == "resume":
            return status in ("stopped", "aborted", "failed", "crashed")
        if action == "delete":
            return status is not None and status not in LIVE
        return True

    def _run(self) -> Run | None:
        return Run(self.folder / self.selected) if self.selected in self.rows else None

    def action_open(self) -> None:
        if run := self._run():
            self.app.push_screen(DashboardScreen(run))
        else:
            self.action_demo()

    def action_new(self) -> None:
        self._wizard(load_draft(draft_path()) or Draft(), draft_path())

    def action_demo(self) -> None:
        """The review of the demo; settings changed there earlier and not started are kept."""
        path = draft_path("draft-demo")
        draft = load_draft(path) or Draft(size="135m")
        draft.step = len(STEPS) - 1
        self._wizard(draft, path)

    def _wizard(self, draft: Draft, path: Path) -> None:
        self.app.push_screen(WizardScreen(draft, path, self.folder, self.runs_flag), self.wizard_left)

    def wizard_left(self, run: Run | None) -> None:
        if run:
            self.selected = run.name
            self.app.push_screen(DashboardScreen(run))

    def action_stop(self) -> None:
        if run := self._run():
            self.ask(
                f"Stop {run.name}?",
                "It saves a checkpoint at the next step and ends; r resumes it from there.",
                "Stop it",
                lambda: request_stop(run),
            )

    def action_resume(self) -> None:
        if run := self._run():
            self.do(lambda: runner.resume(run))

    def action_delete(self) -> None:
        if run := self._run():
            self.ask(
                f"Delete {run.name}?",
                f"{run.path} is removed with its checkpoints and models. There is no way back.",
                "Delete it",
                lambda: delete_run(run),
            )


def count_words(runs: int, running: int) -> str:
    """How many runs there are, for the banner."""
    if not runs:
        return ""
    return f"{runs} run{'s' if runs > 1 else ''}, {running or 'none'} running"


def started(row: dict[str, Any]) -> str:
    return time.strftime("%d %b %H:%M", time.localtime(row["started"])) if row["started"] else "–"


def cells(row: dict[str, Any], colours: Mapping[str, str]) -> list[Text]:
    """The cells of a run, in the order of COLUMNS; `colours` are the theme's variables."""
    name = clean(row["name"], 100)
    texts = [
        name if len(name) <= 28 else f"{name[:27]}…",
        row["method"],
        duration(row["duration_s"]),
        number(row["loss"], 3),
        number(row["margin"], 3),
        started(row),
        row["model"],
    ]
    return [status_text(row["status"], colours), *(Text(clean(text, 40)) for text in texts)]


def greeting() -> Content:
    """For a newcomer: what this is and the one key to press."""
    return Content("\n").join(
        [
            Content.styled("Welcome. There are no runs yet.", "bold"),
            Content(""),
            Content("finetui teaches a language model from your rows: SFT, KTO, or both."),
            Content(""),
            *(
                Content.assemble((f"{key:>9}", "bold"), f"   {words}")
                for key, words in (
                    ("Enter, d", "the demo: a small real model learns to call tools, in minutes"),
                    ("n", "a run of your own: method, model, data, settings, review"),
                    ("?", "every key"),
                )
            ),
            Content(""),
            Content.styled(
                "A run goes on when you leave: quit, close the terminal, lose SSH. Open finetui again to see it.",
                "$foreground-muted",
            ),
        ]
    )
