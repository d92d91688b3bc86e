"""Files of rows, whatever their kind: recognised by content, read as a stream of (line, row). No torch, no tokenizer.

A JSON line that cannot be read is a row like any other that cannot be used: it comes as `Unreadable` with the reason.
What breaks the whole file (no UTF-8 table, a torn JSON list, a gzip file by mistake) raises a FinetuiError.
"""

import codecs
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec

from core.errors import FinetuiError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
BINARY_STARTS = {
    b"\x1f\x8b": ("a gzip file", "Unpack it: gunzip FILE."),
    b"PK\x03\x04": ("a zip file", "Unpack it: unzip FILE."),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "Unpack it: unzstd FILE."),
    b"\xfd7zXZ": ("an xz file", "Unpack it: unxz FILE."),
    b"GGUF": ("a GGUF file", ""),
    b"BZh": ("a bzip2 file", "Unpack it: bunzip2 FILE."),
    b"\xff\xfe": ("UTF-16 or binary", "Save it as UTF-8."),
    b"\xfe\xff": ("UTF-16 or binary", "Save it as UTF-8."),
}
SHEETS = (".xlsx", ".xls", ".ods")
BOM = b"\xef\xbb\xbf"
MAX_LINE_BYTES = 64 << 20
BLOCK = 1 << 20
MOST_CONTROLS = 0.02
"""The share of control characters up to which a damaged text is still taken for one."""
CONTROLS = bytes(byte for byte in range(32) if byte not in b"\t\n\v\f\r")
WRAPPERS = "train|training|data|rows|examples"
"""Keys under which a file of one JSON object may hold all its rows."""
WRAPPED = re.compile(rb'\{\s*"(%b)"\s*:\s*(?=\[\s*\{\s*"(?!role"|from"))' % WRAPPERS.encode())
ROW_AFTER_ROW = re.compile(rb"\}\s*\n\s*\{")
_quick = msgspec.json.Decoder().decode


@dataclass(frozen=True)
class Unreadable:
    """A row of the file that is none, and why."""

    reason: str


def kind_of(path: Path) -> str:
    """``jsonl``, ``json`` (a list, or objects over several lines; what follows a comma says more), ``csv``, ``tsv``,
    ``parquet`` or ``text``.

    Raises FinetuiError for a missing, empty, binary or compressed file.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # opening a pipe would wait for its writer
        raise FinetuiError(f"{path} is a pipe or a device.", "Write the rows into a file first.")
    try:
        with path.open("rb") as stream:
            head = stream.read(4096)
            while head and not head.removeprefix(BOM).strip():
                head = stream.read(4096)
    except IsADirectoryError as error:
        raise FinetuiError(f"{path} is a folder.", "Give the data file inside it.") from error
    except OSError as error:
        advice = "Check the path and its permissions."
        raise FinetuiError(f"{path} cannot be read: {error.strerror}.", advice) from error
    except ValueError as error:  # a path with a NUL
        raise FinetuiError(f"{str(path)!r} is no path.", "Check the path.") from error
    if not head:
        raise FinetuiError(f"{path} is empty.", "Give a file with one JSON object a line.")
    if head.startswith(b"PAR1"):
        return "parquet"
    known = next((words for start, words in BINARY_STARTS.items() if head.startswith(start)), None)
    if path.suffix.lower() in SHEETS:
        raise FinetuiError(f"{path} is a spreadsheet.", "Save its table as CSV.")
    if known or (b"\0" in head and not _damaged_rows(head)):
        what, advice = known or ("binary", "")
        raise FinetuiError(f"{path} is {what}, not UTF-8 text.", advice or "Give JSONL, JSON, CSV or Parquet.")
    return _kind_of_text(path.suffix.lower(), head.removeprefix(BOM).lstrip())


def _damaged_rows(head: bytes) -> bool:
    """Whether a file that begins so is JSON in which some bytes were lost, and no binary one."""
    controls = len(head) - len(head.translate(None, CONTROLS))
    return head.removeprefix(BOM).lstrip(b"\0 \t\r\n")[:1] in (b"{", b"[") and controls <= MOST_CONTROLS * len(head)


def _kind_of_text(suffix: str, head: bytes) -> str:
    if suffix in (".csv", ".tsv"):
        return suffix[1:]
    if (wrapped := WRAPPED.match(head)) and not ROW_AFTER_ROW.search(head):
        return f'json, rows under "{wrapped[1].decode()}"'
    if head.startswith(b"[") or (head.startswith(b"{") and head.split(b"\n", 1)[0].strip() == b"{"):
        return "json"
    return "text" if suffix in (".txt", ".md") and not head.startswith(b"{") else "jsonl"


def raw_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, row or Unreadable) of a file of any kind; blank lines are passed over.

    A JSON list and Parquet count rows instead of lines. Raises FinetuiError for what `kind_of` refuses, and where the
    file breaks in a way that leaves the rest of it unreadable, naming the line.
    """
    readers = {
        "jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows, "tsv": _csv_rows, "parquet": _parquet_rows,
        "text": _text_rows,
    }  # fmt: skip
    yield from readers[kind_of(path).split(",")[0]](path)


# --- JSON lines ---


def parse_line(line: bytes) -> Any:
    """One line of JSONL as the value it holds, or Unreadable.

    The quick parser decides what it can; what it refuses is read again by the standard library's, which takes NaN and
    numbers out of range, and whose reasons people know.
    """
    try:
        return _quick(line)
    except (ValueError, RecursionError):
        pass
    if b"\0" in line:
        return Unreadable("broken JSON (a NUL byte)")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 (byte 0x{line[error.start]:02x})")
    except (ValueError, RecursionError) as error:
        return Unreadable(broken_words(error))


def broken_words(error: Exception) -> str:
    """Why a text is not JSON."""
    what = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or a number too long"
    return f"broken JSON ({what})"


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as stream:
        for number, line in enumerate(bounded_lines(stream), 1):
            if number == 1:
                line = line.removeprefix(BOM)
            if len(line) > MAX_LINE_BYTES:
                yield number, Unreadable(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
            elif line.strip():
                yield number, parse_line(line)


def bounded_lines(stream: Any) -> Iterator[bytes]:
    """The lines of a binary stream; of one that is longer than MAX_LINE_BYTES a piece that is one byte longer."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(BLOCK)) and not rest.endswith(b"\n"):
                pass
        yield line


# --- other kinds ---


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(path, number, raw[error.start]) from error


def _not_utf8(path: Path, line: int, byte: int) -> FinetuiError:
    return FinetuiError(f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}).", "Save the file as UTF-8.")


def _json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, be it the file or all that its one object holds, or objects one after the other;
    read piece by piece."""
    text = _Text(path)
    blanks = " \t\r\n"
    text.skip(blanks)
    wrapped = text.take(kind_of(path).partition('"')[2].rstrip('"'))
    in_list = text.skip(blanks) == "["
    text.at += in_list
    number = 0
    while True:
        following = text.skip(blanks if in_list or not number else blanks + ",")
        if not following and not in_list:
            return
        if in_list and following == "]":
            text.at += 1
            if wrapped and text.skip(blanks) == ",":
                raise FinetuiError(f"{path} holds more than one list of rows.", "Save each as a file of its own.")
            text.at += wrapped and text.skip(blanks) == "}"
            if text.skip(blanks):
                raise text.broken("Extra data")
            return
        if in_list and number:
            if following != ",":
                raise text.broken("Expecting ',' delimiter")
            text.at += 1
            text.skip(blanks)
        number += 1
        yield number, text.value()


class _Text:
    """A text file read in pieces; `at` is where reading stands in the piece held."""

    def __init__(self, path: Path) -> None:
        self.path, self.piece, self.at, self.line = path, "", 0, 1
        self._stream = path.open("rb")
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._ended = False

    def _more(self, wanted: int) -> bool:
        """Read on until `wanted` more characters are held; False where there was nothing more."""
        self.line += self.piece.count("\n", 0, self.at)
        parts, got = [self.piece[self.at :]], 0
        while got < wanted and not self._ended:
            raw = self._stream.read(max(BLOCK, wanted))
            self._ended = not raw
            try:
                parts.append(self._decoder.decode(raw, final=not raw))
            except UnicodeDecodeError as error:
                line = self.line + sum(part.count("\n") for part in parts) + error.object[: error.start].count(b"\n")
                raise _not_utf8(self.path, line, error.object[error.start]) from error
            got += len(parts[-1])
        self.piece, self.at = "".join(parts), 0
        return got > 0

    def skip(self, blanks: str) -> str:
        """Pass over `blanks`; the character that follows, empty at the end."""
        while True:
            while self.at < len(self.piece) and self.piece[self.at] in blanks:
                self.at += 1
            if self.at < len(self.piece):
                return self.piece[self.at]
            if self._ended or not self._more(1):
                return ""

    def take(self, key: str) -> bool:
        """Pass over the brace, `key` and colon with which an object begins; False where no key is given."""
        if key:
            self.at = self.piece.index(":", self.piece.index(f'"{key}"', self.at)) + 1
        return bool(key)

    def value(self) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                found, end = self._json.raw_decode(self.piece, self.at)
            except json.JSONDecodeError as error:
                if self._hopeless(error) or self._ended:
                    raise self.broken(error.msg, error.pos) from error
                self._more(len(self.piece) - self.at)
                continue
            except (ValueError, RecursionError) as error:
                raise self.broken("nested too deeply or a number too long") from error
            if end < len(self.piece) or self._ended:
                self.at = end
                return found
            self._more(1)  # what ends with the piece may go on: a number, say

    def _hopeless(self, error: json.JSONDecodeError) -> bool:
        """Whether reading on cannot mend it: only a piece that ends within a value can be more than it seems."""
        if error.msg.startswith("Unterminated string"):
            return len(self.piece) - self.at > MAX_LINE_BYTES
        return error.pos < len(self.piece) - 16

    def broken(self, what: str, at: int | None = None) -> FinetuiError:
        line = self.line + self.piece.count("\n", 0, self.at if at is None else at)
        return FinetuiError(
            f"{self.path}, line {line}: broken JSON ({what}).",
            "Mend it there; what stands behind it cannot be told apart. One object a line (JSONL) loses only that row.",
        )


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    lines = (line for _, line in _decoded_lines(path))
    header = next(lines, "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(header)
    # Strict: a quotation mark that is never closed would swallow the rest of the file without a word.
    reader = csv.DictReader(chain([header], lines), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row:
                yield reader.line_num, Unreadable("the row has more cells than the header")
            else:
                yield reader.line_num, {key: _cell(value) for key, value in row.items()}
    except csv.Error as error:
        raise FinetuiError(f"{path}, line {reader.line_num}: broken CSV ({error}).", "Mend that line.") from error


def _delimiter(header: str) -> str:
    """Comma, or what a table without any is separated by: spreadsheets in many languages write semicolons."""
    return next((mark for mark in ",;\t" if mark in header), ",")


def _cell(value: Any) -> Any:
    """A CSV cell: JSON lists and objects are read as such, everything else stays text."""
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}":
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in table.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:80]
        raise FinetuiError(f"{path} is not a readable Parquet file ({reason}).", "Write it anew.") from error


def _text_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Plain text: paragraphs between blank lines where there are any early on, else each line a row."""
    lines = _decoded_lines(path)
    first = list(islice(lines, 1000))
    by_line = "\n\n" not in "\n".join(line.strip() for _, line in first).strip()
    start, paragraph = 0, ""
    for part in (first, lines):
        for number, line in part:
            if line.strip() and not (by_line and paragraph):
                start, paragraph = start if paragraph else number, paragraph + line
                continue
            if paragraph:
                yield start, {"text": paragraph.strip()}
            start, paragraph = number, line if line.strip() else ""
    if paragraph:
        yield start, {"text": paragraph.strip()}
