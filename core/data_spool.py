"""Any file of rows as JSON lines that can be read from any place: JSONL as it stands, other kinds written out once.

JSON lists, CSV, Parquet and plain text become JSONL in the cache, with the line or row each came from beside it.
"""

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.data_cache import building, content_key, data_cache, entry, key_of
from core.data_files import Unreadable, kind_of, raw_rows
from core.data_pieces import UNREADABLE_MARK
from core.errors import FinetuiError

ROWS, LINES = "rows.jsonl", "lines.u64"
SAY_EVERY = 2000


@dataclass(frozen=True)
class Spool:
    """`rows` is a JSONL file; `lines` the line in the original of each of its rows, None where they are the same."""

    path: Path
    kind: str
    content: str
    rows: Path
    lines: Path | None

    @property
    def spooled(self) -> bool:
        return self.lines is not None

    def line_numbers(self) -> "array[int] | None":
        """The line in the original of each row of `rows`, from 0."""
        if self.lines is None:
            return None
        found = array("Q")
        found.frombytes(self.lines.read_bytes())
        return found


def spool(path: Path, content: str = "", progress: Callable[[int], None] | None = None) -> Spool:
    """Make the rows of `path` readable as JSONL. `progress` is told the rows written so far.

    `content` is the hash of the file where it is known. Raises FinetuiError for a file that cannot be read.
    """
    kind = kind_of(path)
    if kind == "jsonl":
        return Spool(path, kind, content, path, None)
    content = content or content_key(path)
    key = key_of("spool", kind, content)
    folder = entry(key)
    if folder is None:
        with building(key) as fresh:
            try:
                _write(path, fresh, progress)
            except UnicodeEncodeError as error:
                raise FinetuiError(f"{path}: text that UTF-8 cannot hold.", "Mend the row.") from error
        folder = data_cache() / key
    return Spool(path, kind, content, folder / ROWS, folder / LINES)


def _write(path: Path, folder: Path, progress: Callable[[int], None] | None) -> None:
    lines = array("Q")
    with (folder / ROWS).open("wb") as stream:
        for text, line in _texts(path):
            stream.write(text + b"\n")
            lines.append(line)
            if progress and len(lines) % SAY_EVERY == 0:
                progress(len(lines))
    (folder / LINES).write_bytes(lines.tobytes())


def _texts(path: Path) -> Iterator[tuple[bytes, int]]:
    for line, row in raw_rows(path):
        if isinstance(row, Unreadable):
            row = UNREADABLE_MARK + row.reason
        yield text_of(row), line


def text_of(row: Any) -> bytes:
    """A row as one line of JSON in UTF-8, half surrogate pairs escaped; in place of what JSON cannot hold its type."""
    try:
        return json.dumps(row, ensure_ascii=False, default=_foreign).encode()
    except UnicodeEncodeError:
        return json.dumps(row, default=_foreign).encode()


def _foreign(value: Any) -> dict[str, str]:
    return {"not JSON": type(value).__name__}
