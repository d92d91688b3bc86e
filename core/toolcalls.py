"""Tool calls as models write them, in the four forms people train: read, and compared with what was expected.

* ``text``: a line ``tool_call: NAME``, then ``arguments: {…}`` with one JSON object;
* ``tags``: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``;
* ``mistral``: ``[TOOL_CALLS] [{"name": …, "arguments": {…}}]`` or ``[TOOL_CALLS]NAME[ARGS]{…}``;
* ``json``: OpenAI's ``tool_calls`` as JSON, alone or in a message, or bare objects with name and arguments.

Everything here takes text from a model, so nothing here raises, and the time is linear in the length of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

NAME_MARK, ARGUMENTS_MARK = "tool_call:", "arguments:"
OPEN_TAG, CLOSE_TAG = "<tool_call>", "</tool_call>"
MISTRAL_MARK, MISTRAL_ARGUMENTS, MISTRAL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
MAX_CALLS = 64
BLANK = re.compile(r"\s*")
NAMED = re.compile(r'"name"\s*:\s*"([^"\n]{1,200})"')


@dataclass(frozen=True)
class ToolCall:
    """One call; `arguments` is None where they are missing or no JSON object."""

    name: str
    arguments: dict[str, Any] | None

    @property
    def well_formed(self) -> bool:
        return self.arguments is not None and bool(self.name) and NAME_CHARACTERS.issuperset(self.name)


@dataclass(frozen=True)
class Reading:
    """The calls in a text, the form they are written in ("" for none), and the text around them.

    `closed` is False where a call lacks what ends it in its form.
    """

    calls: tuple[ToolCall, ...] = ()
    form: str = ""
    outside: str = ""
    closed: bool = True

    @property
    def well_formed(self) -> bool:
        return bool(self.calls) and self.closed and all(call.well_formed for call in self.calls)


@dataclass(frozen=True)
class _Found:
    """Calls of one place in a text, up to `end`."""

    calls: Sequence[ToolCall]
    start: int
    end: int
    closed: bool = True
    beside: str = ""


def read_calls(text: str) -> Reading:
    """Every call in `text`, at most MAX_CALLS, in the form of the first one."""
    marks = {form: mark for form, find in MARKS.items() if (mark := find(text)) >= 0}
    if marks and (first := next(iter(READERS["json"](text)), None)) and first.start < min(marks.values()) < first.end:
        marks = {"json": first.start} | marks  # the marks stand inside of a call, as words of it
    for form in dict.fromkeys([*sorted(marks, key=marks.__getitem__), "json"]):
        calls: list[ToolCall] = []
        around, at, closed = [], 0, True
        for found in READERS[form](text):
            calls += found.calls
            around += [text[at : found.start], found.beside]
            at, closed = found.end, closed and found.closed
            if len(calls) >= MAX_CALLS:
                break
        if calls:
            outside = "\n".join(part.strip() for part in [*around, text[at:]] if part.strip())
            return Reading(tuple(calls[:MAX_CALLS]), form, outside, closed)
    return Reading(outside=text.strip())


def structured_calls(tool_calls: Any) -> tuple[ToolCall, ...]:
    """OpenAI's ``tool_calls`` of a message; what is no call is passed over."""
    found = [_call(entry) for entry in tool_calls] if isinstance(tool_calls, list) else []
    return tuple(call for call in found if call)


def _call(entry: Any) -> ToolCall | None:
    """A JSON object as a call: ``name`` with ``arguments`` (or ``parameters``), in ``function`` or bare."""
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    key = next((key for key in ("arguments", "parameters") if key in function), None)
    if key is None:
        return None
    arguments = function[key]
    if isinstance(arguments, str):
        decoded = _decoded(arguments, 0)
        arguments = decoded[0] if decoded and not arguments[decoded[1] :].strip() else None
    return ToolCall(function["name"], arguments if isinstance(arguments, dict) else None)


def _decoded(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value that starts at `at` (after blanks) and the place where it ends."""
    try:
        return _DECODER.raw_decode(text, _after_blanks(text, at))
    except (ValueError, RecursionError):  # RecursionError: nested deeper than the interpreter's limit
        return None


def _after_blanks(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    return match.end() if match else at


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # Python reads NaN and Infinity, the standard does not


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _line_starts(text: str, first: str) -> Iterator[int]:
    """Where `first` stands at the beginning of a line, blanks before it passed over."""
    at = text.find(first)
    while at >= 0:
        if not text[text.rfind("\n", 0, at) + 1 : at].strip():
            yield at
            at = text.find(first, at + len(first))
        else:
            line = text.find("\n", at)  # nothing else of this line can begin it
            at = text.find(first, line) if line >= 0 else -1


def _in_text(text: str) -> Iterator[_Found]:
    end = 0
    for at in _line_starts(text, NAME_MARK):
        if at < end:
            continue
        line = text.find("\n", at)
        line = len(text) if line < 0 else line
        name, end = text[at + len(NAME_MARK) : line].strip(), min(line + 1, len(text))
        rest = _after_blanks(text, end)
        arguments = None
        if text.startswith(ARGUMENTS_MARK, rest) and "\n" not in text[end:rest]:
            decoded = _decoded(text, rest + len(ARGUMENTS_MARK))
            arguments, end = decoded if decoded and isinstance(decoded[0], dict) else (None, _line_end(text, rest))
        yield _Found([ToolCall(name, arguments)], at, end)


def _line_end(text: str, at: int) -> int:
    line = text.find("\n", at)
    return len(text) if line < 0 else line + 1


def _in_tags(text: str) -> Iterator[_Found]:
    at = text.find(OPEN_TAG)
    while at >= 0:
        inside = at + len(OPEN_TAG)
        decoded = _decoded(text, inside)
        calls = [call for call in (_call(decoded[0]),) if call] if decoded else []
        end = _after_blanks(text, decoded[1]) if decoded else inside
        closed = text.startswith(CLOSE_TAG, end)
        if closed:
            end += len(CLOSE_TAG)
        else:  # broken: up to its tag, else up to the next call
            close, following = text.find(CLOSE_TAG, inside), text.find(OPEN_TAG, inside)
            within = 0 <= close < following or following < 0 <= close
            end = close + len(CLOSE_TAG) if within else following if following >= 0 else len(text)
        name = NAMED.search(text, inside, min(end, inside + 2000))
        yield _Found(calls or [ToolCall(name.group(1) if name else "", None)], at, end, closed)
        at = text.find(OPEN_TAG, end)


def _in_mistral(text: str) -> Iterator[_Found]:
    at = text.find(MISTRAL_MARK)
    while at >= 0:
        inside = _after_blanks(text, at + len(MISTRAL_MARK))
        following = text.find(MISTRAL_MARK, inside)
        end = following if following >= 0 else len(text)
        calls: list[ToolCall] = []
        if text.startswith("[", inside):
            decoded = _decoded(text, inside)
            if decoded and isinstance(decoded[0], list):
                calls, end = list(structured_calls(decoded[0])), decoded[1]
        elif (brace := text.find("{", inside, end)) >= 0 and brace - inside < 400:
            name = text[inside:brace].replace(MISTRAL_ARGUMENTS, "").split(MISTRAL_ID)[0].strip()
            decoded = _decoded(text, brace)
            calls = [ToolCall(name, decoded[0] if decoded and isinstance(decoded[0], dict) else None)]
            end = decoded[1] if decoded else end
        yield _Found(calls or [ToolCall("", None)], at, end, bool(calls))
        at = text.find(MISTRAL_MARK, end)


def _in_json(text: str) -> Iterator[_Found]:
    end = tries = 0
    for match in re.finditer(r"^[ \t]*([\[{])", text, re.MULTILINE):
        at = match.start(1)
        if at < end:
            continue
        tries += 1
        decoded = _decoded(text, at) if tries <= MAX_CALLS else None
        while decoded and (found := _found_in(decoded[0], at, decoded[1])):
            yield found
            end = at = decoded[1]
            rest = _after_blanks(text, end)
            at = _after_blanks(text, rest + 1) if text[rest : rest + 1] in (";", ",") else rest
            decoded = _decoded(text, at) if text[at : at + 1] in ("{", "[") else None


def _found_in(value: Any, start: int, end: int) -> _Found | None:
    """The calls of a decoded JSON value; None where it is something else."""
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        calls, beside = structured_calls(value["tool_calls"]), value.get("content")
        return _Found(calls, start, end, beside=beside if isinstance(beside, str) else "") if calls else None
    entries = value if isinstance(value, list) else [value]
    found = [_call(entry) for entry in entries]
    return _Found([call for call in found if call], start, end) if found and all(found) else None


MARKS: dict[str, Callable[[str], int]] = {
    "text": lambda text: next(_line_starts(text, NAME_MARK), -1),
    "tags": lambda text: text.find(OPEN_TAG),
    "mistral": lambda text: text.find(MISTRAL_MARK),
}
READERS: dict[str, Callable[[str], Iterator[_Found]]] = {
    "text": _in_text,
    "tags": _in_tags,
    "mistral": _in_mistral,
    "json": _in_json,
}


def paired(got: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> list[tuple[ToolCall | None, ToolCall]]:
    """Each expected call with the answer's call that fits it best: equal, else of the same name, else the next one.

    Only as many of the answer's calls are looked at as were expected; their order does not matter.
    """
    left = list(got[: len(wanted)])
    pairs: list[tuple[ToolCall | None, ToolCall]] = []
    waiting = list(wanted)
    for fits in (_equal, _namesakes, _any):
        for call in list(waiting):
            place = next((place for place, one in enumerate(left) if fits(one, call)), None)
            if place is not None:
                pairs.append((left.pop(place), call))
                waiting = [one for one in waiting if one is not call]
    return pairs + [(None, call) for call in waiting]


def _equal(one: ToolCall, other: ToolCall) -> bool:
    return one.name == other.name and same(one.arguments, other.arguments)


def _namesakes(one: ToolCall, other: ToolCall) -> bool:
    return one.name == other.name


def _any(one: ToolCall, other: ToolCall) -> bool:
    return True


def without(arguments: Any, ignored: Sequence[str]) -> Any:
    """Arguments without those that are not compared."""
    if not ignored or not isinstance(arguments, dict):
        return arguments
    return {key: value for key, value in arguments.items() if key not in ignored}


def same(left: Any, right: Any) -> bool:
    """Equality of JSON values: 10 equals 10.0, true is not 1, texts are compared without surrounding spaces."""
    pairs = [(left, right)]
    while pairs:  # a loop, because the nesting of a model's JSON may be near the recursion limit
        a, b = pairs.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            pairs.extend((a[key], b[key]) for key in a)
        elif isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                return False
            pairs.extend(zip(a, b, strict=True))
        elif isinstance(a, str) and isinstance(b, str):
            if a.strip() != b.strip():
                return False
        elif isinstance(a, int | float) and isinstance(b, int | float):
            if isinstance(a, bool) is not isinstance(b, bool) or a != b:
                return False
        elif a is not None or b is not None:
            return False
    return True
