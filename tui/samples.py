"""Answers to fixed prompts while a stage trains: the newest on the dashboard, all of them in a room of their own."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event as Wake
from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.worker import get_current_worker

from core.events import Event, RunState, StageState
from core.runs import Run
from core.scores import expected_of, score
from core.text import clean, duration
from tui.follow import Follower
from tui.widgets import Banner, Room, Words

PERIOD_S = 1.0
MAX_SHOWN = 1500
CHANGED = "bold underline"
Series = list[Event]


def series_of(state: RunState) -> list[Series]:
    """The samples of each prompt, in the order in which they were taken; a chain's stages follow one another."""
    found: dict[str, Series] = {}
    for sample in state.samples:
        found.setdefault(str(sample.get("prompt", "")), []).append(sample)
    return [series for _, series in sorted(found.items(), key=lambda entry: int(entry[1][0].get("number") or 0))]


def answer_words(sample: Event, before: Event | None, limit: int = MAX_SHOWN, *, newlines: bool = True) -> Content:
    """An answer, what differs from the one before marked."""
    answer = clean(sample.get("answer", ""), limit, newlines=newlines)
    if before is None:
        return Content(answer)
    return changed_words(answer, clean(before.get("answer", ""), limit, newlines=newlines))


def changed_words(text: str, before: str, *, least_alike: float = 0.0) -> Content:
    """`text` with the words marked that are not in `before`; plain where the two are less alike than `least_alike`."""
    new_words, old_words = _words(text), _words(before)
    matcher = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False)
    if matcher.ratio() < least_alike:
        return Content(text)
    parts: list[Any] = []
    for kind, _, _, start, end in matcher.get_opcodes():
        if start < end:
            parts.append(("".join(new_words[start:end]), "" if kind == "equal" else CHANGED))
    return Content.assemble(*parts)


def _words(text: str) -> list[str]:
    return re.findall(r"\s+|\w+|[^\w\s]", text)


def verdict_of(sample: Event) -> str:
    """Whether the answer is as expected: a glyph and a word, empty where nothing is expected."""
    expected = str(sample.get("expected") or "")
    if not expected:
        return ""
    marks = score(str(sample.get("answer", "")), expected_of(expected), {})
    if marks.get("exact"):
        return "✔ as expected"
    return "~ the right tool" if marks.get("tool") else "✘ not as expected"


def where_words(sample: Event) -> str:
    """Stage and step of a sample."""
    return f"{clean(str(sample.get('stage', '')).upper(), 12)} step {sample.get('step', 0)}"


def newest_words(state: RunState, width: int, limit: int = 3) -> Content:
    """The newest answer to each prompt, two lines each; empty where there are none."""
    lines: list[Content] = []
    for series in series_of(state)[:limit]:
        sample, before = series[-1], series[-2] if len(series) > 1 else None
        prompt = clean(sample.get("prompt", ""), 400)
        head = f"{where_words(sample)}  "
        verdict = verdict_of(sample)
        room = max(10, width - len(head) - len(verdict) - 3)
        shown = prompt if len(prompt) <= room else f"{prompt[: room - 1]}…"
        lines.append(Content.assemble((head, "$foreground-muted"), (shown, "bold"), f"  {verdict}"))
        answer = answer_words(sample, before, 600, newlines=False)
        if not answer.plain.strip():
            answer = Content.styled("(an empty answer)", "$foreground-muted")
        lines.append(Content.assemble("  ", answer.truncate(max(10, 2 * width), ellipsis=True)))
    if not lines:
        return Content("")
    title = Content.styled("answers while it trains, what changed underlined; p shows them all", "$foreground-muted")
    return Content("\n").join([title, *lines])


def cost_words(state: RunState) -> str:
    """What the samples have taken so far, and of how much training."""
    spent = sum(float(sample.get("seconds") or 0) for sample in state.samples)
    trained = sum(stage.phase_seconds.get("train") or _so_far(stage) for stage in state.stages)
    share = f", {100 * spent / trained:.1f} % of the training" if trained > spent > 0 else ""
    return f"{duration(spent)}{share}" if spent else ""


def _so_far(stage: StageState) -> float:
    """Seconds from the first to the newest logged step of a stage that trains."""
    return stage.pace[-1][0] - stage.pace[0][0] if stage.pace else 0.0


class SamplesBody(VerticalScroll):
    """The part that scrolls; left and right go through the steps, Tab through the prompts."""

    BINDINGS = [
        Binding("left", "screen.step(-1)", "Step", key_display="←→"),
        Binding("right", "screen.step(1)", "Next step", show=False),
    ]


class SamplesScreen(Room[None]):
    """One prompt and its answers, step by step; it stays at the newest while the run goes on."""

    BINDINGS = [
        Binding("n", "prompt(1)", "Next prompt"),
        Binding("N", "prompt(-1)", "Prompt before", show=False),
        Binding("escape,h,p", "dismiss", "Back", key_display="esc"),
        Binding("q", "app.quit", "Quit"),
        Binding("question_mark,f1", "app.help", "Help", key_display="?"),
    ]

    @dataclass
    class Seen(Message):
        """The run's samples as they are now."""

        state: RunState

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run_shown = run
        self.place = f"samples of {run.name}"
        self.wake = Wake()
        self.series: list[Series] = []
        self.cost = ""
        self.number = 0
        self.at: int | None = None
        """The sample that is shown; None for the newest."""

    def body(self) -> ComposeResult:
        with SamplesBody(id="scroll"):
            yield Words("reading the log …", id="head")
            yield Words(id="steps")
            yield Words(id="answer")
            yield Words(id="expected")
            yield Words(id="history")

    def on_mount(self) -> None:
        self.query_one("#scroll").focus()
        self.follow()

    def on_unmount(self) -> None:
        self.wake.set()

    @work(thread=True, group="follow", exit_on_error=False)
    def follow(self) -> None:
        worker, follower = get_current_worker(), Follower(self.run_shown)
        count = -1
        while not worker.is_cancelled:
            snapshot = follower.read()
            if snapshot and len(snapshot.state.samples) != count:
                count = len(snapshot.state.samples)
                self.post_message(self.Seen(snapshot.state))
            self.wake.wait(PERIOD_S)
            self.wake.clear()

    @on(Seen)
    def seen(self, event: Seen) -> None:
        self.series, self.cost = series_of(event.state), cost_words(event.state)
        self.paint()

    def paint(self) -> None:
        if not self.series:
            self.query_one("#head", Words).say(
                "This run took no samples. --sample-every N (samples.every in a plan) has a few prompts answered every "
                "N steps."
            )
            return
        self.number %= len(self.series)
        series = self.series[self.number]
        at = len(series) - 1 if self.at is None else max(0, min(self.at, len(series) - 1))
        sample, before = series[at], series[at - 1] if at else None
        self.query_one(Banner).say(f"prompt {self.number + 1} of {len(self.series)}")
        self.query_one("#head", Words).say(Content.styled(clean(sample.get("prompt", ""), 2000, newlines=True), "bold"))
        cut = "  cut at the limit" if sample.get("cut") else ""
        self.query_one("#steps", Words).say(
            Content.assemble(
                step_words(series, at), f"  {verdict_of(sample)}{cut}",
                (f"   samples took {self.cost}" if self.cost else "", "$foreground-muted"),
            )
        )  # fmt: skip
        self.query_one("#answer", Words).say(answer_words(sample, before, 20_000))
        expected = clean(sample.get("expected") or "", 4000, newlines=True)
        self.query_one("#expected", Words).say(
            Content.assemble(("expected\n", "$foreground-muted"), expected) if expected else ""
        )
        self.query_one("#history", Words).say(history_words(series, at, max(20, self.size.width - 6)))

    def action_step(self, by: int) -> None:
        if self.series:
            last = len(self.series[self.number]) - 1
            at = max(0, min(last, (last if self.at is None else self.at) + by))
            self.at = None if at == last else at
            self.paint()

    def action_prompt(self, by: int) -> None:
        if self.series:
            self.number = (self.number + by) % len(self.series)
            self.paint()


def history_words(series: Sequence[Event], at: int, width: int, shown: int = 60) -> Content:
    """Every answer to the prompt in a line each, newest first, what changed underlined; one that did not is told so."""
    lines: list[Content] = []
    for place in range(len(series) - 1, max(-1, len(series) - 1 - shown), -1):
        sample, before = series[place], series[place - 1] if place else None
        head = f"{'›' if place == at else ' '} {where_words(sample):<14}{verdict_of(sample)[:1] or ' '} "
        if before is not None and before.get("answer") == sample.get("answer"):
            lines.append(Content.assemble((head, "$foreground-muted"), ("the same", "$foreground-muted")))
            continue
        answer = answer_words(sample, before, 600, newlines=False).truncate(max(10, width - len(head)), ellipsis=True)
        lines.append(Content.assemble((head, "$foreground-muted"), answer))
    return Content("\n").join([Content.styled("all answers, newest first", "$foreground-muted"), *lines])


def step_words(series: Sequence[Event], at: int, shown: int = 9) -> Content:
    """The steps around the one that is shown, which is marked."""
    first = max(0, min(at - shown // 2, len(series) - shown))
    parts: list[Any] = [("‹ " if first else "", "$foreground-muted")]
    stage = ""
    for place in range(first, min(len(series), first + shown)):
        name = clean(str(series[place].get("stage", "")).upper(), 12)
        label = f" {name + ' ' if name != stage else ''}{series[place].get('step', 0)} "
        stage = name
        parts.append((label, "bold reverse" if place == at else "$foreground-muted"))
    parts.append((" ›" if first + shown < len(series) else "", "$foreground-muted"))
    return Content.assemble(*parts)
