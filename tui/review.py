"""The wizard's last page: the plan as the run will use it, what it will take, and whether it can start."""

import textwrap
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from textual import on, work
from textual.app import ComposeResult
from textual.containers import Container
from textual.content import Content
from textual.message import Message
from textual.worker import get_current_worker

from core.commands import preflight
from core.config import OPTIONS
from core.errors import FinetuiError
from core.plan import Plan
from core.ready import Standby
from core.text import clean
from tui.draft import SOURCE, STEPS, Checked, Draft
from tui.forecast import Count, Forecast, earlier, forecast
from tui.pages import Page, problem_words
from tui.settings import GROUPS, is_rows, shown_value, source_of
from tui.widgets import Words

NAME, VALUE = 28, 24
"""Cells of the names and values of the plan."""
READ_S = 1.0
"""On the review for so long, a person is reading it."""


class ReviewPage(Page):
    """The plan as the run will use it, each value with its source; the command; whether model and rows are fit."""

    can_focus = True

    @dataclass
    class Judged(Message):
        """Model and rows were looked at: notices, or what is in the way."""

        found: Checked
        notices: list[str]
        error: FinetuiError | None

    @dataclass
    class Foreseen(Message):
        """What the plan will take was worked out."""

        found: Checked
        forecast: Forecast

    def __init__(self, draft: Draft, runs_folder: Path, standby: Standby) -> None:
        super().__init__(draft)
        self.runs_folder, self.standby = runs_folder, standby
        self.judgement: ReviewPage.Judged | None = None
        self.foreseen: Forecast | None = None
        self.starting = False
        self._found: Checked | None = None
        self._shown: Checked | None = None

    def compose(self) -> ComposeResult:
        yield Words(id="what")
        yield Words(id="verdict", classes="gap")
        with Container(id="forecast"):
            stages = (stage.upper() for stage in self.draft.stages)
            for name in (*stages, "Memory", "Disk", "Start", "Duration", "Changed"):
                yield Words(Content.styled(name, "bold"), id=f"forecast-{name.lower()}-name")
                yield Words(Content.styled("…", "$foreground-muted"), id=f"forecast-{name.lower()}")
        yield Words(id="command", classes="gap")
        yield Words(id="plan", classes="gap")

    def on_mount(self) -> None:
        self._show_start(False)
        self.focus()

    def show(self, found: Checked) -> None:
        if found.resolved is None:
            self.query_one("#what", Words).say("This plan does not hold together yet.")
            return
        plan = found.resolved.plan
        model = clean(plan.model.name or "a model", 60)
        rows = ", ".join(f"{stage.upper()} on {rows_words(plan, stage)}" for stage in plan.training_stages)
        then = clean(after_words(plan), 200)
        self.query_one("#what", Words).say(Content.assemble((model, "bold"), "\n", f"{clean(rows, 300)}{then}"))
        self._show_plan(found)

    def on_resize(self) -> None:
        if self._shown:
            self._show_plan(self._shown)

    def _show_plan(self, found: Checked) -> None:
        self._shown = found
        self.query_one("#plan", Words).say(plan_words(found, self.draft.stages, max(self.size.width - 1, 40)))

    def command(self, words: str) -> None:
        self.query_one("#command", Words).say(
            Content.assemble(("The same without the app: ", "$foreground-muted"), clean(words, 2000))
        )

    def verdict(self, words: Content) -> None:
        self.query_one("#verdict", Words).say(words)

    def look(self, found: Checked) -> None:
        """Find out whether the plan can start, and what it will take."""
        self._found, self.judgement, self.foreseen = found, None, None
        if found.problems:
            for path, error in found.problems.items():
                error.about = error.about or path
            self.verdict(Content("\n").join([refusal(error) for error in found.problems.values()]))
        elif not self.starting:
            self.verdict(Content.styled("○ looking at model and rows …", "$foreground-muted"))
            self.judge(found)
            self.foresee(found, dict(self.counts))

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
            self.post_message(self.Judged(found, notices, trouble))

    @work(thread=True, exclusive=True, group="foresee", exit_on_error=False)
    def foresee(self, found: Checked, counts: dict[str, Count]) -> None:
        """Work out what the plan will take, against what this machine has and the runs before."""
        worker = get_current_worker()
        if found.resolved is None:
            return
        expected = forecast(found.resolved.plan, counts, self.runs_folder, earlier(self.runs_folder))
        if not worker.is_cancelled:
            self.post_message(self.Foreseen(found, expected))

    @on(Foreseen)
    def foreseen_now(self, event: Foreseen) -> None:
        if event.found is self._found:
            self.foreseen = event.forecast
            self.forecast(event.forecast)
            self.refresh_bindings()
            self.say_judgement()

    @on(Judged)
    def judged(self, event: Judged) -> None:
        if event.found is self._found:
            self.judgement = event
            self.say_judgement()

    def say_judgement(self) -> None:
        """Whether it can start, and the warnings, heaviest first."""
        if self.starting or self.judgement is None:
            return
        if self.judgement.error:
            self.verdict(refusal(self.judgement.error))
            return
        warnings = [*(self.foreseen.warnings if self.foreseen else []), *self.judgement.notices]
        lines = [Content.styled(f"! {clean(warning, 400)}", "$text-warning") for warning in warnings]
        ready = Content.assemble(("✔ ready", "bold $text-success"), "  Enter starts it; it goes on when you leave.")
        self.verdict(Content("\n").join([ready, *lines]))
        if resolved := self.judgement.found.resolved:
            self.have_trainer_wait(resolved.plan)

    @work(thread=True, exclusive=True, group="ready", exit_on_error=False)
    def have_trainer_wait(self, plan: Plan) -> None:
        """Let a trainer import what it needs while the review is read."""
        worker = get_current_worker()
        Event().wait(READ_S)
        if not worker.is_cancelled and not self.starting:
            self.standby.prepare(plan)

    def begin(self) -> None:
        """The run is being started."""
        self.starting = True
        self.verdict(Content.styled("● starting …", "$text-primary"))

    def refuse(self, error: FinetuiError) -> None:
        """The run could not be started."""
        self.starting = False
        self.verdict(refusal(error))

    def forecast(self, forecast: Forecast) -> None:
        for name, words, hue in forecast.lines:
            for line in self.query(f"#forecast-{name.lower()}").results(Words):
                line.say(Content.styled(clean(words, 1200, newlines=True), hue))
        self._show_start(any(name == "Start" for name, _, _ in forecast.lines))

    def _show_start(self, shown: bool) -> None:
        """Whether the run waits for something before it starts is worth a line only where it does."""
        for line in self.query("#forecast-start, #forecast-start-name").results(Words):
            line.display = shown


def step_of(error: FinetuiError) -> int:
    """The step on which a refusal can be mended."""
    if error.about.split(".")[0] == "model":
        return STEPS.index("Model")
    if error.about.endswith(".data") or is_rows(error.about):
        return STEPS.index("Data")
    return STEPS.index("Settings")


def refusal(error: FinetuiError) -> Content:
    """What is in the way of a start, and the key that leads to where it can be mended."""
    step = step_of(error)
    back = Content.assemble("\n  ", (str(step + 1), "bold"), f" leads back to {STEPS[step]}.")
    return Content.assemble(problem_words(error), back)


def after_words(plan: Plan) -> str:
    """What follows the training, in a few words; empty for nothing."""
    export = plan.export
    parts = ["a score on held-out prompts"] if plan.evaluate.enabled else []
    if export.merged_forms:
        parts.append(f"merge ({export.merged_forms[-1].removeprefix('merged_').replace('bit', '-bit')})")
    if export.gguf:
        parts.append(f"GGUF {', '.join(export.gguf)}")
    if export.upload:
        parts.append(f"upload to {export.upload} ({'private' if export.private else 'public if it is new'})")
    return f", then {', '.join(parts)}" if parts else ""


def rows_words(plan: Plan, stage: str) -> str:
    data = plan.stage(stage).data
    return "the demo's rows" if data.demo else data.file or data.dataset or "no rows yet"


def plan_words(found: Checked, stages: list[str], width: int) -> Content:
    """Every value of the plan that applies, with its source; what was set here is marked.

    What is too long for one line of `width` cells goes on below its beginning.
    """
    assert found.resolved
    lines: list[Content] = []
    group = None
    for path in OPTIONS:
        section = path.split(".")[0] if "." in path else ""
        if section in ("sft", "kto") and section not in stages:
            continue
        if section != group:
            group = section
            lines += [Content(""), Content.styled(GROUPS.get(section, section), "bold $text-accent")]
        value = clean(shown_value(found.resolved.plan, path), 300) or "–"
        source = clean(source_of(found, path), 80)
        own = "bold" if found.resolved.sources.get(path) == SOURCE else ""
        name = path.removeprefix(f"{section}.") if section else path
        head, hue = f"{clean(name, 40):<{NAME}} ", own or "$foreground-muted"
        room, below = width - NAME - 1, "\n" + " " * (NAME + 1)
        if max(len(value), VALUE) + 2 + len(source) <= room:
            lines.append(Content.assemble((f"{head}{value:<{VALUE}}  ", own), (source, hue)))
        else:
            whole = below.join(textwrap.wrap(value, room)) or value
            lines.append(Content.assemble((head + whole, own), below, (source, hue)))
    return Content("\n").join(lines[1:])
