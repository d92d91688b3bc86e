"""The survey of a file: every row and conversation in a few numbers, found once and kept.

A file of some size is cut into pieces that workers check side by side; the pieces are laid end to end here. The survey
does not depend on method, model or limits: those are laid over it (`core.data_ledger`).
"""

import contextlib
import difflib
import json
import mmap
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.data_cache import CacheUnwritable, building, content_key, entry, key_of, known_content
from core.data_pieces import ALONE_BYTES, COLUMNS, ROW_COLUMNS, check_piece, pieces
from core.data_pool import Workers, worker_count
from core.data_spool import Spool, spool
from core.errors import FinetuiError

if TYPE_CHECKING:
    import numpy

FIRST_BYTES = 256 << 10
SAY_EVERY_S = 0.2
MAX_NUMBERED, OTHERS = 65_000, "other"
MAX_COLUMNS = 12
OTHER = ("shapes", "tools", "keys", "problems")


@dataclass
class Progress:
    """How far a survey is, and what it has seen so far."""

    done_bytes: int
    total_bytes: int
    rows: int
    conversations: int
    reasons: Counter[str]
    flags: Counter[int]
    phase: str = "check"


Say = Callable[[Progress], None]


@dataclass
class Survey:
    """What a file holds. `columns` has a numpy array for each of core.data_pieces.COLUMNS.

    The first four have an entry for each row: its line in the file, its byte offset in `rows`, the number of the reason
    why it cannot be used (0: it can) and of what was repaired. The others have an entry for each conversation.
    """

    file: str
    kind: str
    content: str
    rows_path: str
    size: int
    lines: int
    columns: "dict[str, numpy.ndarray]"
    reasons: list[str]
    repairs: list[str]
    patterns: list[str]
    mapping: dict[str, str] = field(default_factory=dict)
    shapes: Counter[str] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """Rows of the file, blank lines apart."""
        return len(self.columns["line"])

    @property
    def conversations(self) -> int:
        return len(self.columns["row"])

    @property
    def spooled(self) -> bool:
        return self.rows_path != self.file

    def __getitem__(self, name: str) -> "numpy.ndarray":
        return self.columns[name]

    def line_of(self, conversation: int) -> int:
        """The line of a conversation in the file, from 1."""
        return int(self["line"][self["row"][conversation]])

    def let_go(self) -> None:
        """Give back the memory that columns mapped from the disk take; they are mapped again where they are read."""
        for values in self.columns.values():
            mapped = getattr(values, "_mmap", None)
            if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def reason_counts(self) -> Counter[str]:
        """How many rows cannot be used for which reason."""
        return counted(self["reason"], self.reasons)

    def repair_counts(self) -> Counter[str]:
        return counted(self["repair"], self.repairs)


def refuse_unknown_columns(surveys: Sequence[Survey]) -> None:
    """Raise FinetuiError where a column was named that occurs in none of the files; the nearest one comes first."""
    there = list(dict.fromkeys(key for found in surveys for key in found.keys))
    for part, name in surveys[0].mapping.items():
        if name and there and name not in there:
            near = difflib.get_close_matches(name, there, 3, 0.4)
            named = [*near, *(key for key in there if key not in near)]
            more = f" and {len(named) - MAX_COLUMNS} more" if len(named) > MAX_COLUMNS else ""
            raise FinetuiError(
                f"{surveys[0].file} has no column {name!r}, which --column names as {part}.",
                f"It has {', '.join(named[:MAX_COLUMNS])}{more}.",
            )


def counted(numbers: "numpy.ndarray", words: list[str]) -> Counter[str]:
    """How often each word but the first (which stands for none) occurs."""
    import numpy

    counts = numpy.bincount(numbers, minlength=len(words))
    return Counter({word: int(count) for word, count in zip(words[1:], counts[1:], strict=False) if count})


def survey(
    path: Path, mapping: Mapping[str, str] | None = None, say: Say | None = None, *, workers: int | None = None
) -> Survey:
    """Survey the file at `path` with the columns that `mapping` names; what was found before is taken from the cache.

    `say` is told how far it is several times a second; an exception it raises ends the survey and its workers.
    Raises FinetuiError for a file that cannot be read.
    """
    mapping = dict(mapping or {})
    teller = _Teller(say)
    source = spool(path, known_content(path) if path.is_file() else "", teller.spooled)
    size = source.rows.stat().st_size
    if size > ALONE_BYTES:
        content = source.content or known_content(path)
        if content and (folder := entry(key_of("survey", source.spooled, content, mapping))):
            return load_survey(folder, path, source)
    found = _Assembly(teller, size)
    requests: list[dict[str, Any]] = [
        {"path": str(source.rows), "start": start, "end": end, "columns": mapping, "spooled": source.spooled}
        for start, end in pieces(size)
    ]
    if size <= ALONE_BYTES:
        for request in requests:
            found.add(check_piece(**request), request["end"])
    else:
        _side_by_side(found, requests, worker_count() if workers is None else workers)
    content = source.content or content_key(path, found.digests if size > ALONE_BYTES else None)
    made = found.survey(path, source, content, mapping)
    if size > ALONE_BYTES:
        key = key_of("survey", source.spooled, content, mapping)
        with contextlib.suppress(CacheUnwritable), building(key) as fresh:
            save_survey(made, fresh)
        if folder := entry(key):  # mapped from the disk it takes memory that others may have
            return load_survey(folder, path, source)
    return made


def _side_by_side(found: "_Assembly", requests: list[dict[str, Any]], workers: int) -> None:
    """Check pieces with workers; a little of the first one here and now, so that there is something to see."""
    first = check_piece(**{**requests[0], "end": FIRST_BYTES})
    found.glance(first)
    with Workers(workers) as pool:
        asked = ({"do": "check", **request} for request in requests)
        for request, reply in zip(requests, pool.replies(asked), strict=True):
            found.add(reply, request["end"])


class _Teller:
    """Says how far it is, not more often than somebody can read."""

    def __init__(self, say: Say | None) -> None:
        self._say, self._said = say, 0.0

    def __call__(self, progress: Progress, *, now: bool = False) -> None:
        clock = time.monotonic()
        if self._say and (now or clock - self._said >= SAY_EVERY_S):
            self._said = clock
            self._say(progress)

    def spooled(self, rows: int) -> None:
        self(Progress(0, 0, rows, 0, Counter(), Counter(), phase="read"))


class _Assembly:
    """Lays pieces end to end: lines are counted on, words get their numbers in the whole."""

    def __init__(self, teller: _Teller, size: int) -> None:
        self._teller, self._size = teller, size
        self._parts: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._words: dict[str, dict[str, int]] = {name: {"": 0} for name in ("reasons", "repairs", "patterns")}
        self.counts: dict[str, Counter[str]] = {name: Counter() for name in OTHER}
        self.reasons: Counter[str] = Counter()
        self.flags: Counter[int] = Counter()
        self.lines = self.rows = self.conversations = 0
        self.digests: list[bytes] = []

    def glance(self, reply: dict[str, Any]) -> None:
        """Say what the beginning of the file shows, without taking it in."""
        import numpy

        rows = len(reply["columns"]["line"]) // 4
        numbers = numpy.frombuffer(reply["columns"]["reason"], dtype="u2")
        flags = _flag_counts(numpy.frombuffer(reply["columns"]["flags"], dtype="u2"))
        made = len(reply["columns"]["row"]) // 4
        self._teller(
            Progress(FIRST_BYTES, self._size, rows, made, counted(numbers, reply["reasons"]), flags), now=True
        )

    def add(self, reply: dict[str, Any], end: int) -> None:
        import numpy

        found = {
            name: numpy.frombuffer(reply["columns"][name], dtype=numpy.dtype(code)).copy()
            for name, code in COLUMNS.items()
        }
        self.reasons.update(counted(found["reason"], reply["reasons"]))
        self.flags.update(_flag_counts(found["flags"]))
        for column, words in (("reason", "reasons"), ("repair", "repairs"), ("pattern", "patterns")):
            known = self._words[words]
            numbers = [_number(known, word) for word in reply[words]]
            found[column] = numpy.array(numbers, dtype="u2")[found[column]]
        found["line"] += self.lines
        found["row"] += self.rows
        for name, values in found.items():
            self._parts[name].append(values)
        for name, counts in self.counts.items():
            counts.update(reply[name])
        self.lines += reply["lines"]
        self.rows += len(found["line"])
        self.conversations += len(found["row"])
        self.digests.append(reply["digest"])
        self._teller(Progress(end, self._size, self.rows, self.conversations, self.reasons, self.flags))

    def survey(self, path: Path, source: Spool, content: str, mapping: dict[str, str]) -> Survey:
        import numpy

        columns = {}
        for name, code in COLUMNS.items():
            parts = self._parts.pop(name)
            columns[name] = numpy.concatenate(parts) if parts else numpy.zeros(0, numpy.dtype(code))
        numbers = source.line_numbers()
        if numbers is not None:
            columns["line"] = numpy.frombuffer(numbers, dtype="u8")[columns["line"].astype("i8") - 1].astype("u4")
        reasons, repairs, patterns = (list(self._words[name]) for name in ("reasons", "repairs", "patterns"))
        return Survey(
            str(path), source.kind, content, str(source.rows), self._size, self.lines, columns, reasons, repairs,
            patterns, mapping, *(self.counts[name] for name in OTHER),
        )  # fmt: skip


def _number(known: dict[str, int], word: str) -> int:
    """The number of a word, a new one where it is new; of too many the last number stands for all."""
    if word not in known and len(known) >= MAX_NUMBERED:
        word = OTHERS
    return known.setdefault(word, len(known))


def _flag_counts(flags: "numpy.ndarray") -> Counter[int]:
    """How many conversations carry each flag."""
    return Counter({1 << bit: int(count) for bit in range(16) if (count := (flags >> bit & 1).sum())})


# --- kept in the cache ---


def save_survey(made: Survey, folder: Path) -> None:
    """Write a survey into a folder: one file a column, and the rest as JSON."""
    for name, values in made.columns.items():
        values.tofile(folder / f"{name}.bin")
    rest = {
        name: getattr(made, name)
        for name in ("kind", "size", "content", "lines", "reasons", "repairs", "patterns", "mapping", *OTHER)
    }
    (folder / "survey.json").write_text(json.dumps(rest), encoding="utf-8")


def load_survey(folder: Path, path: Path, source: Spool) -> Survey:
    """The survey in a folder, its columns mapped from the disk."""
    import numpy

    rest = json.loads((folder / "survey.json").read_text(encoding="utf-8"))
    columns = {}
    for name, code in COLUMNS.items():
        file = folder / f"{name}.bin"
        empty = not file.stat().st_size
        columns[name] = numpy.zeros(0, code) if empty else numpy.memmap(file, dtype=numpy.dtype(code), mode="r")
    rest |= {name: Counter(rest[name]) for name in OTHER}
    return Survey(file=str(path), rows_path=str(source.rows), columns=columns, **rest)


assert set(ROW_COLUMNS) < set(COLUMNS)
