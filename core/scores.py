"""The marks of an answer, how often they were earned, and how sure that is.

An answer's marks are a dictionary by name; a mark that cannot be given (no call was expected, no schema is known) is
absent and counts nowhere. A rate is hits of a total with a 95 % interval.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.toolcalls import Reading, ToolCall, paired, read_calls, same, structured_calls, without
from core.tools import Tool, call_fault

Z_95 = 1.959963984540054
MARKS = {
    "decision": ("call or not", "calls a tool where the expected answer does, and none where it does not"),
    "format": ("format", "well-formed, in the form of the expected call"),
    "alone": ("nothing else", "no text around the call, and no further call, that was not expected"),
    "tool": ("right tool", "the tools that were expected"),
    "required": ("required", "every required argument is there (without a schema: every expected one)"),
    "schema": ("schema", "a known tool, and arguments that its schema allows"),
    "arguments": ("arguments", "arguments equal to the expected ones"),
    "exact": ("all right", "the whole call right; for an answer without a call, the same text"),
    "preferred": (
        "good over bad",
        "the answer labelled good is likelier, a token, than the bad one to the same prompt",
    ),
}
"""Every mark: its heading, and what earns it."""
Marks = dict[str, bool]
Rate = dict[str, float]


@dataclass(frozen=True)
class Expected:
    """What a prompt should be answered with: the text as the model was trained to write it, and the calls in it.

    `text` is None where nothing is expected. `form` is that of the calls, "" where the form is not one that is read.
    """

    text: str | None
    calls: tuple[ToolCall, ...] = ()
    form: str = ""
    outside: str = ""

    @property
    def tool(self) -> str:
        """The tool that is expected first; empty where none is."""
        return self.calls[0].name if self.calls else ""


def score(answer: str, expected: Expected, tools: Mapping[str, Tool], ignored: Sequence[str] = ()) -> Marks:
    """The marks of `answer`; `ignored` arguments are not compared."""
    got = read_calls(answer)
    if expected.text is None:
        return {"format": got.well_formed, "schema": _valid(got, tools)} if got.calls and tools else {}
    if not expected.calls:
        return {"decision": not got.calls, "exact": _one_line(answer) == _one_line(expected.text)}
    pairs = paired(got.calls, expected.calls)
    marks = {
        "decision": bool(got.calls),
        "format": got.well_formed and expected.form in ("", got.form),
        "alone": bool(got.calls)
        and len(got.calls) <= len(expected.calls)
        and not (got.outside and not expected.outside),
        "tool": all(one is not None and one.name == call.name for one, call in pairs),
        "required": all(one is not None and _has_required(one, call, tools, ignored) for one, call in pairs),
        "arguments": all(
            one is not None
            and one.arguments is not None
            and same(without(one.arguments, ignored), without(call.arguments, ignored))
            for one, call in pairs
        ),
    }
    if tools:
        marks["schema"] = _valid(got, tools)
    return {**marks, "exact": all(marks[name] for name in ("format", "alone", "tool", "arguments"))}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _valid(got: Reading, tools: Mapping[str, Tool]) -> bool:
    return bool(got.calls) and not any(call_fault(call, tools) for call in got.calls)


def _has_required(one: ToolCall, call: ToolCall, tools: Mapping[str, Tool], ignored: Sequence[str]) -> bool:
    tool = tools.get(call.name)
    needed = tool.required if tool else [name for name in call.arguments or {} if name not in ignored]
    return one.arguments is not None and all(name in one.arguments for name in needed)


def rate(hits: int, total: int) -> Rate:
    """Hits and total with their interval, as reports hold them."""
    low, high = wilson_interval(hits, total)
    return {"hits": hits, "total": total, "low": round(low, 4), "high": round(high, 4)}


def rates(rows: Iterable[Marks]) -> dict[str, Rate]:
    """The rate of each mark over the rows that have it, in the order of MARKS."""
    counted: dict[str, list[int]] = {}
    for marks in rows:
        for name, hit in marks.items():
            entry = counted.setdefault(name, [0, 0])
            entry[0] += bool(hit)
            entry[1] += 1
    return {name: rate(*counted[name]) for name in MARKS if name in counted}


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


def mean_loss(losses: Sequence[tuple[float, int]]) -> dict[str, float] | None:
    """Loss a token over answers given as (summed loss, tokens), with a 95 % interval; None where there are none.

    The interval is that of a ratio of two means (W. G. Cochran, Sampling Techniques, 1977, section 2.11): answers, not
    tokens, are drawn by chance.
    """
    tokens = sum(count for _, count in losses)
    if not tokens:
        return None
    mean = sum(loss for loss, _ in losses) / tokens
    count = len(losses)
    spread = sum((loss - mean * size) ** 2 for loss, size in losses)
    half = Z_95 * math.sqrt(spread * count / (count - 1)) / tokens if count > 1 else 0.0
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4), "tokens": tokens}


def mcnemar(mended: int, broken: int) -> float:
    """The two-sided exact p value that as many answers are mended as broken (Q. McNemar, Psychometrika 12, 1947)."""
    n, k = mended + broken, min(mended, broken)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n) if n else 1.0


def changes(before: Sequence[Marks], after: Sequence[Marks]) -> dict[str, dict[str, Any]]:
    """For each mark that both have: how many answers one model mends and breaks against the other, and the p value."""
    found = {}
    for name in MARKS:
        both = [
            (one[name], other[name]) for one, other in zip(before, after, strict=True) if name in one and name in other
        ]
        if both:
            mended = sum(new and not old for old, new in both)
            broken = sum(old and not new for old, new in both)
            found[name] = {"mended": mended, "broken": broken, "p": float(f"{mcnemar(mended, broken):.3g}")}
    return found


def expected_of(text: str | None, tool_calls: Any = None) -> Expected:
    """What is expected, from the text the model was trained to write and, where the row has them, its tool calls.

    Calls that the template writes in a form that is not read count as text: no answer in it could be read either.
    """
    if text is None:
        return Expected(None)
    reading = read_calls(text)
    if not reading.calls:
        return Expected(text)
    return Expected(text, structured_calls(tool_calls) or reading.calls, reading.form, reading.outside)
