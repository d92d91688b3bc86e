"""The dashboard: one run, live or past, as its log tells it. Leaving it never stops the run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Container, Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Static
from textual.worker import get_current_worker

from core import runner
from core.events import RunState, StageState
from core.plan import TRAINING_STAGES
from core.runs import Run, request_stop
from core.text import clean, duration, number
from core.watch import GLYPHS, result_table
from tui.dialogs import LogScreen, RunRoom
from tui.follow import LIVE, Follower, LogTail, Snapshot
from tui.widgets import HUES, Banner, Chart, StepBar, Words, bar, status_words

PERIOD_S = 1.0
CHARTS = (("loss", "loss"), ("rewards/margins", "margin"), ("eval_loss", "loss on held-out rows"))
FIGURES = (
    ("eval_loss", "held-out loss", 4),
    ("rewards/margins", "margin", 3),
    ("kl", "kl", 3),
    ("learning_rate", "rate", 3),
    ("grad_norm", "gradient", 3),
)
STAGE_NAMES = {"sft": "SFT", "kto": "KTO", "evaluate": "evaluate"}


class Body(VerticalScroll):
    """The part that scrolls; left and right go through the stages' curves."""

    BINDINGS = [
        Binding("left", "screen.stage(-1)", "Stage", key_display="←→"),
        Binding("right", "screen.stage(1)", "Curves of the next stage", show=False),
    ]


class DashboardScreen(RunRoom):
    BINDINGS = [
        Binding("s", "stop", "Stop with checkpoint"),
        Binding("a", "abort", "Abort"),
        Binding("r", "resume", "Resume"),
        Binding("l", "log", "Log"),
        Binding("escape,h", "leave", "Home", key_display="esc"),
        Binding("q", "app.quit", "Quit"),
        Binding("question_mark,f1", "app.help", "Help", key_display="?"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]

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
        self.chosen_stage: str | None = None
        self.log_screen: LogScreen | None = None
        self._log_tail: LogTail | None = None
        self._result: Any = {}
        self._keys_for: tuple[str, int] = ("", 0)

    def body(self) -> ComposeResult:
        yield StepBar(id="steps")
        yield Words("reading the log …", id="now")
        with Body(id="scroll"):
            yield Static(id="result", markup=False)
            yield Words(id="end")
            with Container(id="columns"):
                with Vertical(id="left"):
                    with Horizontal(id="charts"):
                        yield Chart(id="chart-a")
                        yield Chart(id="chart-b")
                    yield Words(id="notes")
                yield Words(id="side")

    def on_mount(self) -> None:
        self.query_one("#scroll").focus()
        self.follow()

    def on_unmount(self) -> None:
        self.wake.set()

    @work(thread=True, group="follow", exit_on_error=False)
    def follow(self) -> None:
        """Tail the run's files and post one snapshot a second while something changes."""
        worker, follower = get_current_worker(), Follower(self.run_shown)
        while not worker.is_cancelled:
            if snapshot := follower.read():
                self.post_message(self.Seen(snapshot))
            if (tail := self._log_tail) and (lines := tail.read()):
                self.post_message(self.Logged(lines))
            self.wake.wait(PERIOD_S)
            self.wake.clear()

    @on(Seen)
    def seen(self, event: Seen) -> None:
        self.snapshot = event.snapshot
        with self.app.batch_update():
            self.paint(event.snapshot)
        if (keys := (event.snapshot.status, len(self.trained()))) != self._keys_for:
            self._keys_for = keys
            self.refresh_bindings()

    @on(Logged)
    def logged(self, event: Logged) -> None:
        if self.log_screen is not None and self.log_screen.is_attached:
            self.log_screen.add(event.lines)

    def paint(self, snapshot: Snapshot) -> None:
        """Everything on this screen is painted here."""
        state = snapshot.state
        self.query_one(Banner).say(status_words(snapshot.status))
        steps = [(STAGE_NAMES.get(stage.name, stage.name), _stage_state(stage, snapshot)) for stage in state.stages]
        shown = self.shown_stage(state)
        here = state.stages.index(shown) if shown else -1
        self.query_one(StepBar).show(steps, here)
        self.query_one("#now", Words).say(now_words(snapshot, max(20, self.size.width - 4)))
        self.paint_end(snapshot)
        self.paint_charts(shown)
        self.query_one("#notes", Words).say(notes_words(state))
        self.query_one("#side", Words).say(side_words(snapshot))

    def paint_end(self, snapshot: Snapshot) -> None:
        result, end = self.query_one("#result", Static), self.query_one("#end", Words)
        if snapshot.state.result != self._result:
            self._result = snapshot.state.result
            result.update(result_shown(self._result) or "")
        result.display = bool(self._result)
        words = end_words(snapshot)
        end.display = bool(words)
        end.say(words)

    def paint_charts(self, stage: StageState | None) -> None:
        drawn = [(title, stage.series[key]) for key, title in CHARTS if stage.series.get(key)] if stage else []
        name = STAGE_NAMES.get(stage.name, stage.name) if stage else ""
        first, second = self.query_one("#chart-a", Chart), self.query_one("#chart-b", Chart)
        first.show(f"{name} {drawn[0][0]}" if drawn else "loss", drawn[0][1] if drawn else [])
        second.display = len(drawn) > 1
        if len(drawn) > 1:
            second.show(f"{name} {drawn[1][0]}", drawn[1][1])

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
            return self.snapshot is not None and not live and self.snapshot.status not in ("done", "deleted")
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

    def action_stage(self, by: int) -> None:
        if not self.snapshot:
            return
        names = [stage.name for stage in self.trained()]
        shown = self.shown_stage(self.snapshot.state)
        if names:
            at = names.index(shown.name) if shown else 0
            self.chosen_stage = names[max(0, min(len(names) - 1, at + by))]
            self.paint(self.snapshot)

    def action_log(self) -> None:
        self.log_screen = LogScreen(f"log of {self.run_shown.name}")
        self._log_tail = LogTail(self.run_shown.log_path)
        self.wake.set()
        self.app.push_screen(self.log_screen, self.log_left)

    def log_left(self, _: None) -> None:
        self.log_screen, self._log_tail = None, None

    def action_leave(self) -> None:
        self.dismiss(None)


def _stage_state(stage: StageState, snapshot: Snapshot) -> str:
    """The state of a stage; a stage of a run that died is not running."""
    return "crashed" if stage.state == "running" and not snapshot.live else stage.state


def now_words(snapshot: Snapshot, width: int) -> Content:
    """What happens at this moment, how far it is, and how fast."""
    stage = snapshot.state.current
    took = duration(snapshot.took_s)
    if not snapshot.live:
        head = Content.assemble(status_words(snapshot.status), f" after {took}")
        return Content("\n").join([head, Content(clean(_last_figures(snapshot), 200))])
    if stage is None or stage.state != "running":
        return Content.assemble(status_words(snapshot.status), f"  starting …  {took}")
    phase_s = snapshot.taken - snapshot.phase_started if snapshot.phase_started else None
    name = STAGE_NAMES.get(stage.name, stage.name)
    what = f"{clean(stage.phase, 20)} {clean(stage.detail, 60)}".strip()
    head = Content.assemble(
        (f"{clean(name, 20)}: {what}", "bold"), f"  {duration(phase_s)}", (f"   {took} in all", "$foreground-muted")
    )
    if snapshot.status == "stopping":
        head = Content.assemble(status_words("stopping"), "  ", head)
    done = stage.step / stage.total_steps if stage.total_steps else 0.0
    steps = f"  step {stage.step}/{stage.total_steps}" if stage.total_steps else ""
    left = f"  {duration(stage.eta_s)} left" if stage.eta_s is not None and stage.step else ""
    progress = Content.assemble((bar(done, min(60, width - 40)), "$text-primary"), f" {100 * done:3.0f} %{steps}{left}")
    return Content("\n").join([head, progress, Content(figures(stage) or _before(stage))])


def figures(stage: StageState) -> str:
    """The newest figures of a stage in one line; empty before the first."""
    parts = []
    if points := stage.series.get("loss"):
        parts.append(f"loss {number(stage.last('loss'))}" if points[-1][1] is not None else "loss not finite")
    for key, word, digits in FIGURES:
        if (value := stage.last(key)) is not None:
            parts.append(f"{word} {number(value, digits)}")
    if (rate := stage.last("tokens_per_s")) is not None:
        parts.append(f"{number(rate, 3)} tokens/s")
    return "   ".join(parts)


def _before(stage: StageState) -> str:
    """What is known before the first step."""
    if stage.total_steps:
        return f"{stage.total_steps} steps are ahead; the first figures come with the first logged step"
    return "loading and preparing: the steps are counted once the rows are read"


def _last_figures(snapshot: Snapshot) -> str:
    trained = [stage for stage in snapshot.state.stages if stage.name in TRAINING_STAGES and stage.series.get("loss")]
    if not trained:
        return "no step was logged"
    stage = trained[-1]
    margin = stage.last("rewards/margins")
    parts = [f"{STAGE_NAMES[stage.name]} step {stage.step}/{stage.total_steps}", f"loss {number(stage.last('loss'))}"]
    return "   ".join([*parts, f"margin {number(margin, 3)}"] if margin is not None else parts)


def result_shown(result: dict[str, Any]) -> Table | None:
    """The evaluation's table, or None where the event is not one."""
    try:
        return result_table({**result, "prompts": int(result["prompts"])})
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def end_words(snapshot: Snapshot) -> Content:
    """After the end: where the model is, or what went wrong and what to try. Empty while the run lives."""
    if snapshot.live:
        return Content("")
    lines = []
    for stage in snapshot.state.stages:
        if stage.output and stage.state == "done" and stage.name in TRAINING_STAGES:
            path = snapshot.run.path / stage.output
            lines.append(
                Content.assemble((f"✔ model after {STAGE_NAMES[stage.name]}: ", "$text-success"), clean(path, 400))
            )
    if snapshot.status in ("failed", "crashed"):
        for error in snapshot.state.errors[-1:]:
            message = f"✘ {clean(error.get('type', ''), 40)}: {clean(error.get('message', ''), 600)}"
            lines += [Content.styled(message, "$text-error"), Content(clean(error.get("advice") or "", 400))]
        if not snapshot.state.errors:
            lines.append(Content.styled("✘ It ended without a word: killed, or the machine went down.", "$text-error"))
    if snapshot.status in ("failed", "crashed", "stopped", "aborted"):
        lines.append(Content.assemble("r goes on from the newest checkpoint, l shows the log."))
    return Content("\n").join(lines)


def notes_words(state: RunState, limit: int = 6) -> Content:
    """The newest notices, newest last, and how many figures were not finite."""
    lines = []
    if state.nonfinite:
        lines.append(Content.styled(f"! {state.nonfinite} figures were not finite (NaN or infinite)", "$text-error"))
    unique = {(notice.get("text"), notice.get("advice")): notice for notice in state.notices}  # each stage says some
    for notice in list(unique.values())[-limit:]:
        warning = notice.get("level") in ("warning", "error")
        text = f"{clean(notice.get('text', ''), 300)} {clean(notice.get('advice') or '', 200)}".rstrip()
        lines.append(
            Content.styled(f"{'!' if warning else '·'} {text}", "$text-warning" if warning else "$foreground-muted")
        )
    return Content("\n").join(lines)


def stage_words(stage: StageState, snapshot: Snapshot) -> Content:
    """One stage with its state, its phases in seconds and what it was given."""
    state = _stage_state(stage, snapshot)
    over = stage.ended or (None if snapshot.live else snapshot.until)  # a clock here would repaint it all every second
    took = duration(over - stage.started) if stage.started and over and state != "waiting" else ""
    name = clean(STAGE_NAMES.get(stage.name, stage.name), 20)
    lines = [
        Content.assemble(
            (f"{GLYPHS.get(state, '?')} {name} {clean(state, 12)}", f"bold {HUES.get(state, '')}".strip()), f"  {took}"
        )
    ]
    phases = ", ".join(f"{phase} {duration(seconds)}" for phase, seconds in stage.phase_seconds.items() if seconds >= 1)
    totals = stage.totals
    facts = [phases] if phases else []
    if totals.get("examples"):
        facts.append(f"{totals['examples']} examples, {totals.get('left_out') or 0} left out")
    if stage.checkpoints:
        facts.append(f"checkpoints at {', '.join(map(str, stage.checkpoints[-4:]))}")
    return Content("\n").join(
        [*lines, *(Content.styled(f"  {clean(fact, 200)}", "$foreground-muted") for fact in facts)]
    )


def side_words(snapshot: Snapshot) -> Content:
    """Stages, memory, model and place of the run."""
    state = snapshot.state
    started = time.strftime("%d %b %H:%M:%S", time.localtime(state.started)) if state.started else "–"
    facts: Sequence[tuple[str, str]] = (
        ("model", state.model),
        ("method", state.method),
        ("started", started),
        ("note", state.note),
        ("memory", snapshot.memory if snapshot.status in LIVE else ""),
        ("folder", str(snapshot.run.path)),
    )
    lines = [stage_words(stage, snapshot) for stage in state.stages]
    lines += [Content.assemble((f"{word} ", "$foreground-muted"), clean(value, 300)) for word, value in facts if value]
    return Content("\n").join(lines)
