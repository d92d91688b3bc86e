"""The wizard's page about data: which rows each stage learns from, and the data room below them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.message import Message
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Input

from core.data_rows import COLUMNS, ROLE_HELP
from core.errors import FinetuiError
from core.paths import runs_dir
from core.text import clean
from tui.completion import PathLine, load_columns
from tui.data_room import FINDINGS, VIEWS, DataRoom
from tui.draft import Checked, Draft
from tui.pages import Page, problem_words
from tui.widgets import Choice, Line, Words, keys

ROW_KINDS = (("demo", "the demo's rows"), ("file", "a file"), ("hub", "a Hub data set"))
HUB_LINES = (
    ("dataset_config", "configuration"), ("dataset_split", "split (train)"), ("dataset_file", "file or pattern"),
    ("dataset_revision", "revision (main)"),
)  # fmt: skip
WIDE, LOW = 100, 27
LOOK = Binding.Group(", ".join(VIEWS).capitalize(), compact=True)
NEEDS = {"sft": "conversations", "kto": "conversations labelled true or false"}


class DataPage(Page):
    """A block for each stage: which rows, and what a look into them found; below them the data room."""

    BINDINGS = [
        *(Binding(str(number), f"view({number - 1})", name, group=LOOK) for number, name in enumerate(VIEWS, 1)),
        Binding("m", "columns", "Columns"),
    ]

    @dataclass
    class Wanted(Message):
        """The rows of a stage were named anew: what is known of them does not hold any more."""

        stage: str

    close = False
    """Whether the data room has taken the room of the other lines."""
    waits_for_check = True

    def __init__(self, draft: Draft) -> None:
        super().__init__(draft)
        self.troubles: Mapping[str, FinetuiError | None] = {}
        """What is in the way of training on the rows of each stage, as far as they are known."""
        self._held: set[str] = set()
        self._said: dict[str, Content] = {}

    @property
    def waits_for_rows(self) -> bool:
        """Whether a file has not been looked into yet."""
        return any(self.draft.data[stage].kind == "file" and stage not in self.troubles for stage in self.draft.stages)

    def ready(self, found: Checked | None) -> bool:
        """Whether every stage has rows to learn from; else it is said, and the focus goes where it can be mended."""
        self._held.update(self.draft.stages)
        for stage in self.draft.stages:
            if self.troubles.get(stage):
                self.report(stage, Content(""))
                self.app.bell()
                self._lead_to(stage)
                return False
        return True

    def _lead_to(self, stage: str) -> None:
        """Put the focus on the line that names the rows of a stage; where they were read, show what was found."""
        room, kind = self.query_one(DataRoom), self.draft.data[stage].kind
        line = ".file" if kind == "file" else ".dataset"
        if room.shown[stage].look:
            room.stage, line = stage, ".kind"  # where m and 2 can be pressed, too
            room.action_view(FINDINGS)
        self.query_one(f"#rows-{stage}").query_one(line).focus()

    def compose(self) -> ComposeResult:
        yield Words("Which rows?", classes="question")
        for stage in self.draft.stages:
            rows = self.draft.data[stage]
            with Vertical(id=f"rows-{stage}", classes="rows"):
                with Horizontal(classes="source"):
                    yield Words(Content.styled(stage.upper(), "bold"), classes="stage")
                    yield Choice(ROW_KINDS, rows.kind, classes="kind")
                    yield Words(Content.styled(NEEDS[stage], "$foreground-muted"), classes="needs")
                yield PathLine(
                    "file", runs_dir(), clean(rows.file), classes="file",
                    placeholder="path of a JSONL, JSON, CSV, Parquet or text file",
                )  # fmt: skip
                yield PathLine(
                    "dataset", runs_dir(), clean(rows.dataset), placeholder="OWNER/NAME on the Hub", classes="dataset"
                )
                with Horizontal(classes="hub"):
                    for name, placeholder in HUB_LINES:
                        yield Line(clean(getattr(rows, name)), placeholder=placeholder, classes=name)
                yield Words(classes="candidates")
                yield Words(classes="report")
        yield DataRoom(self.draft.stages)

    def on_mount(self) -> None:
        for stage in self.draft.stages:
            self._lay_out(stage)
        self.screen.set_focus(self.query(Choice).first())

    def on_resize(self) -> None:
        for words in self.query(".needs"):
            words.display = self.size.width >= WIDE
        for words in self.query(".question"):
            words.display = self.size.height >= LOW
        self._make_room()

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        self._make_room()

    @on(DataRoom.Wanted)
    def _make_room(self) -> None:
        """On a low terminal the data room, while one is in it, takes the lines of the rest of the page."""
        room = self.query_one(DataRoom)
        self.close = room.has_focus and self.size.height < LOW
        for stage in self.draft.stages:
            self._lay_out(stage)
            self.query_one(f"#rows-{stage}").display = not self.close or stage == room.stage

    def action_view(self, view: int) -> None:
        """Into the data room, to a view of the rows on whose lines the focus is; from anywhere but a line itself."""
        room = self.query_one(DataRoom)
        room.turn_to(self._focused_stage)
        room.action_view(view)
        room.focus()

    @on(DataRoom.Left)
    def room_left(self, event: DataRoom.Left) -> None:
        self.query_one(f"#rows-{event.stage}").query_one(Choice).focus()

    def action_columns(self) -> None:
        """Say which column of the rows is what, of the stage in whose lines the focus is."""
        stage = self._focused_stage
        self.query_one(DataRoom).post_message(DataRoom.Asked(stage, "columns"))

    @property
    def _focused_stage(self) -> str:
        around = self.screen.focused.ancestors_with_self if self.screen.focused else []
        blocks = [str(node.id).removeprefix("rows-") for node in around if node.has_class("rows")]
        return blocks[0] if blocks else next((room.stage for room in self.query(DataRoom)), self.draft.stages[0])

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.draft.data[self._focused_stage].kind != "demo" if action == "columns" else True

    def _lay_out(self, stage: str) -> None:
        """Show the lines that the kind of rows needs."""
        kind = self.draft.data[stage].kind
        block = self.query_one(f"#rows-{stage}")
        block.query_one(".file").display = kind == "file" and not self.close
        for name in (".dataset", ".hub"):
            block.query_one(name).display = kind == "hub" and not self.close

    def report(self, stage: str, words: Content) -> None:
        """Say what is known of the rows of a stage."""
        self._said[stage] = words
        own = [other.upper() for other in self.draft.stages if self.draft.data[other].kind != "demo"]
        if stage in self._held and (error := self.troubles.get(stage)):
            words = Content.assemble(("Not yet. ", "bold"), problem_words(error))
        elif own and self.draft.data[stage].kind == "demo":
            warning = f"! {stage.upper()} would learn the demo's made-up tool calls, not what {own[0]} learns."
            words = Content.assemble((warning, "$text-warning"), "  ←/→ chooses.\n", words)
        elif self.troubles.get(stage) and self._half_typed(stage):
            words = Content("")
        self.query_one(f"#rows-{stage}").query_one(".report", Words).say(words)

    def _half_typed(self, stage: str) -> bool:
        """Whether a path is being typed that could still become one that is there."""
        block = self.query_one(f"#rows-{stage}")
        line = block.query_one(".file", PathLine)
        return line.has_focus and bool(line.value) and any(words.display for words in block.query(".candidates"))

    @on(PathLine.Offered)
    def offered(self, event: PathLine.Offered) -> None:
        super().offered(event)
        stage = self._stage_of(event.line)
        self.report(stage, self._said.get(stage, Content("")))

    @staticmethod
    def _stage_of(widget: Widget) -> str:
        block = next(node for node in widget.ancestors if isinstance(node, Widget) and node.has_class("rows"))
        return str(block.id).removeprefix("rows-")

    @on(Choice.Changed)
    def chosen(self, event: Choice.Changed) -> None:
        stage = self._stage_of(event.choice)
        self._held.clear()
        rows = self.draft.data[stage] = self.draft.data[stage].model_copy(update={"kind": event.value})
        rows.columns = load_columns(rows)
        self._lay_out(stage)
        self.post_message(self.Wanted(stage))
        self.edited()

    @on(Input.Changed)
    def typed(self, event: Input.Changed) -> None:
        stage = self._stage_of(event.input)
        self._held.clear()
        named = ("file", "dataset", *(name for name, _ in HUB_LINES))
        name = next(name for name in named if event.input.has_class(name))
        if event.value != getattr(self.draft.data[stage], name):
            rows = self.draft.data[stage]
            setattr(rows, name, event.value)
            if name in ("file", "dataset"):
                rows.columns = load_columns(rows)
            self.post_message(self.Wanted(stage))
            self.edited()


class ColumnsScreen(ModalScreen[dict[str, str] | None]):
    """Which column of the rows is what. Empty lines are found out; Enter takes what is typed."""

    BINDINGS = [("escape", "dismiss", "Cancel"), ("enter", "take", "Take")]
    PARTS = [part for part in COLUMNS if part != "history"]

    def __init__(self, columns: Sequence[str], found: dict[str, str], chosen: dict[str, str]) -> None:
        """`columns` are those of the rows, `found` what is read from which, `chosen` what the person chose before."""
        super().__init__()
        self._columns, self._found, self._chosen = columns, found, chosen

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog -wide-dialog"):
            yield Words(Content.styled("Which column is what?", "bold"))
            named = ", ".join(clean(name, 40) for name in self._columns[:20]) or "none known yet"
            yield Words(Content.assemble((f"The rows have: {named}", "$foreground-muted")))
            for part in self.PARTS:
                with Horizontal(classes="column"):
                    yield Words(part, classes="part")
                    found = self._found.get(part, "")
                    yield Line(
                        clean(self._chosen.get(part, "")), placeholder=clean(found, 60) or "–", id=f"column-{part}",
                        classes="name",
                    )  # fmt: skip
                    yield Words(Content.styled(ROLE_HELP[part], "$foreground-muted"), classes="help")
            yield Words(keys(("Enter", "take"), ("Escape", "leave as it is")))

    def on_mount(self) -> None:
        self.query(Line).first().focus()

    @on(Input.Submitted)
    def submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_take()

    def action_take(self) -> None:
        lines: dict[str, Any] = {part: self.query_one(f"#column-{part}", Line).value.strip() for part in self.PARTS}
        self.dismiss({part: value for part, value in lines.items() if value})
