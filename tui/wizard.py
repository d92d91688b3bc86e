"""The wizard: Method → Model → Data → Settings → Review over one draft, which is on disk after every change."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Container
from textual.content import Content
from textual.message import Message
from textual.worker import get_current_worker

from core import runner
from core.commands import preflight
from core.config import save_plan
from core.data import Rows, read_rows
from core.errors import FinetuiError
from core.runs import Run, create_run
from core.sources import demo_files
from core.text import clean
from tui.dialogs import Ask
from tui.draft import STEPS, Checked, Draft, checked, command_line, save_draft
from tui.pages import DataPage, MethodPage, ModelPage, Page, problem_words
from tui.settings import ReviewPage, SettingsPage
from tui.widgets import Room, StepBar

DEBOUNCE_S = 0.15


class WizardScreen(Room[Run | None]):
    """Gives the run it started, or None when it is left; the draft stays either way until a run is made of it."""

    BINDINGS = [
        Binding("enter", "next", "Next"),
        Binding("escape", "back", "Back"),
        Binding("v", "save", "Save as YAML"),
        Binding("ctrl+r", "reset", "Reset to presets"),
        Binding("f1", "app.help", "Help"),
    ]
    place = "new run"

    @dataclass
    class Resolved(Message):
        """What the draft makes was worked out."""

        found: Checked
        edits: int

    @dataclass
    class RowsSeen(Message):
        """A look into the rows of a stage is over, or on its way (`done` False)."""

        stage: str
        words: Content

    @dataclass
    class Judged(Message):
        """Model and rows were looked at: notices, or what is in the way."""

        notices: list[str]
        error: FinetuiError | None

    @dataclass
    class Turn(Message):
        """Another page is wanted. A message, so that a page never changes while another handler works on it."""

        by: int

    @dataclass
    class Started(Message):
        run: Run

    def __init__(self, draft: Draft, draft_file: Path, runs_folder: Path, runs_flag: str = "") -> None:
        super().__init__()
        self.draft, self.draft_file = draft, draft_file
        self.runs_folder, self.runs_flag = runs_folder, runs_flag
        self.found: Checked | None = None
        self.edits, self.found_at = 1, 0
        self.next_wanted = False
        self.starting = False
        self._save_failed = False

    def body(self) -> ComposeResult:
        yield StepBar(id="steps")
        yield Container(id="page")

    async def on_mount(self) -> None:
        await self.turn_to(self.draft.step)
        self.work_out()

    @property
    def page(self) -> Page:
        return self.query_one(Page)

    async def turn_to(self, step: int) -> None:
        """Show a page, built anew from the draft."""
        self.draft.step = step
        pages = (MethodPage, ModelPage, DataPage, lambda draft: SettingsPage(draft, self.found), ReviewPage)
        states = ["done"] * step + ["running"] + ["waiting"] * (len(STEPS) - step - 1)
        self.query_one(StepBar).show(
            [(f"{n} {name}", state) for n, (name, state) in enumerate(zip(STEPS, states, strict=True), 1)], step
        )
        holder = self.query_one("#page", Container)
        await holder.remove_children()
        await holder.mount(pages[step](self.draft))
        self.refresh_bindings()
        if self.found:
            self.show_found(self.found)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.draft.step == len(STEPS) - 1 if action == "save" else True

    def action_next(self) -> None:
        self.post_message(self.Turn(1))

    def action_back(self) -> None:
        self.post_message(self.Turn(-1))

    def action_reset(self) -> None:
        """Forget the settings that were typed; method, model and rows stay."""
        self.draft.values = {}
        self.edited()
        self.post_message(self.Turn(0))

    @on(Page.Done)
    def page_done(self) -> None:
        self.post_message(self.Turn(1))

    @on(Turn)
    async def turned(self, event: Turn) -> None:
        if event.by > 0:
            await self.go_on()
            return
        if self.draft.step or not event.by:
            await self.turn_to(self.draft.step + event.by)
            self.keep()
        elif not self.starting:
            self.dismiss(None)

    async def go_on(self) -> None:
        """To the next page, or from the last one into the run."""
        if self.page.waits_for_check and self.found_at != self.edits:
            self.next_wanted = True
            return
        if not self.page.ready(self.found):
            return
        if self.draft.step < len(STEPS) - 1:
            await self.turn_to(self.draft.step + 1)
            self.keep()
        elif not self.starting:
            self.starting = True
            self.say_verdict(Content.styled("● starting …", "$text-primary"))
            self.start()

    @on(Page.Edited)
    def edited(self) -> None:
        self.edits += 1
        self.next_wanted = False
        self.keep()
        self.work_out()

    def keep(self) -> None:
        """Put the draft on disk, so that it survives the end of the terminal."""
        try:
            save_draft(self.draft, self.draft_file)
        except OSError as error:
            if not self._save_failed:
                self._save_failed = True
                self.notify(clean(f"The draft cannot be kept: {error.strerror}."), severity="warning", markup=False)

    @work(thread=True, exclusive=True, group="plan", exit_on_error=False)
    def work_out(self) -> None:
        """Resolve the draft once typing pauses."""
        worker, edits = get_current_worker(), self.edits
        Event().wait(DEBOUNCE_S)
        if not worker.is_cancelled:
            found = checked(self.draft.model_copy(deep=True))
            if not worker.is_cancelled:
                self.post_message(self.Resolved(found, edits))

    @on(Resolved)
    async def resolved(self, event: Resolved) -> None:
        self.found, self.found_at = event.found, event.edits
        self.show_found(event.found)
        if self.next_wanted and self.found_at == self.edits:
            self.next_wanted = False
            await self.go_on()

    def show_found(self, found: Checked) -> None:
        page = self.page
        page.show(found)
        if isinstance(page, ReviewPage):
            page.command(command_line(self.draft, self.runs_flag))
            if self.found_at != self.edits:
                page.verdict(Content.styled("○ working it out …", "$foreground-muted"))
            elif found.problems:
                page.verdict(Content("\n").join([problem_words(error) for error in found.problems.values()]))
            elif not self.starting:
                page.verdict(Content.styled("○ looking at model and rows …", "$foreground-muted"))
                self.judge(found)

    @work(thread=True, exclusive=True, group="judge", exit_on_error=False)
    def judge(self, found: Checked) -> None:
        """Look at model and rows as the command line does before it starts."""
        worker = get_current_worker()
        notices, trouble = [], None
        try:
            notices = preflight(found.resolved.plan) if found.resolved else []
        except FinetuiError as error:
            trouble = error
        if not worker.is_cancelled:
            self.post_message(self.Judged(notices, trouble))

    @on(Judged)
    def judged(self, event: Judged) -> None:
        if self.starting:
            return
        if event.error:
            self.say_verdict(problem_words(event.error))
            return
        lines = [Content.styled(f"! {clean(notice, 400)}", "$text-warning") for notice in event.notices]
        ready = Content.assemble(("✔ ready", "bold $text-success"), "  Enter starts it; it goes on when you leave.")
        self.say_verdict(Content("\n").join([ready, *lines]))

    def say_verdict(self, words: Content) -> None:
        if isinstance(self.page, ReviewPage):
            self.page.verdict(words)

    @on(DataPage.Wanted)
    def rows_wanted(self, event: DataPage.Wanted) -> None:
        self.look_into_rows(event.stage, self.draft.model_copy(deep=True))

    @work(thread=True, group="rows", exit_on_error=False)
    def look_into_rows(self, stage: str, draft: Draft) -> None:
        """Read the rows of a stage as training will and say what is there."""
        worker = get_current_worker()
        rows = draft.data[stage]

        def say(words: Content) -> None:
            if not worker.is_cancelled and rows == self.draft.data[stage]:
                self.post_message(self.RowsSeen(stage, words))

        Event().wait(DEBOUNCE_S)
        if worker.is_cancelled or rows != self.draft.data[stage]:
            return
        if rows.kind == "hub":
            say(Content.styled("Fetched and checked when the run starts.", "$foreground-muted"))
            return
        if rows.kind == "file" and not rows.file.strip():
            say(Content.styled("Type the path of a file.", "$foreground-muted"))
            return
        say(Content.styled("○ reading …", "$foreground-muted"))
        try:
            path = demo_files()[stage] if rows.kind == "demo" else Path(rows.file.strip()).expanduser().absolute()
            learn_bad = draft.changed().get(f"{stage}.data.include_undesirable") == "true"
            found = read_rows(
                path,
                stage,
                include_undesirable=learn_bad,
                progress=lambda count: say(Content.styled(f"○ {count:,} rows read …", "$foreground-muted")),
            )
            say(rows_report(found))
        except FinetuiError as error:
            say(problem_words(error))

    @on(RowsSeen)
    def rows_seen(self, event: RowsSeen) -> None:
        if isinstance(self.page, DataPage) and event.stage in self.draft.stages:
            self.page.report(event.stage, event.words)

    @work(thread=True, group="start", exit_on_error=False)
    def start(self) -> None:
        """Check once more, make the run and start it."""
        try:
            found = checked(self.draft.model_copy(deep=True))
            if found.problems or found.resolved is None:
                raise next(iter(found.problems.values()))
            preflight(found.resolved.plan)
            run = create_run(self.runs_folder, found.resolved)
            runner.start(run)
        except FinetuiError as error:
            self.post_message(self.Refused(error))
        else:
            self.post_message(self.Started(run))

    @on(Room.Refused)
    def refused(self, event: Room.Refused) -> None:
        self.starting = False
        self.say_verdict(problem_words(event.error))

    @on(Started)
    def started(self, event: Started) -> None:
        with contextlib.suppress(OSError):
            self.draft_file.unlink()
        self.dismiss(event.run)

    def action_save(self) -> None:
        self.app.push_screen(Ask("Save the plan as", f"finetui-{self.draft.method}.yaml"), self.save_to)

    def save_to(self, name: str | None) -> None:
        found = self.found
        if not name or not found or not found.resolved:
            return
        path = Path(name).expanduser().absolute()
        try:
            if path.exists():
                raise FinetuiError(f"{path} exists already.", "Choose another name.")
            save_plan(found.resolved, path)
            self.notify(
                clean(f"Start it with: finetui {self.draft.method} --config {path}"), title="Saved", markup=False
            )
        except FinetuiError as error:
            self.notify(clean(error), severity="error", markup=False)


def rows_report(rows: Rows) -> Content:
    """Rows, labels, and what is left out and why, with the first lines."""
    labels = rows.labels
    parts = [
        f"{labels[key]:,} {word}" for key, word in ((True, "good"), (False, "bad"), (None, "unlabelled")) if labels[key]
    ]
    lines = [
        Content.assemble(
            (f"✔ {rows.total:,} rows, {len(rows.used):,} examples", "$text-success"), f"  ({', '.join(parts)})"
        )
    ]
    for word, entries in (("left out", rows.left_out), ("repaired", rows.repaired)):
        by_reason: dict[str, list[int]] = {}
        for entry in entries:
            by_reason.setdefault(entry.reason, []).append(entry.line)
        for reason, where in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:4]:
            shown = ", ".join(map(str, where[:5])) + (" …" if len(where) > 5 else "")
            words = f"! {word}: {len(where):,} × {clean(reason, 120)} (line {shown})"
            lines.append(Content.styled(words, "$text-warning"))
    return Content("\n").join(lines)
