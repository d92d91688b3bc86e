"""The pages of the wizard about method, model and data. Each edits the one draft; none of them touches the disk."""

from typing import Any

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import DataTable, Input, OptionList
from textual.widgets.option_list import Option as Entry

from core.backend import gpu_present
from core.budget import preset_needs
from core.config import size_presets
from core.errors import FinetuiError
from core.memory import Lengths
from core.paths import runs_dir
from core.stages import METHODS
from core.text import clean
from tui.completion import PathLine
from tui.draft import Checked, Draft
from tui.forecast import Counts, card, fit
from tui.widgets import Menu, Rows, Words

ASSUMED_TOKENS = 512
"""The length of the rows for which the table of sizes says what is needed."""
METHOD_HELP: dict[str, tuple[str, str, str, str]] = {
    "sft": (
        "SFT: learn from examples",
        "What: it learns to give the answers in your rows, assistant turns only.",
        "Data: conversations with good answers; dozens teach a form already.",
        "When: first. It makes a model do something it does not do yet.",
    ),
    "kto": (
        "KTO: learn from good and bad answers",
        "What: it moves towards answers labelled true, away from those false.",
        "Data: conversations with a label, both kinds; no pairs are needed.",
        "When: the model answers in the right form and still makes mistakes.",
    ),
    "sft-kto": (
        "SFT→KTO: both, one after the other",
        "What: KTO starts from the SFT result and is measured against it.",
        "Data: rows for both; one labelled file can serve, or two files.",
        "When: you have labelled rows and a base model. The demo does this.",
    ),
}


def problem_words(error: FinetuiError) -> Content:
    """What is wrong, and the way forward."""
    advice = f" {clean(error.advice, 300)}" if error.advice else ""
    return Content.assemble((f"✘ {clean(error.message, 400)}", "$text-error"), advice)


class Page(VerticalScroll, can_focus=False):
    """One step of the wizard."""

    first = ""

    @property
    def waits_for_check(self) -> bool:
        """Whether going on has to wait until the newest change was checked."""
        return False

    @property
    def waits_for_rows(self) -> bool:
        """Whether it has to wait until something is known of the rows."""
        return False

    class Edited(Message):
        """The draft was changed."""

    class Done(Message):
        """The person is through with this page."""

    def __init__(self, draft: Draft) -> None:
        super().__init__(classes="page")
        self.draft = draft
        self.counts: Counts = {}

    def on_mount(self) -> None:
        if self.first:
            self.screen.set_focus(self.query_one(self.first))  # before it is painted: no key may come in between

    def edited(self) -> None:
        self.post_message(self.Edited())

    def show(self, found: Checked) -> None:
        """Explain what the draft makes now."""

    def ready(self, found: Checked | None) -> bool:
        """Whether the person may go on; puts the focus on what is in the way."""
        return True

    @on(PathLine.Offered)
    def offered(self, event: PathLine.Offered) -> None:
        """Show under a line what it may become."""
        parent = event.line.parent
        for words in parent.query(".candidates").results(Words) if parent else ():
            words.say(event.words)
            words.display = bool(event.words.plain)

    @on(Input.Submitted)
    @on(OptionList.OptionSelected)
    @on(DataTable.RowSelected)
    def entered(self, event: Message) -> None:
        event.stop()
        self.post_message(self.Done())


class MethodPage(Page):
    first = "#method"

    def compose(self) -> ComposeResult:
        yield Words("What shall the model learn from?", classes="question")
        entries = []
        for method in METHODS:
            title, *lines = METHOD_HELP[method]
            text = Content("\n").join([Content.styled(title, "bold"), *(Content(f"  {line}") for line in lines)])
            entries += [Entry(text, id=method), None]
        options = Menu(*entries[:-1], id="method", markup=False)
        options.highlighted = METHODS.index(self.draft.method)
        yield options

    @on(OptionList.OptionHighlighted)
    def highlighted(self, event: OptionList.OptionHighlighted) -> None:
        chosen = next((method for method in METHODS if method == event.option_id), None)
        if chosen and chosen != self.draft.method:
            self.draft.method = chosen
            self.edited()


class ModelPage(Page):
    first = "#sizes"

    @property
    def waits_for_check(self) -> bool:
        """Only a model of one's own may be wrong."""
        return bool(self.draft.model.strip())

    def compose(self) -> ComposeResult:
        yield Words("Which model?", classes="question")
        yield Rows(id="sizes", cursor_type="row")
        yield Words(id="about-size")
        yield Words(id="assumes")
        yield Words(id="card")
        yield Words(
            "Or a model of your own: a Hub id, a folder, or run:NAME for an earlier run's result.", classes="gap"
        )
        yield PathLine(
            "model", runs_dir(), clean(self.draft.model), placeholder="OWNER/NAME, folder or run:NAME", id="own"
        )
        yield Words(classes="candidates")
        yield Words(id="model-problem")

    def on_mount(self) -> None:
        self._card, self._lengths = card(), dict[str, Lengths]()
        table = self.query_one("#sizes", DataTable)
        two = len(self.draft.stages) > 1
        for name in ("size", "model", "LoRA", "batches" if two else "batch", "GiB", "fits here?"):
            table.add_column(name, key=name)
        needs = preset_needs(self.draft.method, self._card is not None, ASSUMED_TOKENS)
        for size, preset in size_presets().items():
            table.add_row(*(Text(clean(cell, 40)) for cell in self._cells(size, preset, needs[size])), key=size)
        if self._card:
            name, free, total = self._card
            self.query_one("#card", Words).say(f"{clean(name, 60)}: {free:.1f} of {total:.1f} GiB free")
        self._assume(f"for rows of {ASSUMED_TOKENS} tokens; longer ones take more. The review counts with yours.")
        size = self.draft.size or ("7b" if gpu_present() else "135m")
        table.move_cursor(row=list(size_presets()).index(size))
        self.screen.set_focus(self.query_one("#own" if self.draft.model else "#sizes"))

    def _assume(self, words: str) -> None:
        batches = "Batches: SFT's, KTO's. " if len(self.draft.stages) > 1 else ""
        self.query_one("#assumes", Words).say(f"{batches}GiB of memory {words}")

    def _count_with_rows(self) -> None:
        """What the sizes need for the rows of the draft, where they were counted: the review's figures."""
        lengths = {name: Lengths(count.longest_rows) for name, count in self.counts.items() if count.longest_rows}
        if not set(self.draft.stages) <= set(lengths) or lengths == self._lengths:
            return
        self._lengths = lengths
        table = self.query_one("#sizes", DataTable)
        for size, need in preset_needs(self.draft.method, self._card is not None, lengths=lengths).items():
            table.update_cell(size, "GiB", Text(f"{need:.1f}"))
            table.update_cell(size, "fits here?", Text(clean(fits(size, need, self._card), 40)))
        longest = max(count.longest_rows[0] for name, count in self.counts.items() if name in self.draft.stages)
        self._assume(f"for your rows, the longest of {longest:,} tokens.")

    def _cells(self, size: str, preset: dict[str, Any], need_gib: float) -> list[str]:
        stages = [preset[stage] for stage in self.draft.stages]
        return [
            size,
            preset["model"]["name"].rsplit("/", 1)[-1],
            f"{preset['lora']['r']}/{preset['lora']['alpha']}",
            ", ".join(f"{stage['batch_size']}×{stage['gradient_accumulation_steps']}" for stage in stages),
            f"{need_gib:.1f}",
            fits(size, need_gib, self._card),
        ]

    @on(DataTable.RowHighlighted)
    def highlighted(self, event: DataTable.RowHighlighted) -> None:
        size = str(event.row_key.value)
        name = size_presets()[size]["model"]["name"]
        default = "7b" if gpu_present() else "135m"
        why = (
            ""
            if size != default
            else "  The default here: "
            + (
                "there is an NVIDIA GPU."
                if gpu_present()
                else "there is no NVIDIA GPU, and this one trains on the CPU."
            )
        )
        self.query_one("#about-size", Words).say(f"{name}.{why}")
        if size != (self.draft.size or default):
            self.draft.size = size
            self.edited()

    @on(Input.Changed, "#own")
    def typed(self, event: Input.Changed) -> None:
        if event.value != self.draft.model:
            self.draft.model = event.value
            self.edited()

    def ready(self, found: Checked | None) -> bool:
        """Whether a model of one's own is one; else the focus goes to its name."""
        if not found or not self.draft.model.strip() or "model.name" not in found.problems:
            return True
        self.app.bell()
        self.query_one("#own").focus()
        return False

    def show(self, found: Checked) -> None:
        error = found.problems.get("model") or found.problems.get("model.name")
        own = found.model if self.draft.model.strip() else ""
        self.query_one("#model-problem", Words).say(problem_words(error) if error else own)
        self._count_with_rows()


def fits(size: str, need_gib: float, found: tuple[str, float, float] | None) -> str:
    """Whether what a size needs goes into the free memory of the card here, in a word and a glyph."""
    if found is None:
        return "✔ CPU" if size == "135m" else "✘ needs GPU"
    return fit(need_gib, found[1], found[2])
