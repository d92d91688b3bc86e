"""How held-out prompts were answered: the tables, the failing cases, each case with every model's answer beside."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import DataTable, Input, Static
from textual.worker import get_current_worker

from core.compare import Shared
from core.evaluation import Report, Row, evaluations, failed, missed_words, read_cases, variant_words
from core.evaluation_report import remarks
from core.runs import Run, request_stop
from core.text import clean
from core.watch import shown_result
from tui.dialogs import RunRoom
from tui.follow import Follower, Snapshot
from tui.report import now_words
from tui.samples import changed_words
from tui.widgets import Banner, Words, keys, status_words

PERIOD_S = 1.0
MAX_CASES = 2000
PROMPT_WIDTH = 60
MAX_ANSWER = 6000
ALIKE = 0.4
"""What differs is marked in an answer that has at least this share of the expected words."""


@dataclass
class Asked:
    """What an evaluation shall be made of, as it was typed."""

    file: str = ""
    tools: str = ""
    prompts: str = ""

    def values(self) -> dict[str, Any]:
        """As `evaluation_start.checked` takes them."""
        found: dict[str, Any] = {key: text for key in ("file", "tools") if (text := getattr(self, key).strip())}
        if text := self.prompts.strip():
            found["max_prompts"] = int(text) if text.isdigit() else text
        return found


class AskEvaluation(ModalScreen[Asked | None]):
    """Which prompts to answer; Enter on the last line starts, Escape gives None."""

    BINDINGS = [Binding("escape", "dismiss(None)", "Cancel")]

    def __init__(self, run: Run, count: int) -> None:
        super().__init__()
        self._run, self._count = run, count

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Words(Content.styled(f"Evaluate {clean(self._run.name, 60)}", "bold"))
            yield Words(
                "Held-out prompts are answered by the base model and after each stage, and the answers scored. It goes "
                "on when you leave, like training.",
                classes="consequence",
            )
            for name, label, hint in (
                ("file", "Prompts", "a file of rows; empty: what the run held out"),
                ("tools", "Tools", "a JSON file of schemas to check calls against; may be empty"),
                ("prompts", "How many", str(self._count)),
            ):
                yield Words(Content.styled(label, "bold"))
                yield Input(placeholder=hint, id=name, compact=True, select_on_focus=False)
            yield Words(keys(("Enter", "start"), ("Tab", "next field"), ("Escape", "cancel")), classes="gap")

    @on(Input.Submitted)
    def submitted(self) -> None:
        self.dismiss(Asked(*(self.query_one(f"#{name}", Input).value for name in ("file", "tools", "prompts"))))


class Cases(DataTable[Text]):
    """Prompts with what each model missed; Enter opens the one under the cursor."""

    BINDINGS = [Binding("enter", "select_cursor", "Side by side")]


class EvaluationScreen(RunRoom):
    """The evaluations of a run, live while one goes on."""

    BINDINGS = [
        Binding("v", "begin", "Evaluate"),
        Binding("s", "stop", "Stop"),
        Binding("f", "filter", "Failing or all"),
        Binding("e", "other", "Earlier ones"),
        Binding("c", "copy", "Copy the report's path", show=False),
        Binding("escape,h", "dismiss", "Back", key_display="esc"),
        Binding("q", "app.quit", "Quit"),
        Binding("question_mark,f1", "app.help", "Help", key_display="?"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]

    @dataclass
    class Seen(Message):
        """The run as it is now, and its evaluations, where they have changed."""

        snapshot: Snapshot | None
        found: list[tuple[Path, Report, list[Row]]] | None

    @dataclass
    class Ready(Message):
        """The number of prompts that is proposed is known."""

        count: int

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run_shown = run
        self.place = f"evaluation of {run.name}"
        self.found: list[tuple[Path, Report, list[Row]]] = []
        self.snapshot: Snapshot | None = None
        self.at = 0
        self.failing = True
        self.cases: list[Row] = []

    def body(self) -> ComposeResult:
        yield Words("reading the evaluations …", id="now")
        with VerticalScroll(id="scroll"):
            yield Static(id="result", markup=False)
            yield Words(id="remarks")
            yield Static(id="tools", markup=False)
        yield Words(id="cases-head")
        yield Cases(id="cases", cursor_type="row")

    def on_mount(self) -> None:
        self.query_one("#cases").focus()
        self.follow()

    def on_unmount(self) -> None:
        self.wake.set()

    @work(thread=True, group="follow", exit_on_error=False)
    def follow(self) -> None:
        """Read the evaluations when a report is new, and the run while it lives."""
        worker, follower = get_current_worker(), Follower(self.run_shown)
        known: list[Any] = [None]
        while not worker.is_cancelled:
            snapshot = follower.read()
            done = evaluations(self.run_shown)
            marks = [(path, report.get("t")) for path, report in done]
            fresh = None
            if marks != known:
                known, fresh = marks, [(path, report, read_cases(path, MAX_CASES)) for path, report in done]
            if snapshot or fresh is not None:
                self.post_message(self.Seen(snapshot, fresh))
            self.wake.wait(PERIOD_S)
            self.wake.clear()

    @on(Seen)
    def seen(self, event: Seen) -> None:
        self.snapshot = event.snapshot or self.snapshot
        if event.found is not None:
            self.found, self.at = event.found, 0
            self.show_cases()
        with self.app.batch_update():
            self.paint()
        self.refresh_bindings()

    @property
    def live(self) -> bool:
        return bool(self.snapshot and self.snapshot.live)

    @property
    def evaluating(self) -> bool:
        """Whether what goes on is an evaluation; the run may be training, too."""
        if not (self.live and self.snapshot):
            return False
        state = self.snapshot.state
        return state.task == "evaluate" or bool(state.current and state.current.name == "evaluate")

    def paint(self) -> None:
        """Everything but the cases is painted here."""
        snapshot, width = self.snapshot, max(20, self.size.width - 4)
        if snapshot:
            self.query_one(Banner).say(status_words(snapshot.status))
        now = self.query_one("#now", Words)
        table: Any = None
        said: list[str] = []
        if self.live and snapshot:
            busy = "" if self.evaluating else "\n\nIts held-out prompts can be answered once it has ended."
            now.say(Content.assemble(now_words(snapshot, width), (busy, "$foreground-muted")))
            state = snapshot.state
            fresh = state.result.get("t", 0) >= (state.task_started or state.started or 0)
            table = shown_result(state.result, width) if fresh else None
        elif self.found:
            path, report, _ = self.found[self.at]
            more = f"   {self.at + 1} of {len(self.found)}: e" if len(self.found) > 1 else ""
            now.say(Content.assemble((clean(report["source"], 100), "bold"), (more, "$foreground-muted")))
            table, said = shown_result(report, width), remarks(report)
        else:
            now.say(
                "No evaluation yet. v answers held-out prompts with every model of this run and scores the answers."
            )
        self.query_one("#result", Static).update(table or "")
        self.query_one("#remarks", Words).say(Content("\n").join(Content(clean(line, 300)) for line in said))
        by_tool = tool_table(self.found[self.at][1], width) if self.found and not self.live else None
        self.query_one("#tools", Static).update(by_tool or "")

    def show_cases(self) -> None:
        """The rows of the table of cases."""
        table = self.query_one("#cases", DataTable)
        table.clear(columns=True)
        table.display = bool(self.found)
        self.cases = []
        if not self.found:
            self.query_one("#cases-head", Words).say("")
            return
        _, report, rows = self.found[self.at]
        last = report["variants"][-1]
        wrong = [row for row in rows if failed(row, last)]
        self.cases = wrong if self.failing else rows
        what = f"{len(wrong)} of {len(rows)} cases fail {variant_words(last)}"
        shown = "these are shown, f shows all" if self.failing else "all are shown, f shows these alone"
        self.query_one("#cases-head", Words).say(Content.assemble((what, "bold"), (f"   {shown}", "$foreground-muted")))
        heads = ["line", "tool", *report["variants"], f"{variant_words(last)} misses", "prompt"]
        for place, name in enumerate(heads):
            table.add_column(Text(clean(name, 30)), key=f"{place} {name}")
        for row in self.cases:
            table.add_row(*_case_cells(row, report["variants"]))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "stop":
            return self.evaluating
        if action == "begin":
            return not self.live
        if action in ("open", "filter", "copy"):
            return bool(self.found)
        if action == "other":
            return len(self.found) > 1
        return True

    @on(DataTable.RowSelected)
    def row_selected(self) -> None:
        self.action_open()

    def action_open(self) -> None:
        if self.cases:
            at = self.query_one("#cases", DataTable).cursor_row
            variants = self.found[self.at][1]["variants"]
            self.app.push_screen(SideBySide(items_of_cases(self.cases, variants), at))

    def action_filter(self) -> None:
        self.failing = not self.failing
        self.show_cases()

    def action_other(self) -> None:
        self.at = (self.at + 1) % len(self.found)
        self.show_cases()
        self.paint()

    def action_copy(self) -> None:
        self.copy(str(self.found[self.at][0] / "report.md"))

    def action_stop(self) -> None:
        self.ask(
            "Stop the evaluation?",
            "The answers so far are kept; v with the same prompts goes on from there.",
            "Stop it",
            lambda: request_stop(self.run_shown),
        )

    def action_begin(self) -> None:
        self.read_options()

    @work(thread=True, group="plan", exit_on_error=False)
    def read_options(self) -> None:
        """Read what the run was evaluated with last, and ask for what shall be different."""
        from core.evaluation_start import kept_options

        self.report_errors(lambda: self.post_message(self.Ready(kept_options(self.run_shown).max_prompts)))

    @on(Ready)
    def ready(self, event: Ready) -> None:
        self.app.push_screen(AskEvaluation(self.run_shown, event.count), self.asked)

    def asked(self, asked: Asked | None) -> None:
        """Start it; what is wrong is told on the screen."""
        from core.evaluation_start import checked, start

        run = self.run_shown
        if asked is not None:
            self.do(lambda: start(run, *checked(run, run.plan(), asked.values())))


def tool_table(report: Report, width: int) -> Table | None:
    """How many prompts expect each tool, and how many each model answers with it, and wholly right."""
    by_tool = report["by_tool"]
    if not any(by_tool):
        return None
    table = Table(
        box=None, pad_edge=False, title=Text("By tool: right tool / all right", style="italic"), title_justify="left"
    )
    table.add_column("", no_wrap=True, max_width=max(16, width - 20 * len(report["variants"])))
    table.add_column("prompts", justify="right")
    for name in report["variants"]:
        table.add_column(Text(variant_words(name)), justify="right")

    def prompts(rates: dict[str, Any]) -> int:
        return max((int(entry["total"]) for marks in rates.values() for entry in marks.values()), default=0)

    for tool, rates in sorted(by_tool.items(), key=lambda entry: -prompts(entry[1]))[:40]:
        cells = []
        for name in report["variants"]:
            marks = rates.get(name, {})
            counts = [marks.get(key, {}).get("hits", "–") for key in ("tool" if tool else "decision", "exact")]
            cells.append(" / ".join(str(count) for count in counts))
        name = Text(clean(tool, 60)) if tool else Text("(no call)", style="dim")
        table.add_row(name, str(prompts(rates)), *(Text(cell) for cell in cells))
    return table


def _case_cells(row: Row, variants: Sequence[str]) -> list[Text]:
    wrong = {name: failed(row, name) for name in variants}
    counts = [f"✘ {len(missed)}" if missed else "✔" for missed in wrong.values()]
    misses = missed_words(row["answers"].get(variants[-1], {}).get("marks", {}))
    cells = [str(row.get("line", "")), cut(row.get("tool") or "–", 26), *counts, cut(misses, 40)]
    return [Text(cell) for cell in [*cells, cut(row.get("prompt", ""), PROMPT_WIDTH)]]


def cut(text: object, width: int) -> str:
    """Foreign text in a cell of `width`."""
    shown = clean(text, 1000)
    return shown if len(shown) <= width else f"{shown[: width - 1]}…"


class CaseBody(VerticalScroll):
    """The part that scrolls; left and right go through the cases."""

    BINDINGS = [
        Binding("left", "screen.turn(-1)", "Case", key_display="←→"),
        Binding("right", "screen.turn(1)", "Next case", show=False),
    ]


@dataclass(frozen=True)
class Item:
    """One prompt with what was expected and several answers, (whose, answer with its marks) each."""

    where: str
    prompt: str
    expected: str | None
    answers: tuple[tuple[str, dict[str, Any] | None], ...]


def items_of_cases(rows: Sequence[Row], variants: Sequence[str]) -> list[Item]:
    """The cases of one evaluation: an answer of each model."""
    return [
        Item(
            f"line {row.get('line', '')} of {row.get('file', '')}", str(row.get("prompt", "")), row.get("expected"),
            tuple((variant_words(name), row["answers"].get(name)) for name in variants),
        )
        for row in rows
    ]  # fmt: skip


def items_of_shared(shared: Sequence[Shared], names: Sequence[str]) -> list[Item]:
    """Prompts that several runs answered: an answer of each run."""
    return [
        Item(
            "" if one.unlike else "the same marks",
            one.prompt,
            one.expected,
            tuple(zip(names, one.answers, strict=True)),
        )
        for one in shared
    ]


class SideBySide(RunRoom):
    """One prompt with what was expected and every answer; left and right go through the prompts."""

    BINDINGS = [
        Binding("escape,h", "dismiss", "Back", key_display="esc"),
        Binding("q", "app.quit", "Quit"),
        Binding("question_mark,f1", "app.help", "Help", key_display="?"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]
    place = "answers side by side"

    def __init__(self, items: Sequence[Item], at: int = 0) -> None:
        super().__init__()
        self.items, self.at = list(items), at

    def body(self) -> ComposeResult:
        with CaseBody(id="scroll"):
            yield Words(id="prompt")
            with Horizontal(id="answers"):
                for place in range(1 + len(self.items[0].answers)):
                    yield Words(id=f"answer-{place}", classes="answer")

    def on_mount(self) -> None:
        self.query_one("#scroll").focus()
        self.paint()

    def paint(self) -> None:
        item = self.items[self.at]
        self.query_one(Banner).say(f"{self.at + 1} of {len(self.items)}")
        prompt = clean(item.prompt, 4000, newlines=True)
        self.query_one("#prompt", Words).say(
            Content.assemble((clean(item.where, 100), "$foreground-muted"), "\n", prompt)
        )
        words = "nothing in particular" if item.expected is None else clean(item.expected, MAX_ANSWER, newlines=True)
        self.query_one("#answer-0", Words).say(Content.assemble(("expected", "bold"), "\n\n", words))
        for place, (whose, answer) in enumerate(item.answers, 1):
            self.query_one(f"#answer-{place}", Words).say(answer_words(whose, answer, item.expected))
        self.query_one("#scroll").scroll_home(animate=False)

    def action_turn(self, by: int) -> None:
        at = max(0, min(len(self.items) - 1, self.at + by))
        if at != self.at:
            self.at = at
            self.paint()


def answer_words(whose: str, answer: dict[str, Any] | None, expected: str | None = None) -> Content:
    """An answer, where it departs from the expected one underlined, and under it what it missed."""
    head = Content.styled(clean(whose, 40), "bold")
    if answer is None:
        return Content.assemble(head, "\n\n", ("no answer", "$foreground-muted"))
    text = clean(answer.get("answer", ""), MAX_ANSWER, newlines=True)
    wrong = missed_words(answer["marks"])
    verdict = (f"✘ {wrong}", "$text-error") if wrong else ("✔ right" if answer["marks"] else "", "$text-success")
    shown = Content(text)
    if wrong and expected:
        shown = changed_words(text, clean(expected, MAX_ANSWER, newlines=True), least_alike=ALIKE)
    cut = "\n(cut at the limit of tokens)" if answer.get("cut") else ""
    return Content.assemble(head, "\n\n", shown, cut, "\n\n", verdict)
