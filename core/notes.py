"""What a person says of a run: a note and a pin, in ``RUN/note.json``.

Not in the event log: its size and its time of change tell when the run was last heard of, and the history reads only
its two ends.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from core.paths import writing_whole
from core.secrets import redact

MAX_NOTE = 500


@dataclass(frozen=True)
class Note:
    """A person's words on a run; pinned runs stand first in the history."""

    text: str = ""
    pinned: bool = False


def note_path(folder: Path) -> Path:
    return folder / "note.json"


def read_note(folder: Path) -> Note | None:
    """The note in the run directory `folder`, None where nothing was said or it cannot be read."""
    try:
        found = json.loads(note_path(folder).read_bytes())
        return Note(str(found.get("text", ""))[:MAX_NOTE], found.get("pinned") is True)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def write_note(folder: Path, note: Note) -> None:
    """Keep a note with the run. Raises FinetuiError."""
    with writing_whole(note_path(folder)) as stream:
        json.dump(asdict(replace(note, text=redact(note.text))), stream)


def note_mark(folder: Path) -> tuple[int, int]:
    """Something that differs after every change of the note."""
    try:
        found = note_path(folder).stat()
        return found.st_mtime_ns, found.st_ino
    except OSError:
        return 0, 0
