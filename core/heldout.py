"""The prompts an evaluation answers: a run's held-out rows or a file's, none of them trained on without a word.

No torch. A chain holds out rows in every stage, and each stage leaves out rows of its own; so what counts as held out
is what no stage has trained on.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.data import conversations_of, drawn, raw_rows
from core.data_facts import prompt_key_of
from core.data_reader import Rows
from core.data_rows import RowError
from core.errors import FinetuiError
from core.paths import runs_dir
from core.plan import Plan
from core.prepare import stage_ledger
from core.sources import Notify, demo_files
from core.tools import Tool, read_tools, tools_of

DRAW_SEED = 0
NO_PROMPTS = "There are no held-out prompts to answer."
NO_PROMPTS_ADVICE = "Give --eval-file FILE or --split-dataset."


@dataclass(frozen=True)
class Prompt:
    """One prompt: its messages, the assistant turn that is expected (None: nothing is), and a bad one where known."""

    file: str
    line: int
    messages: list[dict[str, Any]]
    expected: dict[str, Any] | None = None
    rejected: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def key(self) -> int:
        """As `Conversation.prompt_key`: equal for equal prompts."""
        return prompt_key_of([*self.messages, {"role": "assistant", "content": ""}])

    @property
    def schemas(self) -> dict[str, Tool]:
        """The row's own tools by name; empty where it has none that can be used."""
        try:
            return tools_of(self.tools) if self.tools else {}
        except FinetuiError:
            return {}


@dataclass
class HeldOut:
    """The prompts, where they come from, and what people should know of them."""

    source: str
    prompts: list[Prompt]
    notes: list[str] = field(default_factory=list)
    tools: dict[str, Tool] = field(default_factory=dict)
    """Tools that every prompt may call, beside a row's own."""


def held_out(plan: Plan, file: Path | None, count: int, notify: Notify = lambda text: None) -> HeldOut:
    """At most `count` prompts: the file's, else the plan's file, the demo's, or what the last stage holds out.

    Of more than `count` the same ones are drawn every time, and more of them include the fewer. Raises FinetuiError
    where there are none.
    """
    chosen = file or (Path(plan.evaluate.file) if plan.evaluate.file else None)
    data = plan.stage(plan.training_stages[-1]).data
    demo = chosen is None and data.demo
    if demo:
        chosen = demo_files()["evaluate"]
    if chosen is not None:
        found = prompts_of(chosen)
        found.notes += _known_prompts(plan, found.prompts, notify)
    else:
        found = _of_split(plan, notify)
    if demo:
        found.tools = read_tools(demo_files()["tools"])
    found.prompts = _drawn(found.prompts, count)
    return found


def _known_prompts(plan: Plan, prompts: list[Prompt], notify: Notify) -> list[str]:
    """What is to be said of a file's prompts that stand in the training rows too."""
    try:
        seen = trained_prompts(plan, notify)
    except FinetuiError:
        return ["The rows of the training cannot be read any more: whether these prompts were trained on is not known."]
    again = sum(prompt.key in seen for prompt in prompts)
    return [f"{again} of the file's prompts were trained on: their score says nothing of new ones."] if again else []


def _drawn(prompts: list[Prompt], count: int) -> list[Prompt]:
    chosen = sorted(prompts, key=lambda prompt: drawn(prompt.key, DRAW_SEED))[:count]
    return sorted(chosen, key=lambda prompt: (prompt.file, prompt.line))


def prompts_of(path: Path) -> HeldOut:
    """The rows of a file; one without an answer is a prompt for which nothing is expected. Raises FinetuiError."""
    good: dict[int, Prompt] = {}
    bad: dict[int, dict[str, Any]] = {}
    reasons: Counter[str] = Counter()
    for line, row in raw_rows(path):
        try:
            for prompt, label in _prompts_of(path, line, row):
                if label is False and prompt.expected is not None:
                    bad[prompt.key] = prompt.expected
                else:
                    good[prompt.key] = prompt
        except RowError as error:
            reasons[str(error)] += 1
    if only_bad := len(bad.keys() - good.keys()):
        reasons["only an answer labelled false"] += only_bad
    prompts = [_with_bad(prompt, bad.get(key)) for key, prompt in good.items()]
    if not prompts:
        said = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(2)) or "no rows"
        raise FinetuiError(f"{path} has no prompt that can be answered ({said}).", 'A row has "messages" or "prompt".')
    notes = [f"Left out: {count:,} × {reason}." for reason, count in reasons.most_common(5)]
    return HeldOut(path.name, prompts, notes)


def _prompts_of(path: Path, line: int, row: Any) -> Iterator[tuple[Prompt, bool | None]]:
    """The prompts of a row with the row's label. Raises RowError."""
    try:
        found, _ = conversations_of(row)
        answered = True
    except RowError:
        if (open_row := _answered(row)) is None:
            raise
        found, _ = conversations_of(open_row)
        answered = False
    tools = row.get("tools")
    with_tools = tools if isinstance(tools, list) else _decoded_list(tools)
    for messages, label in found:
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        yield Prompt(str(path), line, messages[:last], messages[last] if answered else None, tools=with_tools), label


def _answered(row: Any) -> dict[str, Any] | None:
    """A row that ends with the person's words, with an answer put behind them; None for any other."""
    if not isinstance(row, dict):
        return None
    for key in ("messages", "conversations", "conversation"):
        if isinstance(turns := row.get(key), list) and turns:
            return {**row, key: [*turns, {"role": "assistant", "content": "-"}]}
    return {**row, "completion": "-"} if row.get("prompt") and row.get("completion") is None else None


def _decoded_list(tools: Any) -> list[dict[str, Any]] | None:
    try:
        found = json.loads(tools) if isinstance(tools, str) else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def _with_bad(prompt: Prompt, bad: dict[str, Any] | None) -> Prompt:
    return Prompt(prompt.file, prompt.line, prompt.messages, prompt.expected, bad, prompt.tools) if bad else prompt


def _of_split(plan: Plan, notify: Notify) -> HeldOut:
    """What the last stage holds out and no stage trains on."""
    stage = plan.training_stages[-1]
    ledger = stage_ledger(plan.stage(stage), stage, notify)
    rows = list(Rows(ledger).each(ledger.evaluation()))
    if not rows:
        raise FinetuiError(NO_PROMPTS, NO_PROMPTS_ADVICE)
    seen = trained_prompts(plan, notify)
    bad = {row.prompt_key: row.messages[row.last_assistant] for row in rows if row.label is False}
    good = {row.prompt_key: row for row in rows if row.label is not False and row.prompt}
    fresh = {key: row for key, row in good.items() if key not in seen}
    notes = []
    if only_bad := len(bad.keys() - good.keys()):
        have, are = ("prompts have", "are") if only_bad > 1 else ("prompt has", "is")
        notes.append(f"{only_bad:,} held-out {have} only answers labelled false, and {are} not answered.")
    if again := len(good) - len(fresh):
        what, were, are = ("prompts", "were", "are") if again > 1 else ("prompt", "was", "is")
        notes.append(
            f"{again:,} {what} that {stage.upper()} holds out {were} trained on by another stage and {are} left out."
        )
    if not fresh:
        raise FinetuiError(
            "Every held-out prompt was trained on by another stage of this run." if again else NO_PROMPTS,
            "Hold rows out in every stage (--split-dataset), or give a file of prompts.",
        )
    prompts = [
        Prompt(row.file, row.line, row.prompt, row.messages[row.last_assistant], bad.get(key), row.tools)
        for key, row in fresh.items()
    ]
    names = sorted({Path(row.file).name for row in rows})
    return HeldOut(f"held out from {', '.join(names[:3])}", prompts, notes)


def trained_prompts(plan: Plan, notify: Notify, depth: int = 5) -> set[int]:
    """The keys of every prompt that a stage of this run, or the run it started from, has trained on."""
    seen: set[int] = set()
    for stage in plan.training_stages:
        ledger = stage_ledger(plan.stage(stage), stage, notify)
        seen |= set(ledger.prompt_keys[ledger.training()].tolist())
    earlier = plan.model.name.removeprefix("run:")
    if earlier != plan.model.name and depth:
        from core.runs import find_run

        try:
            seen |= trained_prompts(find_run(runs_dir(), earlier).plan(), notify, depth - 1)
        except FinetuiError:  # that run or its rows are gone: nobody can tell any more
            notify(f"what {earlier} was trained on cannot be told any more")
    return seen
