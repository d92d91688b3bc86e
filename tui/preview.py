"""A row as it will be trained: rendered by the model's template, the trained tokens marked by colour and underline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import ModalScreen

from core.config import Resolved
from core.errors import FinetuiError
from core.lens import DryRun, Reply
from core.plan import Plan
from core.text import clean
from tui.widgets import Words, keys

TRAINED = "bold underline $text-success"
SPECIAL = "$text-accent"
MAX_SHOWN = 12_000


class Preview(VerticalScroll, can_focus=True):
    """One example of a stage; left and right go through the rows, Space to the other stage."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "turn(-1)", "Row before"),
        Binding("right", "turn(1)", "Next row"),
        Binding("shift+left", "turn(-25)", "25 rows back", show=False),
        Binding("shift+right", "turn(25)", "25 rows on", show=False),
        Binding("space", "other_stage", "SFT or KTO"),
        Binding("enter", "screen.next", "Next"),
    ]

    @dataclass
    class Wanted(Message):
        """A row should be looked at."""

        stage: str
        at: int

    def __init__(self, stages: Sequence[str]) -> None:
        super().__init__(id="preview")
        self.stages = list(stages)
        self.stage = self.stages[0]
        self.at = dict.fromkeys(stages, 0)
        self.of = dict.fromkeys(stages, 0)
        self.key = ""

    def compose(self) -> ComposeResult:
        yield Words(id="preview-head")
        yield Words(id="preview-text")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return len(self.stages) > 1 if action == "other_stage" else True

    def ask(self, key: str) -> bool:
        """Whether what is shown differs from `key`, which names plan, stage and row; from now on `key` is shown."""
        if key == self.key:
            return False
        self.key = key
        if not self.of[self.stage]:
            self.say(Content.styled("○ preparing the tokenizer …", "$foreground-muted"))
        return True

    def say(self, words: Content) -> None:
        """Words instead of a row."""
        head = Content.assemble(("Preview ", "bold"), (self.stage.upper(), "bold"))
        self.query_one("#preview-head", Words).say(head)
        self.query_one("#preview-text", Words).say(words)

    def tell(self, reply: Reply) -> None:
        """Show what the lens found, where it is still what is wanted."""
        if reply["key"] != self.key:
            return
        if "error" in reply:
            advice = clean(reply["advice"], 300)
            self.say(Content.assemble((f"○ {clean(reply['error'], 300)}", "$text-warning"), f"  {advice}"))
            return
        self.at[self.stage], self.of[self.stage] = int(reply["at"]), int(reply["of"])
        self.query_one("#preview-head", Words).say(head_words(self.stage, reply))
        self.query_one("#preview-text", Words).say(example_words(self.stage, reply))
        self.scroll_home(animate=False)

    def action_turn(self, by: int) -> None:
        at = max(0, min(self.at[self.stage] + by, self.of[self.stage] - 1))
        if at != self.at[self.stage]:
            self.at[self.stage] = at
            self.post_message(self.Wanted(self.stage, at))

    def action_other_stage(self) -> None:
        self.stage = self.stages[(self.stages.index(self.stage) + 1) % len(self.stages)]
        self.post_message(self.Wanted(self.stage, self.at[self.stage]))


def preview_key(plan: Plan, stage: str, at: int) -> str:
    """What decides how a row is shown: model, rows, limits."""
    settings = plan.stage(stage)
    parts = [plan.model, settings.data, settings.max_length, getattr(settings, "max_prompt_length", 0), stage, at]
    return "|".join(str(part) for part in parts)


def head_words(stage: str, reply: Mapping[str, Any]) -> Content:
    """Which row this is, its tokens, and for KTO its label."""
    parts: list[Any] = [
        (f"Preview {stage.upper()}", "bold"), f"  row {reply['at'] + 1:,} of {reply['of']:,} ",
        (f"(line {reply['line']:,})", "$foreground-muted"), f"  {reply['tokens']:,} tokens, ",
    ]  # fmt: skip
    parts.append((f"{reply['trained']:,} trained", TRAINED) if not reply["left_out"] else "not trained")
    if stage == "kto":
        parts += ["  ", ("✔ true", "$text-success") if reply["label"] else ("✘ false", "$text-error")]
    return Content.assemble(*parts)


def example_words(stage: str, reply: Mapping[str, Any]) -> Content:
    """The tokens' text, trained ones marked, special ones visible; before them what the limits did to the row."""
    lines = []
    if reply["left_out"]:
        lines.append(Content.styled(f"! left out: {clean(reply['left_out'], 200)}", "$text-warning"))
    if reply["cut"]:
        lines.append(Content.styled(f"! {reply['cut']:,} tokens are cut from the left", "$text-warning"))
    parts: list[Any] = []
    left, in_prompt = MAX_SHOWN, stage == "kto"
    if in_prompt:
        parts.append(("prompt\n", "bold $foreground-muted"))
    for text, trained, special in reply["segments"]:
        if in_prompt and trained:
            in_prompt = False
            lead = "" if parts and str(parts[-1][0]).endswith("\n") else "\n"
            parts.append((f"{lead}completion, labelled {str(reply.get('label')).lower()}\n", "bold $foreground-muted"))
        mark = f"{TRAINED} {'$text-accent' if special else ''}".strip() if trained else SPECIAL if special else ""
        parts.append((clean(text, max(left, 0), newlines=True), mark))
        left -= len(text)
        if left <= 0:
            break
    return Content("\n").join([*lines, Content.assemble(*parts)])


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
