"""The dry run of a plan, in a dialog."""

from dataclasses import dataclass
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import ModalScreen

from core.config import Resolved
from core.errors import FinetuiError
from core.lens import DryRun
from core.text import clean
from tui.widgets import Words, keys


class DryRunScreen(ModalScreen[None]):
    """Runs the dry run of a plan in a child and shows its words; leaving ends the child."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,d,enter,q", "dismiss", "Close")]

    @dataclass
    class Said(Message):
        words: Content

    def __init__(self, plan: Resolved) -> None:
        super().__init__()
        self._plan, self._child = plan, DryRun()

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Words(Content.styled("Dry run: nothing is started", "bold"))
            with VerticalScroll(id="dry", classes="consequence"):
                yield Words("○ rows are tokenised and counted as training will …", id="dry-words")
            yield Words(keys(("Escape", "close")))

    def on_mount(self) -> None:
        self.query_one("#dry").focus()
        self.try_it()

    @work(thread=True, exit_on_error=False)
    def try_it(self) -> None:
        try:
            lines = [Content(clean(line, 600)) for line in self._child.text(self._plan)]
            words = Content("\n").join([Content.styled("✔ it holds together", "$text-success"), *lines])
        except FinetuiError as error:
            words = Content.assemble((f"✘ {clean(error.message, 600)}", "$text-error"), f" {clean(error.advice, 600)}")
        except OSError as error:
            words = Content.styled(f"✘ The dry run cannot be started: {clean(error.strerror)}.", "$text-error")
        self.post_message(self.Said(words))

    @on(Said)
    def said(self, event: Said) -> None:
        self.query_one("#dry-words", Words).say(event.words)

    def on_unmount(self) -> None:
        self._child.end()
