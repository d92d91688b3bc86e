"""Home: the history of runs, live, beside a preview of the selected one."""

from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

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
from core.errors import FinetuiError
from core.notes import Note, write_note
from core.paths import cache_dir
from core.runs import Run, delete_run, request_stop
from core.stages import TRAINING_STAGES
from core.text import clean
from tui.charts import Chart, Panel
from tui.dashboard import DashboardScreen
from tui.dialogs import Ask, Ended, PathsScreen, RunRoom
from tui.follow import LIVE, Follower, Snapshot, machine_words
from tui.history import History
from tui.report import STAGE_NAMES, end_words, figures, paths_of, preview_head, settings_words, stage_words
from tui.rows import brief, cells, count_words, greeting, searched
from tui.widgets import Banner, Line, Words

if TYPE_CHECKING:  # the wizard's modules are half of the start-up: they are imported after the first paint
    from tui.draft import Draft

PERIOD_S, GIVE_WAY_S = 1.5, 0.03
PAGE, PREVIEW_WIDTH = 200, 37
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
        Binding("d", "demo", "Demo", show=False),
        Binding("enter", "open", "Open"),
        Binding("s", "stop", "Stop"),
        Binding("r", "resume", "Resume"),
        Binding("x", "delete", "Delete"),
        Binding("g", "again", "Again"),
        Binding("v", "evaluate", "Evaluate"),
        Binding("i", "try_it", "Try"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("space", "mark", "Mark for comparing", show=False),
        Binding("c", "compare", "Compare the marked runs", show=False),
        Binding("u", "export", "Merge, GGUF, upload", show=False),
        Binding("p", "pin", "Pin", show=False),
        Binding("t", "note", "Write a note", show=False),
        Binding("w", "report", "Write a report to send", show=False),
        Binding("o", "paths", "Every path of the run", show=False),
        Binding("escape", "unfilter", "Show every run", show=False),
        Binding("q", "app.quit", "Quit"),
        Binding("question_mark,f1", "app.help", "Help", key_display="?"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]
    place = "runs"
    AUTO_FOCUS = ""

    @dataclass
    class Listed(Message):
        """The runs as they are now, newest first, and the machine in words."""

        rows: list[dict[str, Any]]
        machine: str

    @dataclass
    class Planned(Message):
        """A draft with the settings of an earlier run."""

        draft: "Draft"

    @dataclass
    class Previewed(Message):
        """The selected run, read whole."""

        snapshot: Snapshot

    @dataclass
    class Settled(Message):
        """The settings of a run, in words."""

        name: str
        words: str

    def __init__(self, folder: Path, runs_flag: str = "") -> None:
        super().__init__()
        self.folder, self.runs_flag = folder, runs_flag
        self.rows: dict[str, dict[str, Any]] = {}
        self.selected: str | None = None
        self._here = Event()
        self._left = self._drafted = False
        self._keys_for: tuple[str | None, str | None] = (None, None)
        self.all_rows: list[dict[str, Any]] = []
        self.marked: list[str] = []
        self.sought = ""
        self._snapshot: Snapshot | None = None
        self._settings: dict[str, str] = {}
        self._live: set[str] = set()
        self._limit, self._more = PAGE, False

    def body(self) -> ComposeResult:
        yield Words("looking for a GPU …", id="machine")
        yield Words(f"runs in {clean(self.folder, 300)}", id="folder")
        yield Words(id="draft")
        with Line("", placeholder="words of name, status, method, model or note", id="filter") as line:
            line.display = False
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
            machine = machine_words()
            for rows in history.batches():
                self.post_message(self.Listed(rows, machine))
                self.wake.wait(GIVE_WAY_S)  # what was found is painted before more is read
            if self.selected and (follower is None or follower.run.name != self.selected):
                follower = Follower(Run(self.folder / self.selected))
            if follower and (snapshot := follower.read()):
                self.post_message(self.Previewed(snapshot))
            self.wake.wait(PERIOD_S)
            self.wake.clear()
            import tui.wizard  # noqa: F401  once all is painted, so that the first key need not wait for it

            if follower and follower.run.name not in self._settings:
                self.post_message(self.Settled(follower.run.name, _settings(follower.run)))
            self._here.wait()

    def _say_place(self) -> None:
        kept = None
        self._drafted = (cache_dir() / "draft.json").exists()
        if self._drafted:
            from tui.draft import STEPS, draft_path, load_draft

            kept = load_draft(draft_path())
            kept = None if kept and kept.untouched else kept
        self.query_one("#draft").display = kept is not None
        if kept:
            self.query_one("#draft", Words).say(f"▸ your draft is kept at {STEPS[kept.step]}: n goes on with it")

    @on(Listed)
    def listed(self, event: Listed) -> None:
        self.query_one("#machine", Words).say(event.machine)
        if self._drafted != (cache_dir() / "draft.json").exists():  # another window began or started one
            self._say_place()
        self._tell_ends(event.rows)
        self.all_rows = event.rows
        self._show_rows()
        if not event.rows:
            self.selected = None
            self.set_focus(None)
            self.query_one("#greeting", Words).say(greeting())
        elif self.focused is None and self.is_current:
            self.query_one("#runs").focus()
        if (keys := (self.selected, self.rows.get(self.selected or "", {}).get("status"))) != self._keys_for:
            self._keys_for = keys
            self.refresh_bindings()

    def _tell_ends(self, rows: list[dict[str, Any]]) -> None:
        """Have the app ring for runs that lived at the last look and do not now."""
        live = {row["name"] for row in rows if row["status"] in LIVE}
        for row in rows:
            if row["name"] in self._live - live:
                self.app.post_message(Ended(row["name"], row["status"]))
        self._live = live

    def _show_rows(self) -> None:
        """Pinned runs first, and only those that the filter finds."""
        rows = sorted(self.all_rows, key=lambda row: not row["pinned"])
        words = self.sought.lower().split()
        found = [row for row in rows if all(word in searched(row) for word in words)]
        running = sum(row["status"] in LIVE for row in rows)
        aside = count_words(len(rows), running)
        names = {row["name"] for row in rows}
        self.marked = [name for name in self.marked if name in names]
        if self.marked:
            aside = f"{len(self.marked)} marked: c compares   {aside}"
        self.query_one(Banner).say(f"{len(found)} of {aside}" if words else aside)
        with self.app.batch_update():
            self._fill([{**row, "marked": row["name"] in self.marked} for row in found[: self._limit]])
        self._more = len(found) > self._limit
        self.query_one("#rooms").set_class(not rows, "-empty")

    def _fill(self, rows: list[dict[str, Any]]) -> None:
        """Update changed cells in place; the table is built anew only where runs came or went, cursor kept."""
        table = self.query_one("#runs", DataTable)
        fresh, colours = {row["name"]: row for row in rows}, self.app.theme_variables
        names, known = list(fresh), list(self.rows)
        if names[: len(known)] != known:
            at = self.selected
            table.clear()
            for name, row in fresh.items():
                table.add_row(*cells(row, colours), key=name)
            if at in fresh:
                table.move_cursor(row=names.index(at))
        else:
            for name in names[len(known) :]:
                table.add_row(*cells(fresh[name], colours), key=name)
            for name in known:
                row = fresh[name]
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
        if self._more and table.cursor_row >= self._limit - 1:  # a table of thousands would hold the keyboard up
            self._limit += PAGE
            self.call_later(self._show_rows)
        name = str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value)
        if name != self.selected:
            self.selected = name
            self.wake.set()
            self._say_brief()
            self.refresh_bindings()

    def _say_brief(self) -> None:
        row = self.rows.get(self.selected or "")
        self.query_one("#brief", Words).say(brief(row) if row else "")

    @on(Previewed)
    def previewed(self, event: Previewed) -> None:
        snapshot = event.snapshot
        if snapshot.run.name != self.selected:
            return
        self._snapshot = snapshot
        state = snapshot.state
        self.query_one("#preview-head", Words).say(preview_head(snapshot))
        trained = [stage for stage in state.stages if stage.name in TRAINING_STAGES and stage.series.get("loss")]
        chart = self.query_one("#preview-chart", Chart)
        chart.display = bool(trained)
        lines = [stage_words(stage, snapshot) for stage in state.stages]
        if trained:
            chart.show(Panel(f"{STAGE_NAMES[trained[-1].name]} loss", (("loss", trained[-1].series["loss"]),)))
            lines.append(Content(figures(trained[-1], PREVIEW_WIDTH)))
        if settings := self._settings.get(snapshot.run.name):
            lines.append(Content.styled(settings, "$foreground-muted"))
        if snapshot.note.text:
            lines.append(Content.assemble(("note ", "$foreground-muted"), clean(snapshot.note.text, 300)))
        if end := end_words(snapshot):
            lines.append(end)
        self.query_one("#preview-facts", Words).say(Content("\n").join(lines))

    @on(Settled)
    def settled(self, event: Settled) -> None:
        self._settings[event.name] = event.words
        if self._snapshot and self._snapshot.run.name == event.name:
            self.previewed(self.Previewed(self._snapshot))

    @on(DataTable.RowSelected)
    def row_selected(self, event: DataTable.RowSelected) -> None:
        self.action_open()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        status = self.rows.get(self.selected or "", {}).get("status")
        if action == "stop":
            return status == "running"
        if action == "resume":
            return status in ("stopped", "aborted", "failed", "crashed")
        if action in ("delete", "try_it"):
            return status is not None and status not in LIVE
        if action in ("again", "evaluate", "report", "compare", "export", "pin", "note", "paths", "mark", "filter"):
            return bool(self.all_rows)
        if action == "unfilter":
            return bool(self.sought) or self.query_one("#filter").display
        return True

    def _run(self) -> Run | None:
        return Run(self.folder / self.selected) if self.selected in self.rows else None

    def action_open(self) -> None:
        if run := self._run():
            self.app.push_screen(DashboardScreen(run))
        else:
            self.action_demo()

    def action_new(self) -> None:
        from tui.draft import Draft, draft_path, load_draft

        self._wizard(load_draft(draft_path()) or Draft(), "draft")

    def action_demo(self) -> None:
        """The review of the demo; settings changed there earlier and not started are kept."""
        from tui.draft import STEPS, Draft, draft_path, load_draft

        draft = load_draft(draft_path("draft-demo")) or Draft(size="135m")
        draft.step = len(STEPS) - 1
        self._wizard(draft, "draft-demo")

    def _wizard(self, draft: "Draft", name: str) -> None:
        from tui.draft import draft_path
        from tui.wizard import WizardScreen

        self.app.push_screen(WizardScreen(draft, draft_path(name), self.folder, self.runs_flag), self.wizard_left)

    def action_again(self) -> None:
        """The review of a new run with the settings of the selected one."""
        if run := self._run():
            self._read_plan(run)

    @work(thread=True, group="plan", exit_on_error=False)
    def _read_plan(self, run: Run) -> None:
        from tui.draft import draft_of

        self.report_errors(lambda: self.post_message(self.Planned(draft_of(run.plan()))))

    @on(Planned)
    def planned(self, event: Planned) -> None:
        self._wizard(event.draft, "draft-again")

    def go_on_with_kto(self, run: Run) -> None:
        """The wizard for KTO from the model of a run."""
        from tui.draft import STEPS, Draft

        self._wizard(Draft(method="kto", model=f"run:{run.name}", step=STEPS.index("Data")), "draft-again")

    def action_evaluate(self) -> None:
        if run := self._run():
            from tui.evaluation import EvaluationScreen

            self.app.push_screen(EvaluationScreen(run))

    def action_report(self) -> None:
        if run := self._run():
            self.report(run)

    def action_try_it(self) -> None:
        if run := self._run():
            from tui.chat import ChatScreen

            self.app.push_screen(ChatScreen(run))

    def action_filter(self) -> None:
        self.query_one("#filter").display = True
        self.query_one("#filter").focus()
        self.refresh_bindings()

    def action_unfilter(self) -> None:
        line = self.query_one("#filter", Line)
        line.value, line.display = "", False
        self.query_one("#runs").focus()

    @on(Line.Changed, "#filter")
    def filtered(self, event: Line.Changed) -> None:
        self.sought = event.value
        self._show_rows()
        self.refresh_bindings()

    @on(Line.Submitted, "#filter")
    def filter_left(self) -> None:
        self.query_one("#filter").display = bool(self.sought)
        self.query_one("#runs").focus()

    def action_mark(self) -> None:
        name = self.selected
        if name in self.rows:
            self.marked = [one for one in self.marked if one != name] if name in self.marked else [*self.marked, name]
            self._show_rows()
            self.query_one("#runs", DataTable).action_cursor_down()

    def action_compare(self) -> None:
        """The marked runs; one mark alone is compared with the run under the cursor."""
        names = self.marked
        if len(names) < 2 and self.selected in self.rows and self.selected not in names:
            names = [*names, self.selected]
        if len(names) < 2:
            self.notify("Mark two or more runs with Space, then press c.", title="Nothing to compare", markup=False)
            return
        from tui.compare import CompareScreen

        self.app.push_screen(CompareScreen([Run(self.folder / name) for name in names]))

    def _note(self) -> Note:
        row = self.rows.get(self.selected or "", {})
        return Note(str(row.get("note", "")), bool(row.get("pinned")))

    def action_pin(self) -> None:
        if run := self._run():
            note = replace(self._note(), pinned=not self._note().pinned)
            self.do(lambda: write_note(run.path, note))

    def action_note(self) -> None:
        if run := self._run():
            before = self._note()

            def answered(words: str | None) -> None:
                if words is not None:
                    self.do(lambda: write_note(run.path, replace(before, text=words)))

            self.app.push_screen(Ask(f"Note on {run.name}", before.text, may_be_empty=True), answered)

    def action_export(self) -> None:
        if run := self._run():
            self.ask_what_to_make(run, lambda: self.app.push_screen(DashboardScreen(run)))

    def action_paths(self) -> None:
        if self._snapshot and self._snapshot.run.name == self.selected:
            self.app.push_screen(PathsScreen(f"paths of {self.selected}", paths_of(self._snapshot)))

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


def _settings(run: Run) -> str:
    """The settings of `run` in words; empty where its plan cannot be read."""
    try:
        return settings_words(run.plan())
    except FinetuiError:
        return ""
