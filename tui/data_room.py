"""The data room: the rows of a stage as they will be trained, what was found in them, their lengths, what they hold.

One pane with four views. It asks for what it shows by messages and keeps what it was told, by stage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message

from core.data_shape import round_up
from core.lens import Reply
from core.plan import Plan
from core.text import clean
from tui.data_views import (
    MUTED,
    ROW_HELP,
    contents_words,
    findings_words,
    hub_rows,
    lengths_words,
    order,
    row_head,
    row_words,
    side_words,
    tally,
    tokens_at,
)
from tui.widgets import Words

VIEWS = ("Rows", "Findings", "Lengths", "Contents")
WIDE, HIGH, BESIDE, SIDE = 100, 18, 110, 42
ROWS, FINDINGS, LENGTHS, CONTENTS = range(4)
MOVE = Binding.Group("Move", compact=True)


@dataclass
class Shown:
    """What is known of a stage's rows, and where the person stands in it."""

    at: int = 0
    of: int = 0
    look: Reply = field(default_factory=dict)
    hub: Reply = field(default_factory=dict)
    count: Reply = field(default_factory=dict)
    row: Reply = field(default_factory=dict)
    finding: int = 0
    place: int = 0
    kept_limit: int = 0
    limit_at: int = 0
    limit: Reply = field(default_factory=dict)
    words: Content | None = None
    """What stands in place of a row."""

    @property
    def findings(self) -> Sequence[Mapping[str, Any]]:
        return order([*self.look.get("findings", ()), *self.count.get("findings", ())])

    @property
    def step(self) -> int:
        """Tokens by which the limit is moved."""
        longest = self.count["shape"]["row_percentiles"].get("100", 100) if self.count else 100
        return round_up(max(longest / 40, 1))

    def moved_limit(self, by: int) -> int:
        """The limit a step on or back, five where `by` is more than one; back from far beyond at the longest row."""
        step = self.step * (1 if abs(by) == 1 else 5)
        longest = int(self.count["shape"]["row_percentiles"].get("100", self.kept_limit))
        if by > 0:
            most = max(-(-longest // step) * step, self.kept_limit)
            return min((self.limit_at // step + 1) * step, most)
        at = min(self.limit_at, longest + step)
        return max((-(-at // step) - 1) * step, 8)


class DataRoom(VerticalScroll, can_focus=True):
    """Rows, findings, lengths and contents of a stage; 1 to 4 choose, Space goes to the other stage."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(number), f"view({number - 1})", name, show=False) for number, name in enumerate(VIEWS, 1)),
        Binding("left", "move(-1)", "Before", key_display="←", group=MOVE),
        Binding("right", "move(1)", "After", key_display="→", group=MOVE),
        Binding("shift+left", "move(-25)", "Far back", show=False),
        Binding("shift+right", "move(25)", "Far on", show=False),
        Binding("up", "choose(-1)", "Up", show=False),
        Binding("down", "choose(1)", "Down", show=False),
        Binding("space", "other_stage", "SFT/KTO"),
        Binding("i", "ids", "Ids"),
        Binding("k", "keep_limit", "Keep limit"),
        Binding("c", "count_all", "Count every row"),
        Binding("m", "ask('columns')", "Columns"),
        Binding("f", "ask('fetch')", "Fetch now"),
        Binding("l", "ask('ledger')", "Ledger"),
        Binding("enter", "show_row", "Show row"),
        Binding("enter", "done", "Next"),
        Binding("escape", "leave", "Back"),
    ]

    @dataclass
    class Wanted(Message):
        """A row should be shown: by its number, or by (file, line)."""

        stage: str

    @dataclass
    class LimitMoved(Message):
        """What another limit would do is asked for."""

        stage: str
        at: int

    @dataclass
    class LimitKept(Message):
        stage: str
        at: int

    @dataclass
    class Left(Message):
        """Back to the lines that name the rows."""

        stage: str

    @dataclass
    class Asked(Message):
        """Something that needs the page: ``columns``, ``fetch``, ``ledger`` or ``count``."""

        stage: str
        what: str

    def __init__(self, stages: Sequence[str]) -> None:
        super().__init__(id="preview")
        self.stages = list(stages)
        self.stage = self.stages[0]
        self.shown = {stage: Shown() for stage in stages}
        self.view = ROWS
        self.ids = False
        self.turned = False
        """Whether the findings are shown because there is no row."""
        self.place: tuple[str, int] | None = None
        self.key = ""

    def compose(self) -> ComposeResult:
        yield Words(id="preview-head")
        yield Words(id="preview-side")
        yield Words(id="preview-text")

    def on_resize(self) -> None:
        self.paint()

    def on_focus(self) -> None:
        self.paint()

    def on_blur(self) -> None:
        self.paint()

    @property
    def here(self) -> Shown:
        return self.shown[self.stage]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        here = self.here
        fits = {
            "other_stage": len(self.stages) > 1,
            "ids": self.view == ROWS,
            "move": self.view != CONTENTS,
            "keep_limit": self.view == LENGTHS and here.limit_at not in (0, here.kept_limit),
            "show_row": self.view == FINDINGS and bool(here.findings),
            "done": self.view != FINDINGS or not here.findings,
            "count_all": self.view == LENGTHS and bool(here.count) and not here.count["exact"],
        }
        if action == "ask":
            return {"fetch": bool(here.hub), "ledger": bool(here.look), "columns": True}[str(parameters[0])]
        return fits.get(action, True)

    # --- what is told ---

    def ask(self, key: str) -> bool:
        """Whether the row shown differs from `key`, which names plan, stage and row; from now on `key` is wanted."""
        if key == self.key:
            return False
        self.key = key
        if not self.here.of:
            self.say(Content.styled("○ preparing the tokenizer …", MUTED))
        return True

    def say(self, words: Content) -> None:
        """Words instead of a row."""
        self.here.words = words
        self.paint()

    def tell_row(self, reply: Reply) -> None:
        """Show what the lens found, where it is still what is wanted."""
        if reply["key"] != self.key:
            return
        if "error" in reply:
            advice = clean(reply["advice"], 300)
            self.say(Content.assemble((f"○ {clean(reply['error'], 300)}", "$text-warning"), f"  {advice}"))
            return
        here = self.here
        here.at, here.of, here.row, here.words, self.place = int(reply["at"]), int(reply["of"]), reply, None, None
        self.paint()
        if self.view == ROWS:
            self.scroll_home(animate=False)

    def tell_look(self, stage: str, look: Reply) -> None:
        """A report about a stage's rows came."""
        here = self.shown[stage]
        here.look, here.hub = look, {}
        if stage == self.stage and self.view in (ROWS, FINDINGS) and bool(look["problem"]) is not self.turned:
            if self.view == (FINDINGS if self.turned else ROWS):  # where there is no row to see, there is why
                self.view = ROWS if self.turned else FINDINGS
            self.turned = bool(look["problem"])
        self.refresh_bindings()
        self.paint()

    def tell_hub(self, stage: str, found: Reply) -> None:
        here = self.shown[stage]
        here.hub, here.look, here.of = found, {}, 0
        here.words = hub_rows(found)
        self.paint()

    def tell_count(self, stage: str, count: Reply, kept: int) -> None:
        """The stage's rows were counted in tokens, under the limit `kept`."""
        here = self.shown[stage]
        here.count, here.kept_limit, here.limit_at, here.limit = count, kept, kept, {}
        self.paint()

    def tell_limit(self, stage: str, reply: Reply) -> None:
        if "error" not in reply:
            self.shown[stage].limit = reply
            self.paint()

    def forget(self, stage: str) -> None:
        """The rows of a stage are others now."""
        self.shown[stage] = Shown()
        self.key = ""
        self.paint()

    # --- what is done ---

    def action_view(self, view: int) -> None:
        self.view = view
        self.refresh_bindings()
        self.paint()
        self.scroll_home(animate=False)

    def action_move(self, by: int) -> None:
        here = self.here
        if self.view == LENGTHS and here.count:
            here.limit_at = here.moved_limit(by)
            self.post_message(self.LimitMoved(self.stage, here.limit_at))
            self.refresh_bindings()
        elif self.view == FINDINGS:
            self._show_place(by)
        elif self.view == ROWS:
            at = max(0, min(here.at + by, here.of - 1))
            if at != here.at:
                here.at = at
                self.post_message(self.Wanted(self.stage))
        self.paint()

    def on_mouse_down(self, event: events.MouseDown) -> None:
        self._drag(event)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if event.button:
            self._drag(event)

    def _drag(self, event: events.MouseEvent) -> None:
        """The limit goes where the mouse is pressed in the histogram, and follows it."""
        here, text = self.here, self.query_one("#preview-text", Words)
        if self.view != LENGTHS or not here.count or not text.region.contains(*event.screen_offset):
            return
        x, y = event.screen_offset - text.region.offset
        if 0 < y <= self._bars() + 2:
            step = here.step
            tokens = tokens_at(here.count["shape"]["rows"], x - 1, self._width() - 2)
            at = max(8, round(tokens / step) * step)
            if at != here.limit_at:
                here.limit_at = at
                self.post_message(self.LimitMoved(self.stage, at))
                self.refresh_bindings()
                self.paint()

    def _width(self) -> int:
        return max(self.scrollable_content_region.width or self.size.width, 20)

    def _bars(self) -> int:
        """Lines that the histogram of the lengths takes."""
        return max(2, min(self.size.height - 9, 10))

    def action_choose(self, by: int) -> None:
        """Another finding; elsewhere a line up or down."""
        found = self.here.findings
        if self.view == FINDINGS and found:
            self.here.finding = max(0, min(self.here.finding + by, len(found) - 1))
            self.here.place = 0
            self.paint()
            self.scroll_to(y=max(self.here.finding - 2, 0), animate=False)
        else:
            self.scroll_relative(y=by, animate=False)

    def action_show_row(self) -> None:
        """From a finding to its row."""
        self._show_place(0)

    def action_done(self) -> None:
        self.screen.post_message(self.Done())

    @dataclass
    class Done(Message):
        """The person is through with the rows."""

    def _show_place(self, by: int) -> None:
        """Go to the row at one of the lines of the chosen finding."""
        here = self.here
        found = here.findings
        if not found or not found[here.finding]["places"]:
            return
        places = found[here.finding]["places"]
        here.place = (here.place + (1 if by > 0 else -1 if by < 0 else 0)) % len(places)
        file, line = places[here.place]
        self.place = str(file), int(line)
        self.action_view(ROWS)
        self.post_message(self.Wanted(self.stage))

    def action_other_stage(self) -> None:
        self.turn_to(self.stages[(self.stages.index(self.stage) + 1) % len(self.stages)])

    def turn_to(self, stage: str) -> None:
        """Show another stage's rows."""
        if stage != self.stage:
            self.stage, self.place = stage, None
            self.refresh_bindings()
            self.paint()
            self.post_message(self.Wanted(self.stage))

    def action_leave(self) -> None:
        self.post_message(self.Left(self.stage))

    def action_ids(self) -> None:
        self.ids = not self.ids
        self.post_message(self.Wanted(self.stage))

    def action_keep_limit(self) -> None:
        self.post_message(self.LimitKept(self.stage, self.here.limit_at))

    def action_count_all(self) -> None:
        self.post_message(self.Asked(self.stage, "count"))

    def action_ask(self, what: str) -> None:
        self.post_message(self.Asked(self.stage, what))

    # --- what is seen ---

    def paint(self) -> None:
        if self.is_mounted:
            self.query_one("#preview-head", Words).say(self._head())
            self.query_one("#preview-text", Words).say(self._body())
            here, side = self.here, self.query_one("#preview-side", Words)
            side.display = self.view == ROWS and self.size.width >= BESIDE and bool(here.look)
            if side.display:
                words = side_words(here.look, here.count, here.findings, here.kept_limit, self.stage, SIDE)
                side.say(words)

    def _head(self) -> Content:
        here = self.here
        parts: list[Any] = [(f"{self.stage.upper()} ", "bold")] if len(self.stages) > 1 else []
        outside = not self.has_focus and self.size.width >= WIDE
        aside: list[Any] = [("   Tab", "bold"), (" goes in", MUTED)] if outside else []
        for number, name in enumerate(VIEWS):
            count = f" {len(here.findings)}" if number == FINDINGS and here.findings else ""
            mark = f" {number + 1} {name}{count} "
            parts.append((mark, "bold reverse" if number == self.view else MUTED))
        if self.view == ROWS and here.row and here.words is None:
            parts += [*aside, "\n ", row_head(self.stage, here.row)]
            if self.size.height >= HIGH:
                parts += ["\n ", ROW_HELP]
        elif self.view == FINDINGS and here.findings:
            parts.append(f"  {tally(here.findings)}")
        return Content.assemble(*parts)

    def _body(self) -> Content:
        here = self.here
        width = self._width()
        if self.view == ROWS:
            if here.words is not None:
                return here.words
            return row_words(self.stage, here.row) if here.row else Content("")
        if self.view == FINDINGS and here.look:
            here.finding = min(here.finding, max(len(here.findings) - 1, 0))
            return findings_words(here.findings, here.finding, bool(here.look["whole"]), width, self.size.height - 2)
        if self.view == LENGTHS and here.count:
            return lengths_words(here.count, here.limit or None, here.limit_at, here.kept_limit, width, self._bars())
        if self.view == CONTENTS and here.look:
            return contents_words(here.look, here.count, self.stage, width)
        if self.view == CONTENTS and here.hub:
            return hub_rows(here.hub)
        return here.words if here.words is not None else Content.styled("○ not known yet", MUTED)


def row_key(plan: Plan, stage: str, at: object) -> str:
    """What decides how a row is shown: model, rows, limits, and for KTO's partners the batches."""
    settings = plan.stage(stage)
    parts = [plan.model, settings.data, settings.max_length, getattr(settings, "max_prompt_length", 0), stage,
             settings.seed, settings.batch_size if stage == "kto" else 0, at]  # fmt: skip
    return "|".join(str(part) for part in parts)
