"""The shape of a stage's rows in figures: lengths, what a limit would cut, batches, labels, turns, tools."""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from core.data_ledger import LEFT_OUT, Ledger
from core.data_limits import Lengths, Limits

if TYPE_CHECKING:
    import numpy

BUCKETS = 60
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
PACKED_ROWS = 20_000


def histogram(values: "numpy.ndarray") -> dict[str, Any]:
    """Counts of `values` in at most BUCKETS of equal, round width; `edges` has one more entry than `counts`."""
    import numpy

    if not len(values):
        return {"edges": [0, 1], "counts": [0]}
    width = round_up(max(float(values.max()) / BUCKETS, 1))
    counts = numpy.bincount((values // width).astype("i8"))
    return {"edges": [int(width * at) for at in range(len(counts) + 1)], "counts": counts.tolist()}


def round_up(value: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 …"""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= value:
                return factor * step
        step *= 10


def percentiles(values: "numpy.ndarray") -> dict[str, int]:
    """Values at PERCENTILES, as ``"50": 83``; empty where there are no values."""
    import numpy

    if not len(values):
        return {}
    found = numpy.percentile(values, PERCENTILES, method="higher")
    return {str(at): int(value) for at, value in zip(PERCENTILES, found, strict=True)}


def token_shape(lengths: Lengths, limits: Limits, batch_size: int, scale: float = 1.0) -> dict[str, Any]:
    """Lengths of rows and answers in tokens before the limit, what the limit does, and how well batches are filled.

    `scale` is what the counts must be multiplied with where the rows are a sample.
    """
    at = lengths.at_limit(limits)
    return {
        "rows": histogram(lengths.length), "answers": histogram(lengths.trained),
        "row_percentiles": percentiles(lengths.length), "answer_percentiles": percentiles(lengths.trained),
        "limit": {key: value if key == "longest" else round(value * scale) for key, value in at.items()},
        **filled(lengths, limits, batch_size),
    }  # fmt: skip


def filled(lengths: Lengths, limits: Limits, batch_size: int) -> dict[str, float]:
    """Shares of tokens that are not padding: of padded batches in random order, and of rows packed to the limit."""
    import numpy

    kept = numpy.minimum(lengths.length, limits.max_length)
    if limits.too_long != "cut":
        kept = lengths.length[lengths.length <= limits.max_length]
    kept = kept[:PACKED_ROWS]
    if not len(kept):
        return {"padded": 0.0, "packed": 0.0}
    order = numpy.random.default_rng(0).permutation(len(kept))
    edges = numpy.arange(0, len(kept), batch_size)
    widest = numpy.maximum.reduceat(kept[order], edges)
    sizes = numpy.diff([*edges, len(kept)])
    return {
        "padded": round(float(kept.sum() / (widest * sizes).sum()), 4),
        "packed": round(float(kept.sum() / (packs(kept, limits.max_length) * limits.max_length)), 4),
    }


def padded_share(batches: "list[numpy.ndarray]") -> float:
    """The share of tokens that are not padding in batches of rows of these lengths, each padded to its longest row."""
    whole = sum(int(batch.max()) * len(batch) for batch in batches)
    return round(sum(int(batch.sum()) for batch in batches) / max(whole, 1), 4)


def batch_words(shape: Mapping[str, Any]) -> str:
    """How well batches are filled, as they are made and as they might be."""
    packed = f"packed {shape['packed']:.0%}"
    if shape["padding_free"] == "off":
        return f"padded to the longest row of each: {shape['padded']:.0%} full ({packed})"
    return f"rows end to end, no padding (padded {shape['padded']:.0%} full, {packed})"


def packs(lengths: "numpy.ndarray", limit: int) -> int:
    """Packs of `limit` tokens that hold rows of these lengths, by best fit decreasing, as TRL packs (``bfd``)."""
    room: Counter[int] = Counter()
    rooms: list[int] = []  # sorted, the rooms that `room` counts
    count = 0
    for length in sorted((int(length) for length in lengths), reverse=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            count += 1
            left = limit - length
        else:
            left = rooms[at] - length
            room[rooms[at]] -= 1
            if not room[rooms[at]]:
                rooms.pop(at)
        if not room[left]:
            insort(rooms, left)
        room[left] += 1
    return max(count, 1)


def content_shape(ledger: Ledger) -> dict[str, Any]:
    """Labels of an epoch, turn patterns and tools of the rows that are used, by how often they occur."""
    import numpy

    used = ledger.fate != LEFT_OUT
    turns: Counter[str] = Counter()
    tools: Counter[str] = Counter()
    shapes: Counter[str] = Counter()
    start = 0
    for source in ledger.sources:
        survey = source.survey
        mine = used[start : start + survey.conversations]
        counts = numpy.bincount(survey["pattern"][mine], minlength=len(survey.patterns))
        for number in numpy.flatnonzero(counts):
            turns[pattern_words(survey.patterns[number])] += int(counts[number])
        tools.update(survey.tools)
        shapes.update(survey.shapes)
        start += survey.conversations
    labels = ledger.label_counts()
    return {
        "labels": {str(label).lower(): count for label, count in labels.items()},
        "turns": dict(turns.most_common(12)), "tools": dict(tools.most_common(40)), "shapes": dict(shapes),
    }  # fmt: skip


NAMES = {"s": "system", "u": "user", "a": "assistant", "t": "tool", "x": "plain text"}


def pattern_words(pattern: str) -> str:
    """``suauaua`` as ``system, 3 × (user, assistant)``."""
    words: list[str] = []
    at = 0
    while at < len(pattern):
        count, unit = _repeated(pattern, at)
        names = ", ".join(NAMES.get(letter, letter) for letter in unit)
        words.append(f"{count} × ({names})" if count > 1 else names)
        at += count * len(unit)
    return ", ".join(words)


def _repeated(pattern: str, at: int) -> tuple[int, str]:
    """How often which unit of two to four letters is repeated from here on; once one letter where none is."""
    for size in (2, 3, 4):
        unit = pattern[at : at + size]
        count = 1
        while pattern[at + count * size : at + (count + 1) * size] == unit:
            count += 1
        if count > 1 and len(set(unit)) > 1:
            return count, unit
    return 1, pattern[at]
