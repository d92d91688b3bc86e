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
from core.lens import Lens, Reply
from core.runs import Run, create_run
from core.sources import demo_files
from core.text import clean
from tui.completion import remember
from tui.dialogs import Ask
from tui.draft import STEPS, Checked, Draft, checked, command_line, save_draft, with_model
from tui.forecast import Count, Forecast, earlier, forecast
from tui.pages import DataPage, MethodPage, ModelPage, Page, problem_words
from tui.preview import DryRunScreen, Preview, preview_key
from tui.settings import ReviewPage, SettingsPage
from tui.widgets import Room, StepBar

DEBOUNCE_S = 0.15


class WizardScreen(Room[Run | None]):
    """Gives the run it started, or None when it is left; the draft stays either way until a run is made of it."""

    BINDINGS = [
        Binding("enter", "next", "Next"),
        Binding("escape", "back", "Back"),
        Binding("d", "dry_run", "Dry run"),
        Binding("v", "save", "Save as YAML"),
        Binding("w", "wait", "Start when free"),
        Binding("o", "other_gpu", "Other GPU"),
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
        """A look into the rows of a stage is over, or on its way."""

        stage: str
        words: Content
        used: int | None
        """Usable rows: None while they are read or where there are none, 0 where they are not here yet."""

    @dataclass
    class LensSaid(Message):
        """The lens answered: a row for the preview, or the tokens of a stage."""

        slot: str
        reply: Reply

    @dataclass
    class Judged(Message):
        """Model and rows were looked at: notices, or what is in the way."""

        notices: list[str]
        error: FinetuiError | None

    @dataclass
    class Foreseen(Message):
        """What the plan will take was worked out."""

        forecast: Forecast
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
        self.lens = Lens(lambda slot, reply: self.post_message(self.LensSaid(slot, reply)))
        self.usable: dict[str, int | None] = {}
        self.counts: dict[str, Count] = {}
        self.counted: dict[str, str] = {}
        self.judgement: WizardScreen.Judged | None = None
        self.foreseen: Forecast | None = None

    def on_unmount(self) -> None:
        self.lens.close()

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
        if step > STEPS.index("Data"):
            for stage in self.draft.stages:
                if self.usable.get(stage) is None:
                    self.rows_wanted(DataPage.Wanted(stage))
        if self.found:
            self.show_found(self.found)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        foreseen = self.foreseen if self.draft.step == len(STEPS) - 1 else None
        if action in ("wait", "other_gpu"):
            return bool(foreseen and (foreseen.busy if action == "wait" else foreseen.other_gpu is not None))
        return self.draft.step == len(STEPS) - 1 if action in ("save", "dry_run") else True

    def action_next(self) -> None:
        self.post_message(self.Turn(1))

    def action_back(self) -> None:
        self.post_message(self.Turn(-1))

    def action_wait(self) -> None:
        """Start once the run that has the device now has ended."""
        self.draft.values = {**self.draft.values, "wait_gpu": "true"}
        self.edited()

    def action_other_gpu(self) -> None:
        """Train on a GPU that none of our runs uses."""
        if self.foreseen and self.foreseen.other_gpu is not None:
            self.draft.values = {**self.draft.values, "gpu": str(self.foreseen.other_gpu)}
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
            if isinstance(self.page, ReviewPage):
                self.foresee(self.found, dict(self.counts), self.edits)

    def show_found(self, found: Checked) -> None:
        page = self.page
        self.look_closer()
        page.counts = self.counts
        page.show(found)
        if isinstance(page, ReviewPage):
            self.judgement = self.foreseen = None
            page.command(command_line(self.draft, self.runs_flag))
            if self.found_at != self.edits:
                page.verdict(Content.styled("○ working it out …", "$foreground-muted"))
            elif found.problems:
                page.verdict(Content("\n").join([problem_words(error) for error in found.problems.values()]))
            elif not self.starting:
                page.verdict(Content.styled("○ looking at model and rows …", "$foreground-muted"))
                self.judge(found)
                self.foresee(found, dict(self.counts), self.edits)

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

    @work(thread=True, exclusive=True, group="foresee", exit_on_error=False)
    def foresee(self, found: Checked, counts: dict[str, Count], edits: int) -> None:
        """Work out what the plan will take, against what this machine has and the runs before."""
        worker = get_current_worker()
        if found.resolved is None:
            return
        expected = forecast(found.resolved.plan, counts, self.runs_folder, earlier(self.runs_folder))
        if not worker.is_cancelled:
            self.post_message(self.Foreseen(expected, edits))

    @on(Foreseen)
    def foreseen_now(self, event: Foreseen) -> None:
        if event.edits == self.edits and isinstance(self.page, ReviewPage):
            self.foreseen = event.forecast
            self.page.forecast(event.forecast)
            self.refresh_bindings()
            self.say_judgement()

    @on(Judged)
    def judged(self, event: Judged) -> None:
        self.judgement = event
        self.say_judgement()

    def say_judgement(self) -> None:
        """Whether it can start, and the warnings, heaviest first."""
        if self.starting or self.judgement is None:
            return
        if self.judgement.error:
            self.say_verdict(problem_words(self.judgement.error))
            return
        warnings = [*(self.foreseen.warnings if self.foreseen else []), *self.judgement.notices]
        lines = [Content.styled(f"! {clean(warning, 400)}", "$text-warning") for warning in warnings]
        ready = Content.assemble(("✔ ready", "bold $text-success"), "  Enter starts it; it goes on when you leave.")
        self.say_verdict(Content("\n").join([ready, *lines]))

    def say_verdict(self, words: Content) -> None:
        if isinstance(self.page, ReviewPage):
            self.page.verdict(words)

    @on(DataPage.Wanted)
    def rows_wanted(self, event: DataPage.Wanted) -> None:
        self.usable.pop(event.stage, None)
        self.look_into_rows(event.stage, self.draft.model_copy(deep=True))

    @work(thread=True, group="rows", exit_on_error=False)
    def look_into_rows(self, stage: str, draft: Draft) -> None:
        """Read the rows of a stage as training will and say what is there."""
        worker = get_current_worker()
        rows = draft.data[stage]

        def say(words: Content, used: int | None = None) -> None:
            if not worker.is_cancelled and rows == self.draft.data[stage]:
                self.post_message(self.RowsSeen(stage, words, used))

        Event().wait(DEBOUNCE_S)
        if worker.is_cancelled or rows != self.draft.data[stage]:
            return
        if rows.kind == "hub":
            say(Content.styled("Fetched and checked when the run starts.", "$foreground-muted"), 0)
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
            say(rows_report(found), len(found.used))
        except FinetuiError as error:
            say(problem_words(error))

    @on(RowsSeen)
    def rows_seen(self, event: RowsSeen) -> None:
        self.usable[event.stage] = event.used
        if isinstance(self.page, DataPage) and event.stage in self.draft.stages:
            self.page.report(event.stage, event.words)
        self.show_counts()

    @on(Preview.Wanted)
    def look_closer(self) -> None:
        """Ask the lens for the row that the preview should show, and for the tokens of stages not counted yet."""
        plan = self.found.resolved.plan if self.found and self.found.resolved else None
        if plan is None or self.found_at != self.edits:
            for preview in self.page.query(Preview):
                preview.say(Content.styled("The plan does not hold together yet.", "$foreground-muted"))
            return
        for stage in self.draft.stages:
            used = self.usable.get(stage)
            key = f"{preview_key(plan, stage, -1)}|{plan.stage(stage).seed}|{used}"
            if used is None:
                self.counts.pop(stage, None)
                self.counted.pop(stage, None)
            elif self.counted.get(stage) != key:
                self.counted[stage] = key
                self.counts.pop(stage, None)
                if used:
                    self.counts[stage] = Count.of_rows(used, plan.stage(stage).data.holdout)
                self.lens.count(stage, key, plan, stage)
        for preview in self.page.query(Preview):
            stage, at = preview.stage, preview.at[preview.stage]
            if self.usable.get(stage) is None:
                preview.key = ""
                preview.say(Content.styled("Rows appear here as they will be trained.", "$foreground-muted"))
            elif preview.ask(key := preview_key(plan, stage, at)):
                self.lens.show("preview", key, plan, stage, at)

    @on(LensSaid)
    def lens_said(self, event: LensSaid) -> None:
        reply = event.reply
        if event.slot == "preview":
            for preview in self.page.query(Preview):
                preview.tell(reply)
        elif reply["key"] == self.counted.get(event.slot) and "error" not in reply:
            self.counts[event.slot] = Count.of_reply(reply)
            self.show_counts()

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
            with contextlib.suppress(FinetuiError):
                remember(self.draft)
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

    def action_dry_run(self) -> None:
        if self.found and self.found.resolved and not self.found.problems:
            self.app.push_screen(DryRunScreen(self.found.resolved))

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
