"""The app's own widgets. Foreign text goes through `clean` and is shown as Content or Text, not markup."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.screen import Screen
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import DataTable, Footer, Input, OptionList, Static
from textual.worker import Worker, WorkerState

from core.errors import FinetuiError
from core.text import clean
from core.watch import GLYPHS

HUES = {
    "running": "$text-primary",
    "stopping": "$text-warning",
    "done": "$text-success",
    "failed": "$text-error",
    "crashed": "$text-error",
    "stopped": "$text-warning",
    "aborted": "$text-warning",
    "waiting": "$foreground-muted",
}
Result = TypeVar("Result")
NEWS_S = 10.0
"""How long the banner tells of what happened elsewhere."""


def status_text(status: str, colours: Mapping[str, str]) -> Text:
    """Glyph and word of a status for a table's cell, which takes no Content; `colours` are the theme's variables."""
    hue = colours.get(HUES.get(status, "").removeprefix("$"), "")
    return Text(f"{GLYPHS.get(status, '?')} {clean(status, 12)}", style=hue if hue.startswith("#") else "")


def status_words(status: str) -> Content:
    """Glyph and word of a status."""
    return Content.styled(f"{GLYPHS.get(status, '?')} {clean(status, 12)}", f"bold {HUES.get(status, '')}".strip())


def keys(*pairs: tuple[str, str]) -> Content:
    """Keys with what they do: the key bold, the word muted."""
    parts: list[Any] = []
    for key, word in pairs:
        parts += ["   " if parts else "", (key, "bold"), (f" {word}", "$foreground-muted")]
    return Content.assemble(*parts)


class Words(Static):
    """Text that is never taken for markup. Strings are cleaned; Content made in this app is shown as it is."""

    def __init__(self, words: str | Content = "", *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(self._safe(words), id=id, classes=classes, markup=False)

    def say(self, words: str | Content) -> None:
        """Show something else; nothing is redrawn where it is the same."""
        safe = self._safe(words)
        shown = self.content
        if not (isinstance(shown, Content) and safe.is_same(shown)):  # == compares no colours
            self.update(safe)

    @staticmethod
    def _safe(words: str | Content) -> Content:
        return words if isinstance(words, Content) else Content(clean(words, newlines=True))


class Banner(Horizontal):
    """The line on top: where one is, for a while what has happened elsewhere, and a word on the right."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self._place = place
        self._news: Timer | None = None

    def compose(self) -> ComposeResult:
        yield Words(Content.assemble((" finetui ", "bold reverse"), " ", Content(clean(self._place, 120))), id="place")
        yield Words(id="news")
        yield Words(id="aside")

    def say(self, aside: str | Content) -> None:
        self.query_one("#aside", Words).say(aside)

    def tell(self, news: Content) -> None:
        """Show a few words that cover nothing, and take them away again."""
        for words in self.query("#news").results(Words):
            words.say(news)
            if self._news:
                self._news.stop()
            self._news = self.set_timer(NEWS_S, functools.partial(words.say, ""))


class Room(Screen[Result]):
    """A screen of the app: banner, body, keys. An unforeseen error of a worker becomes a sentence, not a traceback."""

    BINDINGS = [
        # With priority, for what is typed right after Tab (a paste, a quick hand) goes where the focus is just then.
        Binding("tab", "next_field", "Next field", show=False, priority=True),
        Binding("shift+tab", "app.focus_previous", "Field before", show=False, priority=True),
    ]
    place = ""

    async def action_next_field(self) -> None:
        """To the next field; a line that completes does that first."""
        complete = getattr(self.focused, "action_complete", None)
        if complete:
            await complete()
        else:
            self.app.action_focus_next()

    def compose(self) -> ComposeResult:
        yield Banner(self.place)
        yield from self.body()
        yield Footer(compact=True, show_command_palette=False)

    def body(self) -> ComposeResult:
        raise NotImplementedError

    def report_errors(self, deed: Callable[[], object]) -> None:
        """In a thread: do it, and tell the person what the core says against it."""
        try:
            deed()
        except FinetuiError as error:
            self.post_message(self.Refused(error))

    @dataclass
    class Refused(Message):
        """The core refused what was asked of it."""

        error: FinetuiError

    @on(Refused)
    def refused(self, event: Refused) -> None:
        self.notify(clean(event.error.advice), title=clean(event.error.message, 300), severity="error", markup=False)

    @on(Worker.StateChanged)
    def tell_of_failure(self, event: Worker.StateChanged) -> None:
        if event.state is WorkerState.ERROR:
            error = event.worker.error
            self.notify(
                clean(f"{type(error).__name__}: {error}", 300),
                title="A defect of finetui",
                severity="error",
                markup=False,
                timeout=15,
            )


class StepBar(Static):
    """Steps in a row, each with its state as glyph and weight."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, markup=False)

    def show(self, steps: Sequence[tuple[str, str]], here: int) -> None:
        """`steps` are (name, state); `here` is the one that is underlined."""
        parts: list[Any] = []
        for index, (name, state) in enumerate(steps):
            hue = HUES.get(state, "")
            weight = "bold reverse" if index == here else ""
            label = f" {GLYPHS.get(state, '?')} {clean(name, 24)} "
            parts += [(" ── ", "$foreground-muted") if parts else "", (label, f"{weight} {hue}".strip())]
        content = Content.assemble(*parts)
        if content != self.content:
            self.update(content)


class Line(Input):
    """A line to type in; Enter goes on."""

    BINDINGS = [Binding("enter", "submit", "Next")]

    def __init__(self, value: str, *, placeholder: str, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(value, placeholder=placeholder, id=id, classes=classes, compact=True, select_on_focus=False)


class Menu(OptionList):
    """Entries to choose from; Enter takes one and goes on."""

    BINDINGS = [Binding("enter", "select", "Next")]


class Rows(DataTable[Text]):
    """Rows to choose from; Enter takes one and goes on."""

    BINDINGS = [Binding("enter", "select_cursor", "Next")]


class Choice(Widget, can_focus=True):
    """One of a few words, chosen with the left and right arrows, Space or the mouse."""

    BINDINGS = [
        Binding("left", "move(-1)", "Previous", show=False),
        Binding("right,space", "move(1)", "Next", show=False),
        Binding("backspace,delete", "clear", "Preset's value", show=False),
    ]
    value: reactive[str] = reactive("")

    @dataclass
    class Changed(Message):
        """The person chose another word."""

        choice: "Choice"
        value: str

        @property
        def control(self) -> "Choice":
            return self.choice

    def __init__(
        self, options: Sequence[tuple[str, str]], value: str, *, clearable: bool = False, classes: str | None = None
    ) -> None:
        """`options` are (value, words shown). A clearable choice says "" on Backspace, for the preset's value."""
        super().__init__(classes=classes)
        self.options = list(options)
        self.clearable = clearable
        self.set_reactive(Choice.value, value)

    def show(self, value: str) -> None:
        """Show another word without saying that the person chose it."""
        self.set_reactive(Choice.value, value)
        self.refresh()

    def _labels(self) -> list[tuple[str, str]]:
        return [(value, f" {'◉' if value == self.value else '○'} {words} ") for value, words in self.options]

    def render(self) -> Content:
        return Content.assemble(
            *((label, "bold underline" if value == self.value else "") for value, label in self._labels())
        )

    def action_move(self, by: int) -> None:
        values = [value for value, _ in self.options]
        at = values.index(self.value) if self.value in values else -1
        self._choose(values[max(0, min(len(values) - 1, at + by))] if by < 0 else values[(at + by) % len(values)])

    def action_clear(self) -> None:
        if self.clearable:
            self.post_message(self.Changed(self, ""))

    def on_click(self, event: events.Click) -> None:
        at = event.get_content_offset_capture(self).x
        for value, label in self._labels():
            if at < len(label):
                self._choose(value)
                return
            at -= len(label)

    def _choose(self, value: str) -> None:
        if value != self.value:
            self.value = value
            self.post_message(self.Changed(self, value))


def bar(done: float, width: int) -> str:
    """A bar of `width` cells, `done` between 0 and 1."""
    filled = round(max(0.0, min(1.0, done)) * width)
    return "█" * filled + "░" * (width - filled)
