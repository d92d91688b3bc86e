"""What drives the app in a test and reads its screen; recorded runs and hostile text to show on it."""

import html
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.app import App
from textual.pilot import Pilot

from core.runs import Run

RECORDED = Path(__file__).parent / "runs"
HOSTILE = "a\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b31m [/x] [INST] [red]b \u202egnp.exe\u2066 \x08\x7f\tend"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]")


def recorded(folder: Path, log: str, name: str = "") -> Run:
    """A run directory made from a recorded log."""
    run = Run(folder / (name or log))
    run.path.mkdir()
    shutil.copy(RECORDED / f"{log}.jsonl", run.events_path)
    run.plan_path.write_text("method: sft\n")
    return run


def frame(app: App[Any]) -> str:
    """What the screen shows, as lines of text."""
    lines: dict[float, str] = defaultdict(str)
    cells = r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*clip-path[^>]*>([^<]*)</text>'
    for x, y, text in re.findall(cells, app.export_screenshot()):
        row = lines[float(y)]
        lines[float(y)] = row.ljust(round(float(x) / 12.2)) + html.unescape(text).replace("\xa0", " ")
    return "\n".join(line.rstrip() for _, line in sorted(lines.items()))


async def until(pilot: Pilot[Any], condition: Callable[[], Any], limit: int = 3000) -> Any:
    """Let the app work until `condition` holds."""
    for _ in range(limit):
        if found := condition():
            return found
        await pilot.pause(0.02)
    raise AssertionError(f"the screen is {type(pilot.app.screen).__name__}:\n{frame(pilot.app)}")


async def shows(pilot: Pilot[Any], *words: str) -> str:
    """Wait until the screen shows all of `words`."""

    def seen() -> str:
        text = frame(pilot.app)
        return text if all(word in text for word in words) else ""

    return await until(pilot, seen)
