"""Dialogs over a screen: a question, a line to type, the keys; and the log of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.widgets import Button, Input, Log, OptionList

from core.runs import Run
from core.text import clean
from tui.widgets import Menu, Room, Words, keys


class Confirm(ModalScreen[bool]):
    """A question with a safe default. Enter takes the focused answer."""

    BINDINGS = [
        Binding("y", "answer(True)", "Yes"),
        Binding("n,escape", "answer(False)", "No"),
        Binding("left,right,up,down", "app.focus_next", "Other answer", show=False),
    ]

    def __init__(self, question: str, consequence: str, yes: str) -> None:
        super().__init__()
        self._question, self._consequence, self._yes = question, consequence, yes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Words(Content.styled(clean(self._question, 200), "bold"))
            yield Words(self._consequence, classes="consequence")
            with Horizontal(classes="answers"):
                yield Button(Content("No [n]"), id="no", compact=True)
                yield Button(Content(f"{self._yes} [y]"), id="yes", compact=True)

    def on_mount(self) -> None:
        self.query_one("#no").focus()

    @on(Button.Pressed)
    def pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)


@dataclass
class Ended(Message):
    """A run that was watched has ended. For the app, which rings."""

    run_name: str
    status: str


class RunRoom(Room[None]):
    """A screen that acts on runs: it asks, lets the core act in a thread, and has its follower look again at once."""

    def __init__(self) -> None:
        super().__init__()
        self.wake = Event()

    def ask(self, question: str, consequence: str, yes: str, deed: Callable[[], object]) -> None:
        def answered(answer: bool | None) -> None:
            if answer:
                self.do(deed)

        self.app.push_screen(Confirm(question, consequence, yes), answered)

    def ask_what_to_make(self, run: Run, then: Callable[[], object]) -> None:
        """The dialog about merged model, GGUF and upload; `then` is done once something was started."""
        from tui.export import ExportScreen

        def answered(started: bool | None) -> None:
            if started:
                then()

        self.app.push_screen(ExportScreen(run), answered)

    def copy(self, words: str) -> None:
        copy_words(self, words)

    @dataclass
    class Written(Message):
        """A report of a run was written here."""

        path: str

    def report(self, run: Run) -> None:
        """Write the run's report, as HTML and Markdown, and say where it is."""
        from core.report_files import write_reports

        self.do(lambda: self.post_message(self.Written(str(write_reports(run)[0]))))

    @on(Written)
    def written(self, event: Written) -> None:
        self.app.copy_to_clipboard(clean(event.path, 4000))
        title = "Report written, as HTML and Markdown; its path is copied"
        self.notify(clean(event.path, 300), title=title, markup=False)

    @work(thread=True, group="deed", exit_on_error=False)
    def do(self, deed: Callable[[], object]) -> None:
        self.report_errors(deed)
        self.wake.set()


class PathsScreen(ModalScreen[None]):
    """Paths and commands, one a line; Enter copies one. Over SSH nothing else can open a folder."""

    BINDINGS = [Binding("escape,o,q", "dismiss", "Close")]

    def __init__(self, title: str, lines: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._title, self._lines = title, lines

    def compose(self) -> ComposeResult:
        width = max(len(clean(what, 24)) for what, _ in self._lines)
        with Vertical(classes="dialog -wide-dialog"):
            yield Words(Content.styled(clean(self._title, 200), "bold"))
            options = [
                Content.assemble((f"{clean(what, 24):>{width}}  ", "$foreground-muted"), clean(line, 600))
                for what, line in self._lines
            ]
            yield Menu(*options, id="paths", markup=False)
            yield Words(keys(("Enter", "copy"), ("Escape", "close")))

    @on(OptionList.OptionSelected)
    def chosen(self, event: OptionList.OptionSelected) -> None:
        copy_words(self, self._lines[event.option_index][1])
        self.dismiss()


def copy_words(screen: Screen[Any], words: str) -> None:
    """Hand our own words, or a path, to the terminal's clipboard, without what a shell could take for Enter."""
    screen.app.copy_to_clipboard(clean(words, 4000))
    screen.notify(
        "Handed to the terminal (OSC 52). Where it does not take it, mark it with the mouse and Shift.",
        title=clean(f"Copied: {words}", 200),
        markup=False,
    )


class Ask(ModalScreen[str | None]):
    """One line of text; Escape gives None."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(self, question: str, value: str, *, may_be_empty: bool = False) -> None:
        super().__init__()
        self._question, self._value, self._may_be_empty = question, value, may_be_empty

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Words(Content.styled(clean(self._question, 200), "bold"))
            yield Input(clean(self._value), select_on_focus=False)
            yield Words(keys(("Enter", "save"), ("Escape", "cancel")))

    @on(Input.Submitted)
    def submitted(self, event: Input.Submitted) -> None:
        words = event.value.strip()
        self.dismiss(words if words or self._may_be_empty else None)


ONE_COLUMN = 10


class HelpScreen(ModalScreen[None]):
    """The keys of the screen below, made from its bindings, and what leaving means."""

    BINDINGS = [Binding("escape,f1,question_mark,q,enter", "dismiss", "Close")]

    def __init__(self, title: str, bindings: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self._title, self._keys = title, bindings

    def compose(self) -> ComposeResult:
        width = max((len(key) for key, _ in self._keys), default=0)
        lines = [Content.assemble((key.rjust(width), "bold"), f"  {words}") for key, words in self._keys]
        rows = -(-len(lines) // 2) if len(lines) > ONE_COLUMN else len(lines)  # all of them on 24 rows
        with VerticalScroll(classes="dialog"):
            yield Words(Content.styled(self._title, "bold"))
            with Horizontal(classes="keys"):
                for column in (lines[:rows], lines[rows:]):
                    if column:
                        yield Words(Content("\n").join(column))
            yield Words(
                "Training goes on when the app is left, the terminal closes or SSH drops. Open the app again: "
                "the run is there."
            )
            yield Words(keys(("Escape", "close")))


class LogScreen(Room[None]):
    """The end of a run's log, growing as the run writes it."""

    BINDINGS = [Binding("escape,l,h", "dismiss", "Back"), Binding("g", "end", "End of the log")]

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def body(self) -> ComposeResult:
        yield Log(id="log", max_lines=5000)

    def add(self, lines: Sequence[str]) -> None:
        """`lines` are clean already."""
        self.query_one("#log", Log).write_lines(lines)

    def action_end(self) -> None:
        self.query_one("#log", Log).scroll_end(animate=False)
