"""The check of a stretch of a JSONL file: a few numbers for each row and each conversation, in columns.

A stretch owns the lines that begin in it, so that stretches of one file can be checked in any number of processes and
laid end to end. What comes back is a few dozen bytes a row.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from core.data_facts import Facts, facts_of
from core.data_files import BOM, MAX_LINE_BYTES, Unreadable, parse_line
from core.data_rows import RowError, names_of, read_row

PIECE_BYTES = 4 << 20
ALONE_BYTES = 16 << 20
"""Files up to this size are read by one process: starting workers takes as long."""
MAX_WORDS = 4000
"""Different reasons, patterns and names that are told apart in one piece; the rest is counted together."""
NAMED_ROWS = 200
"""Rows of a piece whose column names are noted."""
UNREADABLE_MARK = "\0"
"""How a spooled file writes a row that could not be read: a text that begins with this."""
COLUMNS = {
    "line": "I", "offset": "Q", "reason": "H", "repair": "H",
    "row": "I", "part": "B", "label": "b", "flags": "H", "pattern": "H", "prompt_key": "Q", "answer_key": "Q",
    "row_key": "Q", "system": "Q", "characters": "I", "answer_characters": "I",
}  # fmt: skip
"""Columns of a piece by array type code: the first four have an entry a row, the others an entry a conversation."""
ROW_COLUMNS = ("line", "offset", "reason", "repair")


class Words:
    """Texts by number, in the order of their first use; the last number stands for all that are too many."""

    def __init__(self, first: str = "", rest: str = "other") -> None:
        self._numbers = {first: 0}
        self._rest = rest

    def number(self, text: str) -> int:
        found = self._numbers.get(text)
        if found is None:
            if len(self._numbers) >= MAX_WORDS:
                text = self._rest
            found = self._numbers.setdefault(text, len(self._numbers))
        return found

    def all(self) -> list[str]:
        return list(self._numbers)


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the stretches of a file that are read one at a time."""
    for start in range(0, size, PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, size)


class Piece:
    """The bytes [start, end) of a file and the lines that begin in them; of an overlong line only a beginning."""

    def __init__(self, path: str, start: int, end: int) -> None:
        before = min(start, 1)  # the byte before tells whether a line begins at `start`
        with Path(path).open("rb") as stream:
            stream.seek(start - before)
            block = stream.read(end - start + before)
            self.digest = hashlib.sha256(block[before:]).digest()
            first = block.find(b"\n") + 1 if before else 0
            self._offset = start - before + first
            self._block = block[first:] if first or not before else b""
            if self._block and not self._block.endswith(b"\n"):
                self._block += stream.readline(MAX_LINE_BYTES + 1)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, line without its end)."""
        lines = self._block.split(b"\n")
        if not lines[-1]:
            lines.pop()
        offset = self._offset
        for line in lines:
            yield offset, line
            offset += len(line) + 1


def check_piece(
    path: str, start: int, end: int, columns: Mapping[str, str] | None = None, spooled: bool = False
) -> dict[str, Any]:
    """Check the lines that begin in [start, end) of a JSONL file.

    Columns (see COLUMNS) as bytes, the words their numbers stand for, counts of lines, blank lines, shapes, tools and
    column names, and a digest of exactly the bytes [start, end).
    """
    piece, found = Piece(path, start, end), Findings(names_of(columns), spooled)
    found.unseen = {name for name in (columns or {}).values() if name}
    for offset, line in piece.lines():
        found.lines += 1
        if not offset:
            line = line.removeprefix(BOM)
        if line and not line.isspace():
            found.add(offset, line)
    return found.reply() | {"digest": piece.digest}


class Findings:
    """What the rows of a piece hold, row by row and counted."""

    def __init__(self, names: Mapping[str, tuple[str, ...]], spooled: bool) -> None:
        self.names, self.spooled, self.lines = names, spooled, 0
        self.unseen: set[str] = set()
        """Columns that were asked for and did not occur yet."""
        self._rows: list[tuple[int, ...]] = []
        self._conversations: list[tuple[int, ...]] = []
        self.reasons, self.repairs, self.patterns = Words(), Words(), Words()
        self.shapes: Counter[str] = Counter()
        self.tools: Counter[str] = Counter()
        self.problems: Counter[str] = Counter()
        self.keys: Counter[str] = Counter()

    def add(self, offset: int, line: bytes) -> None:
        number, reason, repair = len(self._rows), 0, 0
        row = row_of(line, self.spooled)
        if number < NAMED_ROWS and isinstance(row, dict):
            self.keys.update(str(key)[:80] for key in row)
        if self.unseen and isinstance(row, dict) and (seen := self.unseen & row.keys()):
            self.keys.update(seen - self.keys.keys())
            self.unseen -= seen
        try:
            pairs, tools, repaired, shape = read_row(row, self.names)
        except RowError as error:
            reason = self.reasons.number(str(error)[:300])
        else:
            self.shapes[shape] += 1
            if repaired:
                repair = self.repairs.number("; ".join(repaired)[:300])
            for part, (messages, label) in enumerate(pairs, len(pairs) - 1):
                self._add_conversation(number, part, label, facts_of(messages, tools))
        self._rows.append((self.lines, offset, reason, repair))

    def _add_conversation(self, row: int, part: int, label: bool | None, facts: Facts) -> None:
        self._conversations.append((
            row, part, -1 if label is None else label, facts.flags, self.patterns.number(facts.pattern[:200]),
            facts.prompt_key, facts.answer_key, facts.row_key, facts.system, facts.characters, facts.answer_characters,
        ))  # fmt: skip
        if facts.calls:
            self.tools.update(facts.calls)
        if facts.problem:
            self.problems[facts.problem[:200]] += 1

    def reply(self) -> dict[str, Any]:
        columns = {name: array(code) for name, code in COLUMNS.items()}
        others = [name for name in COLUMNS if name not in ROW_COLUMNS]
        for names, entries in ((ROW_COLUMNS, self._rows), (others, self._conversations)):
            for name, values in zip(names, zip(*entries, strict=True), strict=False):
                columns[name].extend(values)
        return {
            "columns": {name: column.tobytes() for name, column in columns.items()},
            "reasons": self.reasons.all(), "repairs": self.repairs.all(), "patterns": self.patterns.all(),
            "shapes": dict(self.shapes), "tools": dict(self.tools.most_common(MAX_WORDS)), "keys": dict(self.keys),
            "problems": dict(self.problems.most_common(200)), "lines": self.lines,
        }  # fmt: skip


def row_of(line: bytes, spooled: bool) -> Any:
    if len(line) > MAX_LINE_BYTES:
        return Unreadable(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    row = parse_line(line)
    if spooled and isinstance(row, str) and row.startswith(UNREADABLE_MARK):
        return Unreadable(row[len(UNREADABLE_MARK) :])
    return row
