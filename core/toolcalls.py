"""Tool calls written as text: parsing and scoring.

A call is a name line and an arguments line: `tool_call: NAME`, then `arguments: {…}` with one JSON object. Everything
here takes text from a model, so nothing here raises, and the time is linear in the length of the text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

NAME_MARK, ARGUMENTS_MARK = "tool_call:", "arguments:"
NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class ToolCall:
    """The first call in a text; `before` and `after` are what stands around it.

    `arguments` is None when the arguments line is missing or is not a JSON object; a broken one ends with its line.
    """

    name: str
    arguments: dict[str, Any] | None
    before: str
    after: str


@dataclass(frozen=True)
class CallScore:
    """`format`: one well-formed call and nothing else; `tool`: the right name; `arguments`: equal after parsing."""

    format: bool
    tool: bool
    arguments: bool

    @property
    def exact(self) -> bool:
        return self.format and self.tool and self.arguments


@dataclass(frozen=True)
class Rate:
    """`hits` of `total`, with a 95 % interval for the proportion (0 to 1)."""

    hits: int
    total: int
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """Rates over all scored answers; `exact` counts those right in all three."""

    format: Rate
    tool: Rate
    arguments: Rate
    exact: Rate


def parse_tool_call(text: str) -> ToolCall | None:
    """Return the first call in `text`, or None when no line starts with `tool_call:`."""
    lines = text.split("\n")
    number = next((i for i, line in enumerate(lines) if line.lstrip().startswith(NAME_MARK)), None)
    if number is None:
        return None
    start = sum(len(line) + 1 for line in lines[:number])
    before, name = text[:start], lines[number].strip()[len(NAME_MARK) :].strip()
    rest_at = start + len(lines[number]) + 1
    following = lines[number + 1] if number + 1 < len(lines) else ""
    if not following.lstrip().startswith(ARGUMENTS_MARK):
        return ToolCall(name, None, before, text[rest_at:])
    json_at = text.index(ARGUMENTS_MARK, rest_at) + len(ARGUMENTS_MARK)
    decoded = _decode_object(text[json_at:])
    if decoded is None:
        return ToolCall(name, None, before, text[rest_at + len(following) + 1 :])
    arguments, length = decoded
    return ToolCall(name, arguments, before, text[json_at + length :])


def _decode_object(text: str) -> tuple[dict[str, Any], int] | None:
    """The JSON object that `text` starts with (after spaces) and the number of characters it takes."""
    body = text.lstrip()
    try:
        value, end = json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(body)
    except (ValueError, RecursionError):  # RecursionError: nested deeper than the interpreter's limit
        return None
    return (value, len(text) - len(body) + end) if isinstance(value, dict) else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")  # Python reads NaN and Infinity, the standard does not


def score_tool_call(answer: str, expected: str) -> CallScore:
    """Compare the first call in `answer` with the first in `expected`.

    The three marks are independent: an answer with chatter around the right call misses only the format. Where
    `expected` holds no call, each mark says whether `answer` holds none either.
    """
    got, wanted = parse_tool_call(answer), parse_tool_call(expected)
    if wanted is None:
        return CallScore(*[got is None] * 3)
    if got is None:
        return CallScore(False, False, False)
    lone = not got.before.strip() and not got.after.strip()
    well_formed = got.arguments is not None and bool(got.name) and NAME_CHARACTERS.issuperset(got.name)
    return CallScore(
        format=lone and well_formed,
        tool=got.name == wanted.name,
        arguments=got.arguments is not None and _same(got.arguments, wanted.arguments),
    )


def _same(left: Any, right: Any) -> bool:
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


def summarise(scores: Iterable[CallScore]) -> Summary:
    """Count the marks and give each rate its interval."""
    rows = list(scores)
    return Summary(
        format=_rate(row.format for row in rows),
        tool=_rate(row.tool for row in rows),
        arguments=_rate(row.arguments for row in rows),
        exact=_rate(row.exact for row in rows),
    )


def _rate(marks: Iterable[bool]) -> Rate:
    values = list(marks)
    hits = sum(values)
    return Rate(hits, len(values), *wilson_interval(hits, len(values)))


def wilson_interval(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """The score interval for a proportion, (0, 1) when there is nothing to count.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", Journal of the American
    Statistical Association 22 (1927), pages 209 to 212.
    """
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)
