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
from core.errors import FinetuiError
from core.lens import Lens, Reply
from core.paths import expanded
from core.plan import Plan
from core.ready import Standby
from core.runs import Run, create_run
from core.text import clean
from tui.completion import remember, remember_columns
from tui.data_page import ColumnsScreen, DataPage
from tui.data_room import DataRoom
from tui.dialogs import Ask
from tui.draft import STEPS, Checked, Draft, checked, command_line, save_draft, with_model
from tui.dry_run import DryRunScreen
from tui.forecast import Count
from tui.inspection import LEDGER_SLOT, Inspection, LensSaid, LookSaid
from tui.pages import MethodPage, ModelPage, Page
from tui.review import ReviewPage
from tui.settings import SettingsPage
from tui.widgets import Room, StepBar

DEBOUNCE_S = 0.15


class WizardScreen(Room[Run | None]):
    """Gives the run it started, or None when it is left; the draft stays either way until a run is made of it."""

    BINDINGS = [
        Binding("enter", "next", "Next"),
        Binding("enter", "start_run", "Start"),
        Binding("escape", "back", "Back"),
        Binding("d", "dry_run", "Dry run"),
        Binding("v", "save", "Save as YAML"),
        Binding("w", "wait", "Start when free"),
        Binding("o", "other_gpu", "Other GPU"),
        Binding("ctrl+r", "reset", "Reset to presets"),
        *(Binding(str(step + 1), f"go_to({step})", f"Back to {STEPS[step]}", show=False) for step in range(4)),
        Binding("f1", "app.help", "Help"),
    ]
    place = "new run"

    @dataclass
    class Resolved(Message):
        """What the draft makes was worked out."""

        found: Checked
        edits: int

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
        self.inspection = Inspection(self.post_message)
        self.standby = Standby()

    def on_unmount(self) -> None:
        self.inspection.close()
        self.standby.close()

    @property
    def lens(self) -> Lens:
        return self.inspection.lens

    @property
    def counts(self) -> dict[str, Count]:
        """What is known of each stage's examples and tokens."""
        return self.inspection.counts

    @property
    def plan(self) -> Plan | None:
        """The plan that the draft makes, while it is the newest."""
        return self.found.resolved.plan if self.found and self.found.resolved and self.found_at == self.edits else None

    @property
    def room(self) -> DataRoom | None:
        """The data room, where its page is shown."""
        return next(iter(self.page.query(DataRoom)), None)

    @property
    def review(self) -> ReviewPage | None:
        """The last page, where it is shown."""
        return next(iter(self.query(ReviewPage)), None)

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
        pages = (
            MethodPage, ModelPage, DataPage, lambda draft: SettingsPage(draft, self.found),
            lambda draft: ReviewPage(draft, self.runs_folder, self.standby),
        )  # fmt: skip
        states = ["done"] * step + ["running"] + ["waiting"] * (len(STEPS) - step - 1)
        self.query_one(StepBar).show(
            [(f"{n} {name}", state) for n, (name, state) in enumerate(zip(STEPS, states, strict=True), 1)], step
        )
        holder = self.query_one("#page", Container)
        await holder.remove_children()
        await holder.mount(pages[step](self.draft))
        if not self.query(Page):  # the app is being left
            return
        self.refresh_bindings()
        if self.room:
            for stage in self.draft.stages:
                self.inspection.fill(self.room, stage, self.plan)
        if self.found:
            self.show_found(self.found)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "reset":
            return self.draft.step >= STEPS.index("Settings")
        foreseen = self.review.foreseen if self.review else None
        if action in ("wait", "other_gpu"):
            return bool(foreseen and (foreseen.busy if action == "wait" else foreseen.other_gpu is not None))
        last = self.draft.step == len(STEPS) - 1
        return last if action in ("save", "dry_run", "start_run", "go_to") else not last if action == "next" else True

    def action_next(self) -> None:
        self.post_message(self.Turn(1))

    action_start_run = action_next

    def action_go_to(self, step: int) -> None:
        """Back to an earlier step, and there to what is in the way."""
        if not self.starting:
            self.post_message(self.Turn(step - self.draft.step))

    def action_back(self) -> None:
        self.post_message(self.Turn(-1))

    def action_wait(self) -> None:
        """Start once the run that has the device now has ended."""
        self.draft.values = {**self.draft.values, "wait_gpu": "true"}
        self.edited()

    def action_other_gpu(self) -> None:
        """Train on a GPU that none of our runs uses."""
        foreseen = self.review.foreseen if self.review else None
        if foreseen and foreseen.other_gpu is not None:
            self.draft.values = {**self.draft.values, "gpu": str(foreseen.other_gpu)}
            self.edited()

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
        self.next_wanted = False
        if self.draft.step or not event.by:
            await self.turn_to(max(self.draft.step + event.by, 0))
            if event.by < -1:
                self.page.ready(self.found)
            self.keep()
        elif not self.starting:
            self.dismiss(None)

    async def go_on(self) -> None:
        """To the next page, or from the last one into the run."""
        self.next_wanted = self.page.waits_for_check and (self.found_at != self.edits or self.page.waits_for_rows)
        if self.next_wanted:
            return
        if not self.page.ready(self.found):
            self.inspection.doubt()  # what was wrong may have been mended elsewhere in the meantime
            self.look_closer()
            return
        if self.draft.step < len(STEPS) - 1:
            await self.turn_to(self.draft.step + 1)
            self.keep()
        elif not self.starting:
            self.starting = True
            if review := self.review:
                review.begin()
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
                words = f"The draft cannot be kept: {error.strerror}. FINETUI_CACHE names another folder."
                self.notify(clean(words), severity="warning", markup=False)

    @work(thread=True, exclusive=True, group="plan", exit_on_error=False)
    def work_out(self) -> None:
        """Resolve the draft once typing pauses."""
        worker, edits = get_current_worker(), self.edits
        Event().wait(DEBOUNCE_S)
        if not worker.is_cancelled:
            draft = self.draft.model_copy(deep=True)
            found = with_model(checked(draft)) if draft.model.strip() else checked(draft)
            if not worker.is_cancelled:
                self.post_message(self.Resolved(found, edits))

    @on(Resolved)
    async def resolved(self, event: Resolved) -> None:
        self.found, self.found_at = event.found, event.edits
        self.show_found(event.found)
        if self.next_wanted and self.found_at == self.edits:
            self.next_wanted = False
            await self.go_on()

    def show_counts(self) -> None:
        """Let the page say what the plan makes of the rows, as far as they are known."""
        if self.found and self.found_at == self.edits:
            self.look_closer()
            self.page.counts = self.counts
            self.page.show(self.found)
            if review := self.review:
                review.foresee(self.found, dict(self.counts))

    def show_found(self, found: Checked) -> None:
        self.look_closer()
        self.page.counts = self.counts
        self.page.show(found)
        if review := self.review:
            review.command(command_line(self.draft, self.runs_flag))
            if self.found_at == self.edits:
                review.look(found)
            else:
                review.verdict(Content.styled("○ working it out …", "$foreground-muted"))

    # --- rows ---

    @on(DataPage.Wanted)
    def rows_wanted(self, event: DataPage.Wanted) -> None:
        self.inspection.forget(event.stage)
        if self.room:
            self.room.forget(event.stage)

    @on(LookSaid)
    async def look_said(self, event: LookSaid) -> None:
        if event.stage == LEDGER_SLOT:
            self.ledger_saved(event.said, event.said.get("saved", ""))
            return
        known = self.inspection.heard(event, self.room)
        self.report_rows()
        if known:
            self.show_counts()
        if self.next_wanted:
            await self.go_on()

    def report_rows(self) -> None:
        """Put what is known of the rows under their lines."""
        if isinstance(self.page, DataPage):
            for stage in self.draft.stages:
                self.page.report(stage, self.inspection.words.get(stage, Content("")))
            self.page.troubles = self.inspection.troubles

    @on(DataRoom.Wanted)
    def look_closer(self) -> None:
        """Have the rows looked at that are not known yet, and ask the lens for what the room should show."""
        plan, room = self.plan, self.room
        if plan is None or self.found is None:
            if room:
                room.say(Content.styled("The plan does not hold together yet.", "$foreground-muted"))
            return
        if self.draft.step >= STEPS.index("Data"):
            self.inspection.look(self.found, self.draft)
            self.report_rows()
            self.inspection.ask(plan, self.draft.stages, room)

    @on(LensSaid)
    def lens_said(self, event: LensSaid) -> None:
        if event.slot == LEDGER_SLOT:
            self.ledger_saved(event.reply, event.reply["key"])
        elif self.inspection.answered(event, self.plan, self.room):
            self.report_rows()
            self.show_counts()

    @on(DataRoom.LimitMoved)
    def limit_moved(self, event: DataRoom.LimitMoved) -> None:
        if self.plan:
            self.lens.limit(f"{event.stage} limit", str(event.at), self.plan, event.stage, event.at)

    @on(DataRoom.LimitKept)
    def limit_kept(self, event: DataRoom.LimitKept) -> None:
        """Make the limit that was tried the stage's own; KTO's prompts may not be longer."""
        values = {f"{event.stage}.max_length": str(event.at)}
        if event.stage == "kto" and self.plan and self.plan.kto.max_prompt_length > event.at:
            values["kto.max_prompt_length"] = str(event.at)
        self.draft.values = {**self.draft.values, **values}
        self.edited()

    @on(DataRoom.Done)
    def room_done(self) -> None:
        self.post_message(self.Turn(1))

    @on(DataRoom.Asked)
    def room_asked(self, event: DataRoom.Asked) -> None:
        stage = event.stage
        if event.what == "columns":
            names, parts = self.inspection.columns(stage)
            chosen = self.draft.data[stage].columns
            self.app.push_screen(ColumnsScreen(names, parts, chosen), lambda found: self.take_columns(stage, found))
        elif event.what == "fetch" and self.found:
            self.inspection.look(self.found, self.draft, fetch=(stage,))
            self.report_rows()
        elif event.what == "ledger":
            name = f"{stage}-ledger.csv"
            self.app.push_screen(Ask("Save every row with its fate as", name), lambda to: self.save_ledger(stage, to))
        elif event.what == "count" and self.found and self.found.resolved:
            self.app.push_screen(DryRunScreen(self.found.resolved), self.count_again)

    def take_columns(self, stage: str, found: dict[str, str] | None) -> None:
        if found is not None and found != self.draft.data[stage].columns:
            rows = self.draft.data[stage] = self.draft.data[stage].model_copy(update={"columns": found})
            with contextlib.suppress(FinetuiError):
                remember_columns(rows)
            self.rows_wanted(DataPage.Wanted(stage))
            self.edited()

    def count_again(self, _: None) -> None:
        """More tokens may be known after a dry run."""
        self.inspection.count_again()
        self.look_closer()

    def save_ledger(self, stage: str, name: str | None) -> None:
        """Have every row of a stage written with its fate."""
        if name and self.plan:
            try:
                self.inspection.save_ledger(self.plan, stage, expanded(name).absolute())
            except FinetuiError as error:
                self.notify(clean(error, 300), severity="error", markup=False)

    def ledger_saved(self, said: Reply, path: str) -> None:
        if "error" in said:
            self.notify(clean(said["error"], 300), severity="error", markup=False)
        elif path:
            self.notify(clean(path, 300), title="Saved", markup=False)

    @work(thread=True, group="start", exit_on_error=False)
    def start(self) -> None:
        """Check once more, make the run and start it."""
        try:
            found = checked(self.draft.model_copy(deep=True))
            if found.problems or found.resolved is None:
                path, problem = next(iter(found.problems.items()))
                problem.about = problem.about or path
                raise problem
            preflight(found.resolved.plan)
            run = create_run(self.runs_folder, found.resolved)
            runner.start(run, ready=self.standby.take())
            with contextlib.suppress(FinetuiError):
                remember(self.draft)
        except FinetuiError as error:
            self.post_message(self.Refused(error))
        else:
            self.post_message(self.Started(run))

    @on(Room.Refused)
    def refused(self, event: Room.Refused) -> None:
        self.starting = False
        if review := self.review:
            review.refuse(event.error)

    @on(Started)
    def started(self, event: Started) -> None:
        with contextlib.suppress(OSError):
            self.draft_file.unlink()
        self.dismiss(event.run)

    def action_dry_run(self) -> None:
        if self.found and self.found.resolved and not self.found.problems:
            self.app.push_screen(DryRunScreen(self.found.resolved))

    def action_save(self) -> None:
        self.app.push_screen(Ask("Save the plan as", f"finetui-{self.draft.method}.yaml"), self.save_to)

    def save_to(self, name: str | None) -> None:
        found = self.found
        if not name or not found or not found.resolved:
            return
        path = expanded(name).absolute()
        try:
            if path.exists():
                raise FinetuiError(f"{path} exists already.", "Choose another name.")
            save_plan(found.resolved, path)
            self.notify(
                clean(f"Start it with: finetui {self.draft.method} --config {path}"), title="Saved", markup=False
            )
        except FinetuiError as error:
            self.notify(clean(error), severity="error", markup=False)
