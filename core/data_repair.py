"""Mending single rows: lines that are nearly JSON, arguments that are nearly JSON, text that was decoded wrongly.

Only what can be mended without guessing at a meaning is mended, and every mend is named. Nothing runs what it reads.
"""

import ast
import json
import re
from typing import Any

from core.data_calls import MAX_CALLS
from core.data_files import Unreadable, parse_line
from core.toolcalls import ARGUMENTS_MARK, NAME_MARK

MAX_LITERAL_BYTES = 1 << 20
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_NUMBERS = {"NaN": "null", "Infinity": "null", "-Infinity": "null"}


def mended_line(line: bytes) -> tuple[Any, str]:
    """(row, what was mended) of a line of JSONL; (Unreadable, "") where it cannot be mended.

    Tried in turn: as it stands; NUL bytes and control characters inside texts; a byte order mark; bytes that are not
    UTF-8 read as Windows-1252; a comma before a closing bracket; a Python literal (single quotes, True, None).
    """
    row = parse_line(line)
    if not isinstance(row, Unreadable):
        return row, ""
    for mend, what in (
        (_without_controls, "control characters taken out"),
        (_as_utf8, "bytes that are not UTF-8 read as Windows-1252"),
        (_without_commas, "a comma before a closing bracket taken out"),
        (_literal, "a Python literal written as JSON"),
    ):
        found = mend(line)
        if found is not None:
            return found, what
    return row, ""


def _without_controls(line: bytes) -> Any:
    text = _text(line)
    if text is None:
        return None
    return _loaded(text.replace("\0", "").removeprefix("\ufeff").strip(), strict=False)


def _as_utf8(line: bytes) -> Any:
    if _text(line) is not None:
        return None
    return _loaded("".join(_decoded(line)).removeprefix("\ufeff"), strict=False)


def _decoded(line: bytes) -> list[str]:
    """A line's text: as UTF-8 where its bytes are, the others one by one as Windows-1252."""
    parts = []
    while line:
        try:
            parts.append(line.decode())
            break
        except UnicodeDecodeError as error:
            parts.append(line[: error.start].decode())
            parts.append(line[error.start : error.start + 1].decode("cp1252", "replace"))
            line = line[error.start + 1 :]
            if len(parts) > 20_000:
                parts.append(line.decode("cp1252", "replace"))
                break
    return parts


def _without_commas(line: bytes) -> Any:
    text = _text(line)
    return None if text is None else _loaded(_TRAILING_COMMA.sub(r"\1", text.strip().rstrip(",")), strict=False)


def _literal(line: bytes) -> Any:
    text = _text(line)
    if text is None or len(text) > MAX_LITERAL_BYTES or "'" not in text:
        return None
    try:
        found = ast.literal_eval(text.strip())
        json.dumps(found)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _text(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


def _loaded(text: str, *, strict: bool) -> Any:
    try:
        found = json.loads(text, strict=strict)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def mended_arguments(text: str) -> Any:
    """Arguments of a tool call that are nearly JSON as the object they mean; None where they cannot be mended."""
    found = _loaded(_TRAILING_COMMA.sub(r"\1", text.strip()), strict=False)
    return found if found is not None else _literal(text.encode("utf-8", "surrogatepass"))


def mended_text_calls(text: str) -> str:
    """Text in which the arguments of ``tool_call:`` calls that hold bare line breaks and tabs are written as JSON."""
    if NAME_MARK not in text:
        return text
    parts, at = [], 0
    strict, lenient = json.JSONDecoder(), json.JSONDecoder(strict=False)
    for _ in range(MAX_CALLS):
        start = text.find(ARGUMENTS_MARK, at)
        if start < 0:
            break
        start += len(ARGUMENTS_MARK)
        start += len(text[start:]) - len(text[start:].lstrip(" "))
        parts.append(text[at:start])
        at = start
        try:
            strict.raw_decode(text, start)
        except (ValueError, RecursionError):
            try:
                found, end = lenient.raw_decode(text, start)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                parts.append(json.dumps(found, ensure_ascii=False))
                at = end
    return "".join([*parts, text[at:]])


def mended_encoding(text: str) -> str:
    """Text that was UTF-8 and was read as Windows-1252, read anew, piece by piece; other text as it is."""
    if text.isascii():
        return text
    return _MISREAD.sub(_reread, text)


_HIGH = "\u0080-\u00ff€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MISREAD = re.compile(f"[ÂÃÄÅÐÑâðï][{_HIGH}]+")


def _reread(match: re.Match[str]) -> str:
    piece = match.group()
    raw = b"".join(
        letter.encode("cp1252") if _fits(letter) else letter.encode("latin-1", "replace") for letter in piece
    )
    try:
        return raw.decode()
    except UnicodeDecodeError as error:  # a run may go on with letters that were right
        if error.start and error.start < len(piece):
            return raw[: error.start].decode() + piece[error.start :]
        return piece


def _fits(letter: str) -> bool:
    try:
        letter.encode("cp1252")
    except UnicodeEncodeError:
        return False
    return True
