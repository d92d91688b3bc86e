"""Lines that complete what is typed: paths, earlier runs, names on this machine, and what was used before."""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from textual.binding import Binding
from textual.content import Content
from textual.message import Message
from textual.suggester import Suggester
from textual.widgets import Input

from core.data_files import DATA_SUFFIXES
from core.data_rows import COLUMNS as PARTS
from core.errors import FinetuiError
from core.paths import cache_dir, expanded, writing_whole
from core.runs import list_runs
from core.text import clean
from tui.draft import Draft, RowsDraft
from tui.widgets import Line

Kind = Literal["file", "model", "dataset"]
KINDS: tuple[Kind, ...] = ("file", "model", "dataset")
MAX_ENTRIES, MAX_OFFERED, MAX_RECENT, MAX_RUNS = 5000, 50, 8, 30
PATIENCE_S = 1.0
COLUMNS, MAX_COLUMNS = "columns", 50


def offers(kind: Kind, text: str, runs_folder: Path) -> list[str]:
    """What `text` may become, in the order of use: entries used before, then what is on this machine."""
    found = [entry for entry in load_recent()[kind] if entry.startswith(text)]
    if text:
        found += completions(kind, text, runs_folder)
    return list(dict.fromkeys(found))[:MAX_OFFERED]


def completions(kind: Kind, text: str, runs_folder: Path) -> list[str]:
    """Names on this machine that begin with `text`. Those that a terminal could trip over are passed over."""
    found: list[str] = []
    if kind == "model" and (text.startswith("run:") or "run:".startswith(text)):
        found += [f"run:{name}" for name in finished_runs(runs_folder, text[4:])]
    if kind != "dataset" and not text.startswith("run:"):
        found += paths(text, folders_only=kind == "model")
    if kind != "file":
        found += [name for name in cached_names(f"{kind}s--") if name.startswith(text)]
    return [entry for entry in found if clean(entry, 4000) == entry]


def paths(text: str, *, folders_only: bool) -> list[str]:
    """Folders (with a slash at the end) and data files that begin with `text`, as it was typed."""
    lead, stem = os.path.split(text)
    typed = text[: len(text) - len(stem)]
    try:
        with os.scandir(expanded(lead or ".")) as entries:
            fitting = sorted(
                (entry.name, entry.is_dir())
                for entry in islice(entries, MAX_ENTRIES)
                if entry.name.startswith(stem) and (stem.startswith(".") or not entry.name.startswith("."))
            )
    except (OSError, ValueError):
        return []
    return [
        f"{typed}{name}{'/' if folder else ''}"
        for name, folder in fitting
        if folder or (not folders_only and name.lower().endswith(DATA_SUFFIXES))
    ]


def finished_runs(runs_folder: Path, start: str) -> list[str]:
    """Names of the newest runs with a finished model."""
    named = [run for run in list_runs(runs_folder) if run.name.startswith(start)]
    return [run.name for run in named[:MAX_RUNS] if run.trained("kto") or run.trained("sft")]


def cached_names(prefix: str) -> list[str]:
    """Hub ids in the Hub's cache, whose folders are called ``models--OWNER--NAME``."""
    home = Path(os.environ.get("HF_HOME") or expanded("~") / ".cache" / "huggingface")
    folder = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    try:
        found = sorted(name for name in os.listdir(folder) if name.startswith(prefix))
    except OSError:
        return []
    return [name.removeprefix(prefix).replace("--", "/", 1) for name in found]


def _read_recent() -> dict[str, Any]:
    try:
        read = json.loads((cache_dir() / "recent.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        read = {}
    return read if isinstance(read, dict) else {}


def load_recent() -> dict[Kind, list[str]]:
    """What earlier runs were given, newest first; broken or foreign entries are passed over."""
    read = _read_recent()
    found: dict[Kind, list[str]] = {}
    for kind in KINDS:
        entries = read.get(kind)
        texts = [entry for entry in entries if isinstance(entry, str)] if isinstance(entries, list) else []
        found[kind] = [entry for entry in texts if entry and clean(entry) == entry][:MAX_RECENT]
    return found


def remember(draft: Draft) -> None:
    """Keep what this draft names, for the next one. Raises FinetuiError."""
    recent = load_recent()
    used: dict[Kind, list[str]] = {"file": [], "model": [draft.model.strip()], "dataset": []}
    for stage in draft.stages:
        rows = draft.data[stage]
        if rows.kind == "file":
            used["file"].append(str(expanded(rows.file.strip()).absolute()))
        elif rows.kind == "hub":
            used["dataset"].append(rows.dataset.strip())
    for kind in KINDS:
        recent[kind] = list(dict.fromkeys([name for name in used[kind] if name] + recent[kind]))[:MAX_RECENT]
    _write_recent({**recent, COLUMNS: _read_recent().get(COLUMNS, {})})


def _write_recent(recent: Mapping[Any, Any]) -> None:
    with writing_whole(cache_dir() / "recent.json") as stream:
        json.dump(recent, stream, indent=1)


def source_of(rows: RowsDraft) -> str:
    """What the rows of a draft are called where their columns are remembered; empty for the demo's."""
    if rows.kind == "file" and rows.file.strip():
        return str(expanded(rows.file.strip()).absolute())
    return rows.dataset.strip() if rows.kind == "hub" else ""


def load_columns(rows: RowsDraft) -> dict[str, str]:
    """Which column of these rows is what, as it was said before; empty where nothing was."""
    known = _read_recent().get(COLUMNS)
    found = known.get(source_of(rows)) if isinstance(known, dict) else None
    sound = isinstance(found, dict) and all(isinstance(word, str) for word in found.values())
    return {part: word for part, word in found.items() if part in PARTS} if found and sound else {}


def remember_columns(rows: RowsDraft) -> None:
    """Keep which column of these rows is what, for the next draft. Raises FinetuiError."""
    recent, source = _read_recent(), source_of(rows)
    known = recent.get(COLUMNS)
    others = {name: value for name, value in known.items() if name != source} if isinstance(known, dict) else {}
    mine = {source: rows.columns} if rows.columns else {}
    kept = dict(list({**others, **mine}.items())[-MAX_COLUMNS:])
    _write_recent({**load_recent(), COLUMNS: kept})


class Completer(Suggester):
    """Suggests the first of the offers behind the cursor, and hands all of them to the line."""

    def __init__(self, line: "PathLine") -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._line = line

    async def get_suggestion(self, value: str) -> str | None:
        found = await self._line.look(value)
        self._line.offer(value, found)
        return found[0] if found else None


class PathLine(Line):
    """A line that completes: the right arrow takes the suggestion, Tab as much as is certain, Down what was used."""

    BINDINGS = [
        Binding("tab", "complete", "Complete", show=False),
        Binding("down", "recent(1)", "Used before", show=False),
        Binding("up", "recent(-1)", "Used later", show=False),
    ]

    @dataclass
    class Offered(Message):
        """What the text may become is known; empty words when there is nothing to say."""

        line: "PathLine"
        words: Content

    def __init__(self, kind: Kind, runs_folder: Path, value: str, *, placeholder: str, **names: str | None) -> None:
        super().__init__(value, placeholder=placeholder, **names)
        self.kind, self.runs_folder = kind, runs_folder
        self.suggester = Completer(self)
        self._recent_at = -1

    async def look(self, text: str) -> list[str]:
        """The offers for a text, unless the file system takes its time."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(offers, self.kind, text, self.runs_folder), PATIENCE_S)
        except (TimeoutError, FinetuiError):
            return []

    def offer(self, value: str, found: Sequence[str]) -> None:
        if value == self.value and self.has_focus:
            others = [entry for entry in found if entry != value]
            self.post_message(self.Offered(self, offer_words(value, others)))

    def on_focus(self) -> None:
        self.run_worker(self.show_offers(), group="offers", exclusive=True)

    async def show_offers(self) -> None:
        self.offer(self.value, await self.look(self.value))

    def on_blur(self) -> None:
        self.post_message(self.Offered(self, Content("")))

    def on_input_changed(self, event: Input.Changed) -> None:
        if not event.value:
            self.run_worker(self.show_offers(), group="offers", exclusive=True)

    async def action_complete(self) -> None:
        """Add what all offers have in common; where that is nothing, Tab goes on to the next field."""
        text = self.value
        found = await self.look(text) if text else []
        certain = os.path.commonprefix(found)
        if len(certain) > len(text):
            self.value = certain
            self.cursor_position = len(certain)
        else:
            self.app.action_focus_next()

    def action_recent(self, by: int) -> None:
        """Go through what was used before."""
        recent = load_recent()[self.kind]
        if recent:
            self._recent_at = max(0, min(self._recent_at + by, len(recent) - 1))
            self.value = recent[self._recent_at]
            self.cursor_position = len(self.value)


def offer_words(value: str, found: Sequence[str]) -> Content:
    """The offers in a line: the last part of each path."""
    if not found:
        return Content("")
    lead = "Tab completes: " if value else "↓ used before: "
    names = [entry if not value else entry.rstrip("/").rsplit("/", 1)[-1] + entry[len(entry.rstrip("/")) :] for entry in
             found[:8]]  # fmt: skip
    more = f"  +{len(found) - 8}" if len(found) > 8 else ""
    return Content.styled(f"{lead}{clean('  '.join(names), 600)}{more}", "$foreground-muted")
