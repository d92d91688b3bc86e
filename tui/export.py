"""What to make of a run's result: merged model, GGUF files, upload. Asked here, made by the run's own runner."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input

from core import gguf_tools
from core.artefacts import checked_request, trained
from core.commands_export import begin, check_export
from core.errors import FinetuiError
from core.plan import ExportPlan, Plan
from core.runs import Run
from core.text import clean
from tui.widgets import Choice, Line, Words, keys

FORMS = (("lora", "adapter as it is"), ("merged_16bit", "merged, 16-bit"), ("merged_4bit", "merged, 4-bit"))
QUANTISATIONS = ("Q4_K_M", "Q5_K_M", "Q8_0", "F16")
ACCESS = (("public", "public"), ("private", "private"))


def head_words(name: str, what: str) -> Content:
    """A field's name and what it is for."""
    return Content.assemble((name, "bold"), (f"  {what}", "$foreground-muted"))


class Ticks(Widget, can_focus=True):
    """Words that can be ticked, each on its own: the arrows go from one to the next, Space ticks."""

    BINDINGS = [
        Binding("left", "move(-1)", "Previous", show=False),
        Binding("right", "move(1)", "Next", show=False),
        Binding("space", "tick", "Tick", show=False),
    ]
    here: reactive[int] = reactive(0)
    ticked: reactive[tuple[str, ...]] = reactive(())

    @dataclass
    class Changed(Message):
        """The person ticked a word, or took its tick away."""

    def __init__(self, words: Sequence[str], *, classes: str | None = None) -> None:
        super().__init__(classes=classes)
        self.words = list(words)

    def _labels(self) -> list[str]:
        return [f" {'[x]' if word in self.ticked else '[ ]'} {word} " for word in self.words]

    def render(self) -> Content:
        at = self.here if self.has_focus else -1
        return Content.assemble(
            *((label, "bold underline" if index == at else "") for index, label in enumerate(self._labels()))
        )

    def action_move(self, by: int) -> None:
        self.here = max(0, min(len(self.words) - 1, self.here + by))

    def action_tick(self) -> None:
        word = self.words[self.here]
        kept = {*self.ticked} ^ {word}
        self.ticked = tuple(word for word in self.words if word in kept)
        self.post_message(self.Changed())

    def on_click(self, event: events.Click) -> None:
        at = event.get_content_offset_capture(self).x
        for index, label in enumerate(self._labels()):
            if at < len(label):
                self.here = index
                self.action_tick()
                return
            at -= len(label)


class ExportScreen(ModalScreen[bool]):
    """Enter looks at everything that could fail, Enter again starts; True when it was started."""

    BINDINGS = [
        Binding("enter", "go_on", "Check, then start", priority=True),
        Binding("escape", "leave", "Close"),
        Binding("down", "app.focus_next", "Next field", show=False),
        Binding("up", "app.focus_previous", "Field before", show=False),
    ]

    @dataclass
    class Found(Message):
        """What the run has, and what was asked of it before."""

        export: ExportPlan
        names: list[str]

    @dataclass
    class Said(Message):
        """What a look, an installation or the start came to. `plan` is what may be started."""

        lines: list[str]
        plan: Plan | None = None
        error: FinetuiError | None = None
        started: bool = False

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run_shown = run
        self.ready: Plan | None = None
        self.wants_tools = self.busy = False

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog -export"):
            yield Words(Content.styled(f"Merge, GGUF, upload: {clean(self.run_shown.name, 60)}", "bold"))
            yield Words(head_words("form", "for transformers and vLLM"), classes="name")
            yield Choice(FORMS, "merged_16bit", classes="form")
            yield Words(head_words("GGUF", "for llama.cpp, Ollama, LM Studio; Q4_K_M is the usual one"), classes="name")
            yield Ticks(QUANTISATIONS, classes="gguf")
            yield Words(head_words("upload to", "with a model card that is written for you"), classes="name")
            yield Line("", placeholder="OWNER/NAME on the Hub; empty: no upload", classes="upload")
            yield Choice(ACCESS, "private", classes="access")
            yield Words(head_words("from", "which result"), classes="name")
            yield Line("", placeholder="the last stage's result", classes="checkpoint")
            yield Words(classes="there")
            yield Words(id="verdict")
            yield Words(id="keys")

    def on_mount(self) -> None:
        self.query_one(".form", Choice).focus()
        self._hint("look at it")
        self.read()

    def _hint(self, enter: str) -> None:
        pairs = [("Enter", enter), ("↑↓", "field"), ("←→ Space", "choose"), ("Escape", "close")]
        self.query_one("#keys", Words).say(keys(*pairs))

    @work(thread=True, exit_on_error=False)
    def read(self) -> None:
        try:
            names = [one.name for one in trained(self.run_shown)]
            self.post_message(self.Found(self.run_shown.plan().export, names))
        except FinetuiError as error:
            self.post_message(self.Said([], error=error))

    @on(Found)
    def found(self, event: Found) -> None:
        if event.export.save_method:
            self.query_one(".form", Choice).show(event.export.save_method)
            self.query_one(".form", Choice).value = event.export.save_method
        self.query_one(Ticks).ticked = tuple(event.export.gguf)
        self.query_one(".upload", Line).value = clean(event.export.upload or "", 120)
        if event.export.upload and not event.export.private:
            self.query_one(".access", Choice).value = "public"
        self.query_one(".checkpoint", Line).value = clean(event.export.checkpoint or "", 120)
        there = ", ".join(event.names[:6]) + (" …" if len(event.names) > 6 else "")
        self.query_one(".there", Words).say(f"there is: {clean(there, 200)}" if there else "nothing is trained yet")

    def wishes(self) -> dict[str, Any]:
        """What the fields ask for, as changes of the plan's section ``export``."""
        return {
            "save_method": self.query_one(".form", Choice).value,
            "gguf": list(self.query_one(Ticks).ticked),
            "upload": self.query_one(".upload", Line).value.strip() or None,
            "private": self.query_one(".access", Choice).value == "private",
            "checkpoint": self.query_one(".checkpoint", Line).value.strip() or None,
        }

    @on(Input.Changed)
    @on(Choice.Changed)
    @on(Ticks.Changed)
    def changed(self) -> None:
        if self.ready or self.wants_tools:
            self.query_one("#verdict", Words).say("")
        self.ready, self.wants_tools = None, False
        self._hint("look at it")

    def action_go_on(self) -> None:
        if self.busy:
            return
        self.busy = True
        verdict = self.query_one("#verdict", Words)
        if self.ready:
            verdict.say("starting …")
            self.start(self.ready)
        elif self.wants_tools:
            verdict.say("installing llama.cpp's tools …")
            self.install()
        else:
            verdict.say("looking …")
            self.look(self.wishes())

    @work(thread=True, exit_on_error=False)
    def look(self, wishes: dict[str, Any]) -> None:
        try:
            plan = checked_request(self.run_shown, wishes)
            plan.export.gguf = wishes["gguf"]  # what is not ticked any more is not wanted any more
            if not plan.export.stages:
                raise FinetuiError("Nothing is asked for.", "Choose a merged form, a GGUF file or an upload.")
            self.post_message(self.Said(check_export(self.run_shown, plan), plan))
        except FinetuiError as error:
            self.post_message(self.Said([], error=error))

    @work(thread=True, exit_on_error=False)
    def install(self) -> None:
        try:
            gguf_tools.install(lambda text: None)
            self.post_message(self.Said(["llama.cpp's tools are installed."]))
        except FinetuiError as error:
            self.post_message(self.Said([], error=error))

    @work(thread=True, exit_on_error=False)
    def start(self, plan: Plan) -> None:
        try:
            begin(self.run_shown, plan)
            self.post_message(self.Said([], started=True))
        except FinetuiError as error:
            self.post_message(self.Said([], error=error))

    @on(Said)
    def said(self, event: Said) -> None:
        self.busy, self.wants_tools, self.ready = False, False, event.plan
        if event.started:
            self.dismiss(True)
            return
        if error := event.error:
            self.wants_tools = error.advice == gguf_tools.HOW
            sign = "·" if error.exit_code == 0 else "✘"
            advice = "" if self.wants_tools else f" {clean(error.advice, 300)}"
            hue = "$foreground" if error.exit_code == 0 else "$text-error"
            words = Content.assemble((f"{sign} {clean(error.message, 300)}", hue), advice)
        else:
            words = Content("\n").join(Content(clean(line, 200)) for line in event.lines)
        self.query_one("#verdict", Words).say(words)
        install = "install llama.cpp's tools (20 MB)" if self.wants_tools else "look at it"
        self._hint("start" if event.plan else install)
        self.query_one("#keys").scroll_visible(animate=False)

    def action_leave(self) -> None:
        self.dismiss(False)
