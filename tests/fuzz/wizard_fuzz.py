"""Damaged files through the wizard's data page, in this process: no traceback, nothing that hangs, a word about each.

usage: python tests/fuzz/wizard_fuzz.py [--files 300] [--first SEED] [--model FOLDER]

One app is given file after file. For each it must say within ten seconds what became of it, and show every view of the
data room without a character that a terminal acts on. Prints one line for each file that found something.
"""

import argparse
import asyncio
import collections
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from mutate import Sample, sample
from pilots import CONTROLS, frame
from textual.app import App
from textual.pilot import Pilot
from textual.widgets import Input

import tui
from tui.data_page import DataPage
from tui.data_room import DataRoom
from tui.draft import Draft, RowsDraft
from tui.wizard import WizardScreen

LIMIT_S = 10


class OnePage(App[None]):
    """The wizard at its data page."""

    CSS_PATH = Path(tui.__file__).parent / "app.tcss"

    def __init__(self, draft: Draft, folder: Path) -> None:
        super().__init__()
        self.animation_level = "none"
        self.draft, self.folder = draft, folder
        self.defects: list[str] = []

    def on_mount(self) -> None:
        self.push_screen(WizardScreen(self.draft, self.folder / "draft.json", self.folder / "runs"))

    def notify(self, message: str, *, title: str = "", **more: Any) -> None:
        if "defect" in title:
            self.defects.append(message)
        super().notify(message, title=title, **more)


async def examine(pilot: Pilot[None], path: Path, stage: str) -> str:
    """What the page says of a file; raises where it says nothing, too late, or what it must not."""
    app: Any = pilot.app
    page = app.screen.query_one(DataPage)
    room = page.query_one(DataRoom)
    line = page.query_one("PathLine.file", Input)
    line.value = str(path)
    words = await said(pilot, page, stage, path, LIMIT_S)
    room.focus()
    for key in ("2", "down", "enter", "3", "right", "left", "4", "1", "i", "right", "i", "space"):
        if key == "enter" and not room.here.findings:
            continue  # it would go on to the next page
        await pilot.press(key)
        shown = room.query_one("#preview-text").content.plain + room.query_one("#preview-head").content.plain  # type: ignore[attr-defined]
        assert CONTROLS.findall(shown.replace("\n", "")) == [], "a character that acts on a terminal"
    assert CONTROLS.findall(frame(app).replace("\n", "")) == [], "a character that acts on a terminal"
    assert not app.defects, app.defects
    if isinstance(app.screen, WizardScreen):
        room.action_view(0)
    return "refused" if words.startswith("✘") else "used"


async def said(pilot: Pilot[None], page: DataPage, stage: str, path: Path, limit_s: float) -> str:
    """Wait until the page says what became of a file and the room shows a row, or why it does not."""
    app: Any = pilot.app
    room = page.query_one(DataRoom)
    begun = time.monotonic()
    while True:
        await pilot.pause(0.02)
        words = str(page.query_one(f"#rows-{stage} .report").content.plain)  # type: ignore[attr-defined]
        looked = str(path) in str(app.screen.inspection._looked.get(stage))
        waiting = room.here.words is not None and room.here.words.plain.startswith("○ preparing")
        known = words.startswith("✘") or (not waiting and (room.here.row or room.here.words))
        if looked and words.startswith(("✘", "✔")) and known:
            return words
        assert time.monotonic() - begun < limit_s, f"nothing after {limit_s} s: {words!r}"


async def campaign(samples: list[Sample], model: Path, folder: Path) -> collections.Counter[str]:
    """Give one app file after file; a new one after each that found something."""
    outcomes: collections.Counter[str] = collections.Counter()
    waiting = list(samples)
    sound = folder / "sound.jsonl"
    sound.write_text("".join(json.dumps({"prompt": "p", "completion": "c", "label": n > 1}) + "\n" for n in range(4)))
    while waiting:
        stage = "kto" if outcomes.total() % 2 else "sft"
        draft = Draft(method=stage, model=str(model), step=2)  # type: ignore[arg-type]
        draft.data[stage] = RowsDraft(kind="file", file=str(sound))
        app = OnePage(draft, folder)
        async with app.run_test(size=(80, 24)) as pilot:
            page = app.screen.query_one(DataPage)
            await said(pilot, page, stage, sound, 120)  # the tokenizer's process has started then
            while waiting:
                made = waiting.pop(0)
                path = folder / made.name
                path.write_bytes(made.content)
                try:
                    outcomes[await examine(pilot, path, stage)] += 1
                except Exception as error:
                    outcomes["PROBLEM"] += 1
                    print(f"{made.name} ({stage}): {type(error).__name__}: {str(error)[:300]}", flush=True)
                    break
                if outcomes.total() % 50 == 0:
                    print(f"{outcomes.total()} files: {dict(outcomes)}", flush=True)
                    break
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder of a small model (default: the demo's)")
    options = parser.parse_args()
    from core.paths import cache_dir
    from core.smollm import demo_model

    model = options.model or demo_model(cache_dir(), print)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        os.environ["FINETUI_CACHE"] = str(Path(name) / "cache")
        samples = [sample(seed) for seed in range(options.first, options.first + options.files)]
        begun = time.monotonic()
        outcomes = asyncio.run(campaign(samples, model, Path(name)))
    print(f"{options.files} files in {time.monotonic() - begun:.0f} s: {dict(outcomes)}")
    return min(outcomes["PROBLEM"], 100)


if __name__ == "__main__":
    sys.exit(main())
