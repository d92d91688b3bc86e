"""The history in words: the cells of a run, what the filter looks through, and the greeting where there is none."""

import time
from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual.content import Content

from core.text import clean, duration, number
from tui.follow import LIVE
from tui.widgets import status_text


def count_words(runs: int, running: int) -> str:
    """How many runs there are, for the banner."""
    if not runs:
        return ""
    return f"{runs} run{'s' if runs > 1 else ''}, {running or 'none'} running"


def searched(row: dict[str, Any]) -> str:
    """The words of a run that the filter looks through."""
    return " ".join(str(row.get(key) or "") for key in ("name", "status", "method", "model", "note")).lower()


def started(row: dict[str, Any]) -> str:
    return time.strftime("%d %b %H:%M", time.localtime(row["started"])) if row["started"] else "–"


def brief(row: dict[str, Any]) -> str:
    """A run in a line, where there is no room for a preview: how far it is while it lives, and what it is."""
    parts = [row["method"], row["model"], f"started {started(row)}", row["note"]]
    if row["status"] in LIVE and row["step"]:
        total, left = row["total_steps"], row["left_s"]
        far = f"step {row['step']}{f'/{total}' if total else ''}"
        parts.insert(0, f"{str(row['stage']).upper()} {far}{f', {duration(left)} left' if left is not None else ''}")
    return "   ".join(clean(part, 60) for part in parts if part)


def cells(row: dict[str, Any], colours: Mapping[str, str]) -> list[Text]:
    """The cells of a run, in the order of COLUMNS; `colours` are the theme's variables."""
    name = clean(row["name"], 100)
    flags = ("◆ " if row.get("marked") else "") + ("★ " if row.get("pinned") else "")
    name = flags + name
    texts = [
        name if len(name) <= 28 else f"{name[:27]}…",
        row["method"],
        duration(row["duration_s"]),
        number(row["loss"], 3),
        number(row["margin"], 3),
        started(row),
        row["model"],
    ]
    return [status_text(row["status"], colours), *(Text(clean(text, 40)) for text in texts)]


def greeting() -> Content:
    """For a newcomer: what this is and the one key to press."""
    return Content("\n").join(
        [
            Content.styled("Welcome. There are no runs yet.", "bold"),
            Content(""),
            Content("finetui teaches a language model from your rows: SFT, KTO, or both."),
            Content(""),
            *(
                Content.assemble((f"{key:>9}", "bold"), f"   {words}")
                for key, words in (
                    ("Enter, d", "the demo: a small real model learns to call tools, in minutes"),
                    ("n", "a run of your own: method, model, data, settings, review"),
                    ("?", "every key"),
                )
            ),
            Content(""),
            Content.styled(
                "A run goes on when you leave: quit, close the terminal, lose SSH. Open finetui again to see it.",
                "$foreground-muted",
            ),
        ]
    )
