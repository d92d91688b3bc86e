"""The history of a folder's runs, read from a thread: what each run is now, without reading again what is known."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.notes import Note, note_mark, read_note
from core.runs import Digest, is_alive, list_runs
from tui.follow import LIVE, tame


class History:
    """The runs of a folder; what has not changed is not read again. To be used from one thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, tuple[Any, dict[str, Any]]] = {}
        self._living: dict[str, Digest] = {}

    def read(self) -> list[dict[str, Any]]:
        """A summary of each run, pinned ones first, then the newest first."""
        return list(self.batches())[-1]

    def batches(self, size: int = 25) -> Iterator[list[dict[str, Any]]]:
        """The summaries so far after the first `size` runs that had to be read and each hundred more, then all."""
        runs = sorted(list_runs(self.folder), key=lambda run: not (read_note(run.path) or Note()).pinned)
        known, self._known = self._known, {}
        living, self._living = self._living, {}
        found: list[dict[str, Any]] = []
        fresh = 0
        for run in runs:
            mark = (_mark(run.events_path), note_mark(run.path))
            before = known.get(run.name)
            if before and before[0] == mark and before[1]["status"] not in LIVE and not is_alive(run):
                row = before[1]
            else:
                begun, digest = time.perf_counter(), living.get(run.name) or Digest(run)
                row = {key: tame(value) for key, value in digest.read().items()}
                if row["status"] in LIVE:
                    self._living[run.name] = digest
                row["started"] = row["started"] if row["started"] and 0 < row["started"] < 1e11 else None
                fresh += 1
                time.sleep((time.perf_counter() - begun) / 2)  # the lock goes to keyboard and screen
            self._known[run.name] = (mark, row)
            found.append(row)
            if fresh >= size:
                fresh, size = 0, 100
                yield list(found)
        yield found


def _mark(path: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    return 0, 0
