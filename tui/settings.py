"""The wizard's page of settings, made from the plan's own description of its options."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Container, Vertical
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Collapsible, Input

from core.config import OPTIONS
from core.errors import FinetuiError
from core.plan import Option, Plan
from core.text import clean
from tui.draft import DEMO, SOURCE, Checked, Draft, applies
from tui.forecast import Counts, consequence, stage_words
from tui.pages import Page, problem_words
from tui.widgets import Choice, Line, Words

GROUPS = {
    "": "The run",
    "model": "Model",
    "lora": "Adapter (LoRA)",
    "sft": "SFT",
    "kto": "KTO",
    "samples": "Samples while training",
    "evaluate": "Evaluation",
    "export": "After training: merge, GGUF, upload",
    "tracking": "Trackers",
}
CHOICE_WIDTH = 22


class Setting(Container):
    """One option: name, value and where the value comes from; below them the help, or what is wrong with the value."""

    BINDINGS = [Binding("f5", "preset", "Preset's value")]

    @dataclass
    class Changed(Message):
        path: str
        text: str

    def __init__(self, option: Option, text: str, plan: Plan | None) -> None:
        super().__init__(classes="setting")
        self.option, self.text = option, text
        self._preset = shown_value(plan, option.path) if plan else ""

    def compose(self) -> ComposeResult:
        yield Words(self.option.path.split(".", 1)[-1], classes="name")
        words = () if self.option.kind is list else self.option.choices
        words = ("true", "false") if self.option.kind is bool else words
        if words and sum(len(word) + 4 for word in words) <= CHOICE_WIDTH:
            yield Choice([(word, word) for word in words], self.text or self._preset, clearable=True, classes="value")
        else:
            yield Line(clean(self.text), placeholder=self._preset, classes="value")
        yield Words(classes="source")
        yield Words(classes="help")

    def explain(self, found: Checked, counts: Counts) -> None:
        """Help, unit, source and consequence of the value in force; or what is wrong with the one typed."""
        error = found.problems.get(self.option.path)
        self.set_class(error is not None, "-wrong")
        self.query_one(".source", Words).say(source_of(found, self.option.path) if not error else "▸ cannot be used")
        if error:
            message = error.message.removeprefix(f"{self.option.path}: ").replace(f", from {SOURCE}", "")
            self.query_one(".help", Words).say(problem_words(FinetuiError(message, error.advice)))
            return
        then = consequence(found.resolved.plan, self.option.path, counts) if found.resolved else ""
        words = Content(clean(help_words(self.option, typed=bool(self.query(Input)))))
        if then:
            words = Content.assemble(words, (f"  → {clean(then, 200)}", "$text-accent"))
        self.query_one(".help", Words).say(words)
        if found.resolved and not self.text:
            self._show_preset(shown_value(found.resolved.plan, self.option.path))

    def _show_preset(self, value: str) -> None:
        for line in self.query(Input):
            line.placeholder = clean(value, 60)
        for choice in self.query(Choice):
            choice.show(value)

    def action_preset(self) -> None:
        """Take back what was typed here."""
        for line in self.query(Input):
            line.value = ""
        if self.text:
            self.text = ""
            self.post_message(self.Changed(self.option.path, ""))

    @on(Input.Changed)
    @on(Choice.Changed)
    def changed(self, event: Input.Changed | Choice.Changed) -> None:
        event.stop()
        if event.value != self.text:
            self.text = event.value
            self.post_message(self.Changed(self.option.path, event.value))


def shown_value(plan: Plan, path: str) -> str:
    """A value of the plan as one would type it."""
    value: Any = plan
    for part in path.split("."):
        value = getattr(value, part)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]" if value else ""
    return "" if value is None or value == {} else str(value)


def help_words(option: Option, *, typed: bool) -> str:
    """What an option does, its unit where the help does not name it, and what may be typed where it is `typed`."""
    aside = [] if not option.unit or option.unit in option.help.lower() else [option.unit]
    if option.choices and typed:
        aside.append(f"one{' or more' if option.kind is list else ''} of {', '.join(option.choices)}")
    return f"{option.help} ({'; '.join(aside)})" if aside else option.help


def source_of(found: Checked, path: str) -> str:
    """Where a value came from, in the wizard's words."""
    source = found.resolved.sources.get(path, "default") if found.resolved else ""
    if source == SOURCE:
        return "▸ set here"
    return DEMO if source.startswith("file ") else "chosen" if source == "command" else source


class SettingsPage(Page):
    """The options people change, and all others under Advanced."""

    waits_for_check = True

    def __init__(self, draft: Draft, found: Checked | None) -> None:
        super().__init__(draft)
        self._found = found

    def compose(self) -> ComposeResult:
        yield Words("Type over what you want to change; F5 or an empty line: the preset's.", classes="question")
        yield from self._fields(True)
        with Collapsible(title="Advanced: everything else (Enter opens it)", id="advanced"):
            yield Vertical(id="others")

    def _fields(self, common: bool) -> Iterable[Widget]:
        plan = self._found.resolved.plan if self._found and self._found.resolved else None
        group = None
        for path, option in OPTIONS.items():
            if option.common != common or not applies(path, self.draft.stages) or is_rows(path):
                continue
            section = path.split(".")[0] if "." in path else ""
            if section != group:
                group = section
                yield Words(GROUPS.get(section, section), classes="group")
                if common and section in self.draft.stages:
                    yield Words(id=f"then-{section}", classes="then")
            yield Setting(option, self.draft.values.get(path, ""), plan)

    def on_mount(self) -> None:
        self.screen.set_focus(self.query(Setting).first().query(".value").first())

    @on(Collapsible.Expanded)
    async def unfold(self) -> None:
        others = self.query_one("#others")
        if not others.children:
            await others.mount_all(self._fields(False))
            if self._found:
                self.show(self._found)

    def show(self, found: Checked) -> None:
        self._found = found
        for setting in self.query(Setting):
            setting.explain(found, self.counts)
        if found.resolved:
            for stage in self.draft.stages:
                for words in self.query(f"#then-{stage}").results(Words):
                    words.say(f"→ {stage_words(found.resolved.plan, stage, self.counts.get(stage))}")

    def ready(self, found: Checked | None) -> bool:
        wrong = [setting for setting in self.query(Setting) if found and setting.option.path in found.problems]
        if wrong:
            wrong[0].query(".value").first().focus()
        return not wrong

    @on(Setting.Changed)
    def changed(self, event: Setting.Changed) -> None:
        self.draft.values = {**self.draft.values, event.path: event.text}
        self.edited()


def is_rows(path: str) -> bool:
    """Whether an option belongs to the page about data."""
    return path.endswith(ROWS)


ROWS = tuple(
    f".data.{name}"
    for name in ("file", "dataset", "dataset_config", "dataset_file", "dataset_revision", "split", "columns", "demo")
)
